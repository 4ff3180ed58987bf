# SPDX-License-Identifier: Apache-2.0

"""Who looks on while tasks are played and programs compiled: phases, ticks and failed environments flow in, `Progress`
and a file of the workdir are told.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from hintsd_jax.runs.progress import Progress
from hintsd_jax.storage import AnyPath, Appended

FAILURES = "environment_failures.txt"
MOST_BYTES = 1_000_000  # of that file; the first ones say most


class Failure(Protocol):
    """A call of an environment that failed; see `rollout.collector.EnvFailure`."""

    @property
    def task_id(self) -> str: ...
    @property
    def rollout(self) -> int: ...
    @property
    def call(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def detail(self) -> str: ...
    @property
    def traceback(self) -> str: ...


class Watch:
    """What `Session.watch` is in a run.

    Args:
      progress: what a person sees.
      path: of the file where failures are written down.
    """

    def __init__(self, progress: Progress, path: AnyPath):
        self._progress, self._path, self._seen = progress, path, False

    def began(self, what: str, total: int) -> None:
        """See `Progress.began`."""
        self._progress.began(what, total)

    def tick(self, n: int = 1) -> None:
        """See `Progress.tick`."""
        self._progress.tick(n)

    def failed(self, failures: Sequence[Failure]) -> None:
        """Writes failed calls down, with their tracebacks; the first of a process is shown as well.

        Raises UserError where the disk refuses the file.
        """
        if not failures:
            return
        file = Appended(self._path)
        texts = [
            f"{_headline(failure)}\n{_indented(failure)}\n".encode(errors="backslashreplace") for failure in failures
        ]
        sizes = itertools.accumulate(map(len, texts), initial=file.size)
        if fitting := [text for text, before in zip(texts, sizes, strict=False) if before < MOST_BYTES]:
            file.write(b"".join(fitting))
        if not self._seen:
            self._seen = True
            more = f"all of them stand in {self._path}"
            self._progress.note(f"first failure of an environment: {_headline(failures[0])}")
            self._progress.note(f"{_indented(failures[0])}{more}")


def _headline(failure: Failure) -> str:
    where = f"task {failure.task_id}, rollout {failure.rollout}, " if failure.task_id else ""
    return f"{where}{failure.call}: {failure.reason}: {' '.join(failure.detail.split())}"


def _indented(failure: Failure) -> str:
    """The traceback's lines, each with a newline; "" where there is none."""
    return "".join(f"    {line}\n" for line in failure.traceback.splitlines())
