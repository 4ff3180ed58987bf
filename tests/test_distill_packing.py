"""Rows and batches: no feedback in the student's context, the same action ids under both contexts, drops counted; by properties."""

import dataclasses
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.distill import packing
from hintsd_jax.distill.packing import DROP_REASONS, Shapes, blank_batch, pack
from hintsd_jax.distill.rows import Branch, Row, alone, plain_branches, rows, single, start_branches, trunk_rows
from hintsd_jax.episodes.chat import ChatFormat, Delta
from hintsd_jax.episodes.episode import Episode
from hintsd_jax.hindsight.targets import Target
from tests.helpers import KEEPING_TEMPLATE, LLAMA3_TEMPLATE, QWEN3_TEMPLATE, QWEN3_THINKING_TEMPLATE, make_llama_tokenizer, make_tokenizer

PROMPT = (7, 8, 9)  # a generation prompt
FEEDBACK = 900  # ids from here on occur in feedback only; 0 occurs in padding only
SHAPES = Shapes((16, 36), (14, 30), (3, 5), rows=3)
ALONE = Shapes((16, 36), (40, 52), (3, 5), rows=3, trunk=False)


class Chat:
    """Stands in for ChatFormat: the feedback message is ids that occur nowhere else, then the generation prompt."""

    def feedback(self, text):
        return (*(FEEDBACK + ord(c) % 32 for c in text), *PROMPT)

    def advised(self, dialogue, tools, trunk, text):
        return len(trunk), self.feedback(text)


class Rewriting(Chat):
    """Its template rewrites the second half of what the student read, in one token more."""

    def advised(self, dialogue, tools, trunk, text):
        seen = len(trunk) // 2
        return seen, (*(300 + id for id in trunk[seen:]), 300, *self.feedback(text))


def trunk_row(episode, targets, chat=Chat(), **place):
    """The row of an episode with one stream."""
    (row,) = trunk_rows(episode, targets, chat, **place)
    return row


def make_episode(seed=0, steps=4, longest=5, rewrites=False):
    """With `rewrites`, some answers begin a new stream."""
    rng = np.random.default_rng(seed)
    ids = lambda n: tuple(int(i) for i in rng.integers(10, 200, n))
    delta = lambda n, fresh=False: Delta(ids(n) + PROMPT, n, fresh)
    episode = Episode.begin("task", 0, (), delta(4))
    for _ in range(steps):
        action = ids(int(rng.integers(1, longest + 1)))
        episode.append_action(action, -rng.random(len(action)).round(3), "")
        episode.append_observation(delta(int(rng.integers(2, 9)), fresh=True) if rewrites and rng.random() < 0.4 else delta(3))
    return episode


@st.composite
def steps_of_training(draw):
    """[(episode, its targets)]: some actions, contexts and feedbacks fit no bucket of SHAPES, some episodes have several streams."""
    seeds = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
    numbers = st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True)
    lengths = st.integers(1, 28) | st.integers(1, 6)
    return [
        (make_episode(seed, longest=6, rewrites=seed % 2 == 1), [Target(step, "x" * draw(lengths)) for step in draw(numbers)])
        for seed in seeds
    ]


