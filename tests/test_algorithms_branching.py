"""Branches of an episode's actions: where the teacher's context leaves the student's, in all forms, under real chat
templates too; errors.
"""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.algorithms.branching import all_steps, examples, feedback_at_start, with_feedback, without_teacher
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from tests.examples_helpers import COMPACT, PROMPT, FakeChat, make_episode, said, target_example, target_examples
from tests.helpers import (
    KEEPING_TEMPLATE,
    LLAMA3_TEMPLATE,
    QWEN3_TEMPLATE,
    QWEN3_THINKING_TEMPLATE,
    make_llama_tokenizer,
    make_tokenizer,
)

WEIGHTS = {"divergence": 1.0}
PLACE = {"number": 5, "micro_step": 2, "key": (3, 4)}


def places(example):
    return {"number": example.episode, "micro_step": example.micro_step, "key": example.key}


def test_a_branch_leaves_its_trunk_before_the_generation_prompt():
    episode = make_episode()
    second, third = episode.steps[1:3]
    example = target_example(episode, [Target(3, "hm"), Target(2, "no")], **PLACE)
    assert places(example) == PLACE and example.tokens == tuple(episode.tokens[: third.stop])
    for branch, step, number, text in zip(example.branches, (second, third), (2, 3), ("no", "hm"), strict=True):
        assert (branch.step, branch.start, branch.stop) == (number, step.start, step.stop)
        assert branch.prefix_length == step.prompt_start and branch.weights == WEIGHTS and not branch.continues
        assert branch.context == FakeChat().user_turn(text)
        assert example.tokens[branch.prefix_length : branch.start] == PROMPT == branch.context[-3:]
    sizes = [step.stop - step.start for step in episode.steps]
    assert example.branches[1].logprobs == tuple(episode.logprobs[sum(sizes[:2]) : sum(sizes[:3])])


def test_every_stream_with_targets_has_an_example():
    episode = make_episode(seed=8, steps=6, rewrites=True)
    streams = [step.stream for step in episode.steps]
    assert len(set(streams)) >= 3 and len(streams) > len(set(streams))
    steps = [1, *(n for n in range(2, 7) if streams[n - 1] > 0)]
    result = target_examples(episode, [Target(step, "hm") for step in reversed(steps)], FakeChat(), **PLACE)
    assert [branch.step for example in result for branch in example.branches] == steps
    of_streams = [len({streams[branch.step - 1] for branch in example.branches}) for example in result]
    assert of_streams == [1] * len(set(streams))
    for example in result:
        step = episode.steps[example.branches[-1].step - 1]
        assert example.tokens == tuple(episode.streams[step.stream].tokens[: step.stop])
        assert places(example) == PLACE
        for branch in example.branches:
            before = sum(earlier.stop - earlier.start for earlier in episode.steps[: branch.step - 1])
            assert branch.logprobs == tuple(episode.logprobs[before : before + branch.action_tokens])
    (last,) = examples(episode, without_teacher(episode, [6], WEIGHTS))
    assert last.tokens == tuple(episode.tokens[: episode.steps[-1].stop])
    assert last.branches[0].start == episode.steps[-1].start
    assert target_examples(episode, [], FakeChat()) == []


TEMPLATES = {
    "keeping": KEEPING_TEMPLATE,
    "qwen3": QWEN3_TEMPLATE,
    "thinking": QWEN3_THINKING_TEMPLATE,
    "llama3": LLAMA3_TEMPLATE,
}
HISTORY = ({"role": "system", "content": "Rules."}, {"role": "user", "content": "Go."})
_steps = st.lists(
    st.tuples(st.sampled_from(["hm", "", "why\n\nso"]), st.sampled_from(["Done.", " Done. ", "a\n"]), st.booleans()),
    min_size=1,
    max_size=5,
)


def played(tokenizer, chat, steps, opened):
    """An episode of these (thinking, text, whether the user speaks next) after HISTORY, as sampled token by token."""
    episode = Episode.begin("task", 0, HISTORY, chat.prompt(HISTORY))
    for number, (thinking, reply, user_next) in enumerate(steps):
        text = f"<think>\n{thinking}\n</think>\n\n{reply}".removeprefix(opened)
        pieces = [id for word in text.split(" ") for id in tokenizer.encode(word + " ", add_special_tokens=False)]
        ids = [*pieces[:-1], chat.stop_ids[0]]
        episode.append_action(ids, [-0.5 - number] * len(ids), chat.decode(ids))
        answers = [{"role": "tool", "content": f"seen {number}"}] + [{"role": "user", "content": "And?"}] * user_next
        episode.append_observation(chat.observation(episode.dialogue(number + 1), (), ids, answers), answers)
    return episode


def renderer(tokenizer):
    return lambda messages: tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, date_string="26 Jul 2024"
    )


