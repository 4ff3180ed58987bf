"""What each method trains on, from the same four episodes and the same hindsight."""

import numpy as np
import pytest

from hintsd_jax import lessons
from hintsd_jax.config import schema as schema
from hintsd_jax.config.validation import validate
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.analyser import Analysis, Hindsight
from hintsd_jax.hindsight.targets import Target
from tests.examples_helpers import FakeChat, make_episode


class Keeping(FakeChat):
    """Remembers what advice was worded."""

    def __init__(self):
        self.said = []

    def user_turn(self, text):
        self.said.append(text)
        return super().user_turn(text)


def episodes():
    """Two tasks with two rollouts: one success and one failure of "a", two failures of "b"."""
    made = [make_episode(seed, steps=3) for seed in range(4)]
    for n, episode in enumerate(made):
        episode.task_id, episode.rollout = "ab"[n // 2], n % 2
        episode.reward, episode.terminated = float(n == 0), True
        for number, step in enumerate(episode.steps, 1):
            step.text = f"deed {n}.{number}"
    return made


def make_rows(method, analyses=(), changes=(), made=None):
    config = schema.base()
    config.policy.path, config.algorithm, config.tasks.rollouts, config.rollout.slots = "policy", method, 2, 4
    config.update_from_flattened_dict(dict(changes))
    made, chat = made or episodes(), Keeping()
    found = Hindsight(
        [
            Analysis(made[n], tuple(Target(*target) for target in targets), rewards=rewards)
            for n, targets, rewards in analyses
        ]
    )
    found_rows, without = lessons.make_rows(validate(config), chat, made, found, step=3)
    return made, found_rows, dict(without), chat.said


def told(found_rows):
    """(episode, step, whether a teacher reads it, weight, advantage) of every action."""
    return [
        (row.episode, b.step, bool(b.words), b.weight, round(b.advantage, 3))
        for row in found_rows
        for b in row.branches
    ]


def test_hint_sd_trains_on_targets_alone():
    _, found_rows, without, said = make_rows(
        "hint_sd", [(1, [(2, "x"), (3, "y")], ()), (2, [], ()), (3, [(1, "z")], ())]
    )
    assert told(found_rows) == [(1, 2, True, 1.0, 0.0), (1, 3, True, 1.0, 0.0), (3, 1, True, 1.0, 0.0)] and not without
    assert said == ["x", "y", "z"] and [row.micro for row in found_rows] == [0, 1]


def test_hint_sd_with_feedback_at_the_start_reads_each_on_its_own():
    made, (row,), _, said = make_rows(
        "hint_sd", [(1, [(2, "x"), (3, "y")], ())], {"hindsight.feedback_position": "start"}
    )
    assert said == ["x", "y"] and [(b.step, b.seen, b.joined) for b in row.branches] == [(2, 0, False), (3, 0, False)]
    first = made[1].steps[0]
    for branch, text in zip(row.branches, said, strict=True):
        assert branch.words == (
            *made[1].tokens[: first.prompt_start],
            *FakeChat().user_turn(text),
            *made[1].tokens[first.start : branch.start],
        )


def test_forms_with_a_row_per_target():
    _, found_rows, _, _ = make_rows("hint_sd", [(1, [(2, "x"), (3, "y")], ())], {"batch.layout": "rows"})
    assert [[b.step for b in row.branches] for row in found_rows] == [[2], [3]] and all(
        row.branches[0].seen == 0 for row in found_rows
    )


def test_grpo_trains_on_all_steps_where_rollouts_differ():
    _, found_rows, without, said = make_rows("grpo")
    value = round(0.5 / (np.std([1.0, 0.0], ddof=1) + 1e-6), 3)
    assert told(found_rows) == [
        (n, step, False, 0.0, sign * value) for n, sign in ((0, 1), (1, -1)) for step in (1, 2, 3)
    ]
    assert without == {"no_advantage": 2} and not said


def test_advantages_against_numpy():
    made = [make_episode(seed) for seed in range(7)]
    rewards = np.array([1.0, 0.25, 0.0, 0.5, 0.5, 0.5, 0.75])
    for n, episode in enumerate(made):
        episode.task_id, episode.reward = "aaabbbc"[n], rewards[n]
    group = rewards[:3]
    spread = np.sqrt(((group - group.mean()) ** 2).sum() / 2)
    np.testing.assert_allclose(lessons.advantages(made), [*((group - group.mean()) / (spread + 1e-6)), 0, 0, 0, 0])


def test_sft_trains_on_successes_and_sharpening_on_one_step_of_each():
    _, found_rows, _, _ = make_rows("sft")
    assert told(found_rows) == [(0, step, False, 1.0, 0.0) for step in (1, 2, 3)]
    _, found_rows, _, _ = make_rows("sharpen")
    assert [row.episode for row in found_rows] == [0, 1, 2, 3] and all(len(row.branches) == 1 for row in found_rows)


def test_dense_adds_the_judges_reward_to_what_the_hint_says():
    rewards = ((1.0, -1.0, 0.0), (0.0, 0.0, 0.0))
    _, found_rows, without, said = make_rows("dense", [(0, [(2, "x")], rewards[0]), (3, [], rewards[1])])
    assert told(found_rows) == [(0, 1, False, 0.0, 1.0), (0, 2, True, 1.0, -1.0)]
    assert without == {"no_advantage": 3} and said == ["x"]


def test_hint_sd_with_grpo_has_both():
    _, found_rows, without, _ = make_rows("hint_sd+grpo", [(1, [(2, "x")], ()), (3, [(1, "z")], ())])
    actions = told(found_rows)
    assert [action[:4] for action in actions if action[0] == 1] == [
        (1, 1, False, 0.0),
        (1, 2, True, 1.0),
        (1, 3, False, 0.0),
    ]
    assert [action for action in actions if action[0] == 3] == [(3, 1, True, 1.0, 0.0)]  # no advantage, but feedback
    assert {action[0] for action in actions} == {0, 1, 3} and without == {"no_advantage": 1}


def test_sdpo_reads_a_siblings_success_or_else_the_feedback():
    made, found_rows, without, said = make_rows("sdpo", [(2, [(1, "z"), (3, "y")], ())])
    assert said == [prompts.solution_hint(made[0]), prompts.combined_feedback([Target(1, "z"), Target(3, "y")])]
    assert [(row.episode, [b.step for b in row.branches], [b.joined for b in row.branches]) for row in found_rows] == [
        (1, [1, 2, 3], [False, True, True]), (2, [1, 2, 3], [False, True, True])
    ]  # fmt: skip
    assert without == {"no_advice": 2}  # the only success has no sibling that succeeded; one failure was not advised
    assert "deed 0.2" in said[0] and "deed 1" not in said[0]


@pytest.mark.parametrize("method", ["hint_sd", "grpo", "sdpo", "sft", "sharpen", "dense"])
def test_an_episode_without_a_step_trains_nothing(method):
    made = episodes()
    made[1].steps, made[1].logprobs = [], []
    assert all(row.episode != 1 for row in make_rows(method, made=made)[1])