def make_rows(chosen, chat=Chat()):
    return [
        row
        for n, (episode, targets) in enumerate(chosen)
        for row in trunk_rows(episode, targets, chat, index=n, micro=n // 2, key=(n, 7))
    ]


def oracle(chosen, shapes, alone, mean_of_micro_means, chat):
    """What the batches must say of every action token, straight from episodes and targets, and the drops by reason."""
    kept, dropped = [], dict.fromkeys(DROP_REASONS, 0)
    for n, (episode, targets) in enumerate(chosen):
        for target in targets:
            step = episode.steps[target.step - 1]
            tokens = tuple(episode.streams[step.stream].tokens)
            seen, words = chat.advised([], (), tokens[: step.branch], target.feedback)
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
                    student, teacher = tokens[: step.start + i], tokens[:seen] + words + tokens[step.start : step.start + i]
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
        own = [i for i in range(m + 1) if batch.branch_BM[b, i] == batch.branch_BM[b, m]]
        seen = batch.seen_BM[b, m]
        # a branch goes on where it left the trunk, and all its tokens agree on where that was
        assert ids(batch.position_BM[b, own]) == tuple(range(seen, seen + len(own)))
        assert set(ids(batch.seen_BM[b, own])) == {seen}
        teacher = ids(batch.trunk_BP[b, :seen]) + ids(batch.stream_BM[b, own])
        token, values = int(batch.actions_BA[b, a]), (batch.sampled_BA[b, a], batch.weight_BA[b, a])
        yield (int(batch.key_B2[b, 0]), ids(batch.student_BT[b, : at + 1]), teacher, token, *values)


def shape(batch):
    return (*batch.student_BT.shape, batch.stream_BM.shape[1], batch.actions_BA.shape[1])


@given(
    steps_of_training(), st.randoms(use_true_random=False), st.integers(1, 4), st.booleans(), st.booleans(), st.sampled_from([Chat(), Rewriting()])
)
@settings(max_examples=80, deadline=None)
def test_batches_say_of_every_target_what_the_episodes_say(chosen, rng: random.Random, rows_of_batch, alone, micro, chat):
    shapes = dataclasses.replace(ALONE if alone else SHAPES, rows=rows_of_batch)
    rows = make_rows(chosen, chat)
    rows = [part for row in rows for part in single(row)] if alone else rows
    packed = pack(rows, shapes, mean_of_micro_means=micro)

    # every action token of the kept targets exactly once, its contexts, log-prob and weight its own; the others counted, never cut
    told, dropped = oracle(chosen, shapes, alone, micro, chat)
    assert Counter(token for batch in packed.batches for token in told_by(batch)) == told
    assert packed.dropped == dropped

    # the order of the rows does not matter
    shuffled = rows[:]
    rng.shuffle(shuffled)
    again = pack(shuffled, shapes, mean_of_micro_means=micro)
    for batch, other in zip(packed.batches, again.batches, strict=True):
        for array, same in zip(batch, other, strict=True):
            np.testing.assert_array_equal(array, same)
    assert packed[1:] == again[1:]

    allowed = {(rows_of_batch, T, shapes.stream_buckets[pair], shapes.action_buckets[pair]) for T, pair in shapes.all()}
    assert {shape(batch) for batch in packed.batches} <= allowed
    assert sum(not batch.mask_BA.any(axis=1).all() for batch in packed.batches) <= 1
    passed = real = 0
    for batch in packed.batches:
        # feedback is on the teacher's side only
        assert not any(np.any(array >= FEEDBACK) for array in (batch.student_BT, batch.trunk_BP, batch.actions_BA))
        assert np.any(batch.stream_BM >= FEEDBACK)
        if alone:
            assert batch.trunk_BP.shape == (rows_of_batch, 0)
        else:
            np.testing.assert_array_equal(batch.trunk_BP, batch.student_BT)
        # padding: no id, no branch, no weight
        np.testing.assert_array_equal(batch.stream_BM == 0, batch.branch_BM == -1)
        assert not np.any(batch.weight_BA[~batch.mask_BA]) and np.all(batch.weight_BA[batch.mask_BA] > 0)
        # a row ends with its last target
        ends = np.where(batch.mask_BA, batch.student_at_BA + 2, 0).max(axis=1)
        np.testing.assert_array_equal(np.count_nonzero(batch.student_BT, axis=1), ends)
        for read in (batch.student_BT, batch.trunk_BP, batch.stream_BM):
            passed, real = passed + read.size, real + np.count_nonzero(read)
        blank = blank_batch(shapes, batch.student_BT.shape[1], shapes.stream_buckets.index(batch.stream_BM.shape[1]))
        for array, empty in zip(batch, blank, strict=True):
            assert (array.dtype, array.shape) == (empty.dtype, empty.shape)
    assert (packed.passed, packed.padding) == (passed, passed - real)


def test_a_row_leaves_its_trunk_before_the_generation_prompt():
    episode = make_episode()
    second, third = episode.steps[1:3]
    row = trunk_row(episode, [Target(3, "hm"), Target(2, "no")], index=5, micro=2, key=(3, 4))
    assert (row.episode, row.micro, row.key) == (5, 2, (3, 4))
    assert row.tokens == tuple(episode.tokens[: third.stop])
    for branch, step, number, text in zip(row.branches, (second, third), (2, 3), ("no", "hm"), strict=True):
        assert (branch.step, branch.start, branch.stop, branch.seen) == (number, step.start, step.stop, step.branch)
        assert branch.words == Chat().feedback(text)
        assert row.tokens[branch.seen : branch.start] == PROMPT == branch.words[-3:]
    sizes = [step.stop - step.start for step in episode.steps]
    assert row.branches[1].sampled == tuple(episode.logprobs[sum(sizes[:2]) : sum(sizes[:3])])


def test_every_stream_with_targets_has_a_row():
    episode = make_episode(seed=8, steps=6, rewrites=True)
    streams = [step.stream for step in episode.steps]
    assert len(set(streams)) >= 3 and len(streams) > len(set(streams))
    steps = [1, *(n for n in range(2, 7) if streams[n - 1] > 0)]
    rows = trunk_rows(episode, [Target(step, "hm") for step in reversed(steps)], Chat(), index=5, micro=2, key=(3, 4))
    assert [branch.step for row in rows for branch in row.branches] == steps
    assert [len({streams[branch.step - 1] for branch in row.branches}) for row in rows] == [1] * len(set(streams))
    for row in rows:
        step = episode.steps[row.branches[-1].step - 1]
        assert row.tokens == tuple(episode.streams[step.stream].tokens[: step.stop]) and (row.episode, row.micro, row.key) == (5, 2, (3, 4))
        for branch in row.branches:
            before = sum(earlier.stop - earlier.start for earlier in episode.steps[: branch.step - 1])
            assert branch.sampled == tuple(episode.logprobs[before : before + branch.size])
    last = action_row(episode, 6)
    assert last.tokens == tuple(episode.tokens[: episode.steps[-1].stop]) and last.branches[0].start == episode.steps[-1].start
    assert trunk_rows(episode, [], Chat()) == []


TEMPLATES = {"keeping": KEEPING_TEMPLATE, "qwen3": QWEN3_TEMPLATE, "thinking": QWEN3_THINKING_TEMPLATE, "llama3": LLAMA3_TEMPLATE}
HISTORY = ({"role": "system", "content": "Rules."}, {"role": "user", "content": "Go."})
_turns = st.lists(st.tuples(st.sampled_from(["hm", "", "why\n\nso"]), st.sampled_from(["Done.", " Done. ", "a\n"]), st.booleans()), min_size=1, max_size=5)


def played(tokenizer, chat, turns, opened):
    """An episode of these (thinking, words, whether a user speaks next) after HISTORY, as sampled token by token."""
    episode = Episode.begin("task", 0, HISTORY, chat.prompt(HISTORY))
    for number, (thinking, words, asked) in enumerate(turns):
        text = f"<think>\n{thinking}\n</think>\n\n{words}".removeprefix(opened)
        ids = [id for letter in text.split(" ") for id in tokenizer.encode(letter + " ", add_special_tokens=False)][:-1] + [chat.stop_ids[0]]
        episode.append_action(ids, [-0.5 - number] * len(ids), chat.decode(ids))
        answers = [{"role": "tool", "content": f"seen {number}"}] + [{"role": "user", "content": "And?"}] * asked
        episode.append_observation(chat.answer(episode.dialogue(number + 1), (), ids, answers), answers)
    return episode


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=_turns, data=st.data())
@settings(max_examples=25, deadline=None)
def test_where_a_template_is_followed_both_contexts_are_its_own_text(name, turns, data):
    tokenizer = make_llama_tokenizer() if name == "llama3" else make_tokenizer(TEMPLATES[name])
    chat, opened = ChatFormat(tokenizer, history="template"), "<think>\n" if name == "thinking" else ""
    render = lambda messages: tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, date_string="26 Jul 2024")
    episode = played(tokenizer, chat, turns, opened)
    steps = data.draw(st.lists(st.integers(1, len(turns)), min_size=1, unique=True))
    rows = trunk_rows(episode, [Target(step, f"Not {step}.") for step in steps], chat)
    assert sorted(branch.step for row in rows for branch in row.branches) == sorted(steps)
    for row, branch in ((row, branch) for row in rows for branch in row.branches):
        dialogue = list(HISTORY)
        for number, (step, (_, _, asked)) in enumerate(zip(episode.steps[: branch.step - 1], turns)):
            dialogue += [{"role": "assistant", "content": step.text}, {"role": "tool", "content": f"seen {number}"}]
            dialogue += [{"role": "user", "content": "And?"}] * asked
        student, teacher = row.tokens[: branch.start], row.tokens[: branch.seen] + branch.words
        assert tokenizer.decode(student) == render(dialogue) and "Not" not in tokenizer.decode(row.tokens)
        advised = render([*dialogue, {"role": "user", "content": f"Not {branch.step}."}])
        assert tokenizer.decode(teacher) == advised
        prompt = row.tokens[episode.steps[branch.step - 1].branch : branch.start]
        assert branch.words[-len(prompt) :] == prompt and row.tokens[branch.start : branch.stop][-1] == chat.stop_ids[0]
        rewritten = branch.seen < episode.steps[branch.step - 1].branch
        if rewritten:
            assert list(teacher) == tokenizer.encode(advised, add_special_tokens=False)
        # what feedback drops is thinking since the last user message
        since = max((number for number, (_, _, asked) in enumerate(turns[: branch.step - 1], 1) if asked), default=0)
        thought = any(thinking for thinking, _, _ in turns[since : branch.step - 1])
        assert rewritten == (name in ("qwen3", "thinking") and thought)


