"""Batches: no feedback in the student's context, the same action ids under both contexts, every part's weights, drops
counted; by properties.
"""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.algorithms.branching import examples, feedback_at_start, without_teacher
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.training.batching import DROP_REASONS, Batch, BatchShapes, blank_batch, make_batches
from hintsd_jax.training.examples import Branch, Example
from hintsd_jax.training.loss_parts import CrossEntropy, Divergence, PolicyGradient
from hintsd_jax.training.losses import Loss
from tests.examples_helpers import (
    FEEDBACK,
    FakeChat,
    RewritingChat,
    make_episode,
    said,
    target_branches,
    target_examples,
)

DISTIL = Loss((Divergence(),))
BOTH = Loss((Divergence(coefficient=2.0), PolicyGradient(coefficient=0.5)))
BY_EPISODE = Loss((Divergence(coefficient=2.0), PolicyGradient(coefficient=0.5, mean="sequence")))
MICRO_STEPS = 4  # of two episodes each; one has none of the at most six
SHAPES = BatchShapes((16, 36), (14, 30), (3, 5), batch_size=3)
ALONE = BatchShapes((16, 36), (40, 52), (3, 5), batch_size=3, trunk=False)
UNPACKED = dataclasses.replace(SHAPES, packed=False)
WEIGHTS = {"divergence": 1.0}


def beginning(episode):
    """A chat whose first prompts begin as this episode's did."""
    return FakeChat(episode.tokens[: episode.steps[0].prompt_start])


@st.composite
def steps_of_training(draw):
    """[(episode, its targets, its advantage)]: some actions, contexts and feedbacks fit no bucket of SHAPES, some
    episodes have several streams; where there is an advantage, all actions are trained on.
    """
    seeds = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
    numbers = st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True)
    lengths = st.integers(1, 28) | st.integers(1, 6)
    return [
        (
            make_episode(seed, longest=6, rewrites=seed % 2 == 1),
            [Target(step, "x" * draw(lengths)) for step in draw(numbers)],
            draw(st.sampled_from([0.0, 0.0, -1.0, 0.75])),
        )
        for seed in seeds
    ]


def weights_of(scored, advantage):
    """How a token is trained on: by the divergence where a teacher scores it, by both where it has an advantage."""
    return ({"divergence": 1.0} if scored else {}) | ({"policy_gradient": 1.5} if advantage else {})


