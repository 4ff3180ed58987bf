# SPDX-License-Identifier: Apache-2.0

"""Numbers for TensorBoard: values of a step flow in, a file of events flows out, on disk when `write` returns.

`tensorboardX.SummaryWriter` writes in a thread of its own: what a full disk refuses there ends the thread, and comes
out as a traceback when the process ends. Its formats are used here without the thread.

A store appends nothing. There, the file grows on this machine and is sent as a whole every `_SENT_EVERY` seconds and
at the end; what a kill takes of it stands in `metrics.jsonl`, out of which the next process writes a new one.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from hintsd_jax.errors import writing
from hintsd_jax.storage import copy_in, is_remote, located, make_folder

_SENT_EVERY = 60.0  # seconds
_messages: Any = event_pb2  # its classes are made at run time


class EventFile:
    """A new file in a folder, which is created where there is none.

    Args:
      purge_step: hides what earlier files of the folder hold from this step on; None: nothing.

    Raises:
      UserError: the disk refuses it; so does `write`.
    """

    def __init__(self, folder: str | os.PathLike, purge_step: int | None = None):
        self._folder = located(folder)
        self._sent = time.monotonic()
        make_folder(self._folder)
        # what a kill leaves of it lies where the system clears up
        self._local = tempfile.TemporaryDirectory(prefix="hintsd-events-") if is_remote(folder) else None
        with writing(self._folder):
            self._writer = EventsWriter(f"{self._local.name if self._local else self._folder}/events")
            if purge_step is not None:
                self._add(purge_step, session_log=_messages.SessionLog(status=_messages.SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name. A tag has only letters, digits and -_./: "@" becomes "_at_"."""
        with writing(self._folder):
            for name, value in values.items():
                self._add(step, summary=scalar(name.replace("@", "_at_"), value))
            self._writer.flush()
        if self._local is not None and time.monotonic() - self._sent >= _SENT_EVERY:
            self._send(Path(self._local.name))

    def _send(self, local: Path) -> None:
        for file in local.iterdir():
            copy_in(file, self._folder / file.name)
        self._sent = time.monotonic()

    def _add(self, step: int, **what: Any) -> None:
        self._writer.write_event(_messages.Event(wall_time=time.time(), step=step, **what))

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()
        if self._local is not None:
            self._send(Path(self._local.name))
            self._local.cleanup()
