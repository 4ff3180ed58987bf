# SPDX-License-Identifier: Apache-2.0

"""What a training step has to learn from: its episodes with what hindsight says of them, as algorithms ask for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hintsd_jax.algorithms import branching
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.training.examples import Branch, Example

STD_EPSILON = 1e-6  # added to the standard deviation of a group's rewards


class Experience:
    """The episodes of one training step.

    Args:
      episodes: in the order in which they were collected: the rollouts of a task stand together.
      hindsight: what an analyser said of some of them.
      chat: the chat format that they were rolled out in.
      seed, step: of the run, and of the training step: everything random follows from them.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        hindsight: Hindsight,
        chat: ChatFormat,
        *,
        seed: int,
        step: int,
    ):
        self.episodes, self.chat = episodes, chat
        self._seed, self._step = seed, step
        self._analyses = {id(analysis.episode): analysis for analysis in hindsight.analyses}

    def analysis(self, episode: Episode) -> Analysis:
        """What hindsight says of an episode; an empty analysis where nobody was asked or nothing came of it."""
        return self._analyses.get(id(episode)) or Analysis(episode, ())

    def successful_siblings(self, episode: Episode) -> list[Episode]:
        """The other rollouts of its task that succeeded."""
        return successful_siblings(self.episodes, episode)

    def advantage(self, episode: Episode, normalize: bool = True) -> float:
        """GRPO's (arXiv 2402.03300): (R - mean) / (std + 1e-6) in the episode's group, the rollouts of one task of the
        training step, with the sample's standard deviation; 0 for all where they are equal, or there is only one.

        normalize: False leaves it at R - mean, as Dr. GRPO (arXiv 2503.20783).
        """
        rewards = np.array([other.reward for other in self.episodes if other.group == episode.group])
        if np.ptp(rewards) == 0:
            return 0.0
        spread = rewards.std(ddof=1) + STD_EPSILON if normalize else 1.0
        return float((episode.reward - rewards.mean()) / spread)

    def key(self, episode: Episode, purpose: str) -> np.ndarray:
        """The raw key (uint32 [2]) of something random about an episode."""
        return job_key(self._seed, self._step, f"{purpose} {episode.task_id}", episode.rollout, episode.occurrence)

    def examples_of(self, episode: Episode, number: int, branches: Sequence[Branch]) -> list[Example]:
        """The examples of an episode's branches, one for each of its streams that has any; `number`: of the episode.
        Its group is the released code's micro-step.
        """
        first, second = self.key(episode, "dropout").tolist()
        return branching.examples(episode, branches, number, micro_step=episode.group, key=(first, second))


def successful_siblings(episodes: Sequence[Episode], episode: Episode) -> list[Episode]:
    """The other rollouts of its task that succeeded."""
    return [other for other in episodes if other.task_id == episode.task_id and other is not episode and other.success]
