"""The same run on one device, on many, and on the devices of several processes; and what happens when processes differ,
fail or die.

  python -m benchmarks.many_processes [--workdir=runs/many_processes] [--out=benchmarks/results/many_processes.md]

Everything goes through the command line and `launch/local.sh`, on made-up CPU devices.

Shapes: `desk_smoke`, greedy, with an adapter and with all weights, on 1 x 1, 1 x 8, 2 x 4 and 4 x 2 processes x
devices. Compared with 1 x 1: the tokens of the first step's episodes (where two differ, by how much the sampled token's
log-probability led is not known, but that of both is: printed), loss and gradient norm of the first update, the
weights after it, and the counts of the whole run.

Faults, each with two processes: very uneven work, environments that all fail in the second process, the second process
killed, the first process killed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import REPO, markdown_table
from benchmarks.resume import state_arrays
from hintsd_jax.envs.base import Action, Start, StepResult
from hintsd_jax.envs.desk.env import Desk

SHAPES = ((1, 1), (1, 8), (2, 4), (4, 2))  # processes, devices of each
TRAINED = {"adapter": ["--config.lora.rank=8", "--config.lora.dropout=0.1"], "all weights": ["--config.lora.rank=0"]}
COUNTS = ("rollout/episodes", "rollout/sampled_tokens", "hindsight/questions", "hindsight/targets", "train/tokens")
LIMIT_S = 1500


def _second() -> bool:
    import jax

    return jax.process_index() == 1


class UnevenDesk(Desk):
    """Desk, where every step takes long in the second process."""

    isolation = "thread"

    def step(self, action: Action) -> StepResult:
        time.sleep(0.5 if _second() else 0.0)
        return super().step(action)


class HalfDesk(Desk):
    """Desk, where nothing can be played in the second process."""

    isolation = "thread"

    def reset(self, task: Mapping[str, Any]) -> Start:
        if _second():
            raise ConnectionError("the world of this host is gone")
        return super().reset(task)


def command(workdir: Path, processes: int, devices: int, extra: Sequence[str]) -> list[str]:
    """Of a run of `desk_smoke` through `launch/local.sh`, which starts nothing again."""
    launcher = ["launch/local.sh", f"--processes={processes}", f"--devices={devices}", "--restarts=0"]
    return [*launcher, "--", "train", "--config=desk_smoke", f"--workdir={workdir}", *extra]


def start(workdir: Path, processes: int, devices: int, extra: Sequence[str]) -> subprocess.Popen:
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = open(f"{workdir}.log", "w", encoding="utf-8")  # noqa: SIM115 - the process's own
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    words = [*command(workdir, processes, devices, extra)]
    words[1:1] = [f"--python={sys.executable}"]
    return subprocess.Popen(words, cwd=REPO, env=environment, stdout=log, stderr=subprocess.STDOUT)


def rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def first_episodes(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "episodes" / "step_000001.jsonl").read_text().splitlines()]


def first_state(workdir: Path, part: str) -> list[np.ndarray]:
    """A part of the state after the first update: "params", what was trained; "opt_state", Adam's moments, which are
    the gradient and its square then.
    """
    return [array for name, array in state_arrays(workdir, 1).items() if name.startswith(f"['{part}']")]


def relative(one: Any, other: Any) -> float:
    """The largest difference, as a part of the largest value."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.max(np.abs(one - other)) / max(np.max(np.abs(one)), 1e-30))


def compared(plain: Path, other: Path) -> dict[str, Any]:
    """How another shape's run differs from the plain one's."""
    before, after = rows(plain), rows(other)
    exceptions = 0
    for one, two in zip(first_episodes(plain), first_episodes(other), strict=True):
        exceptions += [step["text"] for step in one["steps"]] != [step["text"] for step in two["steps"]]
    apart = {
        part: max(relative(*pair) for pair in zip(first_state(plain, part), first_state(other, part), strict=True))
        for part in ("opt_state", "params")
    }
    counts = [[row.get(name) for row in some[1:] for name in COUNTS] for some in (before, after)]
    return {
        "first episodes that differ": f"{exceptions} of {len(first_episodes(plain))}",
        "loss, relative": f"{relative(before[1]['train/loss'], after[1]['train/loss']):.1e}",
        "gradient norm, relative": f"{relative(before[1]['train/grad_norm'], after[1]['train/grad_norm']):.1e}",
        "its gradient and square, of every array": f"{apart['opt_state']:.1e}",
        "its weights": f"{apart['params']:.1e}",
        "counts of all steps": "the same" if counts[0] == counts[1] else f"{counts[0]} and {counts[1]}",
    }


