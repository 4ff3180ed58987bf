# SPDX-License-Identifier: Apache-2.0

"""One line at the bottom of a terminal that is written again and again, with lasting lines above it: texts flow in,
control sequences flow out.

Invariant: no line is longer than the terminal is wide, so that none wraps and all can be written over. A terminal that
goes away takes what would have been shown with it, and nothing else.
"""

from __future__ import annotations

import os
import textwrap
import threading
from collections.abc import Callable
from typing import TextIO

DEFAULT_COLUMNS = 80  # where a terminal does not say how wide it is
_NARROWEST = 20
_CLEAR = "\r\x1b[K"


class Screen:
    """Where a person reads: a terminal with a live line, or a plain stream without one.

    Args:
      stream: where to write.
      compose: called now and then for the live line: columns -> text of at most so many characters. On a plain stream
        it is called with 0, and what it gives, if anything, is a line of its own.
      every: seconds between two calls.
    """

    def __init__(self, stream: TextIO, compose: Callable[[int], str], every: float = 0.5):
        self._stream, self._compose, self._every = stream, compose, every
        self.is_terminal = stream.isatty()
        self._lock, self._closing, self._gone = threading.RLock(), threading.Event(), False
        self._thread = threading.Thread(target=self._keep_alive, name="progress", daemon=True)
        self._thread.start()

    def print(self, text: str) -> None:
        """Writes lasting lines; on a terminal they are folded between words."""
        lines = [_printable(line) for line in text.split("\n")]
        if self.is_terminal:
            columns = self.columns() - 1
            fold = lambda line: textwrap.wrap(line, columns, subsequent_indent="  ")
            lines = [part for line in lines for part in fold(line) or [""]]
        with self._lock:
            self._write((_CLEAR if self.is_terminal else "") + "\n".join(lines) + "\n")
            self.refresh()

    def refresh(self) -> None:
        """Writes the live line of a terminal anew."""
        with self._lock:
            if self.is_terminal and not self._closing.is_set():
                # The last column stays free: some terminals go to the next line after it.
                self._write(_CLEAR + _printable(self._compose(self.columns() - 1)))

    def close(self) -> None:
        """Takes the live line away; what is printed later stands on a line of its own. May be called twice."""
        with self._lock:
            if not self._closing.is_set() and self.is_terminal:
                self._write(_CLEAR)
            self._closing.set()
        self._thread.join()

    def columns(self) -> int:
        """How wide the terminal is now."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):  # no file, or a closed one
            columns = 0
        return max(columns, _NARROWEST) if columns > 0 else DEFAULT_COLUMNS

    def _keep_alive(self) -> None:
        """Writes the live line while nothing else happens: through a long compilation, say."""
        while not self._closing.wait(self._every):
            if self.is_terminal:
                self.refresh()
            elif text := self._compose(0):
                self.print(text)

    def _write(self, text: str) -> None:
        if self._gone:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):  # a terminal or a pipe that went away, or a closed stream: a run goes on without
            self._gone = True


def _printable(text: str) -> str:
    """Without control characters: what is shown may come from outside."""
    return "".join(char if char.isprintable() else " " if char in "\t\r" else "?" for char in text)
