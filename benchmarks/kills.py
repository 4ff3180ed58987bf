"""Does a run that is killed again and again, at random moments, end as one never killed? Compared bit by bit.

  python -m benchmarks.kills --kills=30 --workdir=runs/kills --out=benchmarks/results/kills.md
  python -m benchmarks.kills --kills=10 --processes=2 --out=benchmarks/results/kills_two.md

One run goes through uninterrupted and keeps every checkpoint. Another is started with the same command again and
again; each time, once it has a checkpoint that the start before did not have, it is killed: by SIGKILL or SIGTERM, at a
random moment within a step and a half, or, every third time, a random moment after a save has begun to write. SIGTERM
must end it with status 75 and the last completed step saved. After every kill, and at the end, what the run stands on
is compared as `benchmarks.resume` does, which kills at ten chosen moments.

With several processes a signal goes to one of them or to all; the others must end by themselves.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.pages import REPO
from benchmarks.resume import SMALL, arguments_parser, compile_cache, differences, newest, verdict, write_page
from hintsd_jax.runs.interruption import GO_ON
from hintsd_jax.runs.metrics import read_metrics

# As in `benchmarks.resume`, but not every step is saved, so that SIGTERM has something to save.
EVERY = "checkpoint.every=2"
LONGEST_S = 600  # of a start until its first new checkpoint
END_S = 60  # that a process may need to end after the signal, or after the death of another one


class Run:
    """The processes of one start.

    Args:
      settings: the command line after the mode, without the workdir.
      log: what they print is added to it.
    """

    def __init__(self, settings: list[str], workdir: Path, log: Path, processes: int):
        where = []
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            where = [f"--config.distributed.coordinator={address}", f"--config.distributed.processes={processes}"]
        environment = compile_cache() | os.environ | {"PYTHONPATH": str(REPO)}
        self._log = open(log, "a")  # noqa: SIM115 - closed by `wait`
        self.processes = []
        for number in range(processes):
            mine = [*where, f"--config.distributed.process={number}"] if where else []
            command = [sys.executable, "-m", "hintsd_jax", "train", *settings, f"--workdir={workdir}", *mine]
            self.processes.append(
                subprocess.Popen(command, stdout=self._log, stderr=self._log, env=environment, cwd=REPO)
            )

    def until(self, happened: Callable[[], bool], seconds: float = LONGEST_S) -> bool:
        """Waits until something has happened; False where a process ended before, or it took too long."""
        end = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.002)
        return True

    def wait(self, seconds: float | None = None) -> list[int | None]:
        """The exit statuses; None of one that did not end in time, which is killed."""
        end, statuses = None if seconds is None else time.monotonic() + seconds, []
        for process in self.processes:
            try:
                statuses.append(process.wait(None if end is None else max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                statuses.append(None)
        self._log.close()
        return statuses


def is_saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written, or was when its process died."""
    return any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())


def kills(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Rows of the table: number, signal, moment, exit statuses, step in work, newest checkpoint, whether half a one is
    left, equal.
    """
    whole, killed, log = (arguments.workdir / name for name in ("whole", "killed", "log.txt"))
    for folder in (killed,) if arguments.keep_whole else (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    settings = [f"--config={arguments.config}", *(f"--config.{override}" for override in overrides(arguments))]
    last = ["--config.checkpoint.every=1", "--config.checkpoint.keep=1000000"]
    began = time.monotonic()
    if not arguments.keep_whole and any(Run([*settings, *last], whole, log, arguments.processes).wait()):
        raise SystemExit(f"the uninterrupted run failed: see {log}")
    step_s = statistics.median(row["time/step"] for row in read_metrics(whole / "metrics.jsonl")[1:])
    print(f"uninterrupted: {time.monotonic() - began:.0f} s, {step_s:.2f} s a step", flush=True)
    draw = random.Random(arguments.seed)
    for number in range(1, arguments.kills + 1):
        yield [str(number), *kill(settings, whole, killed, log, step_s, draw, number % 3 == 0, arguments.processes)]
    if any(Run(settings, killed, log, arguments.processes).wait()):
        raise SystemExit(f"the killed run failed: see {log}")
    final = newest(whole) or 0
    wrong = differences(killed, whole, final)
    if (killed / "held_out.json").read_bytes() != (whole / "held_out.json").read_bytes():
        wrong.append("held_out.json")
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    if len(left) > 3 or not all(name.isdigit() for name in left):
        wrong.append(f"left behind: {left}")
    yield ["", "**the end, with held_out.json**", "", "", str(final), "", "", verdict(wrong)]


def kill(
    settings: list[str],
    whole: Path,
    killed: Path,
    log: Path,
    step_s: float,
    draw: random.Random,
    in_a_save: bool,
    processes: int,
) -> list[str]:
    """Starts the run, kills it and compares."""
    before, run = newest(killed) or -1, Run(settings, killed, log, processes)
    if not run.until(lambda: (newest(killed) or -1) > before):
        raise SystemExit(f"no new checkpoint after step {before}, statuses {run.wait(END_S)}: see {log}")
    number = draw.choice((signal.SIGKILL, signal.SIGTERM))
    delay = draw.uniform(0, 0.05 if in_a_save else 1.5 * step_s)
    if in_a_save and not run.until(lambda: is_saving(killed)):
        raise SystemExit(f"no further save after step {newest(killed)}: see {log}, or raise optim.steps")
    time.sleep(delay)
    hit = draw.choice([run.processes, *([process] for process in run.processes)] if processes > 1 else [run.processes])
    for process in hit:
        process.send_signal(number)
    statuses, step = run.wait(END_S), newest(killed) or 0
    wrong = differences(killed, whole, step)
    expected = [-signal.SIGKILL if process in hit and number == signal.SIGKILL else GO_ON for process in run.processes]
    if statuses != expected:
        wrong.append(f"statuses {statuses} instead of {expected}")
    rows = read_metrics(killed / "metrics.jsonl")[-1]["step"]
    if number == signal.SIGTERM and step != rows:
        wrong.append(f"step {rows} was not saved")
    moment = f"{1000 * delay:.0f} ms after {'a save began' if in_a_save else 'a new checkpoint'}"
    who = "" if processes == 1 else " to " + ("all" if len(hit) > 1 else f"process {run.processes.index(hit[0])}")
    half = "yes" if is_saving(killed) else "no"
    shown = ", ".join(map(str, statuses))
    return [f"{number.name}{who}", moment, shown, str(rows + 1), str(step), half, verdict(wrong)]


def overrides(arguments: argparse.Namespace) -> list[str]:
    """Enough steps for all kills: a start needs up to two for a new checkpoint, and two and a half until its death."""
    steps = f"optim.steps={7 * arguments.kills // 2 + 6}"
    small = [each for each in SMALL if not each.startswith(("optim.steps=", "checkpoint.every="))]
    return [*small, EVERY, steps, *arguments.overrides]


def main() -> None:
    parser = arguments_parser(__doc__, "kills")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep-whole", action="store_true", help="compare with the uninterrupted run that is there")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    header = [
        "",
        "killed by",
        "moment",
        "status",
        "in step",
        "newest checkpoint then",
        "half a checkpoint left",
        "equal",
    ]
    who = "one process" if arguments.processes == 1 else f"{arguments.processes} processes"
    title = f"One run of {who}, killed {arguments.kills} times at random moments, seed {arguments.seed}"
    write_page(arguments, title, kills(arguments), header, (1, 2, 3, 6, 7), overrides(arguments))


if __name__ == "__main__":
    main()
