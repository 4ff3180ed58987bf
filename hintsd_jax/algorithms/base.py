# SPDX-License-Identifier: Apache-2.0

"""The interface of all algorithms: the episodes of a training step go in, training examples and a loss come out.

The trainer knows no algorithm by name. It asks, in this order: `loss_parts` (once), `analyse` (who is asked about which
episodes), `branches` (which actions of an episode are trained on, what the teacher reads before each, and with which
weight each part of the loss acts on it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from jax.sharding import AbstractMesh, Mesh

from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.analyser import Analyser
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.models.attention import rows_may_be_packed
from hintsd_jax.models.sampling_distribution import SamplingDistribution
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.batching import BatchShapes
from hintsd_jax.training.examples import Branch, Example
from hintsd_jax.training.loss_parts import Divergence, LossPart, PolicyGradient
from hintsd_jax.training.losses import Loss

# Keys that every algorithm must decide, because a config leaves them open: HINT-SD's settings.
DEFAULTS: Mapping[str, Any] = {
    "hindsight.select": "hindsight",
    "hindsight.max_targets": 3,
    "hindsight.feedback_position": "target",
    "loss.divergence": "reverse_kl",
    "loss.importance_clip": 0.0,
    "optim.ema_decay": 0.999,
}

# Of what a teacher may read beside whole episodes, the part that is enough where it reads of some steps alone: most
# episodes then, and the rest is not paid for as padding.
FEW_STEPS = 4


class Algorithm:
    """One algorithm with the settings of a run. A subclass says what differs.

    defaults: config keys that the algorithm decides unless the config says otherwise. uses_analyser: whether `analyse`
    asks anybody. trains_whole_episodes: whether examples hold all actions of an episode, which takes other shapes.
    nothing_to_learn: the reason under which an episode without examples is counted; "" where that is no loss. offline:
    whether it learns from dialogues of another policy (`sft.path`), and nothing is rolled out.
    """

    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS
    uses_analyser: ClassVar[bool] = True
    trains_whole_episodes: ClassVar[bool] = False
    nothing_to_learn: ClassVar[str] = ""
    offline: ClassVar[bool] = False

    def __init__(self, config: Config):
        self.config = config
        self.prompts = prompts.find(config.hindsight.prompts)
        rollout = config.rollout
        sampling = SamplingDistribution(rollout.temperature, rollout.top_p, rollout.top_k)
        self.loss = Loss(self.loss_parts(), config.loss.chunk_tokens, sampling)
        if self.loss.uses_ratio and not rollout.temperature:
            raise UserError(
                f"algorithm = {config.algorithm} compares actions with how likely they were sampled, which has no"
                " meaning at rollout.temperature = 0: raise it (or set loss.importance_clip = 0, where that is all)"
            )

    @classmethod
    def problems(cls, config: Config) -> list[str]:
        """What this algorithm refuses about a config, a line each."""
        return []

    def loss_parts(self) -> tuple[LossPart, ...]:
        """The parts that the loss is the sum of."""
        raise NotImplementedError(f"algorithm {type(self).__name__} must give loss_parts")

    def analyse(self, episodes: Sequence[Episode], analyser: Analyser) -> Hindsight:
        """Looks back on the episodes that need it; by default on none. Where somebody else answers, episodes are still
        being played meanwhile: going through them waits for each, all else for all (`looking_back.Arriving`).
        """
        return Hindsight()

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        """The actions of an episode that are trained on, in the order of their steps."""
        raise NotImplementedError(f"algorithm {type(self).__name__} must give branches")

    def is_masked(self, episode: Episode) -> bool:
        """Whether a limit ended the episode and the config has such ones left out (`rollout.mask_cut_episodes`)."""
        return self.config.rollout.mask_cut_episodes and not episode.terminated

    def failures(self, episodes: Iterable[Episode]) -> Iterator[Episode]:
        """Those that failed and are to be learnt from."""
        return (episode for episode in episodes if not episode.success and not self.is_masked(episode))

    def describe_targets(self) -> str:
        """What is trained on, for the result's table; "" where no analyser is asked."""
        return ""

    def batch_shapes(self, mesh: Mesh | AbstractMesh, platform: str = "") -> BatchShapes:
        """The shapes of the update's batches: so many rows for each part of the mesh that a batch is split over.
        platform: of the devices, by default that of the mesh's.
        """
        if not platform:  # an abstract mesh has no devices: where they matter the platform is given
            platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "cpu"
        batch, hindsight, teacher = self.config.batch, self.config.hindsight, self.loss.needs_teacher
        in_place = hindsight.feedback_position == "target"
        at_start = hindsight.feedback_position == "start"  # then there is no trunk that it could share with the student
        branches, actions = batch.branch_buckets, batch.action_buckets
        trunk = teacher and batch.layout == "branches" and not at_start
        if self.trains_whole_episodes or (teacher and (not in_place or hindsight.select == "all")):
            whole, acted = batch.whole_episode_buckets
            branches = (whole // FEW_STEPS, whole) if trunk else (whole,)
            actions = (acted,) * len(branches)
        return BatchShapes(
            length_buckets=batch.length_buckets,
            branch_buckets=branches if teacher else (0,) * len(branches),
            action_buckets=actions,
            batch_size=batch.rows_per_device * mesh.shape["data"] * mesh.shape["fsdp"],
            parts=len(self.loss.parts),
            trunk=trunk,
            unscored=self.loss.trains_unscored_tokens,
            packed=rows_may_be_packed(platform),
        )

    def examples(self, experience: Experience) -> tuple[list[Example], Counter[str]]:
        """The training examples of a step, and how many episodes were left out, by reason.

        One example per episode, or per stream of it where chat.history = template; one per action where
        batch.layout = separate.
        """
        examples: list[Example] = []
        without: Counter[str] = Counter()
        for number, episode in enumerate(experience.episodes):
            masked = self.is_masked(episode)
            branches = [] if masked else self.branches(episode, experience)
            if not branches and (reason := "cut_episode" if masked else self.nothing_to_learn):
                without[reason] += 1
            for example in experience.examples_of(episode, number, branches):
                examples += self._laid_out(example)
        return examples, without

    def divergence(self) -> Divergence:
        """The divergence of teacher and student as the config has it."""
        loss = self.config.loss
        return Divergence(
            kind=loss.divergence,
            support=loss.support,
            top_k=loss.top_k,
            alpha=loss.alpha,
            importance_clip=loss.importance_clip,
        )

    def policy_gradient(
        self, *, coefficient: float = 1.0, teacher_advantage: float = 0.0, mean: str = "token"
    ) -> PolicyGradient:
        """The clipped policy gradient with the config's clip range."""
        loss = self.config.loss
        return PolicyGradient(
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            coefficient=coefficient,
            mean=mean,
            teacher_advantage=teacher_advantage,
        )

    def _laid_out(self, example: Example) -> list[Example]:
        if self.config.batch.layout == "separate" and any(branch.context for branch in example.branches):
            return example.separated()
        return [example.without_trunk() if self.config.hindsight.feedback_position == "start" else example]
