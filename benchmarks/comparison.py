"""Summaries of runs in, numbers out: success with its intervals, differences that are paired by seed and task, curves,
times.

A summary is what `compare_algorithms.write_summary` leaves: `arm`, `seed`, `status`, `before` and `after` (encoded
held-out success), `rows` (metrics by key, one value a row), and where it ran. Dimension letters: S seeds, N tasks, K
rollouts, E evaluations.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hintsd_jax.config.edge import RENAMED, RENAMED_VALUES
from hintsd_jax.errors import UserError
from hintsd_jax.statistics import DIFFERENCE, MIN_SEEDS, SHARE, Span, crossed_interval, interval

WARM = 2  # updates at the start whose time is not counted
TIMES = tuple(f"time/{part}" for part in ("rollout", "analysis", "update", "step", "compile"))
# Names in summaries of earlier versions.
_ARMS = {"dense": "openclaw_rl", "sharpen": "self_training"}
_METRICS = {
    "distill/student_tokens": "train/student_tokens",
    "distill/teacher_tokens": "train/teacher_tokens",
    "hindsight/asked": "hindsight/questions",
    "hindsight/failed": "hindsight/failed_episodes",
    "time/hindsight": "time/analysis",
    "time/distill": "time/update",
}


def read_summaries(files: str) -> list[dict]:
    """The summaries in files of --collect, whose names are separated by commas; of earlier versions, by the names of
    today.
    """
    runs = [run for file in filter(None, files.split(",")) for run in json.loads(Path(file).read_text())["runs"]]
    return [_with_names_of_today(run) for run in runs]


def _with_names_of_today(run: Mapping) -> dict:
    def setting(key: str, value: str) -> tuple[str, str]:
        key = RENAMED.get(key, key)
        return key, RENAMED_VALUES.get((key, value), value)

    overrides = ["=".join(setting(*override.split("=", 1))) for override in run["overrides"]]
    return {
        **run,
        "arm": _ARMS.get(run["arm"], run["arm"]),
        "settings": dict(setting(key, value) for key, value in run["settings"].items()),
        "overrides": overrides,
        "rows": {_METRICS.get(key, key): values for key, values in run["rows"].items()},
    }


def encode(held_out: Mapping | None) -> dict | None:
    """A held-out result as short strings: one of digits a task, one of digits for greedy."""
    if held_out is None:
        return None
    missing = sum(value is None for row in held_out["success"] for value in row) + held_out["greedy"].count(None)
    if missing:
        raise UserError(
            f"environments failed in {missing} held-out episodes, so runs cannot be compared task by task: play them"
            " again"
        )
    return {
        "success": ["".join(map(str, row)) for row in held_out["success"]],
        "greedy": "".join(map(str, held_out["greedy"])),
    }


def success(run: Mapping, when: str, measure: str) -> np.ndarray:
    """[N] float: each held-out task's success in [0, 1] "before" or "after" training; measure "avg" or "best" over its
    rollouts, or "greedy" (empty where there is none)."""
    held_out = run[when]
    if measure == "greedy":
        return np.array([float(digit) for digit in held_out["greedy"]])
    success_NK = np.array([[float(digit) for digit in row] for row in held_out["success"]])
    return success_NK.mean(axis=1) if measure == "avg" else success_NK.max(axis=1)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and tasks, the ends of its 95 % interval, and each seed's own mean. over_seeds: the interval is
    over seeds and tasks; with fewer than 3 seeds it is over tasks alone, and says nothing about other seeds.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]
    over_seeds: bool

    @classmethod
    def of(cls, values_SN: np.ndarray, span: Span = SHARE) -> Estimate:
        over_seeds = len(values_SN) >= MIN_SEEDS
        if over_seeds:
            low, high = crossed_interval(values_SN, span=span)
        else:
            low, high = interval(values_SN.mean(axis=0), span=span)
        return cls(float(values_SN.mean()), low, high, tuple(values_SN.mean(axis=1).tolist()), over_seeds)

    def text(self, sign: str = "") -> str:
        """In points: mean [low, high], marked where it is over tasks alone."""
        mean, low, high = (f"{100 * value:{sign}.1f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]{'' if self.over_seeds else ' (tasks)'}"

    @property
    def seeds_text(self) -> str:
        return ", ".join(f"{100 * value:.1f}" for value in self.seeds)


def by_arm(runs: Sequence[Mapping]) -> dict[str, dict[int, Mapping]]:
    """The finished runs: arm -> seed -> run, arms in the order in which they come, seeds ascending."""
    arms: dict[str, dict[int, Mapping]] = {}
    for run in runs:
        if run["status"] == "finished":
            arms.setdefault(run["arm"], {})[run["seed"]] = run
    return {arm: dict(sorted(seeds.items())) for arm, seeds in arms.items()}


def level(seeds: Mapping[int, Mapping], when: str, measure: str) -> Estimate:
    return Estimate.of(np.array([success(run, when, measure) for run in seeds.values()]))


def change(seeds: Mapping[int, Mapping], measure: str) -> Estimate:
    """After minus before, paired by seed and task."""
    runs = seeds.values()
    values = [success(run, "after", measure) - success(run, "before", measure) for run in runs]
    return Estimate.of(np.array(values), DIFFERENCE)


def contrast(better: Mapping[int, Mapping], worse: Mapping[int, Mapping], measure: str) -> Estimate | None:
    """One arm minus another after training, paired by seed and task, over the seeds of both; None without one."""
    common = [seed for seed in better if seed in worse]
    if not common:
        return None
    values = [success(better[seed], "after", measure) - success(worse[seed], "after", measure) for seed in common]
    return Estimate.of(np.array(values), DIFFERENCE)


def column(run: Mapping, key: str) -> np.ndarray:
    """[rows] float: a metric in every row, nan where a row has none."""
    rows = run["rows"]
    return np.array([np.nan if value is None else value for value in rows.get(key, [None] * len(rows["step"]))], float)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Evaluations during training, [E] each: updates, seconds of training (evaluations and compiling left out), tokens
    generated (rollouts and feedback), success in [0, 1]."""

    steps: np.ndarray
    time: np.ndarray
    tokens: np.ndarray
    value: np.ndarray

    @classmethod
    def of(cls, run: Mapping) -> Curve:
        key = next(key for key in run["rows"] if key.startswith("eval/avg@"))
        value = column(run, key)
        at = ~np.isnan(value)
        seconds = np.nan_to_num(column(run, "time/step")).cumsum()
        tokens = (
            np.nan_to_num(column(run, "rollout/tokens")) + np.nan_to_num(column(run, "hindsight/tokens"))
        ).cumsum()
        return cls(np.array(run["rows"]["step"], float)[at], seconds[at], tokens[at], value[at])

    @classmethod
    def mean(cls, curves: Sequence[Curve]) -> Curve:
        """The mean over runs of each axis at equal updates, as far as all of them go."""
        length = min(len(curve.steps) for curve in curves)
        return cls(
            *(
                np.mean([getattr(curve, field.name)[:length] for curve in curves], axis=0)
                for field in dataclasses.fields(cls)
            )
        )

    def at_time(self, seconds: float) -> float:
        """Success after so much training, between evaluations by a straight line. Raises ValueError where training
        ended before.
        """
        if seconds > self.time[-1]:
            raise ValueError(f"training ended after {self.time[-1]:.1f} s, before {seconds:.1f} s")
        return float(np.interp(seconds, self.time, self.value))

    def reaches(self, wanted: float) -> float | None:
        """Seconds of training until success is first at `wanted`, between evaluations by a straight line; None if it
        never is.
        """
        for n in range(len(self.value)):
            if self.value[n] >= wanted:
                if n == 0:
                    return float(self.time[0])
                share = (wanted - self.value[n - 1]) / (self.value[n] - self.value[n - 1])
                return float(self.time[n - 1] + share * (self.time[n] - self.time[n - 1]))
        return None


