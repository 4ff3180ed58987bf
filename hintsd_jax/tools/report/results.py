"""Held-out success in, the lines of the last table out: before, after, and the change, with 95 % intervals over tasks.

The same tasks with the same sampling keys are played before and after, so the change is paired by task, and its
interval is narrower than those of the two ends suggest. Intervals: percentile bootstrap of the mean over tasks with a
fixed seed, as the evaluation's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

RESAMPLES = 10_000


def lines(held_out: Mapping[str, Any] | None, split: str) -> list[dict[str, Any]]:
    """The lines of a run, success in [0, 1]: `{"name", "before", "after", "change"}`, each `{"value", "low", "high"}`
    or None.

    First the split as a whole (Avg@k, Best@k, greedy), then each category. Nothing measured: no lines.
    """
    ends = {when: (held_out or {}).get(when) or {} for when in ("before", "after")}
    measured = {when: measures(end, split) for when, end in ends.items()}
    found = []
    for name in measured["after"] | measured["before"]:
        before, after = measured["before"].get(name), measured["after"].get(name)
        paired = before is not None and after is not None and before.shape == after.shape
        found.append(
            {
                "name": name,
                "before": mean(before),
                "after": mean(after),
                "change": mean(after - before) if paired else None,
            }
        )
    return found


def measures(end: Mapping[str, Any], split: str) -> dict[str, np.ndarray]:
    """The success of each task [tasks] by the name of the measure, of one end of a held-out record."""
    success, greedy = end.get("success") or [], end.get("greedy") or []
    if not success:
        return {}
    success_NK, greedy_N = np.asarray(success, dtype=float), np.asarray(greedy, dtype=float)
    categories = np.asarray(end.get("categories") or [""] * len(success_NK))
    k, found = success_NK.shape[1], {}
    for category in (None, *sorted(set(categories) - {""})):
        here_N = np.ones(len(success_NK), dtype=bool) if category is None else categories == category
        label = split if category is None else category
        found[f"{label} Avg@{k}"] = success_NK[here_N].mean(axis=1)
        found[f"{label} Best@{k}"] = success_NK[here_N].max(axis=1)
        if len(greedy_N) == len(success_NK):
            found[f"{label} greedy"] = greedy_N[here_N]
    return found


def mean(values_N: np.ndarray | None) -> dict[str, float] | None:
    """The mean over tasks with the ends of its 95 % interval."""
    if values_N is None:
        return None
    rng = np.random.default_rng(0)
    means = rng.choice(values_N, (RESAMPLES, len(values_N))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": round(float(values_N.mean()), 5), "low": round(float(low), 5), "high": round(float(high), 5)}
