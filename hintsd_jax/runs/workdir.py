# SPDX-License-Identifier: Apache-2.0

"""The folder of one run: a config flows in, a locked folder with `config.json`, `checkpoints/`, `episodes/` flows out.

Invariants: one folder belongs to one config and one running process; every file appears whole or not at all, so a kill
at any moment leaves nothing half-written. The folder lies on a disk or in a store, see `storage`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import hintsd_jax
from hintsd_jax.config import continuing
from hintsd_jax.config.edge import flatten, settings
from hintsd_jax.config.schema import NOT_OF_A_RUN, Config
from hintsd_jax.errors import UserError
from hintsd_jax.jsonl import read_object
from hintsd_jax.runs import lock as locks
from hintsd_jax.runs import nonfinite
from hintsd_jax.runs.journal import Journal
from hintsd_jax.storage import AnyPath, absolute, entries, make_folder, remove, remove_folder, whole_text

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
_ANOTHER = "the same command with another --workdir writes one that can be put here, if these are its settings"
_EPISODES = re.compile(r"[a-z]+_(\d+)\.jsonl")


def versions() -> dict[str, Any]:
    """Versions and device of this process. Starts jax's backend."""
    import jax  # here, so that a wrong config is refused before the backend starts

    device = jax.devices()[0]
    return {
        "hintsd_jax": hintsd_jax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONED},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
    }


class Workdir:
    """An open, locked workdir, the folder `path`. Use `Workdir.open(...)`, as a context manager or with `close()`.

    Where several processes share a run, the first one holds the lock and writes what is written once. All others write
    the same into a folder that is thrown away (`path`); only what is theirs alone lies in the folder of the run
    (`run_path`), in files that bear their number.
    """

    def __init__(
        self,
        path: AnyPath,
        lock: locks.Lock,
        run_path: AnyPath | None = None,
        process: int = 0,
        changed: Mapping[str, tuple[Any, Any]] | None = None,
    ):
        self.path, self.run_path = path, path if run_path is None else run_path
        self.changed = changed or {}
        self._lock, self._process = lock, process

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        config: Config,
        *,
        may_differ: Callable[[str], bool] = continuing.may_differ,
        benchmark: str = "",
        prompts: Mapping[str, str] | None = None,
        process: int = 0,
    ) -> Workdir:
        """Creates or reopens the folder, locks it and writes `config.json`.

        A reopened folder keeps its config until `adopt`; versions other than the last ones are added to its `versions`
        list, because a run that continues under another jax need not be bit-equal.

        Args:
          path: the folder, its parents are created too; or an address of a store.
          config: the config of this run.
          may_differ: whether a dotted key may differ from the stored config.
          benchmark: its version, to stand among `versions`; "" where there is none, or no task is played.
          prompts: the name of the set of prompts and the digest of its words, to stand beside the config; None where
            none is read. A run continues with the same words only.
          process: the number of this process among those of the run. All but 0 come when 0 has opened the folder.

        Raises:
          UserError: the folder cannot be written, is in use by another process, or belongs to another config.
        """
        path = run_path = absolute(path)
        if process:
            path = absolute(tempfile.mkdtemp(prefix="hintsd-jax-"))
        make_folder(path)
        lock = locks.take(path, note=lambda text: print(text, file=sys.stderr))
        try:
            changed = _keep_config(path / "config.json", config, may_differ, benchmark, prompts)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, run_path, process, changed)

    def adopt(self, config: Config) -> None:
        """A run goes on with `config`: what differs is the folder's config from now on, and what it was stands beside
        it.
        """
        path = self.path / "config.json"
        stored = read_object(path, "a config written by this program")
        if self.changed and stored is not None:
            step = max(_saved_steps(self.path), default=0)
            changed = [*stored.get("changed", []), {"checkpoint": step, **self.changed}]
            _write_json(path, stored | {"config": config.to_dict(), "changed": changed})

    def check_lock(self) -> None:
        """Raises UserError where another process has taken the folder over, which can happen in a store alone."""
        self._lock.check()

    def close(self) -> None:
        """Releases the lock."""
        self._lock.release()
        if self._process:
            remove_folder(self.path)

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def write_episodes(self, step: int, records: Iterable[Mapping], kind: str = "step") -> AnyPath:
        """Writes `episodes/<kind>_<step>.jsonl`, one JSON object a line; an older file of that name is replaced.

        Whatever outside code put into a record, it is JSON: a number that is not finite is null, half a character (a
        lone surrogate) is its escape.

        kind: "step"; "before" or "after" for held-out tasks before and after training; "evaluation" for what
        `--mode=evaluate` has played after that step.
        """
        path = self.path / "episodes" / f"{kind}_{step:06d}.jsonl"
        with whole_text(path) as file:
            for record in records:
                file.write(_line(record))
        return path

    def write_text(self, name: str, text: str) -> AnyPath:
        """Writes a small text file (the last table, say) into the folder."""
        path = self.path / name
        with whole_text(path) as file:
            file.write(text)
        return path

    def journal(self, kind: str, step: int) -> Journal:
        """`journal/<kind>_<step>.jsonl`: what the outside world answered there, in this process and in those before it.

        kind: "step" (a training step's rollouts and analysis), "eval" (the evaluation after that step), "before" and
        "after" (the held-out tasks).
        """
        own = self.own_file(f"journal/{kind}_{step:06d}.jsonl")
        every = re.compile(rf"{kind}_{step:06d}(\.p\d+)?\.jsonl")
        return Journal(own, [path for path in entries(own.parent) if every.fullmatch(path.name) and path != own])

    def own_file(self, name: str) -> AnyPath:
        """Where a file lies that every process of a run has for itself: `name`, of process 3 with .p3 before the last
        dot.
        """
        stem, dot, suffix = name.rpartition(".")
        return self.run_path / (f"{stem}.p{self._process}{dot}{suffix}" if self._process else name)

    def discard_after(self, step: int | None) -> None:
        """Removes what was kept of steps later than `step` (None: 0), episodes and batches: a resumed run repeats
        them.
        """
        nonfinite.discard_after(self.path, step or 0)
        for path in entries(self.path / "episodes"):
            match = _EPISODES.fullmatch(path.name)
            if match and int(match[1]) > (step or 0):
                remove(path)