def a_step(run: Mapping, key: str, middle: Callable = np.median, skip: int = WARM) -> float:
    """A metric of one update: `middle` over the updates after the first `skip` (over the last one where there are no
    more); nan without any.
    """
    values = column(run, key)[np.array(run["rows"]["step"]) > 0]
    values = values[skip:] if len(values) > skip else values[-1:]
    values = values[~np.isnan(values)]
    return float(middle(values)) if len(values) else float("nan")


def mean_of(seeds: Mapping[int, Mapping], key: str, middle: Callable = np.median, skip: int = WARM) -> float:
    return float(np.mean([a_step(run, key, middle, skip) for run in seeds.values()]))


def values_of(seeds: Mapping[int, Mapping], key: str) -> list[float]:
    """Every value of a metric that the runs have."""
    return [value for run in seeds.values() for value in column(run, key) if not np.isnan(value)]


def equal_time(reference: Curve, curve: Curve) -> tuple[float, float, float]:
    """The seconds of training that both have had, when the shorter one ends; success of `curve` then, and of
    `reference`.
    """
    seconds = float(min(reference.time[-1], curve.time[-1]))
    return seconds, curve.at_time(seconds), reference.at_time(seconds)


def retimed(runs: Sequence[Mapping], clean: Sequence[Mapping]) -> list[dict]:
    """The runs with the times of the `clean` run of the same arm, which had its machine to itself.

    Success needs many long runs; clean times need few. Updates that the clean run did not make get the median of those
    that it made, without the first ones.

    Raises:
      SystemExit: an arm has no clean run, or several.
    """
    by_arm: dict[str, list[Mapping]] = {}
    for run in clean:
        by_arm.setdefault(run["arm"], []).append(run)
    with_clean_times = []
    for run in runs:
        if len(by_arm.get(run["arm"], ())) != 1:
            raise SystemExit(
                f"error: there must be one run with clean times of {run['arm']}, not {len(by_arm.get(run['arm'], ()))}"
            )
        rows, (other,) = dict(run["rows"]), by_arm[run["arm"]]
        for key in TIMES:
            if key in rows and key in other["rows"]:
                times = dict(zip(other["rows"]["step"], other["rows"][key], strict=True))
                usual = [value for step, value in times.items() if step > WARM and value is not None]
                middle = float(np.median(usual)) if usual else None
                rows[key] = [times.get(step, middle) for step in rows["step"]]
        with_clean_times.append({**run, "rows": rows})
    return with_clean_times
