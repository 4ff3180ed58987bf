"""What a person sees: metrics rows go in, a progress bar (terminal) or plain lines (no terminal) and the last table
come out.

Nothing here feeds back into the run, so reading the clock is allowed.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import tqdm


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
        done = step - self._start
        if done > 0:
            left = (time.monotonic() - self._began) / done * (self._total - step)
            shown.append(f"left {format_seconds(left)}")
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
    if (loss := metrics.get("train/loss")) is not None:
        shown.append(f"loss {loss:.4f}")
    tokens, seconds = metrics.get("rollout/tokens"), metrics.get("time/step")
    if tokens is not None and seconds:
        shown.append(f"{tokens / seconds:,.0f} tok/s")
    return shown


@dataclass(frozen=True)
class Result:
    """One line of the last table: a success rate in [0, 1] before and after training (None: not measured), with the
    ends of their intervals where they are to be shown."""

    name: str
    before: float | None
    after: float | None
    before_ends: tuple[float, float] | None = None
    after_ends: tuple[float, float] | None = None

    def cells(self) -> tuple[str, str, str, str]:
        change = "" if self.before is None or self.after is None else f"{100 * (self.after - self.before):+.1f}"
        return self.name, _percent(self.before, self.before_ends), _percent(self.after, self.after_ends), change


HEADER = ("success, %", "before", "after", "change")


def plain_table(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """The last table for a terminal.

    Args:
      results: its lines, such as held-out Avg@4, Best@4 and greedy.
      facts: what stands below, such as {"wall time": "5:12", "tokens": "1,234,567", "analyser": "environment
        (privileged)"}.
    """
    rows = [HEADER, *(result.cells() for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in facts.items())]) + "\n"


def markdown_table(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """The same table in Markdown."""
    lines = [
        f"| {' | '.join(HEADER)} |",
        "|---|--:|--:|--:|",
        *(f"| {' | '.join(result.cells())} |" for result in results),
        "",
    ]
    return "\n".join([*lines, *(f"- {name}: {value}" for name, value in facts.items())]) + "\n"


def format_seconds(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _percent(value: float | None, ends: tuple[float, float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if ends else "")
