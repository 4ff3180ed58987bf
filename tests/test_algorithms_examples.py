"""What each algorithm trains on, from the same four episodes and the same hindsight; the keys and groups that follow
from an episode.
"""

import dataclasses

import numpy as np
import pytest

from hintsd_jax.algorithms import ALGORITHMS
from hintsd_jax.algorithms.experience import successful_siblings
from hintsd_jax.config import build
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.hindsight.prompts import shipped
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.random_keys import job_key
from hintsd_jax.training.batching import BatchShapes, make_batches
from tests.configs import algorithm_config
from tests.examples_helpers import FakeChat, Keeping, experience_of, four_episodes, make_episode


def examples_of(name, analyses=(), changes=(), episodes=None):
    """(examples, episodes without any by reason, the feedback that the teacher reads)."""
    episodes, chat = episodes or four_episodes(), Keeping()
    algorithm = build.algorithm(algorithm_config(name, {"hindsight.prompts": "compact"} | dict(changes)))
    examples, without = algorithm.examples(experience_of(episodes, analyses, chat))
    return examples, dict(without), chat.texts


def actions(examples):
    """(episode, step, whether a teacher reads it, weights, advantage) of every action."""
    return [
        (example.episode, b.step, bool(b.context), dict(b.weights), round(b.advantage, 3))
        for example in examples
        for b in example.branches
    ]


DISTILLED, SUPERVISED, REINFORCED = {"divergence": 1.0}, {"cross_entropy": 1.0}, {"policy_gradient": 1.0}
TARGETS = [(1, [(2, "x"), (3, "y")], ()), (2, [], ()), (3, [(1, "z")], ())]


@pytest.mark.parametrize("name", ["hint_sd", "hint_sd_single"])
def test_hint_sd_trains_on_targets_alone(name):
    examples, without, texts = examples_of(name, TARGETS)
    expected = [(1, 2), (1, 3), (3, 1)]
    assert actions(examples) == [(*which, True, DISTILLED, 0.0) for which in expected] and not without
    assert texts == ["x", "y", "z"] and [example.micro_step for example in examples] == [0, 1]


def test_what_the_teacher_reads_in_released_words():
    prompts = {"hindsight.prompts": "released"}
    _, _, (feedback,) = examples_of("hint_sd", TARGETS[2:], prompts)
    assert feedback.startswith("Take the following feedback into account for this step.") and feedback.endswith("\n\nz")
    _, _, texts = examples_of("sdpo", [(2, [(1, "z"), (3, "y")], ())], prompts)
    ends = "\n\nNow solve the original task correctly."
    solution = "\n".join(f"deed 0.{number}" for number in (1, 2, 3))
    assert texts[0] == f"A correct solution of an earlier attempt:\n\n{solution}{ends}"
    assert texts[1] == f"Feedback on an earlier attempt that failed:\n\nStep 1: z\nStep 3: y{ends}"


def test_hint_sd_with_feedback_at_the_start_reads_each_on_its_own():
    episodes = four_episodes()
    changes = {"hindsight.feedback_position": "start"}
    (example,), _, texts = examples_of("hint_sd", TARGETS[:1], changes, episodes)
    assert texts == ["x", "y"] and actions([example]) == [(1, 2, True, DISTILLED, 0.0), (1, 3, True, DISTILLED, 0.0)]
    tokens, first = episodes[1].tokens, episodes[1].steps[0]
    for branch, text in zip(example.branches, texts, strict=True):
        assert (branch.prefix_length, branch.continues) == (0, False)
        after = tokens[first.start : branch.start]
        assert branch.context == (*FakeChat().user_turn(text), *after)


def test_the_separate_layout_has_an_example_per_target():
    alone = {"batch.layout": "separate", "batch.branch_buckets": (), "batch.action_buckets": ()}
    examples, _, _ = examples_of("hint_sd", TARGETS[:1], alone)
    assert [[b.step for b in example.branches] for example in examples] == [[2], [3]]
    assert all(example.branches[0].prefix_length == 0 for example in examples)
    whole, _, _ = examples_of("grpo", changes={"batch.layout": "separate"})
    assert [len(example.branches) for example in whole] == [3, 3]  # nothing to part where no teacher reads


def test_grpo_trains_on_all_steps_where_rollouts_differ():
    examples, without, texts = examples_of("grpo")
    value = round(0.5 / (np.std([1.0, 0.0], ddof=1) + 1e-6), 3)
    expected = [(n, step, False, REINFORCED, sign * value) for n, sign in ((0, 1), (1, -1)) for step in (1, 2, 3)]
    assert actions(examples) == expected
    assert without == {"no_advantage": 2} and not texts


