"""Rows and batches: no feedback in the student's context, the same action ids under both contexts, drops counted; by
properties.
"""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.hindsight.targets import Target
from hintsd_jax.training import batching as packing
from hintsd_jax.training.batching import DROP_REASONS, Shapes, blank_batch, pack
from hintsd_jax.training.examples import Branch, Row, plain_branches, rows, single, start_branches
from tests.examples_helpers import FEEDBACK, FakeChat, RewritingChat, make_episode, target_examples

SHAPES = Shapes((16, 36), (14, 30), (3, 5), rows=3)
ALONE = Shapes((16, 36), (40, 52), (3, 5), rows=3, trunk=False)


@st.composite
def steps_of_training(draw):
    """[(episode, its targets)]: some actions, contexts and feedbacks fit no bucket of SHAPES, some episodes have
    several streams.
    """
    seeds = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
    numbers = st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True)
    lengths = st.integers(1, 28) | st.integers(1, 6)
    return [
        (
            make_episode(seed, longest=6, rewrites=seed % 2 == 1),
            [Target(step, "x" * draw(lengths)) for step in draw(numbers)],
        )
        for seed in seeds
    ]


def make_rows(chosen, chat=FakeChat()):
    return [
        row
        for n, (episode, targets) in enumerate(chosen)
        for row in target_examples(episode, targets, chat, index=n, micro=n // 2, key=(n, 7))
    ]


def oracle(chosen, shapes, alone, mean_of_micro_means, chat):
    """What the batches must say of every action token, straight from episodes and targets, and the drops by reason."""
    kept, dropped = [], dict.fromkeys(DROP_REASONS, 0)
    for n, (episode, targets) in enumerate(chosen):
        for target in targets:
            step = episode.steps[target.step - 1]
            tokens = tuple(episode.streams[step.stream].tokens)
            seen, words = chat.teacher_context([], (), tokens[: step.prompt_start], target.feedback)
            before = sum(earlier.stop - earlier.start for earlier in episode.steps[: target.step - 1])
            size = step.stop - step.start
            stream = len(words) + size + (seen if alone else 0)
            if size > shapes.action_buckets[-1]:
                dropped["action_too_long"] += 1
            elif step.stop > shapes.length_buckets[-1]:
                dropped["student_too_long"] += 1
            elif stream > shapes.stream_buckets[-1]:
                dropped["teacher_too_long"] += 1
            else:
                for i in range(size):
                    student, teacher = (
                        tokens[: step.start + i],
                        tokens[:seen] + words + tokens[step.start : step.start + i],
                    )
                    kept.append((n, student, teacher, tokens[step.start + i], episode.logprobs[before + i]))
    tokens = Counter(n // 2 for n, *_ in kept)
    weigh = lambda n: len(kept) / len(tokens) / tokens[n // 2] if mean_of_micro_means else 1.0
    told = ((n, *words, np.float32(logprob), np.float32(weigh(n))) for n, *words, logprob in kept)
    return Counter(told), dropped


def told_by(batch):
    """The same of a batch: what each side reads up to the index from which an action token is predicted."""
    ids = lambda array: tuple(int(i) for i in array)
    for b, a in zip(*np.nonzero(batch.mask_BA)):
        at, m = batch.student_at_BA[b, a], batch.teacher_at_BA[b, a]
        own = [i for i in range(m + 1) if batch.branch_id_BM[b, i] == batch.branch_id_BM[b, m]]
        seen = batch.prefix_length_BM[b, m]
        # a branch goes on where it left the trunk, and all its tokens agree on where that was
        assert ids(batch.position_BM[b, own]) == tuple(range(seen, seen + len(own)))
        assert set(ids(batch.prefix_length_BM[b, own])) == {seen}
        teacher = ids(batch.trunk_BP[b, :seen]) + ids(batch.stream_BM[b, own])
        token, values = int(batch.actions_BA[b, a]), (batch.sampled_BA[b, a], batch.weight_BA[b, a])
        yield (int(batch.key_B2[b, 0]), ids(batch.student_BT[b, : at + 1]), teacher, token, *values)


def shape(batch):
    return (*batch.student_BT.shape, batch.stream_BM.shape[1], batch.actions_BA.shape[1])


@given(
    steps_of_training(),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([FakeChat(), RewritingChat()]),
)
@settings(max_examples=80, deadline=None)
def test_batches_say_of_every_target_what_the_episodes_say(
    chosen, rng: random.Random, rows_of_batch, alone, micro, chat
):
    shapes = dataclasses.replace(ALONE if alone else SHAPES, rows=rows_of_batch)
    made = make_rows(chosen, chat)
    made = [part for row in made for part in single(row)] if alone else made
    packed = pack(made, shapes, mean_of_micro_means=micro)

    # every action token of the kept targets exactly once, its contexts, log-prob and weight its own; the others
    # counted, never cut
    told, dropped = oracle(chosen, shapes, alone, micro, chat)
    assert Counter(token for batch in packed.batches for token in told_by(batch)) == told
    assert packed.dropped == dropped

    # the order of the rows does not matter
    shuffled = made[:]
    rng.shuffle(shuffled)
    again = pack(shuffled, shapes, mean_of_micro_means=micro)
    for batch, other in zip(packed.batches, again.batches, strict=True):
        for array, same in zip(batch, other, strict=True):
            np.testing.assert_array_equal(array, same)
    assert packed[1:] == again[1:]
    for place in packed.places:
        batch, step = packed.batches[place.batch], chosen[place.episode][0].steps[place.step - 1]
        at = (place.row, slice(place.first, place.stop))
        assert batch.mask_BA[at].all() and place.taught
        assert (
            batch.actions_BA[at].tolist()
            == chosen[place.episode][0].streams[step.stream].tokens[step.start : step.stop]
        )
    assert sum(place.stop - place.first for place in packed.places) == sum(
        int(batch.mask_BA.sum()) for batch in packed.batches
    )

    allowed = {(rows_of_batch, T, shapes.stream_buckets[pair], shapes.action_buckets[pair]) for T, pair in shapes.all()}
    assert {shape(batch) for batch in packed.batches} <= allowed
    assert sum(not batch.mask_BA.any(axis=1).all() for batch in packed.batches) <= 1
    student = teacher = real = 0
    for batch in packed.batches:
        # feedback is on the teacher's side only
        assert not any(np.any(array >= FEEDBACK) for array in (batch.student_BT, batch.trunk_BP, batch.actions_BA))
        assert np.any(batch.stream_BM >= FEEDBACK)
        if alone:
            assert batch.trunk_BP.shape == (rows_of_batch, 0)
        else:
            np.testing.assert_array_equal(batch.trunk_BP, batch.student_BT)
        # padding: no id, no branch, no weight
        np.testing.assert_array_equal(batch.stream_BM == 0, batch.branch_id_BM == -1)
        assert not np.any(batch.weight_BA[~batch.mask_BA]) and np.all(batch.weight_BA[batch.mask_BA] > 0)
        # a row ends with its last target
        ends = np.where(batch.mask_BA, batch.student_at_BA + 2, 0).max(axis=1)
        np.testing.assert_array_equal(np.count_nonzero(batch.student_BT, axis=1), ends)
        student, teacher = student + batch.student_BT.size, teacher + batch.trunk_BP.size + batch.stream_BM.size
        real += sum(np.count_nonzero(read) for read in (batch.student_BT, batch.trunk_BP, batch.stream_BM))
        blank = blank_batch(shapes, batch.student_BT.shape[1], shapes.stream_buckets.index(batch.stream_BM.shape[1]))
        for array, empty in zip(batch, blank, strict=True):
            assert (array.dtype, array.shape) == (empty.dtype, empty.shape)
    assert (packed.student_tokens, packed.teacher_tokens, packed.padding) == (
        student,
        teacher,
        student + teacher - real,
    )


def plain_row(size=40, branches=(), **options):
    """`branches`: (start, tokens of the action, words). All see what stands before their action."""
    made = (
        Branch(n, start, start + size, start, (5,) * words, (0.0,) * size)
        for n, (start, size, words) in enumerate(branches, 1)
    )
    return Row(0, (1,) * size, tuple(made), **options)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ((31, 5, 25), None),
        ((32, 5, 25), "student_too_long"),
        ((31, 5, 26), "teacher_too_long"),
        ((1, 6, 1), "action_too_long"),
        ((90, 6, 90), "action_too_long"),
        ((90, 5, 90), "student_too_long"),
    ],
)
def test_what_does_not_fit_is_dropped_whole_and_counted_by_its_first_reason(target, reason):
    packed = pack([plain_row(99, [target]), plain_row(9, [(2, 1, 3)])], SHAPES)
    assert packed.dropped == {name: int(name == reason) for name in DROP_REASONS}
    assert sum(int(batch.mask_BA.sum()) for batch in packed.batches) == 1 + (0 if reason else target[1])


def test_a_row_ends_with_its_last_kept_target():
    packed = pack([plain_row(40, [(9, 2, 3), (20, 9, 1)])], SHAPES)
    assert packed.dropped["action_too_long"] == 1
    assert [shape(batch) for batch in packed.batches] == [(3, 16, 14, 3)]
    assert packed.batches[0].student_BT[0].tolist() == [1] * 11 + [0] * 5


@pytest.mark.parametrize("words, size", [(10, 1), (1, 2)], ids=["stream full", "actions full"])
def test_a_row_whose_branches_exceed_the_largest_stream_becomes_several(words, size):
    branches = [(start, size, words) for start in (3, 8, 13, 18, 23)]
    packed = pack([plain_row(36, branches, key=(3, 4), micro=1)], SHAPES)
    assert not any(packed.dropped.values())
    found = [row for batch in packed.batches for row in zip(*batch, strict=True)]
    found = [packing.Batch(*row) for row in found if row[packing.Batch._fields.index("mask_BA")].any()]
    numbers = [sorted({int(n) for n in row.branch_id_BM if n >= 0}) for row in found]
    assert numbers == [[0], [0, 1], [0, 1]]  # the shorter ones are sorted to the front
    ends = sorted(int(np.count_nonzero(row.student_BT)) for row in found)
    assert ends == [8 + size, 18 + size, 23 + size]  # each cut after its own last target
    assert all(tuple(row.key_B2) == (3, 4) for row in found)


def test_a_longer_action_or_feedback_takes_the_larger_pair():
    shapes = lambda *branch: [shape(batch)[1:] for batch in pack([plain_row(40, [branch])], SHAPES).batches]
    assert shapes(12, 3, 11) == [(16, 14, 3)]
    assert shapes(12, 4, 2) == [(16, 30, 5)]
    assert shapes(12, 3, 12) == [(16, 30, 5)]
    assert shapes(14, 3, 11) == [(36, 14, 3)]


def test_weights_are_one_or_make_micro_steps_equal():
    made = [plain_row(9, [(3, size, 1)], micro=micro) for size, micro in ((1, 0), (5, 0), (2, 1))]

    def weights(**options):  # by length of the action
        batches = pack(made, SHAPES, **options).batches
        return {
            int(mask.sum()): set(w[mask].tolist())
            for b in batches
            for mask, w in zip(b.mask_BA, b.weight_BA)
            if mask.any()
        }

    assert weights() == {1: {1.0}, 5: {1.0}, 2: {1.0}}
    # 8 tokens, 2 micro-steps of 6 and of 2: (sum of 6) / 6 / 2 + (sum of 2) / 2 / 2 = (4/6 * first + 4/2 * second) / 8
    assert weights(mean_of_micro_means=True) == {
        n: {float(np.float32(w))} for n, w in {1: 4 / 6, 5: 4 / 6, 2: 4 / 2}.items()
    }


def test_nothing_packs_to_nothing():
    nothing = ([], dict.fromkeys(DROP_REASONS, 0), 0, 0, 0, [])
    assert pack([], SHAPES) == pack([plain_row(9, [])], SHAPES) == nothing


def test_every_shape_is_listed_once():
    assert SHAPES.all() == [(16, 0), (16, 1), (36, 0), (36, 1)]
    blanks = [blank_batch(SHAPES, *which) for which in SHAPES.all()]
    assert [shape(batch) for batch in blanks] == [(3, 16, 14, 3), (3, 16, 30, 5), (3, 36, 14, 3), (3, 36, 30, 5)]
    assert all(batch.trunk_BP.shape == batch.student_BT.shape and not batch.mask_BA.any() for batch in blanks)


def test_a_branch_that_looks_back_needs_shapes_with_a_trunk():
    (row,) = make_rows([(make_episode(), [Target(1, "x")])])
    with pytest.raises(ValueError, match="episode 0, step 1: .* none"):
        pack([row], ALONE)
    assert pack(single(row), ALONE).batches


def test_the_teacher_reads_on_through_joined_branches():
    """Advice at the start: one reading of the episode, each action under the advice and all that came before it."""
    episode = make_episode(seed=3)
    shapes = Shapes((60,), (80,), (20,), rows=1, trunk=False)
    (row,) = rows(episode, start_branches(episode, [1, 2, 4], "hm", FakeChat()))
    for part in (row, *single(row)):
        whole = dataclasses.replace(shapes, trunk=part.branches[0].seen > 0)
        (batch,), (*_, places) = pack([part], whole).batches, pack([part], whole)
        assert [place.step for place in places] == [1, 2, 4] and set(
            batch.branch_id_BM[batch.branch_id_BM >= 0].tolist()
        ) == {0}
        first = episode.steps[0]
        advised = [*episode.tokens[: first.branch], *FakeChat().user_turn("hm"), *episode.tokens[first.start :]]
        told = list(told_by(batch))
        for place in places:
            step = episode.steps[place.step - 1]
            shift = len(advised) - len(episode.tokens)
            for (_, student, teacher, token, *_), at in zip(
                told[place.first : place.stop], range(step.start, step.stop), strict=True
            ):
                assert (student, token) == (tuple(episode.tokens[:at]), episode.tokens[at])
                assert teacher == tuple(advised[: at + shift])


def test_joined_branches_stand_or_fall_with_those_before_them():
    episode = make_episode(seed=3, longest=3)
    (row,) = rows(episode, start_branches(episode, [1, 2, 3], "hm", FakeChat()))
    reads = [branch.read for branch in row.branches]
    for room, kept in ((sum(reads), [1, 2, 3]), (sum(reads) - 1, [1, 2]), (reads[0], [1])):
        packed = pack([row], Shapes((60,), (room,), (20,), rows=1))
        assert [place.step for place in packed.places] == kept and packed.dropped["teacher_too_long"] == 3 - len(kept)
    packed = pack([row], Shapes((60,), (80,), (row.branches[0].size,), rows=1))
    assert [place.step for place in packed.places] == [1] and sum(packed.dropped.values()) == 2


def test_without_a_teacher_there_are_no_streams():
    episode = make_episode(seed=3)
    (row,) = rows(
        episode, [dataclasses.replace(branch, advantage=2.0) for branch in plain_branches(episode, [1, 2, 3, 4])]
    )
    (batch,), dropped, student, teacher, padding, places = pack([row], Shapes((60,), (0,), (24,), rows=2, trunk=False))
    assert batch.trunk_BP.shape == batch.stream_BM.shape == (2, 0) and teacher == 0 and student == 120
    assert batch.actions_BA[batch.mask_BA].tolist() == [
        episode.tokens[n] for n in np.flatnonzero(episode.action_mask())
    ]
    assert set(batch.advantage_BA[batch.mask_BA].tolist()) == {2.0} and not any(place.taught for place in places)
    assert padding == 120 - episode.steps[-1].stop and not any(dropped.values())


def test_two_losses_are_means_over_their_own_tokens():
    """Sum of (weight, surrogate) over tokens, divided by all tokens = mean over the taught + 0.5 x mean over those with
    an advantage.
    """
    branches = [
        Branch(1, 2, 5, 2, (5,), (0.0,) * 3, advantage=2.0),
        Branch(2, 6, 8, 0, (), (0.0,) * 2, weight=0.0, advantage=-1.0),
    ]
    taught_alone = Branch(3, 9, 10, 9, (5,), (0.0,))
    (batch,), *_ = pack(
        [Row(0, (1,) * 12, (*branches, taught_alone))], Shapes((12,), (20,), (8,), rows=1), policy_weight=0.5
    )
    tokens, mask = 6, batch.mask_BA
    np.testing.assert_allclose(batch.weight_BA[mask], [tokens / 4] * 3 + [0.0] * 2 + [tokens / 4], rtol=1e-6)
    np.testing.assert_allclose(
        batch.advantage_BA[mask], np.array([2.0] * 3 + [-1.0] * 2 + [0.0]) * 0.5 * tokens / 5, rtol=1e-6
    )
