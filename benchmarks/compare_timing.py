"""Step times of runs that shared their machine, put right by short runs that had it to themselves.

Success needs many long runs, clean times only a few updates. `retimed` scales the times of the long ones so that over the updates that both
made they are those of the short ones, part by part; what a later update takes in comparison with an earlier one stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

PARTS = ("rollout", "hindsight", "distill", "step", "compile")
FIRST = 2  # updates at the start that no factor is taken from


def retimed(runs: Sequence[Mapping], clean: Sequence[Mapping]) -> list[dict]:
    """The runs with the times of `clean` runs of the same arm (the mean over its seeds).

    Raises:
      SystemExit: an arm has no clean run, or one of too few updates.
    """
    by_arm: dict[str, list[Mapping]] = {}
    for run in clean:
        by_arm.setdefault(run["arm"], []).append(run)
    found = []
    for run in runs:
        if run["arm"] not in by_arm:
            raise SystemExit(f"error: there are no clean times of {run['arm']}: run it alone for a few updates")
        rows = dict(run["rows"])
        for key in (f"time/{part}" for part in PARTS):
            if key in rows:
                factor = _factor(run, by_arm[run["arm"]], key)
                rows[key] = [None if value is None else value * factor for value in rows[key]]
        found.append({**run, "rows": rows})
    return found


def _factor(run: Mapping, clean: Sequence[Mapping], key: str) -> float:
    own = _times(run, key)
    pairs = [(theirs[step], own[step]) for other in clean for theirs in [_times(other, key)] for step in theirs if step in own]
    if not pairs:
        raise SystemExit(f"error: the clean runs of {run['arm']} have no {key} of updates that its runs have: make more of them")
    wanted, had = np.median(pairs, axis=0)
    return float(wanted / had) if had > 0 else 1.0


def _times(run: Mapping, key: str) -> dict[int, float]:
    """Seconds by update; those of compiling stand before the first."""
    if key not in run["rows"]:
        return {}
    wanted = (lambda step: step <= FIRST) if key == "time/compile" else (lambda step: step > FIRST)
    return {step: value for step, value in zip(run["rows"]["step"], run["rows"][key], strict=True) if value is not None and wanted(step)}
