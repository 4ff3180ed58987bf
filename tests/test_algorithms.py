"""Algorithms by name: what each decides, refuses and asks, its loss and the shapes of its batches; one of one's own."""

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import pytest

from hintsd_jax.algorithms import ALGORITHMS, find
from hintsd_jax.algorithms.base import DEFAULTS, Algorithm
from hintsd_jax.algorithms.branching import all_steps, without_teacher
from hintsd_jax.algorithms.hint_sd import HintSD
from hintsd_jax.config import base, build
from hintsd_jax.config.edge import flatten
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.models.sampling_distribution import SamplingDistribution
from hintsd_jax.training.batching import BatchShapes, make_batches
from hintsd_jax.training.loss_parts import CrossEntropy, Divergence, LossPart, PolicyGradient, ReferenceKL, TokenLosses
from hintsd_jax.training.losses import Loss
from tests.configs import algorithm_config
from tests.examples_helpers import experience_of, four_episodes


def algorithm(name, changes=None):
    return build.algorithm(algorithm_config(name, changes))


def problem(name, changes=None):
    with pytest.raises(UserError) as caught:
        algorithm_config(name, changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_settles_every_open_key(name):
    config = algorithm_config(name)
    assert None not in flatten(config.to_dict()).values()
    assert build.build(config.to_dict()) == config  # again: nothing is left to decide
    assert find(name).defaults.keys() == DEFAULTS.keys()


def test_what_the_algorithms_are():
    weighed = Divergence(kind="jsd", importance_clip=2.0)
    losses = {
        "hint_sd": (Divergence(),),
        "hint_sd_single": (Divergence(),),
        "hint_sd+grpo": (Divergence(), PolicyGradient()),
        "openclaw_rl": (PolicyGradient(teacher_advantage=1.0),),
        "sdpo": (weighed,),
        "grpo": (PolicyGradient(),),
        "rejection_sampling": (CrossEntropy(),),
        "sft": (CrossEntropy(),),
        "self_training": (CrossEntropy(),),
    }
    algorithms = {name: algorithm(name) for name in ALGORITHMS}
    sampling = SamplingDistribution(0.6)  # of the rollouts
    expected = {n: Loss(parts, sampling=sampling) for n, parts in losses.items()}
    assert {name: each.loss for name, each in algorithms.items()} == expected
    ratios = {name for name, each in algorithms.items() if each.loss.uses_ratio}
    assert ratios == {"hint_sd+grpo", "openclaw_rl", "sdpo", "grpo"}
    asking = {name for name, each in algorithms.items() if each.uses_analyser}
    assert asking == ALGORITHMS.keys() - {"grpo", "rejection_sampling", "self_training", "sft"}
    assert {name for name, each in algorithms.items() if each.offline} == {"sft"}
    assert {name for name, each in algorithms.items() if each.describe_targets()} == asking
    sdpo, judged, single, plain = (
        algorithms[name].config for name in ("sdpo", "openclaw_rl", "hint_sd_single", "hint_sd")
    )
    assert (sdpo.loss.divergence, sdpo.loss.alpha, sdpo.loss.importance_clip) == ("jsd", 0.5, 2.0)
    assert (sdpo.hindsight.feedback_position, sdpo.optim.ema_decay) == ("start", 0.95)
    assert (judged.hindsight.select, single.hindsight.max_targets) == ("all", 1)
    assert (plain.loss.divergence, plain.hindsight.max_targets, plain.optim.ema_decay) == ("reverse_kl", 3, 0.999)
    assert (plain.hindsight.feedback_position, plain.hindsight.select) == ("target", "hindsight")


def test_a_config_wins_over_its_algorithm():
    given = {"loss.divergence": "reverse_kl", "optim.ema_decay": 0.9}
    config = algorithm_config("sdpo", given)
    assert (config.loss.divergence, config.optim.ema_decay, config.loss.importance_clip) == ("reverse_kl", 0.9, 2.0)
    assert base().loss.importance_clip is None  # what a config file begins with stays open


def test_a_loss_has_the_configs_settings():
    loss = {"loss.support": "teacher_topk", "loss.top_k": 7, "loss.alpha": 0.3, "loss.divergence": "jsd"}
    loss |= {"loss.importance_clip": 3.0, "loss.clip_low": 0.1, "loss.clip_high": 0.4, "loss.chunk_tokens": 16}
    loss |= {"loss.policy_gradient_weight": 0.25, "rollout.temperature": 1.5, "rollout.top_p": 0.5, "rollout.top_k": 7}
    divergence, gradient = (both := algorithm("hint_sd+grpo", loss).loss).parts
    assert divergence == Divergence(kind="jsd", support="teacher_topk", top_k=7, alpha=0.3, importance_clip=3.0)
    assert gradient == PolicyGradient(clip_low=0.1, clip_high=0.4, coefficient=0.25) and both.chunk_tokens == 16
    assert both.sampling == SamplingDistribution(1.5, 0.5, 7)
    openclaw = algorithm("openclaw_rl", loss).loss.parts
    assert openclaw == (PolicyGradient(clip_low=0.1, clip_high=0.4, teacher_advantage=1.0),)


def test_grpos_options_are_of_its_parts():
    options = {"grpo.mean": "sequence", "grpo.reference_kl": 0.05, "loss.policy_gradient_weight": 0.5}
    near = ReferenceKL(coefficient=0.05, mean="sequence")
    assert algorithm("grpo", options).loss.parts == (PolicyGradient(mean="sequence"), near)
    both = algorithm("hint_sd+grpo", options).loss
    assert both.parts == (Divergence(), PolicyGradient(mean="sequence", coefficient=0.5), near) and both.needs_reference
    for name, kept in (("grpo", True), ("hint_sd", False)):
        assert build.keeps_initial_weights(algorithm_config(name, options)) == kept
    assert build.keeps_initial_weights(algorithm_config("hint_sd", {"hindsight.analyser": "initial_policy"}))


def test_an_unknown_algorithm_is_all_that_is_said():
    text = problem("hintsd")
    assert text.startswith("algorithm 'hintsd' is unknown") and "did you mean 'hint_sd'?" in text


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("openclaw_rl", {"hindsight.analyser": "environment"}, "judges all steps"),
        ("openclaw_rl", {"hindsight.select": "hindsight"}, "judges all steps"),
        ("openclaw_rl", {"hindsight.feedback_position": "start"}, "judges all steps"),
        ("sdpo", {"hindsight.feedback_position": "target"}, "whole episodes at their start"),
        ("sdpo", {"hindsight.select": "random"}, "whole episodes at their start"),
        ("sdpo", {"chat.history": "template"}, "needs chat.history = keep"),
        ("hint_sd", {"hindsight.feedback_position": "start", "chat.history": "template"}, "needs chat.history = keep"),
        ("hint_sd", {"hindsight.analyser": "endpoint"}, "endpoint.url is empty"),
        (
            "grpo",
            {"batch.whole_episode_buckets": (64, 64)},
            "batch.whole_episode_buckets = (64, 64) must be two lengths",
        ),
    ],
)
def test_what_an_algorithm_cannot_be_combined_with(name, changes, says):
    text = problem(name, changes)
    assert text.startswith("impossible config: ") and says in text


