"""Step times of runs that shared their machine, taken from runs that had it to themselves.

Success needs many long runs; clean times need few. `retimed` gives every run the times of a clean run of its arm,
update by update, and for updates that the clean one did not make the median of those that it made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

PARTS = ("rollout", "hindsight", "distill", "step", "compile")
FIRST = 2  # updates at the start that no median is taken over


def retimed(runs: Sequence[Mapping], clean: Sequence[Mapping]) -> list[dict]:
    """The runs with the times of the `clean` run of the same arm.

    Raises:
      SystemExit: an arm has no clean run, or several.
    """
    by_arm: dict[str, list[Mapping]] = {}
    for run in clean:
        by_arm.setdefault(run["arm"], []).append(run)
    found = []
    for run in runs:
        if len(by_arm.get(run["arm"], ())) != 1:
            raise SystemExit(
                f"error: there must be one run with clean times of {run['arm']}, not {len(by_arm.get(run['arm'], ()))}"
            )
        rows, (other,) = dict(run["rows"]), by_arm[run["arm"]]
        for key in (f"time/{part}" for part in PARTS):
            if key in rows and key in other["rows"]:
                times = dict(zip(other["rows"]["step"], other["rows"][key], strict=True))
                usual = [value for step, value in times.items() if step > FIRST and value is not None]
                middle = float(np.median(usual)) if usual else None
                rows[key] = [times.get(step, middle) for step in rows["step"]]
        found.append({**run, "rows": rows})
    return found
