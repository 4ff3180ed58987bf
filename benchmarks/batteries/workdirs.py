"""Spoiled workdirs: one tiny run of `desk`, copied and spoiled in one place; each copy is then continued, evaluated,
exported and reported. Each of the four ends with 0 and what it should have written, or with 2 and one line.

  python -m benchmarks.batteries.workdirs [--seed N] [--cases N]

Sessions are opened once and their programs compiled once; all that reads or writes the workdir is real.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.batteries import battery
from benchmarks.batteries.battery import BAD, Case, Ending, Outcome
from hintsd_jax.runs.journal import Journal

SETTINGS = {
    "tasks.tasks_per_step": 2,
    "tasks.rollouts": 2,
    "rollout.slots": 2,
    "rollout.max_action_tokens": 4,
    "rollout.max_steps": 2,
    "hindsight.max_tokens": 8,
    "hindsight.max_targets": 2,
    "hindsight.context": 0,
    "batch.branch_buckets": (),
    "batch.action_buckets": (),
    "batch.whole_episode_buckets": (),
    "eval.tasks": 1,
    "eval.rollouts": 1,
    "eval.test_tasks": 1,
    "optim.steps": 2,
    "checkpoint.every": 1,
    "distributed.coordinator": "none",  # jax has devices by the second command of this process
}
MODES = ("train", "evaluate", "export", "report")
FILES = {  # of a workdir, with how often each is spoiled
    "config.json": 3,
    "metrics.jsonl": 3,
    "held_out.json": 2,
    "evaluation.json": 2,
    "episodes/step_000001.jsonl": 3,
    "episodes/step_000002.jsonl": 2,
    "journal/after_000002.jsonl": 2,
    "checkpoints/2/extra/metadata": 2,
    "checkpoints/2/state/_METADATA": 1,
    "checkpoints/2/_CHECKPOINT_METADATA": 1,
    "checkpoints/2/metrics/metrics": 1,
    "result.md": 1,
    ".lock": 1,
}
FOLDERS = ("episodes", "checkpoints", "checkpoints/2", "checkpoints/2/state", "tensorboard", "journal", "export")
_TEXTS = {
    "empty": "",
    "null": "null\n",
    "a list": "[]\n",
    "a number": "3\n",
    "a text": '"config"\n',
    "an empty object": "{}\n",
    "half of it": '{"config": {"seed"',
    "nested without end": "[" * 100_000,
    "a number of 5,000 digits": f'{{"step": {"9" * 5000}}}\n',
    "NaN": '{"step": NaN, "config": NaN}\n',
    "no UTF-8": '{"step": 1, "text": "\udcff"}\n',
    "zeros": "\0" * 4096,
    "half a surrogate pair": '{"step": 1, "task_id": "\\ud800"}\n',
}
_VALUES: Sequence[Any] = (None, "text", "", -1, 10**30, 1.5, [], {}, [[]], True, "\ud800", {"a": {"b": []}})


def spoil_text(path: Path, rng: random.Random) -> str:
    """Puts something else into a file; what, in words."""
    kind = rng.choice(list(_TEXTS))
    path.write_bytes(_TEXTS[kind].encode("utf-8", "surrogateescape"))
    return kind


def spoil_bytes(path: Path, rng: random.Random) -> str:
    """Cuts a file, or a piece out of it, or changes a byte."""
    data = path.read_bytes()
    if not data:
        return spoil_text(path, rng)
    at = rng.randrange(len(data))
    kind = rng.choice(["cut at", "a piece lacks at", "another byte at", "twice from"])
    piece = {"cut at": b"", "a piece lacks at": data[at + 40 :], "another byte at": b"\xff" + data[at + 1 :]}
    path.write_bytes(data[:at] + piece.get(kind, data))
    return f"{kind} {at} of {len(data)}"


def spoil_value(path: Path, rng: random.Random) -> str:
    """Puts another value in place of one in a file of JSON, somewhere; spoils the bytes where it holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        whole = path.suffix != ".jsonl"
        values = [json.loads("\n".join(lines))] if whole else [json.loads(line) for line in lines]
    except ValueError:
        return spoil_bytes(path, rng)
    node: Any = values
    trail, keep_going = [], True
    while keep_going and isinstance(node, dict | list) and node:
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
        trail.append(str(key))
        keep_going = rng.random() < 0.8 or len(trail) < 2
    value = rng.choice(_VALUES)
    if isinstance(parent, dict) and rng.random() < 0.3:
        del parent[key]
        said = "lacks"
    else:
        parent[key], said = value, f"= {value!r}"
    path.write_text("".join(json.dumps(value, indent=None) + "\n" for value in values), encoding="utf-8")
    return f"{'.'.join(trail[1:])[:60]} {said}".encode("ascii", "backslashreplace").decode()


def spoil_kind(path: Path, rng: random.Random) -> str:
    """Puts a folder in place of a file, or a file, a link or a pipe in place of anything; or removes it."""
    was_folder = path.is_dir()
    shutil.rmtree(path) if was_folder else path.unlink(missing_ok=True)
    kind = rng.choice(
        ["removed", "a file" if was_folder else "a folder", "a link to nothing", "a link to itself", "a pipe"]
    )
    if kind == "a file":
        path.write_text("x")
    elif kind == "a folder":
        path.mkdir()
        if rng.random() < 0.5:
            (path / "x").write_text("x")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind != "removed":
        path.symlink_to(path if kind == "a link to itself" else path.with_name("nowhere"))
    return kind


