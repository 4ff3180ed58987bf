"""Algorithms side by side: every arm and seed from the same policy, on the same tasks, with as many rollouts.

  python -m benchmarks.compare_algorithms --search-lr=0.3,1,3 --jobs=7 --cores-per-job=2
      look for the learning rate of each arm, run every arm with every seed, then tables and figures
  python -m benchmarks.compare_algorithms --search-lr=0.3,1,3 --jobs=7 --cores-per-job=2 --minutes=8
      the same in slices: call it until it says that all are done
  python -m benchmarks.compare_algorithms --search-lr=0.3,1,3 --read
      run nothing: tables and figures of what is there
  python -m benchmarks.compare_algorithms --read --collected=benchmarks/results/compare_desk.json
      the same from the kept results alone
  python -m benchmarks.compare_algorithms --config=textworld eval.tasks=20
      with any config, shipped or a file

An arm is the config plus a few overrides (`ARMS`). With --search-lr each arm first gets the same small search: factors
of the config's `optim.lr`, seeds that are not reported (--search-seeds), chosen by the eval split; the test tasks are
not played in it. Each run is a process of its own in WORKDIR/<arm>-<seed> or WORKDIR/search/: one that is finished is
read, not run again, and one that was cut continues. A run leaves a small `summary.json` there; tables and figures need
nothing else, so that only summaries (or the file of --collect) have to travel between machines. With --cores-per-job
every process has cores of its own, so that step times of arms that run at the same time can be compared. Figures need
requirements-bench.txt.

Exit status: 0 when all asked for is finished, 1 when a run failed (it is tried again by the next call), 75 when runs
are left to do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from benchmarks import comparison_search, comparison_tables, comparison_teachers
from benchmarks.comparison import read_summaries, retimed
from benchmarks.comparison_runs import Run, Runner, worth, write_summary
from benchmarks.comparison_search import Choice
from benchmarks.comparison_settings import config_of, settings_of
from benchmarks.pages import RESULTS

# name: (label, overrides). The first is what the others are compared with.
ARMS = {
    "hint_sd": ("**HINT-SD**", ["algorithm=hint_sd"]),
    "hint_sd_single": ("HINT-SD, the first mistake alone", ["algorithm=hint_sd_single"]),
    "openclaw_rl": ("OpenClaw-RL: hints and verdicts a step", ["algorithm=openclaw_rl"]),
    "sdpo": ("SDPO", ["algorithm=sdpo"]),
    "grpo": ("GRPO", ["algorithm=grpo"]),
    "rejection_sampling": ("rejection sampling: its own successes", ["algorithm=rejection_sampling"]),
    "sft": ("SFT: another policy's dialogues (sft.path)", ["algorithm=sft"]),
    "hint_sd+grpo": ("HINT-SD + GRPO", ["algorithm=hint_sd+grpo"]),
    "random": ("a random step, 1 target", ["algorithm=hint_sd", "hindsight.select=random", "hindsight.max_targets=1"]),
    "random3": ("random steps, 3 targets", ["algorithm=hint_sd", "hindsight.select=random", "hindsight.max_targets=3"]),
    "first": ("the first step", ["algorithm=hint_sd", "hindsight.select=first"]),
    "last": ("the last step", ["algorithm=hint_sd", "hindsight.select=last"]),
    "all": ("every step, analysed from the end", ["algorithm=hint_sd", "hindsight.select=all"]),
    "start": ("HINT-SD, feedback at the start", ["algorithm=hint_sd", "hindsight.feedback_position=start"]),
    "oracle": ("PRIVILEGED: true steps, own feedback", ["algorithm=hint_sd", "hindsight.select=oracle"]),
    "environment": ("PRIVILEGED: the environment's report", ["algorithm=hint_sd", "hindsight.analyser=environment"]),
    "missed60": ("HINT-SD, 60 % of its targets", ["algorithm=benchmarks.dulled:Missed60"]),
    "missed30": ("HINT-SD, 30 % of its targets", ["algorithm=benchmarks.dulled:Missed30"]),
    "moved60": ("HINT-SD, 40 % of its targets on other steps", ["algorithm=benchmarks.dulled:Moved60"]),
    "moved30": ("HINT-SD, 70 % of its targets on other steps", ["algorithm=benchmarks.dulled:Moved30"]),
    "moved0": ("HINT-SD, all of its targets on other steps", ["algorithm=benchmarks.dulled:Moved0"]),
    "self_training": ("self-training: its own unselected samples", ["algorithm=self_training"]),
    "lr0": ("learning rate 0, 3 updates", ["algorithm=hint_sd", "optim.lr=0.0", "optim.steps=3"]),
}
LABELS = {arm: label for arm, (label, _) in ARMS.items()}


class Found(NamedTuple):
    """runs: the summaries of what is reported. searched, choices: those of the search, and what it says, by arm. left,
    failed: of all that is wanted, runs that are not finished, and failed ones among them.
    """

    runs: list[dict]
    searched: list[dict]
    choices: Mapping[str, Choice]
    left: int
    failed: int

    @property
    def status(self) -> int:
        return 1 if self.failed else 75 if self.left else 0


def shared_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The overrides that all arms share."""
    settings = {"checkpoint.every": "2"}  # a cut costs at most two updates
    if arguments.steps:
        settings["optim.steps"] = str(arguments.steps)
    for override in arguments.overrides:
        key, equals, value = override.removeprefix("--config.").partition("=")
        if not equals:
            raise SystemExit(f"error: {override!r} is no override: write key=value, such as eval.tasks=100")
        settings[key] = value
    return settings


