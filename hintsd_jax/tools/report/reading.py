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
from hintsd_jax.storage import AnyPath, entries, is_folder, located, open_file

_EPISODES = re.compile(r"(step|evaluation)_(\d+)\.jsonl")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds. name: for people, unique in a report. config: dotted keys. versions: of the last process
    that ran it.

    rows: of `metrics.jsonl`. held_out: `{"before", "after"}` or None. evaluation: of `--mode=evaluate` or None.
    episodes: the file of each training step, by step; where nothing was trained, that of an evaluation.
    """

    name: str
    path: AnyPath
    config: dict[str, Any]
    versions: dict[str, Any]
    rows: list[dict[str, Any]]
    held_out: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    episodes: dict[int, AnyPath]

    @property
    def steps(self) -> int:
        """Training steps done."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def planned(self) -> int | None:
        """Training steps in all."""
        return self.config.get("optim.steps")


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
    matches = ((_EPISODES.fullmatch(file.name), file) for file in entries(path / "episodes"))
    by_kind: dict[str, dict[int, AnyPath]] = {"step": {}, "evaluation": {}}
    for match, file in matches:
        if match:
            by_kind[match[1]][int(match[2])] = file
    episodes = by_kind["step"] or by_kind["evaluation"]
    return Run(
        name=name,
        path=path,
        config=_flat(stored["config"]),
        versions=versions[-1],
        rows=[line.value for line in read_jsonl(path / "metrics.jsonl", "a metrics row", _metrics_row)],
        held_out=read_object(path / "held_out.json"),
        evaluation=read_object(path / "evaluation.json"),
        episodes=dict(sorted(episodes.items())),
    )


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


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim.lr": 1e-4, ...}` of nested groups."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _names(paths: Sequence[AnyPath]) -> list[str]:
    """The shortest ends of the paths, in whole folders, that differ from each other."""
    parts, names = 1, [path.name for path in paths]
    while len(set(names)) < len(names):  # ends at the latest with the whole paths, which differ
        parts += 1
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return names
