"""Invariant 1: an episode's streams only grow, sampled ids stand as sampled, and the masks cover exactly them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.rollout.chat import ChatFormat, Delta
from hintsd_jax.rollout.episode import Episode
from tests.helpers import make_tokenizer

OBSERVATION = [{"role": "tool", "content": "observed"}]


def random_turns(seed: int):
    """A prompt and up to six (sampled ids, answer) pairs; the last answer may be None, where the episode ended."""
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(0, 200_000, rng.integers(1, 9)).tolist()

    def piece(rewrites=0.0):
        tokens = ids()
        return Delta(tuple(tokens), int(rng.integers(0, len(tokens))), new_stream=bool(rng.random() < rewrites))

    turns = [(ids(), piece(rewrites=0.3)) for _ in range(rng.integers(0, 7))]
    return piece(), turns + ([(ids(), None)] if seed % 2 else [])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31))
def test_random_episodes_are_append_only(seed):
    prompt, turns = random_turns(seed)
    episode = Episode.begin("t", 0, [{"role": "user", "content": "Go."}], prompt)
    streams, sampled, openings = [list(prompt.ids)], [[]], [prompt.prompt_start]
    for number, (ids, delta) in enumerate(turns):
        before = [list(stream.tokens) for stream in episode.streams]
        step = episode.append_action(np.array(ids), -np.arange(len(ids)), "text")
        assert (step.stream, step.prompt_start) == (len(streams) - 1, openings[number])
        sampled[-1] += range(len(streams[-1]), len(streams[-1]) + len(ids))
        streams[-1] += ids
        episode.append_observation(delta, OBSERVATION, reward=number)
        if delta is not None:
            if delta.new_stream:
                streams.append([])
                sampled.append([])
            openings.append(len(streams[-1]) + delta.prompt_start)
            streams[-1] += delta.ids
        for stream, old in zip(episode.streams, before, strict=False):
            assert stream.tokens[: len(old)] == old
        episode.verify()
    assert [stream.tokens for stream in episode.streams] == streams and episode.tokens == streams[-1]
    assert all(type(token) is int for stream in episode.streams for token in stream.tokens)
    for number, stream in enumerate(streams):
        mask = episode.action_mask(number)
        assert mask.dtype == bool and mask.shape == (len(stream),)
        assert np.flatnonzero(mask).tolist() == sampled[number]
    np.testing.assert_array_equal(episode.action_mask(), mask)
    assert len(episode.logprobs) == sum(map(len, sampled))
    for step, (ids, _) in zip(episode.steps, turns, strict=True):
        assert episode.streams[step.stream].tokens[step.start : step.stop] == ids
    record = json.loads(json.dumps(episode.to_json()))
    assert record["streams"] == streams and [step["stream"] for step in record["steps"]] == [
        step.stream for step in episode.steps
    ]
    said = [{"role": "user", "content": "Go."}] + [{"role": "assistant", "content": "text"}, *OBSERVATION] * len(turns)
    assert [episode.dialogue(number) for number in range(1, len(turns) + 2)] == [
        said[: 1 + 2 * n] for n in range(len(turns) + 1)
    ]


def test_an_episode_of_real_text_reads_as_the_template_writes_it():
    tokenizer = make_tokenizer()
    chat = ChatFormat(tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Read it."}]
    episode = Episode.begin("t", 1, messages, chat.prompt(messages))
    answers = (
        [{"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}],
        [{"role": "user", "content": "And?"}],
    )
    for action, answer in zip(("Looking.", "It says a, b."), answers, strict=True):
        ids = [*tokenizer.encode(action), chat.stop_ids[0]]
        episode.append_action(ids, [0.0] * len(ids), chat.decode(ids))
        episode.append_observation(chat.delta(answer), answer)
        messages += [{"role": "assistant", "content": action}, *answer]
    assert tuple(episode.tokens) == chat.prompt(messages).ids
    assert [step.text for step in episode.steps] == ["Looking.", "It says a, b."]
    assert [step.observation for step in episode.steps] == ["a\nb", "user: And?"]
    for step in episode.steps:  # the branch and the span meet at the generation prompt
        assert tokenizer.decode(episode.tokens[step.prompt_start : step.start]) == "<|im_start|>assistant\n"
        assert tokenizer.decode(episode.tokens[: step.prompt_start]).endswith("<|im_end|>\n")


def episode_of_two_steps() -> Episode:
    episode = Episode.begin("t", 0, [{"role": "user", "content": "Go."}], Delta((1, 2, 3), 2))
    episode.append_action([4, 5], [-1.0, -2.0], "one")
    episode.append_observation(Delta((6, 7), 1), OBSERVATION, 0.5)
    episode.append_action([8], [-3.0], "two")
    return episode


@pytest.mark.parametrize(
    "break_it",
    [
        lambda e: e.tokens.__setitem__(0, 9),
        lambda e: e.tokens.__setitem__(4, 9),
        lambda e: e.tokens.append(9),
        lambda e: e.tokens.pop(),
        lambda e: e.tokens.insert(2, 9),
        lambda e: e.tokens.reverse(),
    ],
)
def test_tokens_changed_from_outside_are_found_out(break_it):
    episode = episode_of_two_steps()
    break_it(episode)
    with pytest.raises(RuntimeError, match="changed outside append"):
        episode.verify()
    with pytest.raises(RuntimeError, match="changed outside append"):
        episode.append_observation(Delta((9, 10), 0))


def test_an_earlier_stream_is_guarded_too():
    def rewritten():
        episode = episode_of_two_steps()
        episode.append_observation(Delta((1, 2), 1, new_stream=True), OBSERVATION)
        return episode

    for break_it in (lambda e: e.streams[0].tokens.append(9), lambda e: e.streams[0].tokens.__setitem__(0, 9)):
        episode = rewritten()
        break_it(episode)
        with pytest.raises(RuntimeError, match="changed outside append"):
            episode.verify()
    for stream, at in ((1, 0), (0, 9)):  # a step in another stream, a span beyond its stream
        episode = rewritten()
        episode.append_action([3], [0.0], "three")
        episode.steps[0].stream, episode.steps[0].stop = stream, episode.steps[0].stop + at
        with pytest.raises(RuntimeError, match="step . is out of order"):
            episode.verify()
    episode = episode_of_two_steps()
    episode.tokens.append(9)
    with pytest.raises(RuntimeError, match="changed outside append"):
        episode.append_observation(Delta((1, 2), 1, new_stream=True), OBSERVATION)


def test_spans_that_lie_are_found_out():
    episode = episode_of_two_steps()
    episode.steps[1].start -= 2
    with pytest.raises(RuntimeError, match="step 2 is out of order"):
        episode.verify()
    episode = episode_of_two_steps()
    episode.steps[0].stop -= 1
    with pytest.raises(RuntimeError, match="differ in length"):
        episode.verify()


def test_actions_and_observations_alternate():
    episode = Episode.begin("t", 0, [], Delta((1, 2), 1))
    with pytest.raises(ValueError, match="must follow an action"):
        episode.append_observation(Delta((1, 2), 1))
    for ids, logprobs in (([], []), ([1], []), ([1], [0.0, 0.0])):
        with pytest.raises(ValueError, match="log-probs"):
            episode.append_action(ids, logprobs, "")
    episode.append_action([3], [0.0], "x")
    with pytest.raises(ValueError, match="must follow a generation prompt"):
        episode.append_action([3], [0.0], "x")
    with pytest.raises(ValueError, match="prompt_start 2 lies outside the 2 tokens"):
        episode.append_observation(Delta((1, 2), 2))
    # nothing is tokenised once it ended
    episode.append_observation(None, [{"role": "tool", "content": "the end"}], 1.0)
    assert episode.tokens == [1, 2, 3] and episode.steps[0].observation == "the end"
    with pytest.raises(ValueError, match="must follow a generation prompt"):
        episode.append_action([3], [0.0], "x")
    with pytest.raises(ValueError, match="prompt_start 0 lies outside the 0 tokens"):
        Episode.begin("t", 0, [], Delta((), 0))


@pytest.mark.parametrize(
    ("terminated", "reward", "success"), [(True, 1.0, True), (True, 0.99, False), (False, 1.0, False)]
)
def test_success_is_terminated_with_the_full_reward(terminated, reward, success):
    episode = episode_of_two_steps()
    episode.terminated, episode.reward = terminated, reward
    assert episode.success is success


def test_the_record_holds_everything():
    episode = episode_of_two_steps()
    episode.report, episode.ended, episode.detail = Report("why", (Fault(1, "do"),)), "max_steps", "d"
    record = json.loads(json.dumps(episode.to_json()))
    assert record["report"] == {"summary": "why", "faults": [{"step": 1, "feedback": "do"}], "valid_turns": []}
    assert record["steps"][0] == {
        "start": 3,
        "stop": 5,
        "prompt_start": 2,
        "text": "one",
        "observation": "observed",
        "reward": 0.5,
        "stream": 0,
        "cut": False,
        "calls": 0,
        "problem": "",
    }
    assert (record["group"], record["occurrence"]) == (0, 0)
    assert record["prompt_messages"] == [{"role": "user", "content": "Go."}]
    assert (
        record["streams"] == [list(range(1, 9))]
        and record["logprobs"] == [-1.0, -2.0, -3.0]
        and record["prompt_length"] == 3
    )
    assert (record["task_id"], record["rollout"], record["ended"], record["detail"]) == ("t", 0, "max_steps", "d")
    assert (record["reward"], record["terminated"], record["success"]) == (0.0, False, False)