def is_searched(arm: str) -> bool:
    """Not the arms that are made by their learning rate."""
    return not any(override.startswith("optim.lr=") for override in ARMS[arm][1])


def facts_of(arguments: argparse.Namespace, run: Run, choices: Mapping[str, Choice]) -> dict:
    """What a run is: its config, the overrides that all arms share ("settings"), the arm's own, which win over them,
    and what comes of all that ("resolved").
    """
    settings, overrides = shared_settings(arguments), list(ARMS[run.arm][1])
    if dialogues := settings.pop("sft.path", ""):  # which one arm reads: the others can be compared with and without
        overrides += [f"sft.path={dialogues}"] * (run.arm == "sft")
    lr = config_of(arguments.config, settings).optim.lr
    facts = {"arm": run.arm, "seed": run.seed, "config": arguments.config, "settings": settings}
    if run.factor is not None:
        facts["factor"] = run.factor
        overrides += [f"optim.lr={run.factor * lr:.6g}", "eval.test_tasks=0"]
    elif run.arm in choices:
        overrides.append(f"optim.lr={choices[run.arm].factor * lr:.6g}")
    all_overrides = settings | dict(override.split("=", 1) for override in overrides)
    return facts | {"overrides": overrides, "resolved": settings_of(arguments.config, all_overrides)}


def refuse_others(planned: Mapping[Run, Mapping], there: Mapping[Run, Mapping]) -> None:
    """Raises SystemExit where a run that is there already was asked for with other settings."""
    for run, facts in planned.items():
        kept = there.get(run)
        if kept is not None and kept["status"] != "failed":
            for key, now in facts.items():
                if kept.get(key, now) != now:  # earlier versions kept less
                    where = f"{run.folder} was run with other {key} ({kept[key]}, now {now})"
                    raise SystemExit(f"error: {where}: give the same, or another --workdir")


def gather(workdir: Path, collected: Sequence[dict]) -> dict[Run, dict]:
    """The summaries of a workdir and the collected ones, one a run: where there are several, a finished one, then the
    one furthest on. In the order of the arms.
    """
    paths = [*sorted(workdir.glob("*/summary.json")), *sorted(workdir.glob("search/*/summary.json"))]
    best: dict[Run, dict] = {}
    for summary in [*collected, *(write_summary(path.parent) for path in paths)]:
        run = Run.of(summary)
        if run not in best or worth(summary) > worth(best[run]):
            best[run] = summary
    order = list(ARMS)
    place = lambda run: (order.index(run.arm) if run.arm in order else len(order), run.arm, run.seed, run.factor or 0.0)
    return {run: best[run] for run in sorted(best, key=place)}


def parser(description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", default="desk", help="the name of a shipped config, or a file")
    options.add_argument("--arms", default="", help=f"some of {','.join(ARMS)}; all, but sft only with sft.path=FILE")
    options.add_argument("--seeds", default="0,1,2", help="those that are reported; fewer than 3 say nothing of seeds")
    options.add_argument("--once", default="lr0", help="arms to run with the first seed only")
    options.add_argument("--search-lr", default="", help="factors of optim.lr that each arm tries, such as 0.3,1,3")
    options.add_argument("--search-seeds", default="1000", help="seeds of the search; none of them may be reported")
    options.add_argument("--steps", type=int, default=0, help="training steps; 0: as the config says")
    options.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    options.add_argument("--cores-per-job", type=int, default=0, help="cores of each process; 0: all share all")
    options.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="cut what still runs after so long; the same command continues it; 0: no limit",
    )
    options.add_argument("--read", action="store_true", help="run nothing")
    options.add_argument("--collect", type=Path, help="also write the summaries into this one file")
    options.add_argument(
        "--collected", default="", help="files of --collect, separated by commas: what is finished there is not run"
    )
    options.add_argument(
        "--teacher-gain", type=Path, help="a file of `teacher_gain`: arms whose teacher is no better are marked"
    )
    options.add_argument("overrides", nargs="*", help="further overrides for every arm, such as eval.tasks=100")
    return options