def test_advantages_against_numpy():
    """Of the rollouts of a task; the same task again in the step is another group."""
    episodes = [make_episode(seed) for seed in range(7)]
    rewards = np.array([1.0, 0.25, 0.0, 0.5, 0.5, 0.5, 0.75])
    for n, episode in enumerate(episodes):
        episode.task_id, episode.group, episode.reward = "aaabbba"[n], "aaabbbc".index("aaabbbc"[n]), rewards[n]
    experience = experience_of(episodes)
    group = rewards[:3]
    spread = np.sqrt(((group - group.mean()) ** 2).sum() / 2)
    expected = [*((group - group.mean()) / (spread + 1e-6)), 0, 0, 0, 0]
    np.testing.assert_allclose([experience.advantage(episode) for episode in episodes], expected)
    dr_grpo = [*(group - group.mean()), 0, 0, 0, 0]
    np.testing.assert_allclose([experience.advantage(episode, normalize=False) for episode in episodes], dr_grpo)


@pytest.mark.parametrize("name", ["grpo", "hint_sd+grpo"])
def test_grpos_options(name):
    """Cut episodes are left out where the config says so, but count in the mean of their group; equal groups may stay;
    a reference has its weight on the same tokens.
    """
    episodes = four_episodes()
    episodes[1].terminated = False
    value, near = round(0.5 / (np.std([1.0, 0.0], ddof=1) + 1e-6), 3), REINFORCED | {"reference_kl": 1.0}
    of = lambda n, weights, advantage: [(n, step, False, weights, advantage) for step in (1, 2, 3)]

    examples, without, _ = examples_of(name, changes={"rollout.mask_cut_episodes": True}, episodes=episodes)
    assert actions(examples) == of(0, REINFORCED, value) and without == {"cut_episode": 1, "no_advantage": 2}
    changes = {"grpo.drop_equal_groups": False, "grpo.normalize_std": False, "grpo.reference_kl": 0.1}
    examples, without, _ = examples_of(name, changes=changes, episodes=episodes)
    expected = [each for n, advantage in enumerate((0.5, -0.5, 0.0, 0.0)) for each in of(n, near, advantage)]
    assert actions(examples) == expected and not without


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_cut_episode_is_a_failure_or_left_out_everywhere(name):
    """Neither looked back on nor trained on, whatever the algorithm."""
    episodes, looked_at = four_episodes(), []
    episodes[1].terminated = False

    class Analyser:
        def review(self, episodes):
            looked_at.append(episodes)
            return Hindsight()

        judge_steps = review

    for masked in (False, True):
        algorithm = build.algorithm(algorithm_config(name, {"rollout.mask_cut_episodes": masked}))
        algorithm.analyse(episodes, Analyser())
        examples, without = algorithm.examples(experience_of(episodes))
        assert without["cut_episode"] == masked and not (masked and 1 in {example.episode for example in examples})
    if looked_at:
        assert any(each is episodes[1] for each in looked_at[0]) or name == "sdpo"
        assert not any(each is episodes[1] for each in looked_at[1])


def test_the_mean_over_episodes_in_numpy():
    """The loss that the update divides by all tokens: the mean over episodes of their means, of any losses."""
    episodes, changes = four_episodes(), {"grpo.mean": "sequence", "grpo.drop_equal_groups": False}
    algorithm = build.algorithm(algorithm_config("grpo", changes))
    examples, _ = algorithm.examples(experience_of(episodes))
    shapes = BatchShapes((80,), (0,), (24,), batch_size=4, trunk=False)
    (batch,), *_, spans = make_batches(examples, shapes, algorithm.loss)
    losses = np.random.default_rng(0).normal(size=batch.mask_BA.shape)
    of_episode = {n: [] for n in range(4)}
    for span in spans:
        of_episode[span.episode] += losses[span.row, span.start : span.stop].tolist()
    assert len({len(values) for values in of_episode.values()}) > 1
    expected = np.mean([np.mean(values) for values in of_episode.values()])
    np.testing.assert_allclose(np.sum(batch.weight_BAP[..., 0] * losses) / batch.mask_BA.sum(), expected, rtol=1e-5)


def test_sft_trains_on_every_action_of_what_it_is_given():
    examples, without, _ = examples_of("sft")
    expected = [(n, step, False, SUPERVISED, 0.0) for n in range(4) for step in (1, 2, 3)]
    assert actions(examples) == expected and not without