def test_keep_shares_one_trunk_whatever_the_template_drops():
    tokenizer = make_tokenizer(QWEN3_TEMPLATE)
    chat, turns = ChatFormat(tokenizer, history="keep"), [("hm", "Done.", False), ("why", "Done.", True), ("so", "Done.", False)]
    episode = played(tokenizer, chat, turns, "")
    (row,) = trunk_rows(episode, [Target(step, "No.") for step in (1, 2, 3)], chat)
    assert row.tokens == tuple(episode.tokens[: episode.steps[-1].stop]) and len(episode.streams) == 1
    for branch, step in zip(row.branches, episode.steps, strict=True):
        assert (branch.seen, branch.words) == (step.branch, chat.feedback("No."))


def test_a_row_without_feedback_has_the_students_context_on_both_sides():
    row = action_row(make_episode(), 3, index=5, micro=2, key=(3, 4))
    hinted = trunk_row(make_episode(), [Target(3, "hm")], index=5, micro=2, key=(3, 4))
    (branch,) = row.branches
    assert row.tokens[: branch.seen] + branch.words == row.tokens[: branch.start]
    assert dataclasses.replace(row, branches=hinted.branches) == hinted
    assert dataclasses.replace(branch, seen=hinted.branches[0].seen, words=hinted.branches[0].words) == hinted.branches[0]


