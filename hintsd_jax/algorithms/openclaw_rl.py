# SPDX-License-Identifier: Apache-2.0

"""OpenClaw-RL as the HINT-SD paper ran it: dense feedback, judges on every step of every episode.

The judges see one action and the observation after it, never the whole episode, never a reward or the outcome. One
gives a verdict in {1, -1, 0}; the other says whether there is a hint, and writes it. The advantage of an action's
tokens is

    A = verdict + (log pi_teacher - log pi_sampler)        the second term on hinted steps alone

where the teacher has read the hint in the last user message before the step, in the clipped surrogate of
`loss_parts.PolicyGradient`. No KL, no entropy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hintsd_jax.algorithms.base import DEFAULTS, Algorithm
from hintsd_jax.algorithms.branching import with_feedback, without_teacher
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.config.schema import Config
from hintsd_jax.hindsight.analyser import PRIVILEGED_ANALYSERS, Analyser
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch
from hintsd_jax.training.loss_parts import LossPart


class OpenClawRL(Algorithm):
    """An action without a verdict and without a hint is not trained on."""

    defaults = {**DEFAULTS, "hindsight.select": "all", "hindsight.feedback_position": "last_user"}
    trains_whole_episodes = True
    nothing_to_learn = "no_advantage"

    @classmethod
    def problems(cls, config: Config) -> list[str]:
        hindsight = config.hindsight
        judges_in_place = hindsight.select == "all" and hindsight.feedback_position != "start"
        if judges_in_place and hindsight.analyser not in PRIVILEGED_ANALYSERS:
            return []
        return [
            f"algorithm = {config.algorithm} judges all steps, each where it stands: leave hindsight.select, take"
            " hindsight.feedback_position = last_user or target, and another analyser than environment"
        ]

    def loss_parts(self) -> tuple[LossPart, ...]:
        return (self.policy_gradient(teacher_advantage=1.0),)

    def analyse(self, episodes: Sequence[Episode], analyser: Analyser) -> Hindsight:
        return analyser.judge_steps(episode for episode in episodes if not self.is_masked(episode))

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        analysis, weights = experience.analysis(episode), {"policy_gradient": 1.0}
        position = self.config.hindsight.feedback_position
        branches = with_feedback(episode, analysis.targets, position, self.prompts, experience.chat, weights)
        hinted = {branch.step: branch for branch in branches}
        branches = []
        for step, verdict in enumerate(analysis.verdicts, 1):
            if step in hinted or verdict:
                branch = hinted.get(step) or without_teacher(episode, [step], weights)[0]
                branches.append(dataclasses.replace(branch, advantage=verdict))
        return branches

    def describe_targets(self) -> str:
        return "every step, judged alone"
