"""The analyser's questions: compact, complete, and without anything that knows the ground truth."""

import pytest

from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.parse import parse_failures
from hintsd_jax.rollout.chat import Delta
from hintsd_jax.rollout.episode import Episode


def make_episode() -> Episode:
    messages = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Move it."}]
    episode = Episode.begin("task-7", 0, messages, Delta((1, 2), 1))
    tool, user = lambda text: {"role": "tool", "content": text}, {"role": "user", "content": "And now?"}
    for action, observation, reward in (
        ("look", [tool("a b")], 0.0),
        ("take a", [tool("ok"), user], 0.25),
        ("bye", [], 0.0),
    ):
        episode.append_action([3], [0.0], action)
        episode.append_observation(Delta((4, 5), 1), observation, reward)
    episode.reward, episode.ended = 0.25, "max_steps"
    return episode


def test_the_whole_rendering():
    assert prompts.render_trajectory(make_episode()) == (
        f"{prompts.TASK}Rules.\nuser: Move it.{prompts.RESULT}0.25, max_steps{prompts.STEPS}"
        "#1 look\n> a b\n"
        "#2 take a\n> ok\nuser: And now?\nreward 0.25\n"
        "#3 bye\n> \n"
    )


def test_requests_end_with_what_is_asked():
    episode = make_episode()
    (review,) = prompts.review_messages(episode, 3)
    assert review["role"] == "user"
    assert review["content"] == prompts.render_trajectory(episode) + prompts.REVIEW + prompts.AT_MOST + "3"
    assert prompts.review_messages(episode, 1)[0]["content"].endswith(prompts.REVIEW + prompts.ONLY_FIRST)
    (request,) = prompts.step_feedback_messages(episode, 2)
    assert request["content"] == prompts.render_trajectory(episode) + prompts.ADVISE + prompts.GIVEN + "#2"
    for step in (0, 4):
        with pytest.raises(ValueError, match="step"):
            prompts.step_feedback_messages(episode, step)


def test_the_ground_truth_is_never_read():
    episode = make_episode()
    before = (prompts.review_messages(episode, 3), prompts.step_feedback_messages(episode, 1))
    episode.report = Report("SECRET", (Fault(2, "SECRET"),))
    episode.detail = "SECRET"
    assert (prompts.review_messages(episode, 3), prompts.step_feedback_messages(episode, 1)) == before


def test_the_step_list_is_clipped_from_its_beginning_and_says_so():
    episode = make_episode()
    steps = prompts.render_trajectory(episode).partition(prompts.STEPS)[2]
    assert prompts.render_trajectory(episode, len(steps)).endswith(prompts.STEPS + steps)
    clipped = prompts.render_trajectory(episode, 15)
    assert clipped.endswith(prompts.STEPS + prompts.CLIPPED + steps[-15:])
    assert "Move it." in clipped  # the task is never cut
    with pytest.raises(ValueError, match="clip_chars"):
        prompts.render_trajectory(episode, 0)


@pytest.mark.parametrize("wording", [prompts.REVIEW, prompts.ADVISE])
def test_the_example_in_the_wording_is_a_valid_answer(wording):
    assert parse_failures(wording, num_steps=2, max_targets=1).targets[0].step == 2


def test_fixed_strings_are_all_of_the_fixed_text():
    text = prompts.review_messages(make_episode(), 3)[0]["content"]
    for piece in sorted(prompts.FIXED_STRINGS, key=len, reverse=True):
        text = text.replace(piece, "|")
    assert (
        text == "|Rules.\nuser: Move it.|0.25, max_steps||1 look|a b\n|2 take a|ok\nuser: And now?|0.25\n|3 bye|\n||3"
    )
    assert len(set(prompts.FIXED_STRINGS)) == len(prompts.FIXED_STRINGS)
