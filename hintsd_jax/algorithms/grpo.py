# SPDX-License-Identifier: Apache-2.0

"""GRPO (arXiv 2402.03300): a policy gradient on all actions, with advantages from the rewards of a task's rollouts.

A = (R - mean) / (std + 1e-6) within the task's rollouts, the same for every action token of an episode; the loss is
the clipped surrogate of `loss_parts.PolicyGradient`. No KL, no entropy, no analyser, no teacher.
"""

from __future__ import annotations

from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.algorithms.branching import all_steps, without_teacher
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch
from hintsd_jax.training.loss_parts import LossPart


class GRPO(Algorithm):
    """Episodes of tasks whose rollouts all ended alike have no advantage and are counted as that."""

    uses_analyser = False
    trains_whole_episodes = True
    nothing_to_learn = "no_advantage"

    def loss_parts(self) -> tuple[LossPart, ...]:
        return (self.policy_gradient(),)

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        advantage = experience.advantage(episode)
        if not advantage:
            return []
        return without_teacher(episode, all_steps(episode), {"policy_gradient": 1.0}, advantage)
