"""Rows and batches: invariants 2 (no feedback in the student's context), 3 (same action ids) and 7 (drops are counted)."""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.distill import packing
from hintsd_jax.distill.packing import Row, action_row, pack, target_row
from hintsd_jax.episodes.chat import Delta
from hintsd_jax.episodes.episode import Episode
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.targets import Target

PROMPT = (7, 8, 9)  # a generation prompt
FEEDBACK = 900  # ids from here on occur in feedback only
BUCKETS = {"length_buckets": (12, 24, 48), "action_buckets": (2, 5), "rows_per_batch": 3}


class Chat:
    """Stands in for ChatFormat: the feedback message is ids that occur nowhere else, then the generation prompt."""

    def feedback(self, text):
        return (*(FEEDBACK + ord(c) % 32 for c in text), *PROMPT)


def make_episode(seed=0, steps=4, longest=5):
    rng = np.random.default_rng(seed)
    ids = lambda n: tuple(int(i) for i in rng.integers(10, 200, n))
    delta = lambda n: Delta(ids=ids(n) + PROMPT, branch=n)
    episode = Episode.begin("task", 0, (), delta(4))
    for _ in range(steps):
        action = ids(int(rng.integers(1, longest + 1)))
        episode.append_action(action, [0.0] * len(action), "")
        episode.append_observation(delta(3))
    return episode


