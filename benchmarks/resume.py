"""Does a run that is killed again and again end as one never killed? Ten SIGKILLs at ten moments of one run, compared
bit by bit. (`benchmarks.kills` kills at random ones.)

  python -m benchmarks.resume --workdir=runs/resume --out=benchmarks/results/resume.md

One run goes through uninterrupted and keeps every checkpoint. Another is killed at each moment in turn, every time
after it has a checkpoint that the process before it did not have, and started again with the same command. After every
kill, and at the end, what the killed run stands on is compared: the weights, EMA and optimizer in its newest
checkpoint, the counters beside them, and the rows of metrics.jsonl (without time/, memory/ and compile/) and the files
of episodes/ up to that step; at the end held_out.json too.

With --die=<moment> this file is the launcher: it replaces the function of that moment by one that sends SIGKILL to its
own process, then runs hintsd_jax.main. The product has no hook for it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.pages import REPO, markdown_table

SKIPPED = ("time/", "memory/", "compile/")
# Small steps, so that ten starts do not take long; an evaluation every third step, so that a best checkpoint is kept
# beside the last.
SMALL = [
    "tasks.tasks_per_step=3",
    "tasks.rollouts=2",
    "rollout.slots=6",
    "eval.every=3",
    "eval.tasks=4",
    "eval.rollouts=2",
    "eval.test_tasks=4",
    "optim.steps=15",
    "checkpoint.every=1",
    "checkpoint.keep=2",
]


def at_once(die: Callable, original: Callable, *args, **options):
    die()


def afterwards(die: Callable, original: Callable, *args, **options):
    original(*args, **options)
    die()


def in_the_next_update(die: Callable, original: Callable, *args, **options):
    """Also dies while the main thread waits for this one, should the update be over already."""
    die(during="update")


def torn_line(die: Callable, original: Callable, writer, step, metrics):
    """The first half of a row reaches the file."""

    class HalfFile:
        def write(self, line: str) -> None:
            file.write(line[: len(line) // 2])
            file.flush()
            die()

    file, writer._file = writer._file, HalfFile()
    original(writer, step, metrics)


def half_deleted(die: Callable, original: Callable, deleter, folder, **options):
    """Every second file of the old checkpoint is gone."""
    for path in sorted(Path(folder).rglob("*"))[::2]:
        if path.is_file():
            path.unlink()
    die()


@dataclass(frozen=True)
class Moment:
    """Death at the nth call of `function` ("module:name"), counted while `within` runs, from when a new checkpoint is
    there.
    """

    name: str
    function: str
    death: Callable = at_once
    within: str = ""
    nth: int = 1


DECODE = "hintsd_jax.sampling.programs:decode"
DESK_STEP = "hintsd_jax.envs.desk.env:Desk.step"
ORBAX = "orbax.checkpoint._src.path"
MOMENTS = {
    "rollout": Moment("rollout: the second decode call", DECODE, within="rollout", nth=2),
    "environment": Moment("rollout: in the middle of an environment's step", DESK_STEP, afterwards, "rollout", 5),
    "analysis": Moment("analysis: questions about failed episodes are decoded", DECODE, within="analysis"),
    "apply": Moment(
        "update: gradients accumulated, not applied", "hintsd_jax.training.train_step:apply", within="update"
    ),
    "applied": Moment("update: applied, nothing written", "hintsd_jax.runs.workdir:Workdir.write_episodes"),
    "row": Moment("metrics: half a row written", "hintsd_jax.runs.metrics:MetricsWriter.write", torn_line),
    "save": Moment("save: the row written, the save not begun", "hintsd_jax.checkpoints.train_state:Checkpoints.save"),
    "commit": Moment(
        "save: in the background, not yet renamed, while the next update runs",
        f"{ORBAX}.atomicity:AtomicRenameTemporaryPath.finalize",
        in_the_next_update,
    ),
    "committed": Moment(
        "save: renamed, no old checkpoint deleted yet", f"{ORBAX}.deleter:StandardCheckpointDeleter.delete_steps"
    ),
    "delete": Moment("save: an old checkpoint half deleted", f"{ORBAX}.deleter:PathDeleter.delete", half_deleted),
}
PHASES = {
    "rollout": "hintsd_jax.session:Session.play",
    "analysis": "hintsd_jax.hindsight.analyser:ModelAnalyser.review",
    "update": "hintsd_jax.train:update",
}


def launch(moment: Moment, workdir: Path) -> None:
    """Makes this process die at the moment, once `workdir` has a checkpoint that it does not have now."""
    began, calls, running, step = newest(workdir), Counter(), Counter(), Counter()

    def die(during: str = ""):
        patience = time.monotonic() + 20
        while during and not running[during] and time.monotonic() < patience:
            time.sleep(0.001)
        note = {"step": step["at"], "checkpoints": sorted(path.name for path in (workdir / "checkpoints").iterdir())}
        (workdir / "killed.json").write_text(json.dumps(note))
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()  # no other line of this thread runs

    def fatal(original, *args, **options):
        if (not moment.within or running[moment.within]) and (newest(workdir) or 0) > (began or 0):
            calls["fatal"] += 1
            if calls["fatal"] == moment.nth:
                return moment.death(die, original, *args, **options)
        return original(*args, **options)

    def phase(name, original, *args, **options):
        running[name] += name != "rollout" or options["step"] == step["at"] - 1  # an evaluation plays too
        try:
            return original(*args, **options)
        finally:
            running[name] = 0

    def count(original, tasks, seed, now, *rest):
        step["at"] = now + 1
        return original(tasks, seed, now, *rest)

    replace("hintsd_jax.train:step_tasks", count)
    for name, function in PHASES.items():
        replace(function, functools.partial(phase, name))
    replace(moment.function, fatal)


def replace(function: str, wrapper: Callable) -> None:
    module, _, path = function.partition(":")
    *classes, name = path.split(".")
    owner = functools.reduce(getattr, classes, importlib.import_module(module))
    original = getattr(owner, name)

    def wrapped(*args, **options):
        return wrapper(original, *args, **options)

    setattr(owner, name, wrapped)


def newest(workdir: Path) -> int | None:
    """The newest checkpoint that is committed."""
    folder = workdir / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    return max(steps, default=None)


def differences(killed: Path, whole: Path, step: int) -> list[str]:
    """What differs in what a run stands on at a step; [] if nothing does."""
    from hintsd_jax.runs.metrics import read_metrics

    def rows(path: Path) -> list[dict]:
        rows = [row for row in read_metrics(path / "metrics.jsonl") if row["step"] <= step]
        return [{key: value for key, value in row.items() if not key.startswith(SKIPPED)} for row in rows]

    def episodes(path: Path) -> dict[str, bytes]:
        return {
            file.name: file.read_bytes()
            for file in (path / "episodes").glob("*.jsonl")
            if int(file.stem.split("_")[1]) <= step
        }

    def counters(path: Path) -> dict:
        record = json.loads((path / "checkpoints" / str(step) / "extra" / "metadata").read_text())
        return {key: value for key, value in record.items() if key not in ("seconds", "sha256", "rows")}

    parts = {
        "metrics": rows,
        "episodes": episodes,
        "counters": counters,
        "weights": functools.partial(state_bytes, step=step),
    }
    return [name for name, read in parts.items() if read(killed) != read(whole)]


def state_bytes(path: Path, step: int) -> dict[str, tuple]:
    """Every array of a checkpoint by its path in the state: dtype, shape and bytes."""
    arrays = state_arrays(path, step)
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def state_arrays(path: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path in the state, on whatever devices it was."""
    import jax
    import orbax.checkpoint as ocp

    folder = path / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def compile_cache() -> dict[str, str]:
    """The environment variables with which a process keeps what it compiles."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(REPO / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def start(command: list[str], log: Path) -> int:
    environment = compile_cache() | os.environ | {"PYTHONPATH": str(REPO)}
    with open(log, "a") as file:
        return subprocess.run(command, stdout=file, stderr=file, env=environment, cwd=REPO).returncode


def chain(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Rows of the table: moment, step in work, checkpoint resumed from, equal."""
    whole, killed = arguments.workdir / "whole", arguments.workdir / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    settings = [
        f"--config={arguments.config}",
        *(f"--config.{override}" for override in (*SMALL, *arguments.overrides)),
    ]
    main = [sys.executable, "-m", "hintsd_jax.main", "--mode=train", *settings]
    log = arguments.workdir / "log.txt"
    if start([*main, f"--workdir={whole}", "--config.checkpoint.keep=1000000"], log):
        raise SystemExit(f"the uninterrupted run failed: see {log}")
    for key, moment in MOMENTS.items():
        before = newest(killed)
        status = start(
            [sys.executable, __file__, f"--die={key}", "--", "--mode=train", *settings, f"--workdir={killed}"], log
        )
        if status != -signal.SIGKILL:
            raise SystemExit(
                f"the run was not killed at {key!r} but ended with status {status}: see {log}, or raise optim.steps"
            )
        note, step = json.loads((killed / "killed.json").read_text()), newest(killed)
        if step is None or step == before:
            raise SystemExit(f"killed at {key!r} without a new checkpoint")
        yield [moment.name, str(note["step"]), str(step), verdict(differences(killed, whole, step))]
    if start([*main, f"--workdir={killed}"], log):
        raise SystemExit(f"the killed run failed: see {log}")
    final = newest(whole)
    if final is None:
        raise SystemExit(f"the whole run left no checkpoint: see {log}")
    wrong = differences(killed, whole, final)
    if (killed / "held_out.json").read_bytes() != (whole / "held_out.json").read_bytes():
        wrong.append("held_out.json")
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    if len(left) > 3 or not all(name.isdigit() for name in left):
        wrong.append(f"left behind: {left}")
    yield ["**the end, with held_out.json**", str(final), "", verdict(wrong)]


