"""Training runs of a comparison as processes: which are wanted in, a `summary.json` in each run's folder out.

A run that is finished is read, not run again; one that was cut continues, because the trainer resumes. Summaries are
all that tables and figures need, so that only they have to travel between machines.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.comparison import encode
from benchmarks.pages import REPO
from hintsd_jax.runs.metrics import read_metrics

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


class Run(NamedTuple):
    """One training run. factor: in the search for a learning rate, of the config's; None in a run that is reported."""

    arm: str
    seed: int
    factor: float | None = None

    @classmethod
    def of(cls, summary: Mapping) -> Run:
        return cls(summary["arm"], summary["seed"], summary.get("factor"))

    @property
    def folder(self) -> str:
        return f"{self.arm}-{self.seed}" if self.factor is None else f"search/{self.arm}-x{self.factor:g}-{self.seed}"


class Runner:
    """Runs one run at a time in each thread, on that thread's own cores, until the command's time is over or it is
    asked to stop by SIGTERM or SIGINT. One for a whole command, whatever that runs.
    """

    def __init__(self, arguments: argparse.Namespace):
        """The options are those of `compare_algorithms`: jobs, cores_per_job, minutes."""
        self.arguments, self.stop = arguments, threading.Event()
        self.deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
        cores, per_job = sorted(os.sched_getaffinity(0)), arguments.cores_per_job
        if arguments.jobs * per_job > len(cores):
            raise SystemExit(
                f"error: --jobs={arguments.jobs} x --cores-per-job={per_job} exceeds the {len(cores)} cores here:"
                " lower one of them"
            )
        self._cores = [cores[job * per_job : (job + 1) * per_job] for job in range(arguments.jobs)]
        self.machine = {"cpu": cpu_model(), "cores": len(cores), "jobs": arguments.jobs, "cores_per_job": per_job}

    def run_all(self, workdir: Path, wanted: Sequence[Mapping]) -> None:
        """Carries on with these runs (see `run`) as far as the time goes."""
        free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for cores in self._cores:
            free.put(cores)

        def pin() -> None:
            """Gives the calling thread its cores; processes that it starts inherit them. XLA makes as many threads as
            it may use cores.
            """
            if cores := free.get():
                os.sched_setaffinity(0, cores)

        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *unused: self.stop.set())  # no process is left behind
        with concurrent.futures.ThreadPoolExecutor(self.arguments.jobs, initializer=pin) as pool:
            for future in [pool.submit(self.run, workdir, facts) for facts in wanted]:
                future.result()

    def run(self, workdir: Path, facts: Mapping) -> None:
        """Runs or continues one run and writes its summary; nothing where it is finished.

        facts: `arm`, `seed`, `factor` (in a search), `config`, `settings` and `overrides`, which win over these.
        """
        run = Run.of(facts)
        folder = workdir / run.folder
        if (folder / "held_out.json").exists():
            write_summary(folder)
            return
        if self.stop.is_set() or self.deadline - time.monotonic() < START_S:
            return
        merged = facts["settings"] | dict(override.split("=", 1) for override in facts["overrides"])
        merged |= {"seed": str(run.seed)}
        command = [sys.executable, "-m", "hintsd_jax", "train", f"--config={facts['config']}", f"--workdir={folder}"]
        command += [f"--config.{key}={value}" for key, value in merged.items()]
        folder.mkdir(parents=True, exist_ok=True)
        write_summary(folder, {**facts, "status": "unfinished"}, self.machine)
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
        print(f"{run.folder}: {outcome}", flush=True)


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


def worth(summary: dict) -> tuple[bool, int]:
    return summary["status"] == "finished", len(summary["rows"].get("step", ()))
