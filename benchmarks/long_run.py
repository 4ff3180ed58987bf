"""What grows in a long run? Resident memory, threads, open files, child processes and compilations of 1,000 steps.

  python -m benchmarks.long_run --workdir=runs/long --out=benchmarks/results/long_run.md
  python -m benchmarks.long_run --steps=1000 env.isolation=process  # environments in processes of their own

A run of the smallest configuration of Desk is started as a user would start it, and looked at from outside (`/proc`)
whenever it has written a row of metrics.jsonl. The table has the ten steps from each given step on: memory as their
median, the rest as their highest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.pages import REPO, markdown_table
from benchmarks.resume import compile_cache
from hintsd_jax.runs.metrics import read_metrics

# The environment looks back, so that there is nearly always something to train on.
SMALLEST = [
    "hindsight.analyser=environment",
    "tasks.tasks_per_step=1",
    "tasks.rollouts=2",
    "rollout.slots=2",
    "rollout.max_steps=2",
    "rollout.max_action_tokens=8",
    "eval.every=100",
    "eval.tasks=1",
    "eval.rollouts=2",
    "eval.test_tasks=2",
    "checkpoint.every=25",
]
WINDOW = 10  # steps
COUNTS = ("threads", "open files", "child processes")


def look(process: int) -> dict[str, float]:
    """What a process holds now: "resident MiB" and COUNTS."""
    proc = Path("/proc") / str(process)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    children = [task.joinpath("children").read_text().split() for task in (proc / "task").iterdir()]
    values = (int(status["Threads"]), len(list((proc / "fd").iterdir())), sum(map(len, children)))
    return {"resident MiB": int(status["VmRSS"].split()[0]) / 1024, **dict(zip(COUNTS, values, strict=True))}


def looks(command: list[str], workdir: Path, log: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """What the run holds at each of its steps, seen just after its row was written."""
    metrics, seen = workdir / "metrics.jsonl", 0
    environment = compile_cache() | os.environ | {"PYTHONPATH": str(REPO)}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=REPO)
        while process.poll() is None:
            time.sleep(0.02)
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if lines > seen:
                seen = lines
                try:
                    yield seen - 1, look(process.pid)  # the first row is that of step 0
                except OSError:  # it, or one of its threads, has just ended
                    continue
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}: see {log}")


def row(step: int, seen: dict[int, dict[str, float]], rows: dict[int, dict]) -> list[str]:
    """One of the table, from the steps of a window."""
    window = [look for at, look in seen.items() if step <= at < step + WINDOW]
    memory = statistics.median(look["resident MiB"] for look in window)
    counts = [f"{max(look[name] for look in window):.0f}" for name in COUNTS]
    last = max(at for at in rows if at < step + WINDOW)
    return [str(step), f"{memory:,.0f}", *counts, str(rows[last]["compile/count"])]


def growth(seen: dict[int, dict[str, float]], begin: int) -> float:
    """Resident memory from a step on, KiB a step, by least squares."""
    points = [(step, look["resident MiB"] * 1024) for step, look in seen.items() if step >= begin]
    at, held = np.array(points).T
    return float(np.polyfit(at, held, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/desk_smoke.py")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workdir", type=Path, default=Path("runs/long"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/long_run.md"))
    parser.add_argument("overrides", nargs="*", help="further overrides, such as env.isolation=process")
    arguments = parser.parse_args()
    workdir, began = arguments.workdir.absolute(), time.monotonic()
    shutil.rmtree(workdir, ignore_errors=True)
    overrides = [*SMALLEST, f"optim.steps={arguments.steps}", *arguments.overrides]
    command = [sys.executable, "-m", "hintsd_jax", "train", f"--config={arguments.config}", f"--workdir={workdir}"]
    command += [f"--config.{override}" for override in overrides]
    seen = dict(looks(command, workdir, workdir.with_suffix(".log")))
    rows = {row["step"]: row for row in read_metrics(workdir / "metrics.jsonl")}
    steps = [step for step in (10, 100, 300) if step < arguments.steps - WINDOW] + [arguments.steps - WINDOW + 1]
    header = ["from step", "resident MiB", *COUNTS, "programs compiled so far"]
    table = markdown_table(header, [row(step, seen, rows) for step in steps], left=())
    versions = json.loads((workdir / "config.json").read_text())["versions"][-1]
    text = f"# A run of {arguments.steps:,} steps\n\n{time.strftime('%Y-%m-%d')}, {time.monotonic() - began:.0f} s."
    text += f" `{arguments.config}` {' '.join(overrides)}\n\n{table}\n\n"
    if arguments.steps > 200:
        text += f"Resident memory grows by {growth(seen, 100):.2f} KiB a step from step 100 on (least squares).\n\n"
    text += f"Versions: {json.dumps(versions)}\n"
    print(text)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)


if __name__ == "__main__":
    main()