def verdict(wrong: list[str]) -> str:
    return f"**no**: {', '.join(wrong)}" if wrong else "yes"


def arguments_parser(about: str | None, name: str) -> argparse.ArgumentParser:
    """What this and `benchmarks.kills` both take."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/desk_smoke.py")
    parser.add_argument("--workdir", type=lambda path: Path(path).absolute(), default=Path(f"runs/{name}").absolute())
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{name}.md"))
    parser.add_argument("overrides", nargs="*", help="further overrides, such as optim.steps=40")
    return parser


def write_page(
    arguments: argparse.Namespace,
    title: str,
    rows: Iterable[list[str]],
    header: Sequence[str],
    left: Sequence[int],
    settings: Sequence[str],
) -> None:
    """Prints the rows as they come, then writes them as a page."""
    began, lines = time.monotonic(), []
    for row in rows:
        lines.append(row)
        print(*row, sep="  ", flush=True)
    versions = json.loads((arguments.workdir / "killed" / "config.json").read_text())["versions"][-1]
    when = f"{time.strftime('%Y-%m-%d')}, {time.monotonic() - began:.0f} s."
    command = f"`{arguments.config}` {' '.join(settings)}"
    table = markdown_table(header, lines, left=left)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(f"# {title}\n\n{when} {command}\n\n{table}\n\nVersions: {json.dumps(versions)}\n")


def main() -> None:
    arguments = arguments_parser(__doc__, "resume").parse_args()
    header = ["killed", "in step", "newest checkpoint then", "equal so far"]
    settings = [*SMALL, *arguments.overrides]
    write_page(arguments, f"One run, killed {len(MOMENTS)} times", chain(arguments), header, (0, 3), settings)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("--die="):
        sys.argv.remove("--")
        death = sys.argv.pop(1).removeprefix("--die=")
        launch(MOMENTS[death], Path(next(arg for arg in sys.argv if arg.startswith("--workdir=")).partition("=")[2]))
        runpy.run_module("hintsd_jax.main", run_name="__main__", alter_sys=True)
    else:
        main()