def make_rows(episodes=3, **options):
    return [
        target_row(episode, Target(step, "x" * (step + 1)), Chat(), index=e, micro=e // 2)
        for e, episode in enumerate(make_episode(seed, **options) for seed in range(episodes))
        for step in range(1, len(episode.steps) + 1)
    ]


def unpack(batch):
    """The rows of a batch as (student, teacher, action) tuples, padding rows left out."""
    for b in range(len(batch.mask_BA)):
        size = int(batch.mask_BA[b].sum())
        if size:
            cut = lambda tokens, start: tuple(int(t) for t in tokens[:start])
            action = cut(batch.actions_BA[b], size)
            student = cut(batch.student_BT[b], batch.student_start_B[b])
            yield student, cut(batch.teacher_BT[b], batch.teacher_start_B[b]), action


def test_student_contexts_are_prefixes_of_the_episode_without_any_feedback():
    """Invariant 2: context and action together are the episode's own first tokens; feedback is on the teacher's side only."""
    for e in range(4):
        episode = make_episode(e)
        targets = [Target(step, "do it") for step in range(1, 5)]
        batches, dropped = pack([target_row(episode, t, Chat(), index=e) for t in targets], **BUCKETS)
        assert not any(dropped.values())
        for batch in batches:
            assert not np.any(batch.student_BT >= FEEDBACK) and not np.any(batch.actions_BA >= FEEDBACK)
            for b in np.flatnonzero(batch.mask_BA.any(axis=1)):
                length = batch.student_start_B[b] + batch.mask_BA[b].sum()
                np.testing.assert_array_equal(batch.student_BT[b, :length], episode.tokens[:length])
                assert not np.any(batch.student_BT[b, length:])
                assert np.count_nonzero(batch.teacher_BT[b] >= FEEDBACK) == len("do it")


def test_the_same_action_ids_stand_under_both_contexts():
    """Invariant 3, in the packed arrays: from their own starts, student and teacher read the ids of `actions_BA`."""
    batches, _ = pack(make_rows(), **BUCKETS)
    assert batches
    for batch in batches:
        for b, a in zip(*np.nonzero(batch.mask_BA)):
            token = batch.actions_BA[b, a]
            assert batch.student_BT[b, batch.student_start_B[b] + a] == token
            assert batch.teacher_BT[b, batch.teacher_start_B[b] + a] == token
        for start_B, tokens_BT in ((batch.student_start_B, batch.student_BT), (batch.teacher_start_B, batch.teacher_BT)):
            for b in np.flatnonzero(batch.mask_BA.any(axis=1)):
                assert tuple(tokens_BT[b, start_B[b] - 3 : start_B[b]]) == PROMPT


def test_target_row_branches_before_the_generation_prompt():
    episode = make_episode()
    step = episode.steps[2]
    row = target_row(episode, Target(3, "hm"), Chat(), index=5, micro=2)
    assert row.student == tuple(episode.tokens[: step.start])
    assert row.teacher == (*episode.tokens[: step.branch], *Chat().feedback("hm"))
    assert row.action == tuple(episode.tokens[step.start : step.stop])
    assert (row.episode, row.step, row.micro) == (5, 3, 2)
    plain = action_row(episode, 3, index=5, micro=2)
    assert plain == dataclasses.replace(row, teacher=row.student)


@pytest.mark.parametrize("step", [0, -1, 5])
def test_a_step_that_does_not_exist_is_an_error(step):
    with pytest.raises(ValueError, match="4 steps"):
        target_row(make_episode(), Target(step, "x"), Chat())


def test_another_generation_prompt_is_an_error():
    chat = type("Other", (), {"feedback": lambda self, text: (900, 7, 8, 8)})()
    with pytest.raises(ValueError, match="generation prompt"):
        target_row(make_episode(), Target(1, "x"), chat)


@pytest.mark.parametrize("empty", ["student", "teacher", "action"])
def test_a_row_has_no_empty_part(empty):
    with pytest.raises(ValueError, match="none empty"):
        Row(**({"episode": 0, "step": 1, "student": (1,), "teacher": (1,), "action": (1,)} | {empty: ()}))


@given(st.randoms(use_true_random=False), st.integers(1, 5), st.integers(0, 12), st.booleans())
@settings(max_examples=25, deadline=None)
def test_packing_keeps_every_row_once_in_any_order(rng: random.Random, rows_per_batch, teacher_extra, micro):
    rows = make_rows()
    options = BUCKETS | {"rows_per_batch": rows_per_batch, "teacher_extra": teacher_extra, "mean_of_micro_means": micro}
    batches, dropped = pack(rows, **options)
    shuffled = rows[:]
    rng.shuffle(shuffled)
    again, dropped_again = pack(shuffled, **options)
    assert dropped == dropped_again
    for batch, other in zip(batches, again, strict=True):
        for array, same in zip(batch, other):
            np.testing.assert_array_equal(array, same)
    kept = Counter(row for batch in batches for row in unpack(batch))
    assert sum(kept.values()) + sum(dropped.values()) == len(rows)
    assert kept <= Counter((row.student, row.teacher, row.action) for row in rows)
    shapes = {(batch.student_BT.shape, batch.teacher_BT.shape, batch.actions_BA.shape) for batch in batches}
    allowed = {
        ((rows_per_batch, t), (rows_per_batch, t + teacher_extra), (rows_per_batch, a)) for t in (12, 24, 48) for a in (2, 5)
    }
    assert shapes <= allowed
    for batch in batches:
        assert batch.student_BT.dtype == batch.actions_BA.dtype == batch.teacher_start_B.dtype == np.int32
        assert not np.any(batch.weight_B[~batch.mask_BA.any(axis=1)])


def row(student, teacher, action, **options):
    return Row(episode=0, step=1, student=(1,) * student, teacher=(1,) * teacher, action=(1,) * action, **options)


@pytest.mark.parametrize(
    ("lengths", "extra", "reason"),
    [
        ((43, 43, 5), 0, None),
        ((44, 44, 5), 10, "student_too_long"),
        ((43, 44, 5), 0, "teacher_too_long"),
        ((43, 53, 5), 10, None),
        ((43, 54, 5), 10, "teacher_too_long"),
        ((1, 1, 6), 0, "action_too_long"),
        ((90, 90, 6), 0, "action_too_long"),
    ],
)
def test_what_does_not_fit_is_dropped_whole_and_counted(lengths, extra, reason):
    batches, dropped = pack([row(*lengths), row(2, 3, 1)], **BUCKETS, teacher_extra=extra)
    assert dropped == {name: int(name == reason) for name in packing.DROP_REASONS}
    assert sum(int(b.mask_BA.sum()) for b in batches) == 1 + (0 if reason else lengths[2])


def test_a_long_teacher_takes_a_longer_bucket():
    (batch,), _ = pack([row(8, 20, 2)], **BUCKETS, teacher_extra=4)
    assert (batch.student_BT.shape[1], batch.teacher_BT.shape[1]) == (24, 28)


def test_weights_are_one_or_make_micro_steps_equal():
    rows = [row(3, 4, 1, micro=0), row(3, 5, 5, micro=0), row(3, 6, 2, micro=1)]

    def weights(**options):  # by length of the action
        batches, _ = pack(rows, **BUCKETS, **options)
        return {int(mask.sum()): float(w) for batch in batches for mask, w in zip(batch.mask_BA, batch.weight_B) if mask.any()}

    assert weights() == {1: 1.0, 5: 1.0, 2: 1.0}
    # 8 tokens, 2 micro-steps of 6 and of 2: (sum of 6) / 6 / 2 + (sum of 2) / 2 / 2 = (4/6 * first + 4/2 * second) / 8
    assert weights(mean_of_micro_means=True) == pytest.approx({1: 4 / 6, 5: 4 / 6, 2: 4 / 2})


def test_nothing_packs_to_nothing():
    assert pack([], **BUCKETS) == ([], dict.fromkeys(packing.DROP_REASONS, 0))


@pytest.mark.parametrize(
    ("option", "value"), [("length_buckets", ()), ("length_buckets", (8, 8)), ("action_buckets", (0, 4)), ("rows_per_batch", 0)]
)
def test_impossible_buckets_are_refused_by_name(option, value):
    with pytest.raises(UserError, match=f"distill.{option}"):
        pack([], **(BUCKETS | {option: value}))
