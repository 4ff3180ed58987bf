# SPDX-License-Identifier: Apache-2.0

"""What comes of looking back: analyses of episodes, each with its targets, and a count of everything that did not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.episode import Episode


@dataclasses.dataclass
class Analysis:
    """What came of one episode. answer: the analyser's own text, for the record. problem: why (part of) it could not be
    read. verdicts: of a judge, one a step: 1, -1, or 0 where it gave none; else ().
    """

    episode: Episode
    targets: tuple[Target, ...]
    answer: str = ""
    problem: str | None = None
    verdicts: tuple[float, ...] = ()


@dataclasses.dataclass
class Hindsight:
    """The analysed episodes of a training step. dropped: answers, entries and episodes by reason. questions: how many
    were asked; readable_answers: how many of the answers could be parsed; generated_tokens: of all answers.
    """

    analyses: list[Analysis] = dataclasses.field(default_factory=list)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    questions: int = 0
    readable_answers: int = 0
    generated_tokens: int = 0


def attribution(analyses: Sequence[Analysis]) -> dict[str, float]:
    """How right the targets are, where environments know their faults.

    Returns:
      precision: targets that are true faults / targets; recall: true faults that are targets / faults; first_fault:
      share of episodes whose first fault is a target; checked_targets: how many targets precision is of. Absent where
      nothing is known.
    """
    targets = correct = faults = first = episodes = 0
    for analysis in analyses:
        report = analysis.episode.report
        if report is None or not report.faults:
            continue
        true, steps = {fault.step for fault in report.faults}, {target.step for target in analysis.targets}
        episodes, targets, faults = episodes + 1, targets + len(steps), faults + len(true)
        correct, first = correct + len(true & steps), first + (min(true) in steps)
    rates = {"precision": (correct, targets), "recall": (correct, faults), "first_fault": (first, episodes)}
    known = {"checked_targets": float(targets)} if episodes else {}
    return known | {name: part / whole for name, (part, whole) in rates.items() if whole}
