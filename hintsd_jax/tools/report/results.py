# SPDX-License-Identifier: Apache-2.0

"""Held-out success in, the lines of the last table out: before, after, and the change, with 95 % intervals over tasks.

The same tasks with the same sampling keys are played before and after, so the change is paired by task, and its
interval is narrower than the two intervals beside it suggest. Intervals are those of the evaluation itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hintsd_jax.statistics import DIFFERENCE, SHARE, Span, interval


def lines(held_out: Mapping[str, Any] | None, split: str) -> list[dict[str, Any]]:
    """The lines of a run, success in [0, 1]: `{"name", "before", "after", "change"}`, each `{"value", "low", "high"}`
    or None.

    First the split as a whole (Avg@k, Best@k, greedy), then each category. Nothing measured: no lines.
    """
    before, after = (measures((held_out or {}).get(when) or {}, split) for when in ("before", "after"))
    return [
        {
            "name": name,
            "before": mean(before.get(name)),
            "after": mean(after.get(name)),
            "change": mean(difference(before.get(name), after.get(name)), DIFFERENCE),
        }
        for name in after | before
    ]


def measures(result: Mapping[str, Any], split: str) -> dict[str, np.ndarray]:
    """The success of each task [N] by the name of the measure, NaN where no episode of it was played; `result` is one
    of the two of `held_out.json`.
    """
    success, greedy = result.get("success") or [], result.get("greedy") or []
    if not success:
        return {}
    # null, here NaN, is what an environment failed to play: no failure of the policy, and left out as in an evaluation
    success_NK, greedy_N = np.asarray(success, dtype=float), np.asarray(greedy, dtype=float)
    category_N = np.asarray(result.get("categories") or [""] * len(success_NK))
    k, by_name, played_N = len(success[0]), {}, np.isfinite(success_NK).any(axis=1)
    avg_N, best_N = np.full((2, len(success_NK)), np.nan)
    avg_N[played_N], best_N[played_N] = np.nanmean(success_NK[played_N], 1), np.nanmax(success_NK[played_N], 1)
    for category in (None, *sorted(set(category_N) - {""})):
        chosen_N = np.ones(len(success_NK), dtype=bool) if category is None else category_N == category
        label = split if category is None else category
        by_name[f"{label} Avg@{k}"], by_name[f"{label} Best@{k}"] = avg_N[chosen_N], best_N[chosen_N]
        if len(greedy_N) == len(success_NK):
            by_name[f"{label} greedy"] = greedy_N[chosen_N]
    return by_name


def mean(values_N: np.ndarray | None, span: Span = SHARE) -> dict[str, float] | None:
    """The mean over the tasks that were played, with its 95 % interval; None without any."""
    if values_N is None or not np.isfinite(values_N).any():
        return None
    values_N = values_N[np.isfinite(values_N)]
    return value(values_N.mean(), interval(values_N, span=span))


def value(mean: float, ends: tuple[float, float]) -> dict[str, float]:
    """As a page holds it."""
    return {"value": round(float(mean), 5), "low": round(ends[0], 5), "high": round(ends[1], 5)}


def difference(before_N: np.ndarray | None, after_N: np.ndarray | None) -> np.ndarray | None:
    """After minus before, task by task; None where the two were not measured on the same tasks."""
    if before_N is None or after_N is None or before_N.shape != after_N.shape:
        return None
    return after_N - before_N
