"""Summaries of runs in, numbers and Markdown tables out: what `compare_methods` says. Runs nothing and needs no device.

A summary is what `compare_methods.write_summary` leaves: `arm`, `seed`, `status`, `before` and `after` (encoded
held-out success), `rows` (metrics by key, one value a row), and where it ran. Dimension letters: S seeds, N tasks, K
rollouts, E evaluations.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hintsd_jax.evaluate import interval

LEVELS = (0.5, 0.6, 0.7, 0.8)
WARM = 2  # updates at the start whose time is not counted
PAIRS = (
    ("hint_sd_single", "random"),
    ("all", "dense"),
    ("hint_sd+grpo", "grpo"),
)  # compared beside the first arm against each
MEASURES = {"Avg@{k}": "avg", "Best@{k}": "best", "greedy": "greedy"}


def encode(held_out: Mapping | None) -> dict | None:
    """A held-out result as short strings: one of digits a task, one of digits for greedy."""
    if held_out is None:
        return None
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
    """A mean over seeds and tasks, the ends of its 95 % interval (bootstrap over tasks), and each seed's own mean."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @classmethod
    def of(cls, values_SN: np.ndarray) -> Estimate:
        low, high = interval(values_SN.mean(axis=0))
        return cls(float(values_SN.mean()), low, high, tuple(values_SN.mean(axis=1).tolist()))

    def text(self, sign: str = "") -> str:
        """In points: mean [low, high]."""
        mean, low, high = (f"{100 * value:{sign}.1f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"

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
    """After minus before, task by task."""
    return Estimate.of(
        np.array([success(run, "after", measure) - success(run, "before", measure) for run in seeds.values()])
    )


def contrast(better: Mapping[int, Mapping], worse: Mapping[int, Mapping], measure: str) -> Estimate | None:
    """One arm minus another after training, task by task, over the seeds that both have; None without one."""
    common = [seed for seed in better if seed in worse]
    if not common:
        return None
    return Estimate.of(
        np.array([success(better[seed], "after", measure) - success(worse[seed], "after", measure) for seed in common])
    )


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


def number(value: float, form: str = ",.0f") -> str:
    return "" if np.isnan(value) else format(value, form)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    rule = ["---" if n in left else "--:" for n in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def success_table(arms: Mapping, labels: Mapping, missing: Mapping, name: str, measure: str) -> str:
    first = next(iter(arms))
    header = ["arm", "seeds", "before", "after [95 %]", "each seed", "change [95 %]", f"`{first}` minus it [95 %]"]
    rows = []
    for arm, seeds in arms.items():
        minus = None if arm == first else contrast(arms[first], seeds, measure)
        after = level(seeds, "after", measure)
        cells = [
            labels.get(arm, arm),
            ", ".join(map(str, seeds)),
            f"{100 * level(seeds, 'before', measure).mean:.1f}",
            after.text(),
        ]
        rows.append([*cells, after.seeds_text, change(seeds, measure).text("+"), minus.text("+") if minus else ""])
    rows += [[labels.get(arm, arm), str(seed), "", why, "", "", ""] for (arm, seed), why in missing.items()]
    pairs = [(better, worse) for better, worse in PAIRS if better in arms and worse in arms]
    found = [(better, worse, contrast(arms[better], arms[worse], measure)) for better, worse in pairs]
    lines = [f"- `{better}` minus `{worse}`: {estimate.text('+')}" for better, worse, estimate in found if estimate]
    return f"### {name}\n\n{table(header, rows)}" + ("\n\n" + "\n".join(lines) if lines else "")


def cost_table(arms: Mapping, labels: Mapping) -> str:
    first = next(iter(arms))
    header = ["arm", "step", f"x `{first}`", "rollout", "hindsight", "distil", f"hindsight + distil, x `{first}`"]
    header += [
        "tokens of rollouts",
        "of feedback",
        "through student",
        "through teacher",
        "peak memory, MiB",
        "compiling",
    ]

    def looked(seeds: Mapping) -> float:
        return mean_of(seeds, "time/analysis") + mean_of(seeds, "time/update")

    rows = []
    for arm, seeds in arms.items():
        common = {seed: arms[first][seed] for seed in seeds if seed in arms[first]}
        ratios = [np.nan, np.nan]
        if common:
            same = {seed: seeds[seed] for seed in common}
            ratios = [mean_of(same, "time/step") / mean_of(common, "time/step"), looked(same) / looked(common)]
        step, *parts = (
            number(mean_of(seeds, f"time/{part}"), ".2f") for part in ("step", "rollout", "hindsight", "distill")
        )
        tokens = [number(mean_of(seeds, key, np.mean, 0)) for key in ("rollout/tokens", "hindsight/tokens")]
        passed = [number(mean_of(seeds, f"train/{who}_tokens", np.mean, 0)) for who in ("student", "teacher")]
        if not any(passed):
            passed = [f"{number(mean_of(seeds, 'train/passed', np.mean, 0))} in all", ""]
        peak = max(found(seeds, "memory/peak_bytes"), default=np.nan) / 2**20
        compiling = np.mean(
            [
                np.nansum(column(run, "time/compile")) if "time/compile" in run["rows"] else np.nan
                for run in seeds.values()
            ]
        )
        rows.append(
            [labels.get(arm, arm), step, number(ratios[0], ".2f"), *parts, number(ratios[1], ".2f"), *tokens, *passed]
        )
        rows[-1] += [number(peak), number(compiling, ".0f")]
    return table(header, rows)


def target_table(arms: Mapping, labels: Mapping) -> str:
    header = ["arm", "rollouts in all", "failed an update", "questions", "targets", "precision", "recall"]
    rows = []
    for arm, seeds in arms.items():
        episodes = np.mean([np.nansum(column(run, "rollout/episodes")) for run in seeds.values()])
        counts = [
            number(mean_of(seeds, f"hindsight/{key}", np.mean, 0), ".1f") for key in ("failed", "asked", "targets")
        ]
        known = [found(seeds, f"hindsight/{key}") for key in ("precision", "recall")]
        rates = [number(float(np.mean(values)), ".2f") if values else "" for values in known]
        rows.append([labels.get(arm, arm), number(episodes), *counts, *rates])
    return table(header, rows)


def found(seeds: Mapping[int, Mapping], key: str) -> list[float]:
    """Every value of a metric that the runs have."""
    return [value for run in seeds.values() for value in column(run, key) if not np.isnan(value)]


def time_table(arms: Mapping, labels: Mapping) -> str:
    """Success of each arm and of the first one after the same seconds of training, by seed; and the seconds to given
    levels, of the mean curve.
    """
    first = next(iter(arms))
    reference = {seed: Curve.of(run) for seed, run in arms[first].items()}
    header = [
        "arm",
        "training",
        "success at its end",
        "compared at",
        "success then",
        f"`{first}` then",
        f"`{first}` minus it, each seed",
    ]
    header += [f"to {100 * wanted:.0f} %" for wanted in LEVELS]
    rows = []
    for arm, seeds in arms.items():
        curves = {seed: Curve.of(run) for seed, run in seeds.items()}
        mean = Curve.mean(list(curves.values()))
        cells = [
            labels.get(arm, arm),
            number(np.mean([curve.time[-1] for curve in curves.values()])),
            f"{100 * mean.value[-1]:.1f}",
        ]
        pairs = (
            []
            if arm == first
            else [equal_time(reference[seed], curve) for seed, curve in curves.items() if seed in reference]
        )
        then = np.mean(pairs, axis=0) if pairs else None
        cells += [number(then[0]), f"{100 * then[1]:.1f}", f"{100 * then[2]:.1f}"] if pairs else [""] * 3
        cells.append(", ".join(f"{100 * (theirs - its):+.1f}" for _, its, theirs in pairs))
        rows.append(
            cells + ["-" if (seconds := mean.reaches(wanted)) is None else number(seconds) for wanted in LEVELS]
        )
    return table(header, rows)


def equal_time(reference: Curve, curve: Curve) -> tuple[float, float, float]:
    """The seconds of training that both have had, when the shorter one ends; success of `curve` then, and of
    `reference`.
    """
    seconds = float(min(reference.time[-1], curve.time[-1]))
    return seconds, curve.at_time(seconds), reference.at_time(seconds)


def page(runs: Sequence[Mapping], labels: Mapping[str, str], clean: Sequence[Mapping] = ()) -> str:
    """The whole Markdown page; `clean`: the runs that the times come from, where they are others (`compare_timing`).

    Raises:
      SystemExit: runs that cannot be compared: of different configs, settings or held-out tasks.
    """
    arms = by_arm(runs)
    first = next(iter(arms))
    done = [run for seeds in arms.values() for run in seeds.values()]
    settings = check_same(done)
    tasks, k = len(done[0]["after"]["success"]), len(done[0]["after"]["success"][0])
    missing = {
        (run["arm"], run["seed"]): f"**failed**: {run['problem'].replace('|', '/')}"
        if run["status"] == "failed"
        else "not finished"
        for run in runs
        if run["status"] != "finished"
    }
    shared = " ".join([f"`{done[0]['config']}`", *(f"{key}={value}" for key, value in settings.items())])
    parts = [
        "# Methods side by side",
        f"{max(run['date'] for run in done)}. {shared}. The same starting policy, tasks and sampling keys for every arm,"
        f" `{first}` against each.",
        f"## Success on {tasks} held-out tasks x {k} rollouts, %\n\nIntervals: bootstrap over tasks of the mean over seeds and rollouts;"
        f" differences are paired task by task.{starts_agree(arms)}",
    ]
    for name, measure in MEASURES.items():
        if measure != "greedy" or all(run["after"]["greedy"] for run in done):
            parts.append(success_table(arms, labels, missing, name.format(k=k), measure))
    parts += [
        f"## What an update costs\n\nSeconds: medians over the updates after the first {WARM}, mean over seeds. Tokens: mean over all updates; those"
        " through student and teacher with padding. Compiling is before the first update, from a cache where there was one, and in no other figure."
        f" {where(clean or done)}{retold(clean)}",
        cost_table(arms, labels),
        "## At equal wall time\n\nSuccess, %, here is on the evaluation tasks, a straight line between evaluations; times are seconds of updates,"
        f" without evaluations. Each arm is compared with `{first}` when the one of the two ends that takes less time.",
        time_table(arms, labels),
        "## Hindsight\n\nFailed rollouts, questions to the analyser and targets of an update; precision and recall against the steps that broke the"
        " episode, which Desk knows.",
        target_table(arms, labels),
        "Overrides of each arm:\n\n"
        + "\n".join(f"- `{arm}`: `{' '.join(overrides)}`" for arm, overrides in overrides_of(arms).items()),
        f"Versions: {'; '.join(sorted({json.dumps(run['versions']) for run in done}))}",
    ]
    return "\n\n".join(parts) + "\n"


def check_same(runs: Sequence[Mapping]) -> dict[str, str]:
    """The settings that all runs share. Raises SystemExit where they do not."""
    first = runs[0]
    for run in runs:
        names = [f"{one['arm']}-{one['seed']}" for one in (first, run)]
        if (run["config"], run["settings"]) != (first["config"], first["settings"]):
            settings = [f"{one['config']} {one['settings']}" for one in (first, run)]
            raise SystemExit(
                f"error: {names[0]} and {names[1]} cannot be compared: {settings[0]} against {settings[1]}"
            )
        if run["before"] is None or run["after"] is None:
            raise SystemExit(f"error: {names[1]} has no held-out results to compare: set eval.test_tasks above 0")
        shapes = [
            [len(one["after"]["success"]), len(one["after"]["success"][0]), len(one["after"]["greedy"])]
            for one in (first, run)
        ]
        if shapes[0] != shapes[1]:
            raise SystemExit(
                f"error: {names[0]} and {names[1]} have other held-out tasks: {shapes[0]} against {shapes[1]}"
            )
    return first["settings"]


def overrides_of(arms: Mapping) -> dict[str, list[str]]:
    """What makes each arm. Raises SystemExit where its seeds were run with different overrides."""
    for arm, seeds in arms.items():
        kinds = {" ".join(run["overrides"]) for run in seeds.values()}
        if len(kinds) > 1:
            raise SystemExit(f"error: the seeds of {arm} were run with different overrides: {'; '.join(sorted(kinds))}")
    return {arm: next(iter(seeds.values()))["overrides"] for arm, seeds in arms.items()}


def starts_agree(arms: Mapping) -> str:
    """How many rollouts before training differ between the arms of a seed: none on one kind of machine."""
    differing = total = 0
    for seed in sorted({seed for seeds in arms.values() for seed in seeds}):
        starts = [
            np.array([list(row) for row in seeds[seed]["before"]["success"]])
            for seeds in arms.values()
            if seed in seeds
        ]
        differing += sum(int((start != starts[0]).sum()) for start in starts[1:])
        total += sum(start.size for start in starts[1:])
    return (
        f" Before training {differing} of {total} rollouts differ from those of the first arm with the same seed."
        if total
        else ""
    )


def retold(clean: Sequence[Mapping]) -> str:
    if not clean:
        return ""
    updates = max(max(run["rows"]["step"]) for run in clean)
    return (
        f" The runs that success comes from shared these cores with other work. Times are therefore those of one run of each arm that had them"
        f" to itself, update by update; runs of fewer than {updates} updates stand with their median for the later ones, so there they are rough."
    )


def where(runs: Sequence[Mapping]) -> str:
    """The machines, and how many cores each process had."""
    machines = {json.dumps(machine, sort_keys=True): machine for run in runs for machine in run["machines"]}
    texts = []
    for machine in machines.values():
        per_job = machine["cores_per_job"]
        cores = (
            f"{per_job} of its {machine['cores']} cores to each alone"
            if per_job
            else f"its {machine['cores']} cores shared"
        )
        texts.append(f"{machine['cpu']}, {machine['jobs']} processes at a time, {cores}")
    return f"Where: {'; '.join(sorted(set(texts)))}."


def to_json(runs: Sequence[Mapping]) -> str:
    """All summaries as one file: one line a run."""
    lines = ",\n".join(json.dumps(run) for run in runs)
    return f'{{"runs": [\n{lines}\n]}}\n'


def plain(label: str) -> str:
    """A label without Markdown, for figures."""
    return re.sub(r"[*`]", "", label)
