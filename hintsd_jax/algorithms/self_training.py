# SPDX-License-Identifier: Apache-2.0

"""Self-training, a control and no algorithm to use: supervised learning on the policy's own unselected samples.

What it gains, sharpening of the policy's own distribution gains, without any signal about success.
"""

from __future__ import annotations

import random

from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.algorithms.branching import all_steps, without_teacher
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch
from hintsd_jax.training.loss_parts import CrossEntropy, LossPart


class SelfTraining(Algorithm):
    """One random action of every episode."""

    uses_analyser = False

    def loss_parts(self) -> tuple[LossPart, ...]:
        return (CrossEntropy(),)

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        if not episode.steps:
            return []
        key = experience.key(episode, "sharpen")  # the name that keys have had since the first release
        step = random.Random(key.tobytes()).choice(all_steps(episode))
        return without_teacher(episode, [step], {"cross_entropy": 1.0})
