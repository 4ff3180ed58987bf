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
            "change": mean(_difference(before.get(name), after.get(name)), DIFFERENCE),
        }
        for name in after | before
    ]


def measures(result: Mapping[str, Any], split: str) -> dict[str, np.ndarray]:
    """The success of each task [N] by the name of the measure; `result` is one of the two of `held_out.json`."""
    success, greedy = result.get("success") or [], result.get("greedy") or []
    if not success:
        return {}
    success_NK, greedy_N = np.asarray(success, dtype=float), np.asarray(greedy, dtype=float)
    category_N = np.asarray(result.get("categories") or [""] * len(success_NK))
    k, by_name = success_NK.shape[1], {}
    for category in (None, *sorted(set(category_N) - {""})):
        chosen_N = np.ones(len(success_NK), dtype=bool) if category is None else category_N == category
        label = split if category is None else category
        by_name[f"{label} Avg@{k}"] = success_NK[chosen_N].mean(axis=1)
        by_name[f"{label} Best@{k}"] = success_NK[chosen_N].max(axis=1)
        if len(greedy_N) == len(success_NK):
            by_name[f"{label} greedy"] = greedy_N[chosen_N]
    return by_name


def mean(values_N: np.ndarray | None, span: Span = SHARE) -> dict[str, float] | None:
    """The mean over tasks with its 95 % interval."""
    if values_N is None:
        return None
    low, high = interval(values_N, span=span)
    return {"value": round(float(values_N.mean()), 5), "low": round(low, 5), "high": round(high, 5)}


def _difference(before_N: np.ndarray | None, after_N: np.ndarray | None) -> np.ndarray | None:
    """Task by task; None where the two were not measured on the same tasks."""
    if before_N is None or after_N is None or before_N.shape != after_N.shape:
        return None
    return after_N - before_N
