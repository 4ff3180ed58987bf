# SPDX-License-Identifier: Apache-2.0

"""The folder of a run in, plain data out, whatever state the run is in.

A run may be going on or have been killed: files that are not there yet, and a last line that was not finished, are no
errors. `runs/` itself is not used, because it imports jax.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hintsd_jax.errors import UserError
from hintsd_jax.jsonl import json_object, read_jsonl, read_object
from hintsd_jax.storage import AnyPath, entries, is_file, is_folder, located, open_file, size

_EPISODES = re.compile(r"(step|evaluation|before|after)_(\d+)\.jsonl")
TRAINING, BEFORE, AFTER, EVALUATION = "training", "before", "after", "evaluation"


@dataclasses.dataclass(frozen=True)
class EpisodeFile:
    """kind: what was played, one of the four above. step: after how many updates; of training the number of the
    training step.
    """

    kind: str
    step: int
    path: AnyPath


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds. name: for people, unique in a report. config: dotted keys. versions: of the last process
    that ran it.

    rows: of `metrics.jsonl`. held_out: `{"before", "after"}` or None. evaluation: of `--mode=evaluate` or None.
    episodes: files in the order in which they were played: held-out tasks before training, each training step, held-out
    tasks after it; where nothing was trained, those of evaluations.
    """

    name: str
    path: AnyPath
    config: dict[str, Any]
    versions: dict[str, Any]
    rows: list[dict[str, Any]]
    held_out: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    episodes: list[EpisodeFile]

    @property
    def steps(self) -> int:
        """Training steps done."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def planned(self) -> int | None:
        """Training steps in all."""
        return self.config.get("optim.steps")

    @property
    def is_finished(self) -> bool:
        """Whether all is written that this run will write. A run that only evaluated has no end."""
        steps, done = self.planned, self.steps
        if not isinstance(steps, int) or done < steps:
            return False
        return not self.config.get("eval.test_tasks") or bool((self.held_out or {}).get("after"))

    def state(self) -> tuple:
        """Changes whenever the run has written something that a report shows. Raises OSError as `storage.size`."""
        files = [self.path / name for name in ("metrics.jsonl", "held_out.json", "evaluation.json")]
        there = tuple(size(file) if is_file(file) else -1 for file in files)
        return there, tuple(file.name for file in entries(self.path / "episodes"))


def open_runs(workdirs: Sequence[str | os.PathLike]) -> list[Run]:
    """All runs, named by their folders, with as many parent folders as it takes to tell them apart.

    Raises:
      UserError: a folder that is no run, the same one twice, or a broken file.
    """
    paths = [place.resolve() if isinstance(place, Path) else place for place in map(located, workdirs)]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice: name each run once")
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_run(path: AnyPath, name: str) -> Run:
    """One run.

    Raises:
      UserError: there is none, or one of its files is broken.
    """
    if not is_folder(path):
        raise UserError(f"{path} is no folder: give the --workdir of a run")
    stored = read_object(path / "config.json")
    if stored is None:
        raise UserError(f"{path} holds no run (there is no config.json): give the --workdir of a run")
    versions = stored.get("versions") or [{}]
    if not (isinstance(stored.get("config"), dict) and isinstance(versions, list) and isinstance(versions[-1], dict)):
        raise UserError(f"{path / 'config.json'} was not written by a run: give the --workdir of a run")
    return Run(
        name=name,
        path=path,
        config=flat(stored["config"]),
        versions=versions[-1],
        rows=[line.value for line in read_jsonl(path / "metrics.jsonl", "a metrics row", _metrics_row)],
        held_out=read_object(path / "held_out.json"),
        evaluation=read_object(path / "evaluation.json"),
        episodes=episode_files(path / "episodes"),
    )


def episode_files(folder: AnyPath) -> list[EpisodeFile]:
    """See `Run.episodes`. Of held-out tasks the newest file of each kind: a run that went on has played them again."""
    by_kind: dict[str, list[EpisodeFile]] = {TRAINING: [], BEFORE: [], AFTER: [], EVALUATION: []}
    for file in entries(folder):
        if match := _EPISODES.fullmatch(file.name):
            kind = TRAINING if match[1] == "step" else match[1]
            by_kind[kind].append(EpisodeFile(kind, int(match[2]), file))
    for files in by_kind.values():
        files.sort(key=lambda file: file.step)
    played = [*by_kind[BEFORE][-1:], *by_kind[TRAINING], *by_kind[AFTER][-1:]]
    return played or by_kind[EVALUATION]


def count_lines(path: AnyPath) -> int:
    """The whole lines of a file, quickly. Raises UserError as `storage.open_file` does."""
    file = open_file(path)
    if file is None:
        return 0
    with file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _metrics_row(value: Any) -> dict[str, Any]:
    if type(json_object(value).get("step")) is not int:
        raise ValueError("no step")
    return value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim.lr": 1e-4, ...}` of nested groups."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _names(paths: Sequence[AnyPath]) -> list[str]:
    """The shortest ends of the paths, in whole folders, that differ from each other."""
    parts, names = 1, [path.name for path in paths]
    while len(set(names)) < len(names):  # ends at the latest with the whole paths, which differ
        parts += 1
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return names
