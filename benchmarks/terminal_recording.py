"""What a person sees of a run: a terminal's contents as text, and how honest the announced time left was.

  python -m benchmarks.terminal_recording --columns=80 --config=desk

Runs `hintsd_jax train` under a pseudo-terminal of so many columns (0: one that does not say), plays its control
sequences, and writes benchmarks/results/terminal_<columns>.txt: every lasting line, and of the live line the first and
the last form of each phase (its numbers change twice a second), with the seconds at which they came. At the end: the
widest line, and by what factor at worst the time left that was announced from step 2 on differed from the truth.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pages import REPO

_SEQUENCE = re.compile(r"\x1b\[K|\r|\n|[^\x1b\r\n]+|\x1b.?")
_LEFT = re.compile(r"(?:(\d+):)?(\d+):(\d\d) left")
_TOO_SHORT_S = 5.0  # a time left that is shown in whole seconds has no factor below this


@dataclass(frozen=True)
class Frame:
    """at: seconds since the start. text: a line. lasting: whether it stays; else it is the live line."""

    at: float
    text: str
    lasting: bool


class Terminal:
    """One line of a terminal: characters flow in, frames flow out."""

    def __init__(self):
        self._line, self._cursor, self._rest = "", 0, ""

    def feed(self, text: str, at: float) -> Iterator[Frame]:
        """Every line that is ended, and the last one as it stands then."""
        text = self._rest + text
        self._rest = text[text.rindex("\x1b") :] if "\x1b" in text[-2:] else ""
        for piece in _SEQUENCE.findall(text[: len(text) - len(self._rest)]):
            if piece == "\x1b[K":
                self._line = self._line[: self._cursor]
            elif piece == "\r":
                self._cursor = 0
            elif piece == "\n":
                yield Frame(at, self._line.rstrip(), lasting=True)
                self._line, self._cursor = "", 0
            else:
                end = self._cursor + len(piece)
                self._line = self._line[: self._cursor] + piece + self._line[end:]
                self._cursor = end
        if self._line:
            yield Frame(at, self._line, lasting=False)


def record(command: list[str], columns: int) -> tuple[list[Frame], int]:
    """Runs a command under a pseudo-terminal: its frames, and its exit status."""
    child, terminal_fd = pty.fork()
    if not child:
        os.chdir(REPO)
        os.execvp(command[0], command)
    fcntl.ioctl(terminal_fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    began, terminal, frames = time.monotonic(), Terminal(), []
    while True:
        try:
            data = os.read(terminal_fd, 65536)
        except OSError:  # Linux: the other side is closed
            data = b""
        if not data:
            break
        frames += terminal.feed(data.decode("utf-8", "replace"), time.monotonic() - began)
    _, status = os.waitpid(child, 0)
    return frames, os.waitstatus_to_exitcode(status)


def shown(frames: list[Frame]) -> list[Frame]:
    """All lasting lines; of live lines that differ in numbers and the bar only, the first and the last."""
    kept: list[Frame] = []
    words = lambda frame: frame.lasting or re.sub(r"[\d:,#\[\]()-]+", "", frame.text)
    for before, frame, after in zip([None, *frames], frames, [*frames[1:], None], strict=False):
        is_edge = any(other is None or words(other) != words(frame) for other in (before, after))
        if (frame.lasting or is_edge) and (not kept or kept[-1].text != frame.text or frame.lasting):
            kept.append(frame)
    return kept


def worst_factor(frames: list[Frame], from_step: int = 2) -> tuple[float, int]:
    """(the worst factor between the announced and the true time left, announcements that were compared)."""
    end = frames[-1].at
    done = re.compile(rf"step {from_step} of \d+: ")
    since = next((frame.at for frame in frames if frame.lasting and done.match(frame.text)), end)
    factors = []
    for frame in frames:
        match, truth = _LEFT.search(frame.text), end - frame.at
        if match and frame.at >= since and truth >= _TOO_SHORT_S:
            hours, minutes, seconds = (int(part or 0) for part in match.groups())
            announced = max(3600 * hours + 60 * minutes + seconds, 0.5)
            factors.append(max(announced / truth, truth / announced))
    return max(factors, default=1.0), len(factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=80)
    parser.add_argument("--config", default="desk")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/terminal_<columns>.txt")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hintsd_jax", "train", f"--config={options.config}", *rest]
        frames, status = record([*command, f"--workdir={folder}/run"], options.columns)
    lines = [f"{' ' if frame.lasting else '~'} {frame.at:6.1f}s {frame.text}".rstrip() for frame in shown(frames)]
    widest = max(len(frame.text) for frame in frames if not frame.lasting)
    factor, count = worst_factor(frames)
    width = f"a terminal of {options.columns} columns" if options.columns else "a terminal that does not say its width"
    head = f"hintsd-jax train --config={options.config} {' '.join(rest)}".strip()
    facts = f"exit status {status}; the live line was at most {widest} wide; the time left from step 2 on was announced"
    facts += (
        f" {count} times, at worst by a factor of {factor:.2f} from the truth (its last {_TOO_SHORT_S:g} s left out)"
    )
    text = f"{head}, in {width}. ~: the live line.\n\n" + "\n".join(lines)
    out = options.out or REPO / "benchmarks" / "results" / f"terminal_{options.columns}.txt"
    out.write_text(f"{text}\n\n{facts}\n", encoding="utf-8")
    print(f"{out}: {facts}")


if __name__ == "__main__":
    main()