def test_single_gives_every_target_a_row_of_its_own():
    row = trunk_row(make_episode(), [Target(step, "hm") for step in (1, 3)], index=1, micro=2, key=(3, 4))
    first, second = single(row)
    for part, branch in ((first, row.branches[0]), (second, row.branches[1])):
        (own,) = part.branches
        assert own == dataclasses.replace(branch, seen=0, words=row.tokens[: branch.seen] + branch.words)
        assert part == Row(1, row.tokens[: branch.stop], (own,), 2, (3, 4))


def plain_row(size=40, branches=(), **options):
    """`branches`: (start, tokens of the action, words). All see what stands before their action."""
    made = (Branch(n, start, start + size, start, (5,) * words, (0.0,) * size) for n, (start, size, words) in enumerate(branches, 1))
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
    rows = [row for batch in packed.batches for row in zip(*batch, strict=True)]
    rows = [packing.Batch(*row) for row in rows if row[packing.Batch._fields.index("mask_BA")].any()]
    numbers = [sorted({int(n) for n in row.branch_BM if n >= 0}) for row in rows]
    assert numbers == [[0], [0, 1], [0, 1]]  # the shorter ones are sorted to the front
    ends = sorted(int(np.count_nonzero(row.student_BT)) for row in rows)
    assert ends == [8 + size, 18 + size, 23 + size]  # each cut after its own last target
    assert all(tuple(row.key_B2) == (3, 4) for row in rows)


