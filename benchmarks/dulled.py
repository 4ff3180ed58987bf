"""HINT-SD whose hindsight sees less than it does: arms of `compare_algorithms` that show what its recall is worth.

All else is the same: policy, questions, answers, words. Of the targets that hindsight names a share stands; the others
are passed over ("missed"), or their words are put on a step that was not named ("moved"), as if it had looked at the
wrong one.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import ClassVar

from hintsd_jax.algorithms.branching import all_steps
from hintsd_jax.algorithms.hint_sd import HintSD
from hintsd_jax.hindsight.analyser import Analyser
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.episode import Episode


class Dulled(HintSD):
    """kept: the share of targets that stand, in [0, 1]. moves: whether the others are moved; else they are missed."""

    kept: ClassVar[float] = 1.0
    moves: ClassVar[bool] = False

    def analyse(self, episodes: Sequence[Episode], analyser: Analyser) -> Hindsight:
        hindsight = super().analyse(episodes, analyser)
        return dataclasses.replace(hindsight, analyses=[self._dulled(analysis) for analysis in hindsight.analyses])

    def _dulled(self, analysis: Analysis) -> Analysis:
        episode = analysis.episode
        rng = random.Random(f"{self.config.seed} {episode.task_id} {episode.rollout}")
        stands = [rng.random() < self.kept for _ in analysis.targets]
        targets = [target for target, does in zip(analysis.targets, stands, strict=True) if does]
        if self.moves:
            lost = [target for target, does in zip(analysis.targets, stands, strict=True) if not does]
            others = sorted(set(all_steps(episode)) - {target.step for target in analysis.targets})
            places = rng.sample(others, min(len(lost), len(others)))
            targets += [Target(step, target.feedback) for step, target in zip(places, lost, strict=False)]
        return dataclasses.replace(analysis, targets=tuple(sorted(targets)))


class Missed60(Dulled):
    kept = 0.6


class Missed30(Dulled):
    kept = 0.3


class Moved60(Dulled):
    kept, moves = 0.6, True


class Moved30(Dulled):
    kept, moves = 0.3, True


class Moved0(Dulled):
    kept, moves = 0.0, True
