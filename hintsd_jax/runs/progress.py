# SPDX-License-Identifier: Apache-2.0

"""What a person reads: metrics rows flow in, a progress bar (terminal) or plain lines (no terminal) and the last table
flow out.

Nothing here feeds back into the run, so reading the clock is allowed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import tqdm
from tabulate import tabulate


class Progress:
    """Shows success, loss, tokens a second and the time left.

    Args:
      total: optimizer steps of the whole run.
      start: the step to continue from.
      stream: where to write; a bar if it is a terminal, one line a step if not.
    """

    def __init__(self, total: int, start: int = 0, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._total = total
        self._start = start
        self._began = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True, smoothing=0.1
            )

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Shows the row of `step`; a metric that the row lacks is left out."""
        shown = _shown(metrics)
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(shown), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        steps = step - self._start
        if steps > 0:
            seconds = (time.monotonic() - self._began) / steps * (self._total - step)
            shown.append(f"left {format_seconds(seconds)}")
        self.note("  ".join([f"step {step}/{self._total}", *shown]))

    def note(self, text: str) -> None:
        """Writes one line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _shown(metrics: Mapping[str, float | None]) -> list[str]:
    shown = []
    if (success := metrics.get("rollout/success")) is not None:
        shown.append(f"success {100 * success:.1f} %")
    if (loss := metrics.get("train/loss")) is not None and metrics.get("train/tokens") != 0:
        shown.append(f"loss {loss:.4f}")
    tokens, seconds = metrics.get("rollout/tokens"), metrics.get("time/step")
    if tokens is not None and seconds:
        shown.append(f"{tokens / seconds:,.0f} tok/s")
    return shown


Interval = tuple[float, float]  # lower and upper end


@dataclass(frozen=True)
class Result:
    """One line of the last table: a success rate in [0, 1] before and after training (None: not measured), with their
    intervals where these are to be shown.
    """

    name: str
    before: float | None
    after: float | None
    before_interval: Interval | None = None
    after_interval: Interval | None = None

    def cells(self) -> tuple[str, str, str, str]:
        before, after = _percent(self.before, self.before_interval), _percent(self.after, self.after_interval)
        change = "" if self.before is None or self.after is None else f"{100 * (self.after - self.before):+.1f}"
        return self.name, before, after, change


def plain_table(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """The last table for a terminal.

    Args:
      results: its lines, such as held-out Avg@4, Best@4 and greedy.
      facts: what stands below, such as {"wall time": "5:12", "tokens": "1,234,567", "analyser": "environment
        (PRIVILEGED)"}.
    """
    return "\n".join([_table(results, "simple"), *(f"{name}: {value}" for name, value in facts.items())]) + "\n"


def markdown_table(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """The same table in Markdown."""
    return "\n".join([_table(results, "pipe"), "", *(f"- {name}: {value}" for name, value in facts.items())]) + "\n"


def _table(results: Sequence[Result], form: str) -> str:
    header, align = ("success, %", "before", "after", "change"), ("left", "right", "right", "right")
    rows = [result.cells() for result in results]
    return tabulate(rows, header, tablefmt=form, colalign=align, disable_numparse=True)


def format_seconds(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _percent(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else "")
