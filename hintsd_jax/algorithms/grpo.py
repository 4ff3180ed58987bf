# SPDX-License-Identifier: Apache-2.0

"""GRPO (arXiv 2402.03300): a policy gradient on all actions, with advantages from the rewards of a task's rollouts.

A = (R - mean) / (std + 1e-6) within the task's rollouts, the same for every action token of an episode; the loss is
the clipped surrogate of `loss_parts.PolicyGradient`. No entropy, no analyser, no teacher. Decided by config (`grpo.*`):
the mean over tokens or over episodes, advantages without the division, a KL to the policy that training began with, and
whether tasks without an advantage are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.algorithms.branching import all_steps, without_teacher
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.config.schema import Config
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch
from hintsd_jax.training.loss_parts import LossPart, ReferenceKL


class GRPO(Algorithm):
    """Episodes of tasks whose rollouts all ended alike have no advantage and are counted as that."""

    uses_analyser = False
    trains_whole_episodes = True
    nothing_to_learn = "no_advantage"

    def loss_parts(self) -> tuple[LossPart, ...]:
        return self.policy_gradient(mean=self.config.grpo.mean), *reference_parts(self.config)

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        advantage, weights = reinforced(episode, experience, self.config)
        return without_teacher(episode, all_steps(episode), weights, advantage) if weights else []


def reference_parts(config: Config) -> tuple[LossPart, ...]:
    """What keeps the policy near its start, where the config asks for it."""
    grpo = config.grpo
    return (ReferenceKL(coefficient=grpo.reference_kl, mean=grpo.mean),) if grpo.reference_kl else ()


def reinforced(episode: Episode, experience: Experience, config: Config) -> tuple[float, Mapping[str, float]]:
    """The advantage of all actions of an episode, and their weights; none where it is left out."""
    grpo = config.grpo
    advantage = experience.advantage(episode, grpo.normalize_std)
    if grpo.drop_equal_groups and not advantage:
        return 0.0, {}
    return advantage, {"policy_gradient": 1.0} | ({"reference_kl": 1.0} if grpo.reference_kl else {})