def test_a_ratio_needs_actions_that_were_drawn():
    greedy = {"rollout.temperature": 0.0, "tasks.rollouts": 1, "rollout.slots": 2}
    for name in ("grpo", "hint_sd+grpo", "openclaw_rl", "sdpo"):
        text = problem(name, greedy)
        assert f"algorithm = {name}" in text and "rollout.temperature = 0" in text
    assert algorithm("sdpo", greedy | {"loss.importance_clip": 0.0}).loss.sampling.is_softmax
    assert algorithm("hint_sd", greedy).loss.sampling.is_softmax


class Asked:
    """An analyser that remembers what it was asked about."""

    def __init__(self):
        self.calls = []

    def review(self, episodes):
        self.calls.append(("review", list(episodes)))
        return Hindsight(questions=1)

    def judge_steps(self, episodes):
        self.calls.append(("judge_steps", list(episodes)))
        return Hindsight(questions=1)


@pytest.mark.parametrize(
    "name, call, numbers",
    [
        ("hint_sd", "review", [1, 2, 3]),  # the failed ones
        ("hint_sd_single", "review", [1, 2, 3]),
        ("hint_sd+grpo", "review", [1, 2, 3]),
        ("sdpo", "review", [2, 3]),  # those without a successful sibling
        ("openclaw_rl", "judge_steps", [0, 1, 2, 3]),
        *((name, None, []) for name in ("grpo", "rejection_sampling", "self_training", "sft")),
    ],
)
def test_which_episodes_an_analyser_is_asked_about(name, call, numbers):
    episodes, asked = four_episodes(), Asked()
    hindsight = algorithm(name).analyse(episodes, asked)
    assert len(asked.calls) == (call is not None) and hindsight.questions == len(asked.calls)
    for which, given in asked.calls:
        assert which == call and [episodes.index(episode) for episode in given] == numbers
        assert all(any(episode is own for own in episodes) for episode in given)


