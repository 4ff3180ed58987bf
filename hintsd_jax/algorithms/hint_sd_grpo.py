# SPDX-License-Identifier: Apache-2.0

"""HINT-SD + GRPO: targets are distilled, and all actions have GRPO's policy gradient.

The loss is mean divergence over the targets' tokens + loss.policy_gradient_weight x mean policy-gradient loss over the
tokens of episodes that have an advantage. GRPO's options (`grpo.*`) hold here too.
"""

from __future__ import annotations

import dataclasses

from hintsd_jax.algorithms.branching import all_steps, without_teacher
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.algorithms.grpo import reference_parts, reinforced
from hintsd_jax.algorithms.hint_sd import HintSD
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch
from hintsd_jax.training.loss_parts import LossPart


class HintSDWithGRPO(HintSD):
    """Both signals on one episode: a target has both weights, every other action the policy gradient alone."""

    trains_whole_episodes = True
    nothing_to_learn = "no_advantage"

    def loss_parts(self) -> tuple[LossPart, ...]:
        weight, mean = self.config.loss.policy_gradient_weight, self.config.grpo.mean
        return self.divergence(), self.policy_gradient(coefficient=weight, mean=mean), *reference_parts(self.config)

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        advantage, weights = reinforced(episode, experience, self.config)
        branches = {branch.step: branch for branch in super().branches(episode, experience)}
        if weights:
            for branch in without_teacher(episode, all_steps(episode), {}):
                branches.setdefault(branch.step, branch)
        return [
            dataclasses.replace(branch, weights={**branch.weights, **weights}, advantage=advantage)
            for _, branch in sorted(branches.items())
        ]