@pytest.mark.parametrize("name", TEMPLATES)
@given(steps=_steps, data=st.data())
@settings(max_examples=25, deadline=None)
def test_where_a_template_is_followed_both_contexts_are_its_own_text(name, steps, data):
    tokenizer = make_llama_tokenizer() if name == "llama3" else make_tokenizer(TEMPLATES[name])
    chat, opened = ChatFormat(tokenizer, history="template"), "<think>\n" if name == "thinking" else ""
    render = renderer(tokenizer)
    episode = played(tokenizer, chat, steps, opened)
    chosen = data.draw(st.lists(st.integers(1, len(steps)), min_size=1, unique=True))
    result = target_examples(episode, [Target(step, f"Not {step}.") for step in chosen], chat)
    pairs = [(example, branch) for example in result for branch in example.branches]
    assert sorted(branch.step for _, branch in pairs) == sorted(chosen)
    for example, branch in pairs:
        dialogue = list(HISTORY)
        for number, (step, (_, _, user_next)) in enumerate(zip(episode.steps[: branch.step - 1], steps, strict=False)):
            dialogue += [{"role": "assistant", "content": step.text}, {"role": "tool", "content": f"seen {number}"}]
            dialogue += [{"role": "user", "content": "And?"}] * user_next
        student = example.tokens[: branch.start]
        teacher = example.tokens[: branch.prefix_length] + branch.context
        assert tokenizer.decode(student) == render(dialogue) and "Not" not in tokenizer.decode(example.tokens)
        hinted = render([*dialogue, {"role": "user", "content": f"Not {branch.step}."}])
        assert tokenizer.decode(teacher) == hinted
        prompt_start = episode.steps[branch.step - 1].prompt_start
        prompt = example.tokens[prompt_start : branch.start]
        assert branch.context[-len(prompt) :] == prompt
        assert example.tokens[branch.start : branch.stop][-1] == chat.stop_ids[0]
        rewritten = branch.prefix_length < prompt_start
        if rewritten:
            assert list(teacher) == tokenizer.encode(hinted, add_special_tokens=False)
        # what feedback drops is thinking since the last user message
        before = enumerate(steps[: branch.step - 1], 1)
        since = max((number for number, (_, _, user_next) in before if user_next), default=0)
        thought = any(thinking for thinking, _, _ in steps[since : branch.step - 1])
        assert rewritten == (name in ("qwen3", "thinking") and thought)


def test_keep_shares_one_trunk_whatever_the_template_drops():
    tokenizer = make_tokenizer(QWEN3_TEMPLATE)
    chat = ChatFormat(tokenizer, history="keep")
    steps = [("hm", "Done.", False), ("why", "Done.", True), ("so", "Done.", False)]
    episode = played(tokenizer, chat, steps, "")
    (example,) = target_examples(episode, [Target(step, "No.") for step in (1, 2, 3)], chat)
    assert example.tokens == tuple(episode.tokens[: episode.steps[-1].stop]) and len(episode.streams) == 1
    for branch, step in zip(example.branches, episode.steps, strict=True):
        assert (branch.prefix_length, branch.context) == (step.prompt_start, chat.user_turn("No."))


def test_what_no_teacher_reads_has_no_context():
    episode = make_episode()
    branches = without_teacher(episode, [3], WEIGHTS, advantage=0.25)
    (example,), (branch,) = examples(episode, branches, **PLACE), branches
    assert (branch.prefix_length, branch.context, branch.branch_tokens, branch.advantage) == (0, (), 0, 0.25)
    hinted = target_example(episode, [Target(3, "hm")], **PLACE)
    (own,) = hinted.branches
    assert dataclasses.replace(example, branches=hinted.branches) == hinted
    read = {"prefix_length": own.prefix_length, "context": own.context}
    assert dataclasses.replace(branch, advantage=0.0, **read) == own
    assert example.without_trunk() == example and example.separated() == [example]
    assert [branch.step for branch in without_teacher(episode, all_steps(episode), WEIGHTS)] == [1, 2, 3, 4]


@pytest.mark.parametrize("template", [KEEPING_TEMPLATE, LLAMA3_TEMPLATE], ids=["qwen", "llama"])
def test_feedback_at_the_start_reads_as_the_template_would_write_it(template):
    tokenizer = make_llama_tokenizer() if template == LLAMA3_TEMPLATE else make_tokenizer(template)
    chat = ChatFormat(tokenizer, date_string="26 Jul 2024") if template == LLAMA3_TEMPLATE else ChatFormat(tokenizer)
    steps = [("", "One.", True), ("", "Two.", False), ("", "Three.", True)]
    episode = played(tokenizer, chat, steps, "<think>\n\n</think>\n\n")
    (example,) = examples(episode, feedback_at_start(episode, [3, 1], (*HISTORY, *said("Be quick.")), chat, WEIGHTS))
    assert example.tokens == tuple(episode.tokens[: episode.steps[2].stop])
    assert "quick" not in tokenizer.decode(example.tokens)
    first, last = example.branches
    assert (first.continues, last.continues) == (False, True) and first.weights == last.weights == WEIGHTS
    assert 0 < first.prefix_length == last.prefix_length <= episode.steps[0].prompt_start
    dialogue, render = [*HISTORY, {"role": "user", "content": "Be quick."}], renderer(tokenizer)
    read = example.tokens[: first.prefix_length] + first.context
    assert tokenizer.decode(read) == render(dialogue)
    read += example.tokens[first.start : first.stop] + last.context
    assert tokenizer.decode(read) == render([*dialogue, *episode.dialogue(3)[len(HISTORY) :]])
    alone = example.without_trunk()
    assert alone.branches[0].context == example.tokens[: first.prefix_length] + first.context
    assert alone.branches[1].prefix_length == 0
    assert example.separated() == [alone]  # branches that read on cannot be parted