SPOILERS: dict[str, Callable[[Path, random.Random], str]] = {
    "wrong kind": spoil_kind,
    "other content": spoil_text,
    "damaged": spoil_bytes,
    "another value": spoil_value,
}


def words(mode: str, workdir: Path, **changes: object) -> list[str]:
    """The command line of a mode on a workdir."""
    if mode == "report":
        return ["report", str(workdir), f"--out={workdir}.html"]
    settings = {**SETTINGS, **changes}
    return [mode, "--config=desk_smoke", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in settings.items())]


def make_run(folder: Path) -> Path:
    """The run that is spoiled: trained, evaluated, exported and reported, with a journal as an environment that fails
    would leave it."""
    workdir = folder / "run"
    for mode in MODES:
        printed = battery.command(*words(mode, workdir))
        if printed.status:
            raise RuntimeError(f"{mode} of a sound workdir: {printed.err}")
    Journal(workdir / "journal" / "after_000002.jsonl").put("env_timeout", "none", 0, 1, 1, value="x")
    return workdir


@contextlib.contextmanager
def opened_once() -> Iterator[None]:
    """Sessions of the same config, but for what it says of checkpoints, share their weights, engine and programs;
    nothing is compiled ahead of use.
    """
    from hintsd_jax import train
    from hintsd_jax.session import Session

    open_session, kept, compile_programs = Session.open, {}, train.compile_programs

    def opened(config: Any) -> Session:
        key = repr(dataclasses.replace(config, checkpoint=None))
        if key not in kept:
            kept[key] = open_session(config)
        session = kept[key]
        import jax

        trained = jax.tree.map(lambda leaf: leaf.copy(), session.trained)
        return dataclasses.replace(session, config=config, trained=trained)

    setattr(Session, "open", opened)  # noqa: B010 - a class method gives way to a function
    train.compile_programs = lambda session, state, *unused: state
    try:
        yield
    finally:
        Session.open, train.compile_programs = open_session, compile_programs


def sound(mode: str, workdir: Path) -> str:
    """What a mode that ended with 0 should have left and did not; "" where all is there."""
    if mode == "report":
        page = workdir.with_name(f"{workdir.name}.html")
        return "" if page.is_file() and page.stat().st_size > 50_000 else "no page"
    wanted = {"train": ("metrics.jsonl", "held_out.json", "result.md"), "evaluate": ("evaluation.json",)}
    for name in ("config.json", *wanted.get(mode, ())):
        text = (workdir / name).read_text(encoding="utf-8")
        for line in [text] if name == "config.json" else text.splitlines() if name != "result.md" else []:
            json.loads(line)
    if mode == "train":
        steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        if steps != [0, 1, 2]:
            return f"rows of steps {steps}"
    return ""


def case(source: Path, name: str, spoil: Callable[[Path], str], folder: Path) -> Case:
    """All four modes on one spoiled copy; the worst ending counts."""

    def run() -> Outcome:
        outcomes = []
        for mode in MODES:
            workdir = folder / "spoiled"
            shutil.rmtree(workdir, ignore_errors=True)
            shutil.copytree(source, workdir)
            what = spoil(workdir)
            printed = battery.command(*words(mode, workdir))
            outcome = printed.outcome
            if outcome.ending == Ending.FINE and (problem := sound(mode, workdir)):
                outcome = Outcome(Ending.SILENT, problem)
            if partial := [file.name for file in workdir.rglob(".*.partial") if not file.is_symlink()]:
                outcome = Outcome(Ending.LOST, f"left {partial}")
            outcomes.append((mode, outcome))
        worst = next((each for each in outcomes if each[1].ending in BAD), None)
        refused = [mode for mode, outcome in outcomes if outcome.ending == Ending.REFUSED]
        if worst:
            return Outcome(worst[1].ending, f"{what}; {worst[0]}: {worst[1].says}")
        said = next((outcome.says for _, outcome in outcomes if outcome.ending == Ending.REFUSED), "all four go on")
        return Outcome(Ending.REFUSED if refused else Ending.FINE, f"{what}; {', '.join(refused)}: {said}")

    return Case(name, run)


def make_cases(rng: random.Random, count: int, folder: Path) -> list[Case]:
    """The sound one, and `count` - 1 spoiled ones."""
    source = make_run(folder)
    cases = [case(source, "sound: as it is", lambda workdir: "nothing", folder)]
    targets = [name for name, often in FILES.items() for _ in range(often)]
    for number in range(1, count):
        kind = rng.choice([*SPOILERS, "another value"])
        target = rng.choice([*FILES, *FOLDERS, *FOLDERS] if kind == "wrong kind" else targets)
        if kind == "another value" and not target.endswith((".json", ".jsonl", "metadata", "METADATA")):
            target = "config.json"
        seed = rng.randrange(2**32)

        def spoil(workdir: Path, kind: str = kind, target: str = target, seed: int = seed) -> str:
            return SPOILERS[kind](workdir / target, random.Random(seed))

        cases.append(case(source, f"{kind}: {number} {target}", spoil, folder))
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    with opened_once():
        return battery.main("workdirs", "Spoiled workdirs", make_cases, 200, argv)


if __name__ == "__main__":
    sys.exit(main())
