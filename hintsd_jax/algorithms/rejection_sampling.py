# SPDX-License-Identifier: Apache-2.0

"""Rejection sampling (RAFT, expert iteration): supervised learning on the policy's own successes, fresh in each step.

Not the paper's SFT, which is offline and on a stronger model's trajectories: `algorithms.sft`.
"""

from __future__ import annotations

from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.algorithms.branching import all_steps, without_teacher
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch
from hintsd_jax.training.loss_parts import CrossEntropy, LossPart


class RejectionSampling(Algorithm):
    """All actions of successful episodes."""

    uses_analyser = False
    trains_whole_episodes = True

    def loss_parts(self) -> tuple[LossPart, ...]:
        return (CrossEntropy(),)

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        steps = all_steps(episode) if episode.success else ()
        return without_teacher(episode, steps, {"cross_entropy": 1.0})
