"""Algorithms side by side on Desk: every arm and seed from the same policy, on the same tasks, with the same number of
rollouts.

  python -m benchmarks.compare_algorithms --jobs=7 --cores-per-job=2
      run every arm with every seed, then tables and figures
  python -m benchmarks.compare_algorithms --jobs=7 --cores-per-job=2 --minutes=8
      the same in slices: call it until it says that all are done
  python -m benchmarks.compare_algorithms --read
      run nothing: tables and figures of what is there
  python -m benchmarks.compare_algorithms --read --collected=benchmarks/results/compare_methods.json
      the same from the kept results alone

An arm is the config plus a few overrides (`ARMS`). Each run is a process of its own in WORKDIR/<arm>-<seed>: one that
is finished is read, not run again, and one that was cut continues, because the trainer resumes. A run leaves a small
`summary.json` there; tables and figures need nothing else, so that only summaries (or the file of --collect) have to
travel between machines. With --cores-per-job every process has cores of its own, so that step times of arms that run at
the same time can be compared. Figures need requirements-bench.txt.

Exit status: 0 when all asked for is finished, 1 when a run failed (it is tried again by the next call), 75 when runs
are left to do.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import comparison_tables
from benchmarks.comparison import encode, read_summaries, retimed
from benchmarks.pages import REPO, RESULTS
from hintsd_jax.runs.metrics import read_metrics

# name: (label, overrides). The first is what the others are compared with.
ARMS = {
    "hint_sd": ("**HINT-SD**, up to 3 targets", ["algorithm=hint_sd"]),
    "hint_sd_single": ("HINT-SD, the first mistake alone", ["algorithm=hint_sd_single"]),
    "openclaw_rl": ("OpenClaw-RL: hints and verdicts a step", ["algorithm=openclaw_rl"]),
    "sdpo": ("SDPO", ["algorithm=sdpo"]),
    "grpo": ("GRPO", ["algorithm=grpo"]),
    "rejection_sampling": ("rejection sampling: its own successes", ["algorithm=rejection_sampling"]),
    "hint_sd+grpo": ("HINT-SD + GRPO", ["algorithm=hint_sd+grpo"]),
    "random": ("a random step, 1 target", ["algorithm=hint_sd", "hindsight.select=random", "hindsight.max_targets=1"]),
    "random3": ("random steps, 3 targets", ["algorithm=hint_sd", "hindsight.select=random", "hindsight.max_targets=3"]),
    "first": ("the first step", ["algorithm=hint_sd", "hindsight.select=first"]),
    "last": ("the last step", ["algorithm=hint_sd", "hindsight.select=last"]),
    "all": ("every step, analysed from the end", ["algorithm=hint_sd", "hindsight.select=all"]),
    "start": ("HINT-SD, feedback at the start", ["algorithm=hint_sd", "hindsight.feedback_position=start"]),
    "oracle": ("PRIVILEGED: true steps, own feedback", ["algorithm=hint_sd", "hindsight.select=oracle"]),
    "environment": ("PRIVILEGED: the environment's report", ["algorithm=hint_sd", "hindsight.analyser=environment"]),
    "self_training": ("self-training: its own unselected samples", ["algorithm=self_training"]),
    "lr0": ("learning rate 0, 3 updates", ["algorithm=hint_sd", "optim.lr=0.0", "optim.steps=3"]),
}
KEPT = [
    "time/",
    "memory/",
    "rollout/success",
    "rollout/tokens",
    "rollout/episodes",
    "hindsight/questions",
    "hindsight/failed_episodes",
    "hindsight/tokens",
    "hindsight/targets",
    "hindsight/precision",
    "hindsight/recall",
    "train/student_tokens",
    "train/teacher_tokens",
    "eval/avg@",
    "eval/best@",
]
START_S = 45  # with less time left no run is begun: it would not get through its start


class Runner:
    """Runs one (arm, seed) at a time in each thread, on that thread's own cores, until `stop` is set."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.stop = arguments, threading.Event()
        self.deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
        cores, per_job = sorted(os.sched_getaffinity(0)), arguments.cores_per_job
        if arguments.jobs * per_job > len(cores):
            raise SystemExit(
                f"error: --jobs={arguments.jobs} x --cores-per-job={per_job} exceeds the {len(cores)} cores here:"
                " lower one of them"
            )
        self._cores = queue.SimpleQueue()
        for job in range(arguments.jobs):
            self._cores.put(cores[job * per_job : (job + 1) * per_job])
        self.machine = {"cpu": cpu_model(), "cores": len(cores), "jobs": arguments.jobs, "cores_per_job": per_job}

    def pin(self) -> None:
        """Gives the calling thread its cores; processes that it starts inherit them. XLA makes as many threads as it
        may use cores.
        """
        cores = self._cores.get()
        if cores:
            os.sched_setaffinity(0, cores)

    def run(self, arm: str, seed: int) -> None:
        """Runs or continues one run and writes its summary; nothing where it is finished."""
        folder = self.arguments.workdir / f"{arm}-{seed}"
        if (folder / "held_out.json").exists():
            write_summary(folder)
            return
        if self.stop.is_set() or self.deadline - time.monotonic() < START_S:
            return
        facts = facts_of(self.arguments, arm, seed)
        merged = facts["settings"] | dict(override.split("=", 1) for override in ARMS[arm][1]) | {"seed": str(seed)}
        command = [
            sys.executable,
            "-m",
            "hintsd_jax",
            "train",
            f"--config={self.arguments.config}",
            f"--workdir={folder}",
        ]
        command += [f"--config.{key}={value}" for key, value in merged.items()]
        folder.mkdir(parents=True, exist_ok=True)
        write_summary(folder, facts | {"status": "unfinished"}, self.machine)
        began, per_job = time.monotonic(), self.arguments.cores_per_job
        environment = {"JAX_COMPILATION_CACHE_DIR": str(REPO / ".cache" / "jax")} | os.environ
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
        if per_job:
            environment |= {
                "NPROC": str(per_job),
                "OMP_NUM_THREADS": str(per_job),
                "OPENBLAS_NUM_THREADS": str(per_job),
            }
        if per_job == 1:
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
        with open(folder / "log.txt", "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=REPO)
            while process.poll() is None and not self.stop.wait(0.5) and time.monotonic() < self.deadline:
                pass
            cut = process.poll() is None
            if cut:
                process.terminate()
        status = process.wait()
        problem = (
            {}
            if cut or status == 0
            else {"status": "failed", "problem": last_line(folder / "log.txt") or f"exit status {status}"}
        )
        summary = write_summary(folder, problem, seconds=time.monotonic() - began)
        outcome = f"{summary['status']}, {time.monotonic() - began:.0f} s {summary.get('problem', '')}".rstrip()
        print(f"{arm} seed {seed}: {outcome}", flush=True)


def facts_of(arguments: argparse.Namespace, arm: str, seed: int) -> dict:
    """What a run is: its config, the overrides that all arms share ("settings"), and the arm's own, which win over
    them.
    """
    settings = {"checkpoint.every": "2"}  # a cut costs at most two updates
    if arguments.steps:
        settings["optim.steps"] = str(arguments.steps)
    for override in arguments.overrides:
        key, equals, value = override.removeprefix("--config.").partition("=")
        if not equals:
            raise SystemExit(f"error: {override!r} is no override: write key=value, such as eval.tasks=100")
        settings[key] = value
    return {"arm": arm, "seed": seed, "config": arguments.config, "settings": settings, "overrides": ARMS[arm][1]}


def refuse_others(arguments: argparse.Namespace, wanted: Sequence[tuple[str, int]], collected: Sequence[dict]) -> None:
    """Raises SystemExit where a run that is there already was asked for with other settings."""
    paths = [arguments.workdir / f"{arm}-{seed}" / "summary.json" for arm, seed in wanted]
    there = [*collected, *(json.loads(path.read_text()) for path in paths if path.exists())]
    for run in there:
        if (run["arm"], run["seed"]) in wanted and run["status"] != "failed":
            for key, now in facts_of(arguments, run["arm"], run["seed"]).items():
                if run[key] != now:
                    where = f"{run['arm']}-{run['seed']} was run with other {key} ({run[key]}, now {now})"
                    raise SystemExit(f"error: {where}: give the same, or another --workdir")


def write_summary(folder: Path, facts: dict | None = None, machine: dict | None = None, seconds: float = 0.0) -> dict:
    """Brings `summary.json` up to what the run's folder holds now, and returns it.

    Args:
      folder: of the run.
      facts: what is known of it now; without them those of the last time stand.
      machine: where it runs from now on.
      seconds: of its process, added to those before.
    """
    path = folder / "summary.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    new = old | (facts or {})
    if new.get("status") != "failed":
        new.pop("problem", None)
    if machine:
        new["machines"] = old.get("machines", []) + ([machine] if machine not in old.get("machines", []) else [])
    new["seconds"] = round(old.get("seconds", 0.0) + seconds, 1)
    if (folder / "config.json").exists():
        new["versions"] = json.loads((folder / "config.json").read_text())["versions"][-1]
    rows = read_metrics(folder / "metrics.jsonl")
    keys = sorted({key for row in rows for key in row if key == "step" or key.startswith(tuple(KEPT))})
    if rows or "rows" not in new:  # a summary that was brought here alone keeps its rows
        new["rows"] = {key: [short(row.get(key)) for row in rows] for key in keys}
    if (folder / "held_out.json").exists():
        held_out = json.loads((folder / "held_out.json").read_text())
        new |= {"status": "finished", "date": old.get("date", time.strftime("%Y-%m-%d"))}
        new |= {when: encode(held_out[when]) for when in ("before", "after")}
    if new != old:
        partial = path.with_name(".summary.json.partial")
        partial.write_text(json.dumps(new) + "\n")
        os.replace(partial, path)
    return new


def short(value: float | None) -> float | None:
    """Five significant digits: enough for tables and figures."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in path.read_text(errors="replace").replace("\r", "\n").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "unknown",
    )


def gather(workdir: Path, collected: Sequence[dict]) -> list[dict]:
    """The summaries of a workdir and the collected ones, one a run: where there are several, a finished one, then the
    one furthest on.
    """
    summaries = [*collected, *(write_summary(path.parent) for path in sorted(workdir.glob("*/summary.json")))]
    best: dict[tuple[str, int], dict] = {}
    for summary in summaries:
        key = (summary["arm"], summary["seed"])
        if key not in best or worth(summary) > worth(best[key]):
            best[key] = summary
    order = list(ARMS)
    return [
        best[key]
        for key in sorted(best, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), *key))
    ]


def worth(summary: dict) -> tuple[bool, int]:
    return summary["status"] == "finished", len(summary["rows"].get("step", ()))


def run_all(arguments: argparse.Namespace, wanted: Sequence[tuple[str, int]]) -> None:
    runner = Runner(arguments)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *unused: runner.stop.set())  # no process is left behind
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs, initializer=runner.pin) as pool:
        for future in [pool.submit(runner.run, arm, seed) for arm, seed in wanted]:
            future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/desk.py")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of %(default)s")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--once", default="lr0", help="arms to run with the first seed only")
    parser.add_argument("--steps", type=int, default=0, help="training steps; 0: as the config says")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument(
        "--cores-per-job", type=int, default=0, help="cores of its own for each process; 0: all share all"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="cut what still runs after so long; the same command continues it; 0: no limit",
    )
    parser.add_argument("--read", action="store_true", help="run nothing")
    parser.add_argument("--collect", type=Path, help="also write the summaries into this one file")
    parser.add_argument(
        "--collected", default="", help="files of --collect, separated by commas: what is finished there is not run"
    )
    parser.add_argument(
        "--clean-times",
        default="",
        help="a file of --collect, of short runs that had the machine to themselves: see `comparison.retimed`",
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/compare_algorithms"))
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "compare_algorithms",
        help="tables and figures; without a suffix",
    )
    parser.add_argument("overrides", nargs="*", help="further overrides for every arm, such as eval.tasks=100")
    arguments = parser.parse_intermixed_args()
    arguments.workdir = arguments.workdir.absolute()
    arms, seeds = arguments.arms.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    if unknown := set(arms) - set(ARMS):
        raise SystemExit(f"error: --arms: {', '.join(sorted(unknown))} is unknown: choose some of {', '.join(ARMS)}")
    wanted = [(arm, seed) for seed in seeds for arm in arms if seed == seeds[0] or arm not in arguments.once.split(",")]
    collected = read_summaries(arguments.collected)
    if not arguments.read:
        elsewhere = {(run["arm"], run["seed"]) for run in collected if run["status"] == "finished"}
        refuse_others(arguments, wanted, collected)
        run_all(arguments, [run for run in wanted if run not in elsewhere])
    runs = [run for run in gather(arguments.workdir, collected) if (run["arm"], run["seed"]) in wanted]
    if not runs:
        raise SystemExit(
            f"error: no summary in {arguments.workdir}: run some arms first, or name their --collected files"
        )
    if arguments.collect:
        arguments.collect.parent.mkdir(parents=True, exist_ok=True)
        arguments.collect.write_text(comparison_tables.to_json(runs))
    left = len(wanted) - sum(run["status"] == "finished" for run in runs)
    failed = sum(run["status"] == "failed" for run in runs)
    print(f"{len(wanted) - left} of {len(wanted)} runs are finished, {failed} failed", flush=True)
    if any(run["status"] == "finished" for run in runs):
        labels = {arm: label for arm, (label, _) in ARMS.items()}
        clean = read_summaries(arguments.clean_times)
        shown = retimed(runs, clean) if clean else runs
        text = comparison_tables.page(shown, labels, clean)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text(text)
        arguments.out.with_suffix(".json").write_text(comparison_tables.to_json(shown))
        print(text)
        draw(shown, labels, arguments.out)
    sys.exit(1 if failed else 75 if left else 0)


def draw(runs: Sequence[dict], labels: dict[str, str], out: Path) -> None:
    try:
        from benchmarks import comparison_figures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no figures: matplotlib is missing; pip install -r requirements-bench.txt", file=sys.stderr)
        return
    comparison_figures.draw(runs, labels, out)


if __name__ == "__main__":
    main()
