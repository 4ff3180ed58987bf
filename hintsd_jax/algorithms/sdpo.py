# SPDX-License-Identifier: Apache-2.0

"""SDPO (arXiv 2601.20802): distil whole episodes from a teacher that has read a solution, or feedback, at their start.

The teacher begins with another first prompt: the task, then a successful rollout of it (never the episode itself,
without its reasoning) or, where none succeeded, what the analyser says of the episode, then the request to solve it
(`PromptSet.teacher_reprompt`). All actions are trained on, with the generalised Jensen-Shannon divergence of
`divergences.divergence` and importance weights clipped at `loss.importance_clip`. Episodes with neither are left out
and counted.

The paper's fallback is the environment's feedback; here it is the policy's own review, because what our environments
report knows the ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence

from hintsd_jax.algorithms.base import DEFAULTS, Algorithm
from hintsd_jax.algorithms.branching import all_steps, feedback_at_start
from hintsd_jax.algorithms.experience import Experience, successful_siblings
from hintsd_jax.config.schema import Config
from hintsd_jax.hindsight.analyser import Analyser
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch
from hintsd_jax.training.loss_parts import LossPart


class SDPO(Algorithm):
    """Failed episodes without a successful sibling are analysed."""

    defaults = {
        **DEFAULTS,
        "hindsight.feedback_position": "start",
        "loss.divergence": "jsd",
        "loss.importance_clip": 2.0,
        "optim.ema_decay": 0.95,
    }
    trains_whole_episodes = True
    nothing_to_learn = "no_feedback"

    @classmethod
    def problems(cls, config: Config) -> list[str]:
        if config.hindsight.select == "hindsight" and config.hindsight.feedback_position == "start":
            return []
        return [
            f"algorithm = {config.algorithm} reads about whole episodes at their start: leave hindsight.select and"
            " hindsight.feedback_position"
        ]

    def loss_parts(self) -> tuple[LossPart, ...]:
        return (self.divergence(),)

    def analyse(self, episodes: Sequence[Episode], analyser: Analyser) -> Hindsight:
        failures = self.failures(episodes)
        return analyser.review(episode for episode in failures if not successful_siblings(episodes, episode))

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        siblings, targets = experience.successful_siblings(episode), experience.analysis(episode).targets
        if not siblings and not targets:
            return []
        solution = [step.text for step in siblings[0].steps] if siblings else ()
        messages = self.prompts.teacher_reprompt(episode.prompt_messages, solution=solution, targets=targets)
        return feedback_at_start(episode, all_steps(episode), messages, experience.chat, {"divergence": 1.0})

    def describe_targets(self) -> str:
        return "whole episodes, a sibling's success first"
