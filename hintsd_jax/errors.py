# SPDX-License-Identifier: Apache-2.0

"""The one exception that is meant for the user, and what becomes one: a disk, a file or a memory that gives no more.

`main.py` prints its text as a single line and exits with status 2. Every other exception is a bug and keeps its
traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

# Of a machine, not of our code, even where the error names no file: an `OSError` of a write has none.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)
_OF_THE_MACHINE += (errno.ENOMEM, errno.EAGAIN)
_LONGEST = 300  # characters of what a library says
_ROOM = "make room, then the same command goes on; or give another --workdir"


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""


def reason(error: BaseException) -> str:
    """What an error says, in one line that is not too long: the system's words where it is of a file."""
    try:
        text = getattr(error, "strerror", None) or str(error)
        text = " ".join(text.split()) or type(error).__name__
    except Exception as fault:  # an error of somebody else's whose own text fails
        text = f"without a text that could be read ({type(fault).__name__})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@contextlib.contextmanager
def writing(path: str | os.PathLike, remedy: str = _ROOM) -> Iterator[None]:
    """A block that writes a file or folder: what the disk refuses becomes a UserError with its path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason(error)}): {remedy}") from error


def of_the_machine(error: BaseException) -> UserError | None:
    """What the user can mend of an error that nobody has told yet: of a file, a full disk, a full memory, or a thread
    that the system refuses. None: it is a bug.
    """
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        if error.filename is not None:
            return UserError(f"{_shown(error.filename)}: {reason(error)}: mend it, or give another path")
        if error.errno in _OF_THE_MACHINE:
            return UserError(f"the system refuses: {reason(error)}: make room; the same command continues a run")
    told = str(error)
    out = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in told)
    if out or (isinstance(error, RuntimeError) and "can't start new thread" in told):
        return UserError(
            f"memory is out ({reason(error)}): lower rollout.slots, rollout.context or the lengths in batch.*;"
            " `hintsd-jax plan` says what fits"
        )
    return None


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A block whose errors are a UserError where the user can mend them, those of the machine too."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        line = of_the_machine(error)
        if line is None:
            raise
        raise line from error


def _shown(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