def numbers(text: str, kind: type, option: str) -> list:
    """The numbers of an option, separated by commas. Raises SystemExit where it has others."""
    try:
        return [kind(part) for part in filter(None, text.split(","))]
    except ValueError as error:
        raise SystemExit(f"error: {option}={text}: give numbers separated by commas") from error


def carry_out(arguments: argparse.Namespace, collected: Sequence[dict], runner: Runner) -> Found:
    """Runs what is left to run, unless it is only to be read, and gathers what is there and in `collected`."""
    workdir, once = arguments.workdir.absolute(), arguments.once.split(",")
    seeds = numbers(arguments.seeds, int, "--seeds")
    has_dialogues = "sft.path" in shared_settings(arguments) or arguments.read
    arms = arguments.arms.split(",") if arguments.arms else [arm for arm in ARMS if arm != "sft" or has_dialogues]
    if unknown := set(arms) - set(ARMS):
        raise SystemExit(f"error: --arms: {', '.join(sorted(unknown))} is unknown: choose some of {', '.join(ARMS)}")
    factors = numbers(arguments.search_lr, float, "--search-lr")
    search_seeds = numbers(arguments.search_seeds, int, "--search-seeds") if factors else []
    if both := sorted(set(seeds) & set(search_seeds)):
        raise SystemExit(f"error: seed {both[0]} is reported and searched with: choose others for --search-seeds")
    if any(factor <= 0 for factor in factors) or len(set(factors)) < len(factors):
        raise SystemExit(f"error: --search-lr={arguments.search_lr}: give different factors above 0")
    wanted = [Run(arm, seed) for seed in seeds for arm in arms if seed == seeds[0] or arm not in once]
    searched = [
        Run(arm, seed, factor) for seed in search_seeds for arm in filter(is_searched, arms) for factor in factors
    ]
    there = gather(workdir, collected)

    def carry_on(runs: Sequence[Run], choices: Mapping[str, Choice]) -> dict[Run, dict]:
        if arguments.read:
            return there
        planned = {run: facts_of(arguments, run, choices) for run in runs}
        refuse_others(planned, there)
        runner.run_all(workdir, [planned[run] for run in runs if there.get(run, {}).get("status") != "finished"])
        return gather(workdir, collected)

    if searched:
        there = carry_on(searched, {})
    choices = comparison_search.choose([there[run] for run in searched if run in there], factors, search_seeds)
    there = carry_on([run for run in wanted if run.arm in choices or not (searched and is_searched(run.arm))], choices)
    status = [there[run]["status"] if run in there else "" for run in (*searched, *wanted)]
    of = lambda runs: [there[run] for run in there if run in set(runs)]
    return Found(of(wanted), of(searched), choices, len(status) - status.count("finished"), status.count("failed"))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--workdir", type=Path, default=Path("runs/compare_algorithms"))
    options.add_argument(
        "--clean-times",
        default="",
        help="a file of --collect, of short runs that had the machine to themselves: see `comparison.retimed`",
    )
    options.add_argument(
        "--out", type=Path, default=RESULTS / "compare_algorithms", help="tables and figures; without a suffix"
    )
    arguments = options.parse_intermixed_args()
    found = carry_out(arguments, read_summaries(arguments.collected), Runner(arguments))
    if not found.runs and not found.searched:
        raise SystemExit(
            f"error: no summary in {arguments.workdir}: run some arms first, or name their --collected files"
        )
    if arguments.collect:
        arguments.collect.parent.mkdir(parents=True, exist_ok=True)
        arguments.collect.write_text(comparison_tables.to_json([*found.runs, *found.searched]))
    print(f"{found.left} runs are left, {found.failed} of them failed", flush=True)
    if any(run["status"] == "finished" for run in found.runs):
        write(arguments, found, read_summaries(arguments.clean_times))
    sys.exit(found.status)


def write(arguments: argparse.Namespace, found: Found, clean: Sequence[dict] = ()) -> None:
    """The page, the results as one file, and the figures, beside `arguments.out`."""
    shown = retimed(found.runs, clean) if clean else found.runs
    search = ""
    if found.choices:
        lr = config_of(arguments.config, shared_settings(arguments)).optim.lr
        search = comparison_search.table(found.choices, LABELS, lr, sorted({run["seed"] for run in found.searched}))
    text = comparison_tables.page(shown, LABELS, clean, search, comparison_teachers.read(arguments.teacher_gain))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(text)
    arguments.out.with_suffix(".json").write_text(comparison_tables.to_json([*shown, *found.searched]))
    print(text)
    if drawing := figures():
        drawing.draw(shown, LABELS, arguments.out)


def figures() -> ModuleType | None:
    """`comparison_figures`; None, and a word about it, where what it draws with is missing."""
    try:
        from benchmarks import comparison_figures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no figures: matplotlib is missing; pip install -r requirements-bench.txt", file=sys.stderr)
        return None
    return comparison_figures


if __name__ == "__main__":
    main()
