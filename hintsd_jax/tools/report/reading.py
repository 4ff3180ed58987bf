"""The folder of a run in, plain data out, whatever state the run is in.

A run may be going on or have been killed: files that are not there yet, and a last line that was not finished, are no
errors. `runs/` itself is not used, because it imports jax.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hintsd_jax.errors import UserError

_EPISODES = re.compile(r"step_(\d+)\.jsonl")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds. name: for people, unique in a report. config: dotted keys. versions: of the last process
    that ran it.

    rows: of `metrics.jsonl`. held_out: `{"before", "after"}` or None. evaluation: of `--mode=evaluate` or None.
    episodes: the file of each training step, by step.
    """

    name: str
    path: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    rows: list[dict[str, Any]]
    held_out: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    episodes: dict[int, Path]

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
    paths = [Path(workdir).resolve() for workdir in workdirs]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice: name each run once")
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_run(path: Path, name: str) -> Run:
    """One run.

    Raises:
      UserError: there is none, or one of its files is broken.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give the --workdir of a run")
    stored = _object(path / "config.json")
    if stored is None:
        raise UserError(f"{path} holds no run (there is no config.json): give the --workdir of a run")
    if not isinstance(stored.get("config"), dict):
        raise UserError(f"{path / 'config.json'} was not written by a run: give the --workdir of a run")
    rows = []
    for number, row in lines(path / "metrics.jsonl"):
        if not isinstance(row.get("step"), int):
            raise UserError(f"{path / 'metrics.jsonl'} line {number} is not a metrics row: mend or remove the file")
        rows.append(row)
    found = ((_EPISODES.fullmatch(file.name), file) for file in (path / "episodes").glob("*.jsonl"))
    episodes = {int(match[1]): file for match, file in found if match}
    versions = stored.get("versions") or [{}]
    return Run(
        name,
        path,
        _flat(stored["config"]),
        versions[-1],
        rows,
        _object(path / "held_out.json"),
        _object(path / "evaluation.json"),
        dict(sorted(episodes.items())),
    )


def lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with the numbers of their lines; no file, no lines. A last line that a kill tore
    is left out.

    Raises:
      UserError: another line is no JSON object.
    """
    try:
        file = open(path, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("no object")
            except ValueError as error:
                raise UserError(f"{path} line {number} is not a JSON object: mend or remove the file") from error
            yield number, value


def count_lines(path: Path) -> int:
    """The whole lines of a file, quickly."""
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON file that holds one object; None where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): mend or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: mend or remove it")
    return value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim.lr": 1e-4, ...}` of nested groups."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, in whole folders, that differ from each other."""
    for parts in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