@pytest.mark.parametrize(
    "name, history", [("keeping", None), ("qwen3", "keep"), ("qwen3", "template"), ("llama3", None)]
)
@given(steps=_steps, data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_hint_in_the_last_user_message_reads_as_the_template_would_write_it(name, history, steps, data):
    tokenizer = make_llama_tokenizer() if name == "llama3" else make_tokenizer(TEMPLATES[name])
    chat, render = ChatFormat(tokenizer, history=history), renderer(tokenizer)
    if history != "template":
        steps = [("", said_text.strip(), user_next) for _, said_text, user_next in steps]
    episode = played(tokenizer, chat, steps, "<think>\n\n</think>\n\n" if history != "template" else "")
    number = data.draw(st.integers(1, len(steps)))
    released = prompts.find("released")
    branches = with_feedback(episode, [Target(number, "Not so.")], "last_user", released, chat, WEIGHTS)
    (example,) = examples(episode, branches)
    (branch,) = example.branches
    dialogue = episode.dialogue(number)
    place = max(n for n, message in enumerate(dialogue) if message["role"] == "user")
    dialogue[place] = {"role": "user", "content": dialogue[place]["content"] + "\n\n## Hint\nNot so."}
    teacher = example.tokens[: branch.prefix_length] + branch.context
    assert tokenizer.decode(teacher) == render(dialogue) and "Not so" not in tokenizer.decode(example.tokens)
    assert teacher[-len(PROMPT) :] == example.tokens[: branch.start][-len(PROMPT) :]
    assert branch.prefix_length <= episode.steps[number - 1].prompt_start


def test_a_hint_after_a_cut_action_keeps_the_stop_token_that_was_written_for_it():
    chat = ChatFormat(make_tokenizer(KEEPING_TEMPLATE))
    episode = Episode.begin("task", 0, HISTORY, chat.prompt(HISTORY))
    for text, cut in (("Do", True), ("Done.", False)):
        ids = chat.encode(text)[: -1 if cut else None]
        episode.append_action(ids, [-1.0] * len(ids), text, cut=cut)
        answers = [{"role": "user", "content": "And?"}]
        observation = chat.observation(episode.dialogue(len(episode.steps)), (), ids, answers, cut=cut)
        episode.append_observation(observation, answers)
    (branch,) = with_feedback(episode, [Target(2, "b")], "last_user", COMPACT, chat, WEIGHTS)
    said, first = (*HISTORY, {"role": "assistant", "content": "Do"}), episode.steps[0]
    whole = chat.prompt((*said, {"role": "user", "content": "And?\nb"})).ids
    assert (*episode.tokens[: branch.prefix_length], *branch.context) == whole
    assert branch.prefix_length > first.stop and episode.tokens[first.stop] == chat.stop_ids[0]


def test_where_no_user_has_spoken_a_hint_stands_before_the_step():
    chat = ChatFormat(make_tokenizer(KEEPING_TEMPLATE))
    rules = HISTORY[:1]
    episode = Episode.begin("task", 0, rules, chat.prompt(rules))
    episode.append_action([*chat.encode("a")], [-1.0] * len(chat.encode("a")), "a")
    (branch,) = with_feedback(episode, [Target(1, "b")], "last_user", COMPACT, chat, WEIGHTS)
    assert (branch.prefix_length, branch.context) == (episode.steps[0].prompt_start, chat.user_turn("b"))


def test_feedback_at_the_start_needs_one_stream():
    with pytest.raises(ValueError, match="step 2: .* one stream"):
        feedback_at_start(make_episode(seed=8, steps=6, rewrites=True), [5, 2], said("hm"), FakeChat(), WEIGHTS)


@pytest.mark.parametrize("step", [0, -1, 5])
@pytest.mark.parametrize(
    "branches_of",
    [
        lambda step: target_example(make_episode(), [Target(step, "x")]),
        lambda step: without_teacher(make_episode(), [step], WEIGHTS),
        lambda step: feedback_at_start(make_episode(), [step], said("x"), FakeChat(), WEIGHTS),
    ],
)
def test_a_step_that_does_not_exist_is_an_error(branches_of, step):
    with pytest.raises(ValueError, match=f"step {step} of an episode with 4 steps"):
        branches_of(step)


@pytest.mark.parametrize("context", [(900, 7, 8, 8), (8, 9), ()])
def test_another_generation_prompt_is_an_error(context):
    chat = SimpleNamespace(teacher_context=lambda dialogue, tools, trunk, text: (0, context))
    with pytest.raises(ValueError, match="step 2: .* generation prompt"):
        target_example(make_episode(), [Target(2, "x")], chat)
