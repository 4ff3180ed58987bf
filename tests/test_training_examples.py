"""Rows of an episode: where the teacher's context leaves the student's, in all forms; errors."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch, Row, alone, plain_branches, rows, single, start_branches
from tests.helpers import (
    KEEPING_TEMPLATE,
    LLAMA3_TEMPLATE,
    QWEN3_TEMPLATE,
    QWEN3_THINKING_TEMPLATE,
    make_llama_tokenizer,
    make_tokenizer,
)
from tests.examples_helpers import PROMPT, FakeChat, make_episode, target_example, target_examples


def test_a_row_leaves_its_trunk_before_the_generation_prompt():
    episode = make_episode()
    second, third = episode.steps[1:3]
    row = target_example(episode, [Target(3, "hm"), Target(2, "no")], index=5, micro=2, key=(3, 4))
    assert (row.episode, row.micro, row.key) == (5, 2, (3, 4))
    assert row.tokens == tuple(episode.tokens[: third.stop])
    for branch, step, number, text in zip(row.branches, (second, third), (2, 3), ("no", "hm"), strict=True):
        assert (branch.step, branch.start, branch.stop, branch.seen) == (
            number,
            step.start,
            step.stop,
            step.prompt_start,
        )
        assert branch.words == FakeChat().user_turn(text)
        assert row.tokens[branch.seen : branch.start] == PROMPT == branch.words[-3:]
    sizes = [step.stop - step.start for step in episode.steps]
    assert row.branches[1].sampled == tuple(episode.logprobs[sum(sizes[:2]) : sum(sizes[:3])])


def test_every_stream_with_targets_has_a_row():
    episode = make_episode(seed=8, steps=6, rewrites=True)
    streams = [step.stream for step in episode.steps]
    assert len(set(streams)) >= 3 and len(streams) > len(set(streams))
    steps = [1, *(n for n in range(2, 7) if streams[n - 1] > 0)]
    made = target_examples(episode, [Target(step, "hm") for step in reversed(steps)], FakeChat(), index=5, micro=2, key=(3, 4))
    assert [branch.step for row in made for branch in row.branches] == steps
    assert [len({streams[branch.step - 1] for branch in row.branches}) for row in made] == [1] * len(set(streams))
    for row in made:
        step = episode.steps[row.branches[-1].step - 1]
        assert row.tokens == tuple(episode.streams[step.stream].tokens[: step.stop]) and (
            row.episode,
            row.micro,
            row.key,
        ) == (5, 2, (3, 4))
        for branch in row.branches:
            before = sum(earlier.stop - earlier.start for earlier in episode.steps[: branch.step - 1])
            assert branch.sampled == tuple(episode.logprobs[before : before + branch.size])
    (last,) = rows(episode, plain_branches(episode, [6]))
    assert (
        last.tokens == tuple(episode.tokens[: episode.steps[-1].stop])
        and last.branches[0].start == episode.steps[-1].start
    )
    assert target_examples(episode, [], FakeChat()) == []


TEMPLATES = {
    "keeping": KEEPING_TEMPLATE,
    "qwen3": QWEN3_TEMPLATE,
    "thinking": QWEN3_THINKING_TEMPLATE,
    "llama3": LLAMA3_TEMPLATE,
}
HISTORY = ({"role": "system", "content": "Rules."}, {"role": "user", "content": "Go."})
_turns = st.lists(
    st.tuples(st.sampled_from(["hm", "", "why\n\nso"]), st.sampled_from(["Done.", " Done. ", "a\n"]), st.booleans()),
    min_size=1,
    max_size=5,
)


def played(tokenizer, chat, turns, opened):
    """An episode of these (thinking, words, whether a user speaks next) after HISTORY, as sampled token by token."""
    episode = Episode.begin("task", 0, HISTORY, chat.prompt(HISTORY))
    for number, (thinking, words, asked) in enumerate(turns):
        text = f"<think>\n{thinking}\n</think>\n\n{words}".removeprefix(opened)
        ids = [id for letter in text.split(" ") for id in tokenizer.encode(letter + " ", add_special_tokens=False)][
            :-1
        ] + [chat.stop_ids[0]]
        episode.append_action(ids, [-0.5 - number] * len(ids), chat.decode(ids))
        answers = [{"role": "tool", "content": f"seen {number}"}] + [{"role": "user", "content": "And?"}] * asked
        episode.append_observation(chat.observation(episode.dialogue(number + 1), (), ids, answers), answers)
    return episode


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=_turns, data=st.data())
@settings(max_examples=25, deadline=None)
def test_where_a_template_is_followed_both_contexts_are_its_own_text(name, turns, data):
    tokenizer = make_llama_tokenizer() if name == "llama3" else make_tokenizer(TEMPLATES[name])
    chat, opened = ChatFormat(tokenizer, history="template"), "<think>\n" if name == "thinking" else ""
    render = lambda messages: tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, date_string="26 Jul 2024"
    )
    episode = played(tokenizer, chat, turns, opened)
    steps = data.draw(st.lists(st.integers(1, len(turns)), min_size=1, unique=True))
    made = target_examples(episode, [Target(step, f"Not {step}.") for step in steps], chat)
    assert sorted(branch.step for row in made for branch in row.branches) == sorted(steps)
    for row, branch in ((row, branch) for row in made for branch in row.branches):
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
    chat, turns = (
        ChatFormat(tokenizer, history="keep"),
        [("hm", "Done.", False), ("why", "Done.", True), ("so", "Done.", False)],
    )
    episode = played(tokenizer, chat, turns, "")
    (row,) = target_examples(episode, [Target(step, "No.") for step in (1, 2, 3)], chat)
    assert row.tokens == tuple(episode.tokens[: episode.steps[-1].stop]) and len(episode.streams) == 1
    for branch, step in zip(row.branches, episode.steps, strict=True):
        assert (branch.seen, branch.words) == (step.prompt_start, chat.user_turn("No."))


def test_what_no_teacher_reads_has_no_words():
    branches = plain_branches(make_episode(), [3])
    (row,) = rows(make_episode(), branches, index=5, micro=2, key=(3, 4))
    hinted = target_example(make_episode(), [Target(3, "hm")], index=5, micro=2, key=(3, 4))
    (branch,) = row.branches
    assert (branch.seen, branch.words, branch.read) == (0, (), 0)
    assert dataclasses.replace(row, branches=hinted.branches) == hinted
    assert (
        dataclasses.replace(branch, seen=hinted.branches[0].seen, words=hinted.branches[0].words) == hinted.branches[0]
    )
    assert alone(row) == row and single(row) == [row]


@pytest.mark.parametrize("template", [KEEPING_TEMPLATE, LLAMA3_TEMPLATE], ids=["qwen", "llama"])
def test_advice_at_the_start_reads_as_the_template_would_write_it(template):
    tokenizer = make_llama_tokenizer() if template == LLAMA3_TEMPLATE else make_tokenizer(template)
    chat = ChatFormat(tokenizer, date_string="26 Jul 2024") if template == LLAMA3_TEMPLATE else ChatFormat(tokenizer)
    episode = played(
        tokenizer, chat, [("", "One.", True), ("", "Two.", False), ("", "Three.", True)], "<think>\n\n</think>\n\n"
    )
    (row,) = rows(episode, start_branches(episode, [3, 1], "Be quick.", chat))
    assert row.tokens == tuple(episode.tokens[: episode.steps[2].stop]) and "quick" not in tokenizer.decode(row.tokens)
    assert [branch.joined for branch in row.branches] == [False, True] and {branch.seen for branch in row.branches} == {
        episode.steps[0].branch
    }
    first, last = row.branches
    advised = [*HISTORY, {"role": "user", "content": "Be quick."}]
    render = lambda messages: tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, date_string="26 Jul 2024"
    )
    read = row.tokens[: first.seen] + first.words
    assert tokenizer.decode(read) == render(advised)
    read += row.tokens[first.start : first.stop] + last.words
    assert tokenizer.decode(read) == render([*advised, *episode.dialogue(3)[len(HISTORY) :]])
    assert alone(row).branches[0].words == row.tokens[: first.seen] + first.words and alone(row).branches[1].seen == 0
    (own,) = single(row)  # joined branches cannot be parted
    assert own == alone(row)


def test_advice_at_the_start_needs_one_stream():
    with pytest.raises(ValueError, match="step 2: .* one stream"):
        start_branches(make_episode(seed=8, steps=6, rewrites=True), [2, 5], "hm", FakeChat())


def test_single_gives_every_target_a_row_of_its_own():
    row = target_example(make_episode(), [Target(step, "hm") for step in (1, 3)], index=1, micro=2, key=(3, 4))
    first, second = single(row)
    for part, branch in ((first, row.branches[0]), (second, row.branches[1])):
        (own,) = part.branches
        assert own == dataclasses.replace(branch, seen=0, words=row.tokens[: branch.seen] + branch.words)
        assert part == Row(1, row.tokens[: branch.stop], (own,), 2, (3, 4))


@pytest.mark.parametrize("step", [0, -1, 5])
@pytest.mark.parametrize(
    "make",
    [lambda step: target_example(make_episode(), [Target(step, "x")]), lambda step: plain_branches(make_episode(), [step])],
)
def test_a_step_that_does_not_exist_is_an_error(make, step):
    with pytest.raises(ValueError, match=f"step {step} of an episode with 4 steps"):
        make(step)


@pytest.mark.parametrize("words", [(900, 7, 8, 8), (8, 9), ()])
def test_another_generation_prompt_is_an_error(words):
    with pytest.raises(ValueError, match="step 2: .* generation prompt"):
        target_example(
            make_episode(), [Target(2, "x")], SimpleNamespace(advised=lambda dialogue, tools, trunk, text: (0, words))
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start": 0, "seen": 0}, "out of order"),
        ({"seen": 4}, "out of order"),
        ({"seen": -1}, "out of order"),
        ({"stop": 3, "sampled": ()}, "out of order"),
        ({"stop": 7, "sampled": (0.0,) * 4}, "out of order"),
        ({"words": ()}, "no words"),
        ({"joined": True}, "read on from"),
        ({"sampled": (0.0,)}, "1 log-probs of 2 tokens"),
    ],
)
def test_a_row_has_no_empty_or_misplaced_part(changes, says):
    branch = Branch(step=2, start=3, stop=5, seen=2, words=(9,), sampled=(0.0, 0.0))
    Row(4, (1,) * 6, (branch,))
    with pytest.raises(ValueError, match=f"episode 4, step 2: .*{says}"):
        Row(4, (1,) * 6, (dataclasses.replace(branch, **changes),))