def shapes(folder: Path, keep: bool) -> str:
    """The table of shapes. keep: runs that have ended there before are not done again."""
    lines = []
    for name, flags in TRAINED.items():
        settings = [*flags, "--config.rollout.temperature=0", "--config.tasks.rollouts=1"]
        settings += ["--config.tasks.tasks_per_step=16", "--config.checkpoint.every=1", "--config.checkpoint.keep=9"]
        for processes, devices in SHAPES:
            workdir = folder / f"{name.replace(' ', '_')}_{processes}x{devices}"
            done = keep and (workdir / "held_out.json").exists()
            status = 0 if done else start(workdir, processes, devices, settings).wait(timeout=LIMIT_S)
            if status:
                lines.append({"trained": name, "processes x devices": f"{processes} x {devices}", "ended": status})
                continue
            line = {"trained": name, "processes x devices": f"{processes} x {devices}", "ended": 0}
            plain = folder / f"{name.replace(' ', '_')}_1x1"
            lines.append(line | compared(plain, workdir))
            print(lines[-1], flush=True)
    names = list(dict.fromkeys(key for line in lines for key in line))
    return markdown_table(names, [[line.get(name, "-") for name in names] for line in lines])


def said(workdir: Path) -> str:
    """The last line that stands for an error or an end."""
    lines = [line for line in Path(f"{workdir}.log").read_text().splitlines() if "error:" in line or "stopped" in line]
    return lines[-1][:300] if lines else "-"


def faults(folder: Path) -> str:
    """The table of faults."""
    lines = []
    small = ["--config.optim.steps=3", "--config.checkpoint.every=1"]
    for name, env in {"uneven work": "UnevenDesk", "all environments of process 1 fail": "HalfDesk"}.items():
        workdir = folder / env
        began = time.monotonic()
        flags = [*small, f"--config.env.name=benchmarks.many_processes:{env}"]
        status = start(workdir, 2, 1, flags).wait(timeout=LIMIT_S)
        written = rows(workdir)[1:] if (workdir / "metrics.jsonl").exists() else []
        episodes = [f"{row['rollout/episodes']} played" for row in written]
        told = "; ".join(episodes) or said(workdir)
        lines.append((name, status, f"{time.monotonic() - began:.0f}", told))
        print(lines[-1], flush=True)
    for number in (1, 0):
        workdir = folder / f"killed_{number}"
        process = start(workdir, 2, 1, ["--config.optim.steps=40", "--config.checkpoint.every=1"])
        while not (workdir / "checkpoints" / "1").exists() and process.poll() is None:
            time.sleep(0.2)
        found = subprocess.run(["pgrep", "-f", f"{workdir} .*distributed.process={number}$"], capture_output=True)
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        began = time.monotonic()
        status = process.wait(timeout=300)
        waited = f"{time.monotonic() - began:.0f}"
        lines.append((f"process {number} is killed", status, waited, said(workdir)))
        print(lines[-1], flush=True)
    return markdown_table(
        ["two processes", "exit status", "s (of a kill: after it)", "episodes a step, or what is said"], lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/many_processes"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("shapes", "faults"))
    parser.add_argument("--keep", action="store_true", help="runs of the shapes that have ended are not done again")
    options = parser.parse_args()
    folder = options.workdir.absolute()
    parts = []
    if options.only != "faults":
        parts += ["## One run, several shapes", shapes(folder, options.keep)]
    if options.only != "shapes":
        parts += ["## Processes that differ, fail or die", faults(folder)]
    page = "\n\n".join(["# Many processes", "`python -m benchmarks.many_processes`, see there.", *parts]) + "\n"
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