def test_a_longer_action_or_feedback_takes_the_larger_pair():
    shapes = lambda *branch: [shape(batch)[1:] for batch in pack([plain_row(40, [branch])], SHAPES).batches]
    assert shapes(12, 3, 11) == [(16, 14, 3)]
    assert shapes(12, 4, 2) == [(16, 30, 5)]
    assert shapes(12, 3, 12) == [(16, 30, 5)]
    assert shapes(14, 3, 11) == [(36, 14, 3)]


def test_weights_are_one_or_make_micro_steps_equal():
    rows = [plain_row(9, [(3, size, 1)], micro=micro) for size, micro in ((1, 0), (5, 0), (2, 1))]

    def weights(**options):  # by length of the action
        batches = pack(rows, SHAPES, **options).batches
        return {int(mask.sum()): set(w[mask].tolist()) for b in batches for mask, w in zip(b.mask_BA, b.weight_BA) if mask.any()}

    assert weights() == {1: {1.0}, 5: {1.0}, 2: {1.0}}
    # 8 tokens, 2 micro-steps of 6 and of 2: (sum of 6) / 6 / 2 + (sum of 2) / 2 / 2 = (4/6 * first + 4/2 * second) / 8
    assert weights(mean_of_micro_means=True) == {n: {float(np.float32(w))} for n, w in {1: 4 / 6, 5: 4 / 6, 2: 4 / 2}.items()}


def test_nothing_packs_to_nothing():
    assert pack([], SHAPES) == ([], dict.fromkeys(DROP_REASONS, 0), 0, 0)
    assert pack([plain_row(9, [])], SHAPES) == ([], dict.fromkeys(DROP_REASONS, 0), 0, 0)


def test_every_shape_is_listed_once():
    assert SHAPES.all() == [(16, 0), (16, 1), (36, 0), (36, 1)]
    blanks = [blank_batch(SHAPES, *which) for which in SHAPES.all()]
    assert [shape(batch) for batch in blanks] == [(3, 16, 14, 3), (3, 16, 30, 5), (3, 36, 14, 3), (3, 36, 30, 5)]
    assert all(batch.trunk_BP.shape == batch.student_BT.shape and not batch.mask_BA.any() for batch in blanks)


@pytest.mark.parametrize("step", [0, -1, 5])
@pytest.mark.parametrize("make", [lambda step: trunk_row(make_episode(), [Target(step, "x")]), lambda step: action_row(make_episode(), step)])
def test_a_step_that_does_not_exist_is_an_error(make, step):
    with pytest.raises(ValueError, match=f"step {step} of an episode with 4 steps"):
        make(step)


@pytest.mark.parametrize("words", [(900, 7, 8, 8), (8, 9), ()])
def test_another_generation_prompt_is_an_error(words):
    with pytest.raises(ValueError, match="step 2: .* generation prompt"):
        trunk_row(make_episode(), [Target(2, "x")], SimpleNamespace(advised=lambda dialogue, tools, trunk, text: (0, words)))


def test_a_branch_that_looks_back_needs_shapes_with_a_trunk():
    rows = make_rows([(make_episode(), [Target(1, "x")])])
    with pytest.raises(ValueError, match="episode 0, step 1: .* none"):
        pack(rows, ALONE)
    assert pack(single(rows[0]), ALONE).batches


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start": 0, "seen": 0}, "out of order"),
        ({"seen": 4}, "out of order"),
        ({"seen": -1}, "out of order"),
        ({"stop": 3, "sampled": ()}, "out of order"),
        ({"stop": 7, "sampled": (0.0,) * 4}, "out of order"),
        ({"words": ()}, "no words"),
        ({"sampled": (0.0,)}, "1 log-probs of 2 tokens"),
    ],
)
def test_a_row_has_no_empty_or_misplaced_part(changes, says):
    branch = Branch(step=2, start=3, stop=5, seen=2, words=(9,), sampled=(0.0, 0.0))
    Row(4, (1,) * 6, (branch,))
    with pytest.raises(ValueError, match=f"episode 4, step 2: .*{says}"):
        Row(4, (1,) * 6, (dataclasses.replace(branch, **changes),))
