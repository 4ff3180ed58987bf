"""Summaries of runs in, a Markdown page out: what `compare_algorithms` says. Runs nothing and needs no device."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from benchmarks import comparison_settings, comparison_teachers
from benchmarks.comparison import (
    WARM,
    Curve,
    by_arm,
    change,
    column,
    contrast,
    equal_time,
    level,
    mean_of,
    values_of,
)
from benchmarks.comparison_teachers import Gain
from benchmarks.pages import markdown_table

LEVELS = (0.5, 0.6, 0.7, 0.8)
# Compared beside the first arm against each.
PAIRS = (("hint_sd_single", "random"), ("all", "openclaw_rl"), ("hint_sd+grpo", "grpo"))
INTERVALS = (
    "Intervals, 95 %: bootstrap over seeds and tasks, both as drawn from many; differences are paired by seed and task,"
    " over the seeds that both arms have. **(tasks)**: there are fewer than 3 such seeds, so the interval is over tasks"
    " alone and says nothing about other seeds."
)
NO_SEARCH = "Learning rates were not searched for (--search-lr): each arm has the config's, found for none or for one."
SETTINGS = (
    "Settings in which the arms differ, as they were in force, whoever decided them. *config*: the config file's"
    " `algorithm_defaults` have put this in place of what the algorithm has by itself."
)
MEASURES = {"Avg@{k}": "avg", "Best@{k}": "best", "greedy": "greedy"}

Arms = Mapping[str, Mapping[int, Mapping]]  # arm -> seed -> run


def number(value: float, form: str = ",.0f") -> str:
    return "" if np.isnan(value) else format(value, form)


def success_table(arms: Arms, labels: Mapping, missing: Mapping, name: str, measure: str) -> str:
    first = next(iter(arms))
    header = ["arm", "seeds", "before", "after [95 %]", "each seed", "change [95 %]", f"`{first}` minus it [95 %]"]
    rows = []
    for arm, seeds in arms.items():
        minus = None if arm == first else contrast(arms[first], seeds, measure)
        before, after = level(seeds, "before", measure), level(seeds, "after", measure)
        cells = [labels.get(arm, arm), ", ".join(map(str, seeds)), f"{100 * before.mean:.1f}", after.text()]
        rows.append([*cells, after.seeds_text, change(seeds, measure).text("+"), minus.text("+") if minus else ""])
    rows += [[labels.get(arm, arm), str(seed), "", why, "", "", ""] for (arm, seed), why in missing.items()]
    pairs = [(better, worse) for better, worse in PAIRS if better in arms and worse in arms]
    contrasts = [(better, worse, contrast(arms[better], arms[worse], measure)) for better, worse in pairs]
    lines = [f"- `{better}` minus `{worse}`: {minus.text('+')}" for better, worse, minus in contrasts if minus]
    return "\n\n".join(part for part in (f"### {name}", markdown_table(header, rows), "\n".join(lines)) if part)


def cost_table(arms: Arms, labels: Mapping) -> str:
    first = next(iter(arms))
    header = ["arm", "step", f"x `{first}`", "rollout", "analysis", "update", f"analysis + update, x `{first}`"]
    header += ["tokens of rollouts", "of feedback", "through student", "through teacher", "peak memory, MiB"]
    header.append("compiling")
    learning = lambda seeds: mean_of(seeds, "time/analysis") + mean_of(seeds, "time/update")
    rows = []
    for arm, seeds in arms.items():
        both = [seed for seed in seeds if seed in arms[first]]
        ratios = [np.nan, np.nan]
        if both:
            same, of_first = ({seed: runs[seed] for seed in both} for runs in (seeds, arms[first]))
            step = mean_of(same, "time/step") / mean_of(of_first, "time/step")
            ratios = [step, learning(same) / learning(of_first)]
        times = [number(mean_of(seeds, f"time/{part}"), ".2f") for part in ("step", "rollout", "analysis", "update")]
        counts = ("rollout/tokens", "hindsight/tokens", "train/student_tokens", "train/teacher_tokens")
        tokens = [number(mean_of(seeds, key, np.mean, 0)) for key in counts]
        peak = max(values_of(seeds, "memory/peak_bytes"), default=np.nan) / 2**20
        compiling = [np.nansum(column(run, "time/compile")) for run in seeds.values() if "time/compile" in run["rows"]]
        cells = [labels.get(arm, arm), times[0], number(ratios[0], ".2f"), *times[1:], number(ratios[1], ".2f")]
        rows.append([*cells, *tokens, number(peak), number(float(np.mean(compiling or np.nan)), ".0f")])
    return markdown_table(header, rows)


def target_table(arms: Arms, labels: Mapping) -> str:
    header = ["arm", "rollouts in all", "failed a step", "questions", "targets", "precision", "recall"]
    rows = []
    for arm, seeds in arms.items():
        episodes = float(np.mean([np.nansum(column(run, "rollout/episodes")) for run in seeds.values()]))
        keys = ("failed_episodes", "questions", "targets")
        counts = [number(mean_of(seeds, f"hindsight/{key}", np.mean, 0), ".1f") for key in keys]
        known = [values_of(seeds, f"hindsight/{key}") for key in ("precision", "recall")]
        rates = [number(float(np.mean(values)), ".2f") if values else "" for values in known]
        rows.append([labels.get(arm, arm), number(episodes), *counts, *rates])
    return markdown_table(header, rows)


def time_table(arms: Arms, labels: Mapping) -> str:
    """Success of each arm and of the first one after the same seconds of training, by seed; and the seconds to given
    levels, of the mean curve.
    """
    first = next(iter(arms))
    reference = {seed: Curve.of(run) for seed, run in arms[first].items()}
    header = ["arm", "training", "success at its end", "compared at", "success then", f"`{first}` then"]
    header += [f"`{first}` minus it, each seed", *(f"to {100 * wanted:.0f} %" for wanted in LEVELS)]
    rows = []
    for arm, seeds in arms.items():
        curves = {seed: Curve.of(run) for seed, run in seeds.items()}
        mean = Curve.mean(list(curves.values()))
        training = float(np.mean([curve.time[-1] for curve in curves.values()]))
        cells = [labels.get(arm, arm), number(training), f"{100 * mean.value[-1]:.1f}"]
        common = [] if arm == first else [seed for seed in curves if seed in reference]
        pairs = [equal_time(reference[seed], curves[seed]) for seed in common]
        if pairs:
            seconds, its, theirs = np.mean(pairs, axis=0)
            cells += [number(seconds), f"{100 * its:.1f}", f"{100 * theirs:.1f}"]
        else:
            cells += [""] * 3
        cells.append(", ".join(f"{100 * (theirs - its):+.1f}" for _, its, theirs in pairs))
        reached = [mean.reaches(wanted) for wanted in LEVELS]
        rows.append([*cells, *("-" if seconds is None else number(seconds) for seconds in reached)])
    return markdown_table(header, rows)


def page(
    runs: Sequence[Mapping],
    labels: Mapping[str, str],
    clean: Sequence[Mapping] = (),
    search: str = "",
    gains: Mapping[str, Gain] = MappingProxyType({}),
) -> str:
    """The whole Markdown page.

    clean: the runs that the times come from, where they are others (`retimed`). search: what it says of the search for
    learning rates, "" where there was none. gains: of `teacher_gain`, by arm; they mark arms' labels.

    Raises:
      SystemExit: runs that cannot be compared: of different configs, settings or held-out tasks.
    """
    arms, labels = by_arm(runs), comparison_teachers.marked(labels, gains)
    first = next(iter(arms))
    done = [run for seeds in arms.values() for run in seeds.values()]
    settings = check_same(done)
    tasks, k = len(done[0]["after"]["success"]), len(done[0]["after"]["success"][0])
    missing = {
        (run["arm"], run["seed"]): f"**failed**: {run['problem']}" if run["status"] == "failed" else "not finished"
        for run in runs
        if run["status"] != "finished"
    }
    shared = " ".join([f"`{done[0]['config']}`", *(f"{key}={value}" for key, value in settings.items())])
    parts = [
        f"# Algorithms side by side: {done[0]['config']}",
        f"{max(run['date'] for run in done)}. {shared}. The same starting policy, tasks and sampling keys for every"
        f" arm, `{first}` against each.",
        f"## Success on {tasks} held-out tasks x {k} rollouts, {seeds_of(arms)}, %\n\n{INTERVALS}{starts_agree(arms)}",
    ]
    for name, measure in MEASURES.items():
        if measure != "greedy" or all(run["after"]["greedy"] for run in done):
            parts.append(success_table(arms, labels, missing, name.format(k=k), measure))
    compared = {arm: gain for arm, gain in gains.items() if arm in arms}
    teachers = comparison_teachers.table(compared, labels) if compared else ""
    overrides = [f"- `{arm}`: `{' '.join(of_arm)}`" for arm, of_arm in overrides_of(arms).items()]
    parts += [
        f"## What a training step costs\n\nSeconds: medians over the steps after the first {WARM}, mean over seeds."
        " Tokens: mean over all steps; those through student and teacher with padding. Compiling is before the first"
        f" step, from a cache where there was one, and in no other figure. {where(clean or done)}{times_note(clean)}",
        cost_table(arms, labels),
        "## At equal wall time\n\nSuccess, %, here is on the evaluation tasks, a straight line between evaluations;"
        " times are seconds of training steps, without evaluations. Each arm is compared with"
        f" `{first}` when the one of the two ends that takes less time.",
        time_table(arms, labels),
        "## Hindsight\n\nFailed rollouts, questions to the analyser and targets of a training step; precision and"
        " recall against the steps that broke the episode, where the environment knows them.",
        target_table(arms, labels),
        *([f"## Teachers\n\n{comparison_teachers.ABOUT}\n\n{teachers}"] if teachers else []),
        f"## What each arm is\n\n{search or NO_SEARCH}",
        *([f"{SETTINGS}\n\n{settings}"] if (settings := comparison_settings.table(arms, labels)) else []),
        "Overrides of each arm:\n\n" + "\n".join(overrides),
        f"Versions: {'; '.join(sorted({json.dumps(run['versions']) for run in done}))}",
    ]
    return "\n\n".join(parts) + "\n"


def seeds_of(arms: Arms) -> str:
    """How many seeds the arms have, in words."""
    counts = sorted({len(seeds) for seeds in arms.values()})
    return f"{counts[0]} seed{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def check_same(runs: Sequence[Mapping]) -> dict[str, str]:
    """The settings that all runs share. Raises SystemExit where they do not."""
    first = runs[0]
    shape = lambda run: [len(run["after"]["success"]), len(run["after"]["success"][0]), len(run["after"]["greedy"])]
    for run in runs:
        names = [f"{one['arm']}-{one['seed']}" for one in (first, run)]
        if (run["config"], run["settings"]) != (first["config"], first["settings"]):
            settings = [f"{one['config']} {one['settings']}" for one in (first, run)]
            raise SystemExit(
                f"error: {names[0]} and {names[1]} cannot be compared: {settings[0]} against {settings[1]}"
            )
        if run["before"] is None or run["after"] is None:
            raise SystemExit(f"error: {names[1]} has no held-out results to compare: set eval.test_tasks above 0")
        if shape(run) != shape(first):
            raise SystemExit(
                f"error: {names[0]} and {names[1]} have other held-out tasks: {shape(first)} against {shape(run)}"
            )
    return first["settings"]


def overrides_of(arms: Arms) -> dict[str, list[str]]:
    """What makes each arm. Raises SystemExit where its seeds were run with different overrides."""
    for arm, seeds in arms.items():
        kinds = {" ".join(run["overrides"]) for run in seeds.values()}
        if len(kinds) > 1:
            raise SystemExit(f"error: the seeds of {arm} were run with different overrides: {'; '.join(sorted(kinds))}")
    return {arm: next(iter(seeds.values()))["overrides"] for arm, seeds in arms.items()}


def starts_agree(arms: Arms) -> str:
    """How many rollouts before training differ between the arms of a seed: none on one kind of machine."""
    differing = total = 0
    for seed in sorted({seed for seeds in arms.values() for seed in seeds}):
        runs = [seeds[seed] for seeds in arms.values() if seed in seeds]
        starts = [np.array([list(row) for row in run["before"]["success"]]) for run in runs]
        differing += sum(int((start != starts[0]).sum()) for start in starts[1:])
        total += sum(start.size for start in starts[1:])
    if not total:
        return ""
    return f" Before training {differing} of {total} rollouts differ from those of the first arm with the same seed."


def times_note(clean: Sequence[Mapping]) -> str:
    if not clean:
        return ""
    steps = max(max(run["rows"]["step"]) for run in clean)
    return (
        " The runs that success comes from shared these cores with other work. Times are therefore those of one run of"
        f" each arm that had them to itself, step by step; runs of fewer than {steps} steps stand with their median for"
        " the later ones, so there they are rough."
    )


def where(runs: Sequence[Mapping]) -> str:
    """The machines, and how many cores each process had."""
    machines = {json.dumps(machine, sort_keys=True): machine for run in runs for machine in run["machines"]}
    texts = set()
    for machine in machines.values():
        cores, per_job = machine["cores"], machine["cores_per_job"]
        share = f"{per_job} of its {cores} cores to each alone" if per_job else f"its {cores} cores shared"
        texts.add(f"{machine['cpu']}, {machine['jobs']} processes at a time, {share}")
    return f"Where: {'; '.join(sorted(texts))}."


def to_json(runs: Sequence[Mapping]) -> str:
    """All summaries as one file: one line a run."""
    lines = ",\n".join(json.dumps(run) for run in runs)
    return f'{{"runs": [\n{lines}\n]}}\n'


def plain(label: str) -> str:
    """A label without Markdown, for figures."""
    return re.sub(r"[*`]", "", label)