BUCKETS = {
    "batch.length_buckets": (64, 128),
    "batch.branch_buckets": (32, 48),
    "batch.action_buckets": (8, 16),
    "batch.whole_episode_buckets": (96, 24),
    "batch.rows_per_device": 3,
    # lengths that these hold
    "rollout.context": 64,
    "rollout.max_action_tokens": 8,
    "rollout.prefill_buckets": (64,),
}
TARGETS = BatchShapes((64, 128), (32, 48), (8, 16), batch_size=12)
WHOLE = dataclasses.replace(TARGETS, branch_buckets=(96,), action_buckets=(24,))
SOME_STEPS = dataclasses.replace(TARGETS, branch_buckets=(24, 96), action_buckets=(24, 24))  # or all of them


@pytest.mark.parametrize(
    "name, changes, shapes",
    [
        ("hint_sd", {}, TARGETS),
        (
            "hint_sd",
            {"batch.layout": "separate", "batch.branch_buckets": (32, 96)},
            dataclasses.replace(TARGETS, branch_buckets=(32, 96), trunk=False),
        ),
        ("hint_sd", {"hindsight.feedback_position": "start"}, dataclasses.replace(WHOLE, trunk=False)),
        ("hint_sd", {"hindsight.select": "all"}, SOME_STEPS),
        ("hint_sd_single", {}, TARGETS),
        ("hint_sd+grpo", {}, dataclasses.replace(SOME_STEPS, parts=2, unscored=True)),  # some no teacher reads
        ("openclaw_rl", {}, dataclasses.replace(SOME_STEPS, unscored=True)),
        ("sdpo", {}, dataclasses.replace(WHOLE, trunk=False)),
        ("grpo", {}, dataclasses.replace(WHOLE, branch_buckets=(0,), trunk=False)),
        ("rejection_sampling", {}, dataclasses.replace(WHOLE, branch_buckets=(0,), trunk=False)),
        ("sft", {}, dataclasses.replace(WHOLE, branch_buckets=(0,), trunk=False)),
        ("self_training", {}, dataclasses.replace(TARGETS, branch_buckets=(0, 0), trunk=False)),
        (
            "self_training",
            {"hindsight.select": "all"},
            dataclasses.replace(TARGETS, branch_buckets=(0, 0), trunk=False),
        ),
    ],
)
def test_the_shapes_of_batches(name, changes, shapes):
    """On a mesh of 2 replicas x 2 parts; tensor parts hold the same rows."""
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 8})
    assert algorithm(name, BUCKETS | changes).batch_shapes(mesh) == shapes