def test_rejection_sampling_trains_on_successes_and_self_training_on_one_step_of_each():
    examples, without, _ = examples_of("rejection_sampling")
    assert actions(examples) == [(0, step, False, SUPERVISED, 0.0) for step in (1, 2, 3)] and not without
    examples, without, _ = examples_of("self_training")
    assert [example.episode for example in examples] == [0, 1, 2, 3] and not without
    assert all(action[2:] == (False, SUPERVISED, 0.0) for action in actions(examples)) and len(actions(examples)) == 4
    assert actions(examples_of("self_training")[0]) == actions(examples)  # chosen by the episode's key


def test_openclaw_rl_adds_the_judges_verdict_to_what_the_hint_says():
    verdicts = ((1.0, -1.0, 0.0), (0.0, 0.0, 0.0))
    analyses = [(0, [(2, "x")], verdicts[0]), (2, [(3, "y")], verdicts[1]), (3, [], verdicts[1])]
    examples, without, texts = examples_of("openclaw_rl", analyses)
    judged = [(0, 1, False, REINFORCED, 1.0), (0, 2, True, REINFORCED, -1.0)]
    assert actions(examples) == [*judged, (2, 3, True, REINFORCED, 0.0)]  # a hint alone is something to learn from
    assert without == {"no_advantage": 2} and texts == ["x", "y"]


def test_hint_sd_with_grpo_has_both():
    examples, without, _ = examples_of("hint_sd+grpo", [TARGETS[0], TARGETS[2]])
    value = round(-0.5 / (np.std([1.0, 0.0], ddof=1) + 1e-6), 3)
    both, of_failure = DISTILLED | REINFORCED, [action for action in actions(examples) if action[0] == 1]
    assert of_failure == [
        (1, 1, False, REINFORCED, value),
        (1, 2, True, both, value),
        (1, 3, True, both, value),
    ]
    # no advantage, but feedback: distilled alone
    assert [action for action in actions(examples) if action[0] == 3] == [(3, 1, True, DISTILLED, 0.0)]
    assert {action[0] for action in actions(examples)} == {0, 1, 3} and without == {"no_advantage": 1}


def test_sdpo_reads_a_siblings_success_or_else_the_feedback():
    episodes, targets = four_episodes(), [(1, "z"), (3, "y")]
    examples, without, texts = examples_of("sdpo", [(2, targets, ())], episodes=episodes)
    reprompt = lambda **known: shipped("compact").teacher_reprompt((), **known)[-1]["content"]
    solution = [step.text for step in episodes[0].steps]
    assert texts == [reprompt(solution=solution), reprompt(targets=[Target(*target) for target in targets])]
    assert [(example.episode, [b.step for b in example.branches]) for example in examples] == [
        (1, [1, 2, 3]),
        (2, [1, 2, 3]),
    ]
    assert all([b.continues for b in example.branches] == [False, True, True] for example in examples)
    assert all(action[2:] == (True, DISTILLED, 0.0) for action in actions(examples))
    # the only success has no sibling that succeeded; of one failure nothing was said
    assert without == {"no_feedback": 2}
    assert "deed 0.2" in texts[0] and "deed 1" not in texts[0]


@pytest.mark.parametrize(
    "name", ["hint_sd", "hint_sd+grpo", "grpo", "sdpo", "rejection_sampling", "self_training", "openclaw_rl"]
)
def test_an_episode_without_a_step_trains_nothing(name):
    episodes = four_episodes()
    episodes[1].steps, episodes[1].logprobs = [], []
    assert all(example.episode != 1 for example in examples_of(name, episodes=episodes)[0])


def test_everything_random_about_an_episode_follows_from_its_keys():
    """Not from its place among the others; micro-steps are tasks."""
    episodes = four_episodes()
    experience, alone = experience_of(episodes), experience_of(episodes[2:3])
    for purpose in ("dropout", "sharpen"):
        expected = job_key(42, 3, f"{purpose} b", 0)
        for each in (experience, alone):
            np.testing.assert_array_equal(each.key(episodes[2], purpose), expected)
    examples = examples_of("self_training", episodes=episodes)[0]
    assert [example.key for example in examples] == [
        tuple(job_key(42, 3, f"dropout {episode.task_id}", episode.rollout).tolist()) for episode in episodes
    ]
    assert [example.micro_step for example in examples] == [0, 0, 1, 1]


def test_episodes_are_told_apart_by_what_they_are_not_by_what_they_hold():
    """Two equal rollouts are siblings; what hindsight says of one it does not say of the other."""
    first = four_episodes()[0]
    twin = dataclasses.replace(first)
    experience = experience_of([first, twin], [(0, [(1, "x")], ())])
    assert experience.successful_siblings(first) == [twin] == successful_siblings([first, twin], first)
    assert experience.analysis(first).targets and not experience.analysis(twin).targets
    assert experience.analysis(twin).episode is twin