def _line(record: Mapping) -> str:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_nulled(record), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace").decode() + "\n"


def _nulled(value: Any) -> Any:
    """A JSON value with None for every number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _nulled(item) for key, item in value.items()}
    return [_nulled(item) for item in value] if isinstance(value, list | tuple) else value


def _keep_config(
    path: AnyPath,
    config: Config,
    may_differ: Callable[[str], bool],
    benchmark: str,
    prompts: Mapping[str, str] | None,
) -> dict[str, tuple[Any, Any]]:
    """Writes `config.json`, or compares it where it exists and adds this process's versions. Gives the settings that
    differ and may: key -> (there, now).
    """
    now = json.loads(json.dumps(config.to_dict()))  # tuples as the lists that they are in JSON
    try:
        stored = read_object(path, "a config written by this program")
    except UserError as error:
        raise UserError(f"{error}; {_ANOTHER}") from error
    if stored is None:
        if _saved_steps(path.parent):
            raise UserError(f"{path} is gone, and the checkpoints beside it are of some config: {_ANOTHER}")
        stored = {"config": now, "versions": []}
    known = stored.get("versions")
    if not (isinstance(stored.get("config"), dict) and _are_versions(known)):
        raise UserError(f"{path} is not a config written by this program: give another --workdir")
    differing = _differences(stored["config"], now)
    if refused := [_said(key, *values) for key, values in differing.items() if not may_differ(key)]:
        raise UserError(
            f"workdir {path.parent} belongs to another config: {', '.join(refused)}: "
            "give the same settings to continue it, or another --workdir"
        )
    changed = {key: values for key, values in differing.items() if not key.startswith(NOT_OF_A_RUN)}
    _check_words(path, stored.get("prompts"), prompts)
    here = versions() | ({"benchmark": benchmark} if benchmark else {})
    is_known = bool(known) and here.items() <= known[-1].items()
    is_recorded = prompts is None or stored.get("prompts") is not None
    if not is_recorded:
        stored["prompts"] = dict(prompts or {})
    if not (is_known and is_recorded):
        _write_json(path, {**stored, "versions": known if is_known else [*known, here]})
    return changed


def _write_json(path: AnyPath, value: Mapping[str, Any]) -> None:
    with whole_text(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def _check_words(path: AnyPath, there: Any, now: Mapping[str, str] | None) -> None:
    """Raises UserError where the words of the run are not those that it was begun with; their name is a setting, and
    compared with all others.
    """
    if there is None or now is None:
        return
    digest = there.get("digest") if isinstance(there, dict) else there
    if digest != now["digest"]:
        raise UserError(
            f"workdir {path.parent} belongs to a run with other words in hindsight.prompts = {now['set']!r}, or in its"
            f" environment's hindsight_prompts (digest there {digest}, now {now['digest']}): give the same words to"
            " continue it, or another --workdir"
        )


def _saved_steps(workdir: AnyPath) -> list[int]:
    return [int(folder.name) for folder in entries(workdir / "checkpoints") if folder.name.isdecimal()]


def _said(key: str, there: Any, now: Any) -> str:
    return f"{key} (there {there!r}, now {now!r})"


def _are_versions(known: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(known, list) and all(isinstance(each, dict) for each in known)


def _differences(stored: Mapping, now: Mapping) -> dict[str, tuple[Any, Any]]:
    """Every dotted key in which two JSON configs differ, with both values; "nothing" where one lacks it. A key that is
    younger than the stored config had its default there.
    """
    fixed = {each.name: each.default for each in settings().values() if not each.key.by_algorithm}
    there, here = json.loads(json.dumps(fixed)) | flatten(stored), flatten(now)
    there = {key: value for key, value in there.items() if key in here or key not in fixed}
    absent = object()
    return {
        key: (there.get(key, "nothing"), here.get(key, "nothing"))
        for key in sorted(there.keys() | here.keys())
        if there.get(key, absent) != here.get(key, absent)
    }
