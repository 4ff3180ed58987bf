"""What `teacher_gain` has found of each arm's teacher: rates in, a table and a mark out.

A gain is the log-probability of the right action under the teacher's context minus that under the student's, nats an
action: by place ("fault", "before", "all"), and as the share of actions that it makes likelier ("likelier").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.pages import markdown_table
from benchmarks.rates import Rate, cell, percent

PLACES = ("fault", "before", "all")
ABOUT = (
    "log p(right action) under the teacher's context minus that under the student's, same weights, on the arm's own"
    " targets: nats an action, and the share of actions that it makes likelier, %; 95 % over tasks."
)
MARK = "**its teacher is no better than its student**"

Gain = Mapping[str, Rate | None]


def is_better(gain: Gain) -> bool:
    """Whether the teacher is surely better than the student in the mean over all that the arm trains on."""
    rate = gain["all"]
    return rate is not None and rate["low"] > 0


def table(gains: Mapping[str, Gain], labels: Mapping[str, str]) -> str:
    rows = []
    for arm, gain in gains.items():
        total = gain["all"]
        cells = [*(cell(gain[place], "{:+.2f}") for place in PLACES), percent(gain["likelier"])]
        count = f"{total['n']:.0f}" if total else "0"
        rows.append([labels.get(arm, arm), count, *cells, "" if is_better(gain) else MARK])
    return markdown_table(["arm", "actions", "at the fault", "before it", "all", "likelier", ""], rows)


def read(file: Path | None) -> dict[str, Gain]:
    """The gains of a file of `teacher_gain`, by arm; none without a file."""
    return json.loads(file.read_text())["gains"] if file else {}


def marked(labels: Mapping[str, str], gains: Mapping[str, Gain]) -> dict[str, str]:
    """The labels of arms, those with such a teacher with the mark."""
    return {
        arm: label if arm not in gains or is_better(gains[arm]) else f"{label}; {MARK}" for arm, label in labels.items()
    }
