"""One changed byte in a run that is then continued: is anything restored as something else?

  python -m benchmarks.byte_faults [--seed N] [--cases N]

A run of three steps goes through; some calls of its environment fail, so its journals hold answers that cannot be had
again. Each case is a copy as a kill in the third step leaves it, with one bit flipped or one byte replaced in a file of
its checkpoints, metrics, journals, episodes or config; the same command then continues it. It must be refused in one
line, or end as the run that never was touched: weights, EMA and moments by their checksums, rows of metrics, held-out
results and the episodes of later steps. Where a checkpoint was refused, `checkpoint.on_damage = previous` must end so.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.batteries import battery, workdirs
from benchmarks.batteries.battery import Case, Ending, Outcome
from hintsd_jax.envs.base import Action, CallTimeout, StepResult
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.runs.metrics import read_metrics

MOODY = "BYTE_FAULTS_MOODY"  # set: the environment fails now and then
CHANGES = {
    "env.name": "benchmarks.byte_faults:Moody",
    "optim.steps": 3,
    "checkpoint.keep": 3,
    # The weights of each step are others, although such short episodes teach nothing.
    "optim.empty_updates": "step",
    "optim.weight_decay": 0.1,
}
# Which files are spoiled, and how often each kind.
KINDS = {
    "arrays": ("checkpoints/2/state/**/d/*", 6),
    "checkpoint, small files": ("checkpoints/*/**/*", 5),
    "metrics": ("metrics.jsonl", 3),
    "journal": ("journal/*.jsonl", 3),
    "episodes": ("episodes/*.jsonl", 2),
    "config": ("config.json", 1),
}
_CLOCKS = ("time/", "memory/", "compile/")


class Moody(Desk):
    """Desk, in which one step of three of a training task fails, while `MOODY` is in the process's environment."""

    def reset(self, task: Any) -> Any:
        self._name, self._step = task["id"], 0
        return super().reset(task)

    def step(self, action: Action) -> StepResult:
        self._step += 1
        if (
            os.environ.get(MOODY)
            and self._name.startswith("train")
            and zlib.crc32(f"{self._name} {self._step}".encode()) % 3 == 0
        ):
            raise CallTimeout("not today")
        return super().step(action)


def make_run(folder: Path) -> tuple[Path, Path]:
    """The whole run, and what a kill in its third step leaves of it."""
    whole, killed = folder / "whole", folder / "killed"
    os.environ[MOODY] = "1"
    printed = battery.command(*workdirs.words("train", whole, **CHANGES))
    del os.environ[MOODY]
    if printed.status:
        raise RuntimeError(printed.err)
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "3")
    for name in ("held_out.json", "result.md"):
        (killed / name).unlink()
    if not (killed / "journal" / "step_000003.jsonl").exists():
        raise RuntimeError("no call failed in step 3: nothing of the outside world is to be repeated")
    return whole, killed


def ends(workdir: Path) -> dict[str, Any]:
    """What a run that ended stands for."""
    record = json.loads((workdir / "checkpoints" / "3" / "extra" / "metadata").read_text())
    rows = read_metrics(workdir / "metrics.jsonl")
    return {
        "arrays": record["arrays"],
        "metrics": [{key: row[key] for key in row if not key.startswith(_CLOCKS)} for row in rows],
        "held_out.json": (workdir / "held_out.json").read_text(),
        "episodes": (workdir / "episodes" / "step_000003.jsonl").read_bytes(),
    }


def spoil(workdir: Path, pattern: str, rng: random.Random) -> str:
    """Changes one byte of one file; where and how, in words."""
    path = rng.choice(sorted(path for path in workdir.glob(pattern) if path.is_file() and path.stat().st_size))
    data = bytearray(path.read_bytes())
    at, before = rng.randrange(len(data)), 0
    before = data[at]
    data[at] = (
        before ^ 1 << rng.randrange(8) if rng.random() < 0.7 else rng.choice([b for b in range(256) if b != before])
    )
    path.write_bytes(data)
    return f"{path.relative_to(workdir)} byte {at} of {len(data)}: {before:#04x} is {data[at]:#04x}"


def case(whole: Path, killed: Path, name: str, pattern: str, seed: int, folder: Path) -> Case:
    def continued(**changes: object) -> tuple[str, battery.Printed]:
        workdir = folder / "spoiled"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(killed, workdir)
        what = spoil(workdir, pattern, random.Random(seed)) if pattern else "nothing"
        return what, battery.command(*workdirs.words("train", workdir, **CHANGES, **changes))

    def judged(printed: battery.Printed) -> Outcome:
        if printed.status:  # the traceback of a failing environment is shown, and is no failure of ours
            return printed.outcome
        there, here = ends(whole), ends(folder / "spoiled")
        wrong = [part for part in there if there[part] != here[part]]
        return Outcome(Ending.SILENT, f"other {', '.join(wrong)}") if wrong else Outcome(Ending.FINE)

    def run() -> Outcome:
        what, printed = continued()
        outcome = judged(printed)
        if outcome.ending == Ending.REFUSED and "checkpoint.on_damage = previous" in outcome.says:
            then = judged(continued(**{"checkpoint.on_damage": "previous"})[1])
            if then.ending != Ending.FINE:
                return Outcome(Ending.LOST, f"{what}; with on_damage = previous: {then.ending} {then.says}")
            outcome = Outcome(Ending.REFUSED, f"(previous: as the whole run) {outcome.says}")
        if not pattern and outcome.ending != Ending.FINE:
            return Outcome(Ending.LOST, f"a sound run: {outcome.says}")
        return Outcome(outcome.ending, f"{what}; {outcome.says or 'ends as the whole run'}")

    return Case(name, run)


def make_cases(rng: random.Random, count: int, folder: Path) -> list[Case]:
    """The one without a fault, and `count` with one."""
    whole, killed = make_run(folder)
    cases = [case(whole, killed, "sound: as it is", "", 0, folder)]
    drawn = rng.choices(list(KINDS), [often for _, often in KINDS.values()], k=count)
    for number, kind in enumerate(drawn, 1):
        cases.append(case(whole, killed, f"{kind}: {number}", KINDS[kind][0], rng.randrange(2**32), folder))
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    with workdirs.opened_once():
        return battery.main("byte_faults", "One changed byte", make_cases, 200, argv)


if __name__ == "__main__":
    sys.exit(main())