def make_examples(chosen, chat):
    result = []
    for n, (episode, targets, advantage) in enumerate(chosen):
        branches = target_branches(episode, targets, chat, weights_of(True, advantage))
        branches = [dataclasses.replace(branch, advantage=advantage) for branch in branches]
        if advantage:
            rest = {1, 2, 3, 4} - {target.step for target in targets}
            branches += without_teacher(episode, rest, weights_of(False, advantage), advantage)
        result += examples(episode, branches, n, micro_step=n // 2, key=(n, 7))
    return result


def oracle(chosen, shapes, loss, alone, micro_steps, chat):
    """What the batches must say of every action token, straight from episodes and targets, and the drops by reason."""
    kept, dropped = [], dict.fromkeys(DROP_REASONS, 0)
    for n, (episode, targets, advantage) in enumerate(chosen):
        feedback = {target.step: target.feedback for target in targets}
        for number in range(1, 5) if advantage else sorted(feedback):
            step = episode.steps[number - 1]
            tokens = tuple(episode.streams[step.stream].tokens)
            prefix_length, context, size = 0, (), step.stop - step.start
            if number in feedback:
                trunk = tokens[: step.prompt_start]
                prefix_length, context = chat.teacher_context([], (), trunk, feedback[number])
            before = sum(earlier.stop - earlier.start for earlier in episode.steps[: number - 1])
            read = len(context) + size + (prefix_length if alone else 0)
            if size > shapes.action_buckets[-1]:
                dropped["action_too_long"] += 1
            elif step.stop > shapes.length_buckets[-1]:
                dropped["student_too_long"] += 1
            elif number in feedback and read > shapes.branch_buckets[-1]:
                dropped["teacher_too_long"] += 1
            else:
                for i in range(size):
                    action = tokens[step.start : step.start + i]
                    teacher = tokens[:prefix_length] + context + action if number in feedback else None
                    logprob = np.float32(episode.logprobs[before + i])
                    kept.append((n, tokens[: step.start + i], teacher, tokens[step.start + i], logprob, advantage))
    total, micro_step = len(kept), lambda n: n // 2 if micro_steps else 0

    def weights(n, teacher, advantage):
        """A token's: coefficient x all tokens / (micro-steps x [episodes x own of the episode, or] own tokens)."""
        result, given_weights = [], weights_of(teacher is not None, advantage)
        for part in loss.parts:
            acted = [m for m, _, t, *_, a in kept if part.name in weights_of(t is not None, a)]
            own = [m for m in acted if micro_step(m) == micro_step(n)]
            count = len(set(own)) * own.count(n) if part.mean == "sequence" else len(own)
            scale = part.coefficient * (total / max(count, 1)) / max(micro_steps, 1)
            result.append(np.float32(given_weights.get(part.name, 0.0) * scale))
        return tuple(result)

    tokens = ((n, *rest, advantage, weights(n, rest[1], advantage)) for n, *rest, advantage in kept)
    return Counter(tokens), dropped


def tokens_of(batch):
    """The same of a batch: what each side reads up to the index from which an action token is predicted."""
    ids = lambda array: tuple(int(i) for i in array)
    for b, a in zip(*np.nonzero(batch.mask_BA), strict=True):
        at, m, teacher = batch.student_at_BA[b, a], batch.teacher_at_BA[b, a], None
        first = int(batch.first_BT[b, at]) if batch.first_BT.size else 0
        if batch.scored_BA[b, a]:
            own = [i for i in range(m + 1) if batch.branch_id_BM[b, i] == batch.branch_id_BM[b, m]]
            start, stop = batch.prefix_start_BM[b, m], batch.prefix_stop_BM[b, m]
            # a branch goes on where it left the trunk, and all its tokens agree on where that was
            assert ids(batch.position_BM[b, own]) == tuple(range(stop - start, stop - start + len(own)))
            assert set(ids(batch.prefix_start_BM[b, own])) == {start} <= {first}
            assert set(ids(batch.prefix_stop_BM[b, own])) == {stop}
            teacher = ids(batch.trunk_BP[b, start:stop]) + ids(batch.branch_BM[b, own])
        values = (batch.sampler_logprob_BA[b, a], float(batch.advantage_BA[b, a]), tuple(batch.weight_BAP[b, a]))
        student, key = ids(batch.student_BT[b, first : at + 1]), batch.dropout_key_BT2[b, first : at + 1]
        assert len({tuple(one) for one in key.tolist()}) == 1  # of all that is read
        yield (int(key[0, 0]), student, teacher, int(batch.actions_BA[b, a]), *values)


def shape(batch):
    return (*batch.student_BT.shape, batch.branch_BM.shape[1], batch.actions_BA.shape[1])


@given(
    steps_of_training(),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([BOTH, BY_EPISODE]),
    st.sampled_from([0, MICRO_STEPS]),
    st.sampled_from([FakeChat(), RewritingChat()]),
)
@settings(max_examples=80, deadline=None)
def test_batches_say_of_every_target_what_the_episodes_say(
    chosen, rng: random.Random, rows, alone, apart, packed, loss, micro, chat
):
    options = {"batch_size": rows, "parts": 2, "unscored": apart, "packed": packed}
    shapes = dataclasses.replace(ALONE if alone else SHAPES, **options)
    given_examples = make_examples(chosen, chat)
    if alone:
        given_examples = [part for example in given_examples for part in example.separated()]
    result = make_batches(given_examples, shapes, loss, micro_steps=micro)

    # every action token of the kept targets exactly once, its contexts, log-prob, advantage and weights its own; the
    # others counted, never cut
    expected, dropped = oracle(chosen, shapes, loss, alone, micro, chat)
    assert Counter(token for batch in result.batches for token in tokens_of(batch)) == expected
    assert result.dropped == dropped

    # the order of the examples does not matter
    shuffled = given_examples[:]
    rng.shuffle(shuffled)
    again = make_batches(shuffled, shapes, loss, micro_steps=micro)
    for batch, other in zip(result.batches, again.batches, strict=True):
        for array, same in zip(batch, other, strict=True):
            np.testing.assert_array_equal(array, same)
    assert result[1:] == again[1:]
    for span in result.spans:
        episode, targets, _ = chosen[span.episode]
        batch, step = result.batches[span.batch], episode.steps[span.step - 1]
        at = (span.row, slice(span.start, span.stop))
        assert batch.mask_BA[at].all() and set(batch.scored_BA[at].tolist()) == {span.scored}
        assert span.scored == (span.step in {target.step for target in targets})
        assert batch.actions_BA[at].tolist() == episode.streams[step.stream].tokens[step.start : step.stop]
    written = sum(int(batch.mask_BA.sum()) for batch in result.batches)
    assert sum(span.stop - span.start for span in result.spans) == written

    blanks = {shape(blank): blank for blank in (blank_batch(shapes, *which) for which in shapes.all())}
    assert {shape(batch) for batch in result.batches} <= blanks.keys()
    assert sum(not batch.mask_BA.any(axis=1).all() for batch in result.batches) <= 1 + apart
    student = teacher = real = 0
    for batch in result.batches:
        # feedback is on the teacher's side only
        assert not any(np.any(array >= FEEDBACK) for array in (batch.student_BT, batch.trunk_BP, batch.actions_BA))
        assert np.any(batch.branch_BM >= FEEDBACK) == batch.scored_BA.any()
        rows_scored = batch.scored_BA.any(axis=1) | ~batch.mask_BA.any(axis=1)
        assert not apart or rows_scored.all() == (batch.branch_BM.shape[1] > 0)  # no teacher pass for unread rows
        if alone or not batch.branch_BM.shape[1]:
            assert batch.trunk_BP.shape == (rows, 0)
        else:
            np.testing.assert_array_equal(batch.trunk_BP, batch.student_BT)
        # padding: no id, no branch, no weight
        np.testing.assert_array_equal(batch.branch_BM == 0, batch.branch_id_BM == -1)
        assert not np.any(batch.weight_BAP[~batch.mask_BA]) and not np.any(batch.scored_BA[~batch.mask_BA])
        assert np.all(batch.weight_BAP[batch.mask_BA].max(axis=1) > 0)
        # a row ends with its last target
        ends = np.where(batch.mask_BA, batch.student_at_BA + 2, 0).max(axis=1)
        np.testing.assert_array_equal(np.count_nonzero(batch.student_BT, axis=1), ends)
        index_T = np.arange(batch.student_BT.shape[1])
        if packed:  # padding is nobody's; examples follow each other
            np.testing.assert_array_equal((batch.first_BT == index_T)[batch.student_BT == 0], True)
            assert np.all(np.diff(batch.first_BT, axis=1) >= 0) and np.all(batch.first_BT <= index_T)
        else:
            assert batch.first_BT.shape == (rows, 0)
        student, teacher = student + batch.student_BT.size, teacher + batch.trunk_BP.size + batch.branch_BM.size
        real += sum(np.count_nonzero(read) for read in (batch.student_BT, batch.trunk_BP, batch.branch_BM))
        for array, empty in zip(batch, blanks[shape(batch)], strict=True):
            assert (array.dtype, array.shape) == (empty.dtype, empty.shape)
    assert (result.student_tokens, result.teacher_tokens) == (student, teacher)
    assert result.padding_tokens == student + teacher - real


def plain_example(size=40, branches=(), **options):
    """`branches`: (start, tokens of the action, of the context). All see what stands before their action."""
    result = (
        Branch(n, start, start + tokens, start, (5,) * context, (0.0,) * tokens, WEIGHTS)
        for n, (start, tokens, context) in enumerate(branches, 1)
    )
    return Example(0, (1,) * size, tuple(result), **options)


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
    result = make_batches([plain_example(99, [target]), plain_example(9, [(2, 1, 3)])], SHAPES, DISTIL)
    assert result.dropped == {name: int(name == reason) for name in DROP_REASONS}
    assert sum(int(batch.mask_BA.sum()) for batch in result.batches) == 1 + (0 if reason else target[1])


def test_a_row_ends_with_its_last_kept_target():
    result = make_batches([plain_example(40, [(9, 2, 3), (20, 9, 1)])], SHAPES, DISTIL)
    assert result.dropped["action_too_long"] == 1
    assert [shape(batch) for batch in result.batches] == [(3, 16, 14, 3)]
    assert result.batches[0].student_BT[0].tolist() == [1] * 11 + [0] * 5


@pytest.mark.parametrize("context, size", [(10, 1), (1, 2)], ids=["branches full", "actions full"])
def test_an_example_whose_branches_exceed_the_largest_bucket_becomes_several(context, size):
    branches = [(start, size, context) for start in (3, 8, 13, 18, 23)]
    result = make_batches([plain_example(36, branches, key=(3, 4), micro_step=1)], UNPACKED, DISTIL)
    assert not any(result.dropped.values())
    rows = [Batch(*row) for batch in result.batches for row in zip(*batch, strict=True)]
    rows = [row for row in rows if row.mask_BA.any()]
    numbers = [sorted({int(n) for n in row.branch_id_BM if n >= 0}) for row in rows]
    assert numbers == [[0], [0, 1], [0, 1]]  # the shorter ones are sorted to the front
    ends = sorted(int(np.count_nonzero(row.student_BT)) for row in rows)
    assert ends == [8 + size, 18 + size, 23 + size]  # each cut after its own last target
    assert all(tuple(key) == (3, 4) for row in rows for key in row.dropout_key_BT2[row.student_BT > 0])


def test_a_longer_action_or_feedback_takes_the_larger_pair():
    shapes = lambda *branch: [
        shape(batch)[1:] for batch in make_batches([plain_example(40, [branch])], SHAPES, DISTIL).batches
    ]
    assert shapes(12, 3, 11) == [(16, 14, 3)]
    assert shapes(12, 4, 2) == [(16, 30, 5)]
    assert shapes(12, 3, 12) == [(16, 30, 5)]
    assert shapes(14, 3, 11) == [(36, 14, 3)]


def test_examples_share_the_rows_that_leave_the_least_padding():
    """By hand: 4 of 12 tokens and 3 of 5 fill two rows of 36 to 63 of 72; one by one they take seven rows."""
    given_examples = [
        dataclasses.replace(plain_example(size, [(size - 1, 1, 1)]), episode=n)
        for n, size in enumerate((12, 5, 12, 5, 12, 5, 12))
    ]
    shapes = BatchShapes((16, 36), (30,), (8,), batch_size=1)
    together = make_batches(given_examples, shapes, DISTIL)
    assert [shape(batch)[1] for batch in together.batches] == [36, 36]
    ends = [np.count_nonzero(batch.student_BT) for batch in together.batches]
    assert sorted(ends) == [27, 36]
    alone = make_batches(given_examples, dataclasses.replace(shapes, packed=False), DISTIL)
    assert [shape(batch)[1] for batch in alone.batches] == [16] * 7
    assert together.padding_tokens < alone.padding_tokens
    # branches that do not fit beside each other keep examples apart
    few = dataclasses.replace(shapes, branch_buckets=(5,), action_buckets=(2,))
    assert all(len(np.unique(batch.branch_id_BM)) <= 3 for batch in make_batches(given_examples, few, DISTIL).batches)


def test_rows_that_are_not_full_stay_short():
    """With room for three batches' rows side by side, longer rows would be padding."""
    given_examples = [dataclasses.replace(plain_example(12, [(9, 1, 1)]), episode=n) for n in range(3)]
    shapes = BatchShapes((16, 36), (30,), (8,), batch_size=3)
    assert [shape(batch)[:2] for batch in make_batches(given_examples, shapes, DISTIL).batches] == [(3, 16)]


def test_weights_are_one_or_make_micro_steps_equal():
    given_examples = [plain_example(9, [(3, size, 1)], micro_step=micro) for size, micro in ((1, 0), (5, 0), (2, 1))]

    def weights(**options):  # by length of the action
        batches = make_batches(given_examples, UNPACKED, DISTIL, **options).batches
        rows = [row for b in batches for row in zip(b.mask_BA, b.weight_BAP[..., 0], strict=True)]
        return {int(mask.sum()): set(weight[mask].tolist()) for mask, weight in rows if mask.any()}

    assert weights() == {1: {1.0}, 5: {1.0}, 2: {1.0}}
    # 8 tokens, 3 micro-steps of 6, 2 and 0: (sum of 6) / 6 / 3 + (sum of 2) / 2 / 3 = (8/18 * first + 8/6 * second) / 8
    expected = {1: 8 / 18, 5: 8 / 18, 2: 8 / 6}
    assert weights(micro_steps=3) == {n: {float(np.float32(w))} for n, w in expected.items()}
    with pytest.raises(ValueError, match="micro-step 1, of 1"):
        weights(micro_steps=1)


def test_nothing_makes_no_batch():
    nothing = ([], dict.fromkeys(DROP_REASONS, 0), 0, 0, 0, [])
    assert make_batches([], SHAPES, DISTIL) == make_batches([plain_example(9, [])], SHAPES, DISTIL) == nothing


def test_every_shape_is_listed_once():
    assert SHAPES.all() == [(16, 0), (16, 1), (36, 0), (36, 1)]
    blanks = [blank_batch(SHAPES, *which) for which in SHAPES.all()]
    assert [shape(batch) for batch in blanks] == [(3, 16, 14, 3), (3, 16, 30, 5), (3, 36, 14, 3), (3, 36, 30, 5)]
    assert all(batch.trunk_BP.shape == batch.student_BT.shape and not batch.mask_BA.any() for batch in blanks)
    apart = dataclasses.replace(SHAPES, unscored=True)
    assert apart.all() == [(16, 2), (16, 3), (16, 0), (16, 1), (36, 2), (36, 3), (36, 0), (36, 1)]  # the largest last
    blank = blank_batch(apart, 36, 3)
    assert shape(blank) == (3, 36, 0, 5) and blank.trunk_BP.shape == (3, 0)
    equal_actions = BatchShapes((36,), (14, 60), (20, 20), batch_size=1, unscored=True)
    assert equal_actions.all() == [(36, 2), (36, 0), (36, 1)]  # one without a teacher for both


@pytest.mark.parametrize("packed", [True, False])
def test_feedback_on_a_few_steps_does_not_pay_for_whole_episodes(packed):
    """Both algorithms' loss acts on all actions; a teacher reads of one of them, of all four, or of none."""
    shapes = BatchShapes((60,), (14, 80), (30, 30), batch_size=1, unscored=True, packed=packed)
    episode, weights = make_episode(seed=3), {"policy_gradient": 1.0}

    def example(number, steps):
        hinted = target_branches(episode, [Target(step, "hm") for step in steps], weights=weights)
        others = without_teacher(episode, [n for n in (1, 2, 3, 4) if n not in steps], weights)
        branches = sorted([*hinted, *others], key=lambda branch: branch.step)
        return examples(episode, branches, number)[0]

    loss = Loss((PolicyGradient(teacher_advantage=1.0),))
    made = make_batches([example(0, [2]), example(1, [1, 2, 3, 4]), example(2, [])], shapes, loss)
    listed = {shape(blank_batch(shapes, *which)) for which in shapes.all()}
    read = {span.episode: shape(made.batches[span.batch]) for span in made.spans}
    assert read == {0: (1, 60, 14, 30), 1: (1, 60, 80, 30), 2: (1, 60, 0, 30)} and set(read.values()) == listed
    assert made.teacher_tokens == 2 * 60 + 14 + 80 and not sum(made.dropped.values())


def test_a_branch_that_leaves_a_trunk_needs_shapes_with_one():
    (example,) = target_examples(make_episode(), [Target(1, "x")])
    with pytest.raises(ValueError, match="episode 0, step 1: .* none"):
        make_batches([example], ALONE, DISTIL)
    assert make_batches(example.separated(), ALONE, DISTIL).batches


def test_the_teacher_reads_on_through_branches_that_continue():
    """Feedback at the start: one reading of the episode, each action under the feedback and all that came before it."""
    episode = make_episode(seed=3)
    shapes = BatchShapes((60,), (80,), (20,), batch_size=1, trunk=False)
    (example,) = examples(episode, feedback_at_start(episode, [1, 2, 4], said("hm"), beginning(episode), WEIGHTS))
    for part in (example, *example.separated()):
        trunk = part.branches[0].prefix_length > 0
        (batch,), *_, spans = make_batches([part], dataclasses.replace(shapes, trunk=trunk), DISTIL)
        assert [span.step for span in spans] == [1, 2, 4]
        assert set(batch.branch_id_BM[batch.branch_id_BM >= 0].tolist()) == {0}
        first = episode.steps[0]
        hinted = [*episode.tokens[: first.prompt_start], *FakeChat().user_turn("hm"), *episode.tokens[first.start :]]
        shift, tokens = len(hinted) - len(episode.tokens), list(tokens_of(batch))
        for span in spans:
            step = episode.steps[span.step - 1]
            for at, (_, student, teacher, token, *_) in zip(
                range(step.start, step.stop), tokens[span.start : span.stop], strict=True
            ):
                assert (student, token) == (tuple(episode.tokens[:at]), episode.tokens[at])
                assert teacher == tuple(hinted[: at + shift])


def test_branches_that_continue_stand_or_fall_with_those_before_them():
    episode = make_episode(seed=3, longest=3)
    (example,) = examples(episode, feedback_at_start(episode, [1, 2, 3], said("hm"), beginning(episode), WEIGHTS))
    reads = [branch.branch_tokens for branch in example.branches]
    for room, kept in ((sum(reads), [1, 2, 3]), (sum(reads) - 1, [1, 2]), (reads[0], [1])):
        result = make_batches([example], BatchShapes((60,), (room,), (20,), batch_size=1), DISTIL)
        assert [span.step for span in result.spans] == kept
        assert result.dropped["teacher_too_long"] == 3 - len(kept)
    shapes = BatchShapes((60,), (80,), (example.branches[0].action_tokens,), batch_size=1)
    result = make_batches([example], shapes, DISTIL)
    assert [span.step for span in result.spans] == [1] and sum(result.dropped.values()) == 2


def test_nothing_is_read_on_past_an_action_that_fits_no_bucket():
    """The teacher would score it without having read what came before."""
    spans = [(3, 5), (6, 12), (13, 15)]
    branches = [
        Branch(n, start, stop, 2, (5,), (0.0,) * (stop - start), WEIGHTS, continues=n > 1)
        for n, (start, stop) in enumerate(spans, 1)
    ]
    result = make_batches([Example(0, (1,) * 15, tuple(branches))], SHAPES, DISTIL)
    assert [span.step for span in result.spans] == [1]
    assert (result.dropped["action_too_long"], result.dropped["teacher_too_long"]) == (1, 1)


def test_without_a_teacher_there_are_no_branch_tokens():
    episode, loss = make_episode(seed=3), Loss((PolicyGradient(),))
    (example,) = examples(episode, without_teacher(episode, [1, 2, 3, 4], {"policy_gradient": 1.0}, advantage=2.0))
    shapes = BatchShapes((60,), (0,), (24,), batch_size=2, trunk=False)
    (batch,), dropped, student, teacher, padding, spans = make_batches([example], shapes, loss)
    assert batch.trunk_BP.shape == batch.branch_BM.shape == (2, 0) and teacher == 0 and student == 120
    actions = [episode.tokens[n] for n in np.flatnonzero(episode.action_mask())]
    assert batch.actions_BA[batch.mask_BA].tolist() == actions
    assert set(batch.advantage_BA[batch.mask_BA].tolist()) == {2.0} and not any(span.scored for span in spans)
    assert set(batch.weight_BAP[batch.mask_BA].ravel().tolist()) == {1.0}
    assert padding == 120 - episode.steps[-1].stop and not any(dropped.values())


def test_each_part_is_its_coefficient_times_the_mean_over_its_own_tokens():
    """Of tokens whose loss is 1, the sum divided by all tokens is the part's coefficient times its mean weight."""
    loss = Loss((Divergence(coefficient=2.0), PolicyGradient(coefficient=0.5), CrossEntropy(coefficient=3.0)))
    weights = [{"divergence": 1.0, "policy_gradient": 1.0}, {"policy_gradient": 0.5}, {"divergence": 0.25}]
    spans = [(2, 5, 2, (5,)), (6, 8, 0, ()), (9, 10, 9, (5,))]
    branches = [
        Branch(n, start, stop, prefix, context, (0.0,) * (stop - start), weight)
        for n, ((start, stop, prefix, context), weight) in enumerate(zip(spans, weights, strict=True), 1)
    ]
    shapes = BatchShapes((12,), (20,), (8,), batch_size=1, parts=3)
    (batch,), *_ = make_batches([Example(0, (1,) * 12, tuple(branches))], shapes, loss)
    expected = np.array(
        [[2.0 * 6 / 4, 0.5 * 6 / 5, 0]] * 3 + [[0, 0.5 * 0.5 * 6 / 5, 0]] * 2 + [[0.25 * 2 * 6 / 4, 0, 0]]
    )
    np.testing.assert_allclose(batch.weight_BAP[batch.mask_BA], expected, rtol=1e-6)
    means = batch.weight_BAP[batch.mask_BA].sum(axis=0) / 6
    np.testing.assert_allclose(means, [2.0 * 3.25 / 4, 0.5 * 4 / 5, 0.0], rtol=1e-6)  # nothing acts by cross-entropy


@pytest.mark.parametrize(
    "weights, says",
    [
        ({"divergnce": 1.0}, "a weight for 'divergnce', but the loss has the parts divergence, policy_gradient"),
        ({"divergence": 1.0}, "a weight for 'divergence', but no teacher reads the action"),
    ],
)
def test_a_weight_that_nothing_can_use_is_refused(weights, says):
    """It would be ignored, or scale what a teacher never read."""
    episode = make_episode()
    given_examples = examples(episode, without_teacher(episode, [2], weights))
    shapes = dataclasses.replace(SHAPES, parts=2)
    with pytest.raises(UserError, match=f"episode 0, step 2: {says}"):
        make_batches(given_examples, shapes, BOTH)
    assert make_batches(examples(episode, without_teacher(episode, [2], {"divergence": 0.0})), shapes, BOTH).batches