def test_what_is_trained_on_in_words():
    describe = lambda name, **changes: algorithm(name, changes).describe_targets()
    assert describe("hint_sd") == "hindsight, at most 3 an episode, feedback at the target"
    assert describe("hint_sd", **{"hindsight.select": "last"}) == "last, feedback at the target"
    assert describe("sdpo") == "whole episodes, a sibling's success first"
    assert describe("openclaw_rl") == "every step, judged alone"


# From outside of the package.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surprise(LossPart):
    """Pays for what the student finds unlikely; with a setting of its own."""

    name: ClassVar[str] = "surprise"
    reports: ClassVar[tuple[str, ...]] = ("surprise",)
    above: float = 1.0

    def token_losses(self, tokens):
        return TokenLosses(-tokens.logprob_X - self.above, {"surprise": -tokens.logprob_X})


class LastOfFailures(Algorithm):
    """Trains on the last action of every failed episode, twice as much where the reward is lower than 0.5."""

    defaults = {**DEFAULTS, "optim.ema_decay": 0.5}
    uses_analyser = False
    nothing_to_learn = "succeeded"

    @classmethod
    def problems(cls, config):
        return [] if config.tasks.rollouts > 1 else ["LastOfFailures compares rollouts: raise tasks.rollouts"]

    def loss_parts(self):
        return (Surprise(above=0.5, coefficient=2.0), CrossEntropy())

    def branches(self, episode, experience):
        if episode.success:
            return []
        weights = {"surprise": 2.0 if episode.reward < 0.5 else 1.0}
        return without_teacher(episode, all_steps(episode)[-1:], weights)


class Undecided(HintSD):
    defaults = {key: value for key, value in DEFAULTS.items() if key != "optim.ema_decay"}


class Empty(Algorithm):
    pass


class NoAlgorithm:
    pass


HERE = __name__


def test_an_algorithm_of_ones_own_by_its_path():
    own = algorithm(f"{HERE}:LastOfFailures")
    assert isinstance(own, LastOfFailures) and own.config.optim.ema_decay == 0.5
    assert not own.loss.needs_teacher and own.describe_targets() == ""
    episodes, asked = four_episodes(), Asked()
    assert own.analyse(episodes, asked) == Hindsight() and not asked.calls
    examples, without = own.examples(experience_of(episodes))
    assert [(each.episode, [b.step for b in each.branches]) for each in examples] == [(1, [3]), (2, [3]), (3, [3])]
    assert without == {"succeeded": 1}
    shapes = dataclasses.replace(
        own.batch_shapes(SimpleNamespace(shape={"data": 1, "fsdp": 1})), length_buckets=(64,), batch_size=3
    )
    (batch,), *_ = make_batches(examples, shapes, own.loss)
    # a weight of 2 and a coefficient of 2 on all tokens; nothing acts by cross-entropy
    assert batch.weight_BAP[batch.mask_BA].tolist() == [[4.0, 0.0]] * int(batch.mask_BA.sum())
    assert "compares rollouts" in problem(f"{HERE}:LastOfFailures", {"tasks.rollouts": 1, "rollout.slots": 1})


def test_what_is_no_algorithm_is_refused_by_name():
    assert "no subclass of hintsd_jax.algorithms.base.Algorithm" in problem(f"{HERE}:NoAlgorithm")
    assert "no subclass of" in problem(f"{HERE}:four_episodes")
    assert "has no 'Missing'" in problem(f"{HERE}:Missing")
    assert "cannot import 'tests.nowhere'" in problem("tests.nowhere:Algorithm")
    assert "optim.ema_decay" in problem(f"{HERE}:Undecided")
    assert algorithm(f"{HERE}:Undecided", {"optim.ema_decay": 0.9}).config.optim.ema_decay == 0.9
    with pytest.raises(NotImplementedError, match="Empty must give loss_parts"):
        algorithm(f"{HERE}:Empty")
    with pytest.raises(NotImplementedError, match="LastOfFailures must give branches"):
        own = algorithm(f"{HERE}:LastOfFailures")
        Algorithm.branches(own, four_episodes()[0], None)
