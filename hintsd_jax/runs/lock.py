# SPDX-License-Identifier: Apache-2.0

"""One process a workdir: a folder flows in, a lock that this process holds flows out, or a UserError names who does.

On a disk the system keeps the lock, and drops it when the process dies. A store has no locks: there, the owner's name
lies in the file `.lock` and is written anew every `_BEAT` seconds. Who comes and finds a name waits whether it changes:
one that stays the same for `_SILENCE` seconds is of a dead process. A process that was believed dead, and finds
another's name in place of its own, stops at its next `check`.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from hintsd_jax.errors import UserError, reason, writing
from hintsd_jax.storage import AnyPath, open_file, remove, whole_file

if TYPE_CHECKING:
    from etils import epath

_OTHER = "give another --workdir"
_BEAT = 10.0  # seconds between two signs of life
_SILENCE = 45.0  # seconds without one, after which a process is dead


class Lock(Protocol):
    def check(self) -> None:
        """Raises UserError where another process has taken over."""

    def release(self) -> None: ...


def take(folder: AnyPath, note: Callable[[str], None]) -> Lock:
    """Locks a workdir. `note` is told where that will take a while.

    Raises UserError where another process has it, or it cannot be locked.
    """
    return DiskLock(folder) if isinstance(folder, Path) else StoreLock(folder, note)


def _in_use(folder: AnyPath, owner: str) -> UserError:
    return UserError(f"workdir {folder} is in use by another run ({owner}): wait for it or give another --workdir")


def _owner() -> str:
    return f"process {os.getpid()} on {platform.node()}"


class DiskLock:
    """A lock that the system keeps. Raises as `take`."""

    def __init__(self, folder: Path):
        path = folder / ".lock"
        with writing(path, _OTHER):
            self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - `release` closes it
        try:
            self._take(folder)
        except BaseException:
            self._file.close()
            raise

    def _take(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            raise _in_use(folder, self._file.read().strip() or "unknown") from error
        except OSError as error:
            raise UserError(
                f"workdir {folder} cannot be locked ({reason(error)}): put it on a local disk or a gs:// address"
            ) from error
        with writing(folder / ".lock"):
            self._file.truncate(0)
            self._file.write(_owner())
            self._file.flush()

    def check(self) -> None:
        pass  # nobody takes a lock from a process that lives

    def release(self) -> None:
        self._file.close()


class StoreLock:
    """A lock that this process renews in a thread of its own. Raises as `take`."""

    def __init__(self, folder: epath.Path, note: Callable[[str], None] = print):
        self._folder, self._path = folder, folder / ".lock"
        self._run, self._beats = uuid.uuid4().hex, 0
        self._lost = ""  # who has taken over
        self._wait_for_silence(note)
        self._beat()
        time.sleep(0.5)  # two that came at once: the last name that was written holds
        if (owner := self._other()) is not None:
            raise _in_use(folder, owner)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="workdir lock", daemon=True)
        self._thread.start()

    def _wait_for_silence(self, note: Callable[[str], None]) -> None:
        first = self._read()
        if first is None:
            return
        note(f"{self._folder} was left by {first.get('owner')}: waiting {_SILENCE:.0f} s for a sign of life of it")
        until = time.monotonic() + _SILENCE
        while time.monotonic() < until:
            time.sleep(min(1.0, _BEAT))
            seen = self._read()
            if seen is None:
                return
            if seen != first:
                raise _in_use(self._folder, str(seen.get("owner")))

    def _read(self) -> dict | None:
        file = open_file(self._path)
        if file is None:
            return None
        try:
            content = json.loads(file.read())
        except ValueError:
            content = None
        return content if isinstance(content, dict) else {"owner": "unknown"}

    def _other(self) -> str | None:
        """Who holds the lock, where it is not this process."""
        seen = self._read()
        return None if seen is None or seen.get("run") == self._run else str(seen.get("owner"))

    def _beat(self) -> None:
        self._beats += 1
        with whole_file(self._path) as file:
            file.write(json.dumps({"owner": _owner(), "run": self._run, "beat": self._beats}).encode())

    def _keep(self) -> None:
        while not self._released.wait(_BEAT):
            try:
                if (owner := self._other()) is not None:
                    self._lost = owner
                    return
                self._beat()
            except UserError:
                pass  # the store does not answer: what the run itself writes will say so, unless it answers again

    def check(self) -> None:
        if self._lost:
            raise UserError(
                f"workdir {self._folder} was taken over by another run ({self._lost}), which had seen no sign of life"
                " of this one: this one stops; nothing of the other is lost"
            )

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if not self._lost and self._other() is None:
            remove(self._path)
