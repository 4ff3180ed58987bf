# SPDX-License-Identifier: Apache-2.0

"""Watches a run's metrics for collapse: rows flow in, alarms flow out.

Invariant: a function of the rows since the run's start, as they stand in `metrics.jsonl`, and of nothing else. `state`
is what is remembered of earlier ones; saved with a checkpoint and given back, it makes a resumed run decide the same.
What is done about an alarm is the trainer's decision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

NOT_FINITE = "not_finite"


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
    """The thresholds; each is off at 0.

    action: "warn", "stop" or "halve_lr". patience: consecutive rows beyond a threshold that make an alarm.
    min_entropy: of `train/entropy`, nats a token. max_divergence: of `train/divergence`, nats a token that a teacher
    has scored. max_action_length: of `rollout/action_length`, tokens. min_success: of `rollout/success`, a share.
    max_unreadable: of `hindsight/unreadable`, a share of the questions. min_tokens: of `train/tokens`, action tokens of
    an update, and min_targets: of `hindsight/targets`, where the analyser was asked; a step without any failure has
    nothing to learn from for most algorithms, and counts for nothing. max_dropped: of `rollout/dropped_share`, the
    share of the episodes begun that the environment's failures ended.
    max_success_drop: how far the mean success of `patience` rows may fall below the best such mean of the run so far
    (0.2: 20 points).
    """

    action: str
    patience: int
    min_entropy: float
    max_divergence: float
    max_action_length: float
    min_success: float
    max_unreadable: float
    min_tokens: float
    min_targets: float
    max_dropped: float
    max_success_drop: float


@dataclasses.dataclass(frozen=True)
class Alarm:
    """name: the threshold's, or "not_finite": an update was skipped for such a number, or made one of the weights, or
    the sampler gave one. text: one line for people.
    """

    name: str
    text: str


# threshold -> (metric, +1: too high above it, -1: too low below it)
_THRESHOLDS = {
    "min_entropy": ("train/entropy", -1),
    "max_divergence": ("train/divergence", +1),
    "max_action_length": ("rollout/action_length", +1),
    "min_success": ("rollout/success", -1),
    "max_unreadable": ("hindsight/unreadable", +1),
    "min_tokens": ("train/tokens", -1),
    "min_targets": ("hindsight/targets", -1),
    "max_dropped": ("rollout/dropped_share", +1),
}
_OF_AN_UPDATE = ("train/entropy", "train/divergence")
# Where a row has this value, these metrics count for nothing: they are 0 because there was nothing to measure, or
# nothing to learn from in a step without any failure.
_NOT_MEASURED = {
    ("train/skipped", 1): _OF_AN_UPDATE,
    ("train/tokens", 0): _OF_AN_UPDATE,
    ("train/teacher_scored_tokens", 0): ("train/divergence",),
    ("rollout/episodes", 0): ("rollout/action_length", "rollout/success"),
    ("rollout/success", 1): ("train/tokens", "hindsight/targets"),
    ("hindsight/questions", 0): ("hindsight/unreadable", "hindsight/targets"),
}


def is_number(value: float | None) -> bool:
    """Whether a metric has a value, and that is finite."""
    return value is not None and math.isfinite(value)


def not_finite(row: Mapping[str, float | None]) -> str:
    """What a row says of an update, or a sampler, that met a number that is not finite; "" for all others."""
    if not row.get("train/nonfinite"):
        count = row.get("rollout/nonfinite_logprobs") or 0
        return f"{count:g} sampled tokens have no finite log-probability" if count else ""
    if not row.get("train/skipped"):
        return "the update made weights, or a state of the optimizer, that are not finite numbers"
    numbers = [name for name, value in row.items() if name.startswith("train/") and not is_number(value)]
    return f"{', '.join(sorted(numbers)) or 'a gradient'}: not a finite number, so the update was skipped"


class Alarms:
    """`state` is plain JSON: consecutive rows beyond each threshold, success of the last rows, and its best mean."""

    def __init__(self, config: AlarmConfig, state: Mapping[str, Any] | None = None):
        self.config = config
        self.state: dict[str, Any] = {"counts": {}, "recent_success": [], "best_success": None} | dict(state or {})

    def check(self, row: Mapping[str, float | None]) -> list[Alarm]:
        """The alarms of the next row, as `MetricsWriter.write` returns it (None: was not finite) or takes it.

        A metric that the row lacks, or that is not finite, counts for nothing: neither beyond its threshold nor back.
        So do those of a skipped update, the divergence where no teacher has scored a token, success and lengths where
        there was no episode, unreadable answers and targets where nobody was asked, and tokens and targets where no
        episode failed. After an alarm its count begins again. What is not finite is an alarm at once.
        """
        unmeasured = {
            name for (metric, value), names in _NOT_MEASURED.items() if row.get(metric) == value for name in names
        }
        measured = {metric: value for metric, value in row.items() if metric not in unmeasured and is_number(value)}
        values: dict[str, float] = {metric: value for metric, value in measured.items() if value is not None}
        alarms = [Alarm(NOT_FINITE, text)] if (text := not_finite(row)) else []
        counts = dict(self.state["counts"])
        for name, (metric, sign) in _THRESHOLDS.items():
            limit = getattr(self.config, name)
            if limit and metric in values:
                counts[name] = counts.get(name, 0) + 1 if sign * values[metric] > sign * limit else 0
                if counts[name] >= self.config.patience:
                    side = "above" if sign > 0 else "below"
                    alarms.append(Alarm(name, self._text(metric, values[metric], side, name)))
                    counts[name] = 0
        self.state = self.state | {"counts": counts}
        if self.config.max_success_drop and "rollout/success" in values:
            alarms += self._success_drop(values["rollout/success"])
        return alarms

    def _success_drop(self, success: float) -> list[Alarm]:
        config, best = self.config, self.state["best_success"]
        recent = [*self.state["recent_success"], success][-config.patience :]
        alarms = []
        if len(recent) == config.patience:
            mean = sum(recent) / len(recent)
            best = mean if best is None else max(best, mean)
            if best - mean > config.max_success_drop:
                text = (
                    f"rollout/success = {mean:.4g}, the mean of {_steps(config.patience)}, is {best - mean:.4g} below"
                    f" its best so far, {best:.4g} (alarms.max_success_drop = {config.max_success_drop:g})"
                )
                alarms, recent = [Alarm("max_success_drop", text)], []
        self.state = self.state | {"recent_success": recent, "best_success": best}
        return alarms

    def _text(self, metric: str, value: float, side: str, name: str) -> str:
        limit, patience = getattr(self.config, name), self.config.patience
        return f"{metric} = {value:.4g} is {side} alarms.{name} = {limit:g}, for {_steps(patience)}"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
