# SPDX-License-Identifier: Apache-2.0

"""SFT, offline: supervised learning on the actions of another, stronger policy, from a file of dialogues (`sft.path`).

What the HINT-SD paper compares with under this name. Nothing is rolled out in training, so a training step costs its
update alone; success is measured as always. Each update takes `tasks.tasks_per_step` x `tasks.rollouts` dialogues, as
many as other algorithms play episodes. `rollout.dialogues` says what the file holds.
"""

from __future__ import annotations

from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.algorithms.branching import all_steps, without_teacher
from hintsd_jax.algorithms.experience import Experience
from hintsd_jax.config.schema import Config
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch
from hintsd_jax.training.loss_parts import CrossEntropy, LossPart


class SFT(Algorithm):
    """All messages of the assistant but those of weight 0, whatever came of the dialogue: who writes the file chooses
    what is in it.
    """

    uses_analyser = False
    trains_whole_episodes = True
    offline = True

    @classmethod
    def problems(cls, config: Config) -> list[str]:
        if config.sft.path:
            return []
        return [f"algorithm = {config.algorithm} learns from a file of dialogues: give sft.path"]

    def loss_parts(self) -> tuple[LossPart, ...]:
        return (CrossEntropy(),)

    def branches(self, episode: Episode, experience: Experience) -> list[Branch]:
        steps = [number for number in all_steps(episode) if number not in episode.given]
        return without_teacher(episode, steps, {"cross_entropy": 1.0})
