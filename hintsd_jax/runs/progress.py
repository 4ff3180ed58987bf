# SPDX-License-Identifier: Apache-2.0

"""What a person reads: phases, metrics rows and notes flow in; a live line (terminal) or plain lines (no terminal) and
the last table flow out.

Nothing here feeds back into the run, so reading the clock is allowed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from tabulate import tabulate

from hintsd_jax.runs import step_line
from hintsd_jax.runs.live_line import Screen
from hintsd_jax.runs.time_left import EVALUATED, ROLLED_OUT, Plan, TimeLeft

_EVALUATION, _ROLLOUT = "evaluation", "rollout"  # what episodes are played for
# What a phase counts -> the words that are shown, "<words> k of n".
_WORDS = {
    "programs": "compiling program",
    "answers": "looking back, answer",
    "batches": "update, batch",
    _EVALUATION: "evaluating episode",
    _ROLLOUT: "rollout, episode",
}
_HEARTBEAT_S = 60.0  # without a terminal a phase says that it lives after so long, then after twice as long, ...
_BAR = 30  # most characters of the bar
_BESIDE_BAR = 68  # characters that nearly every text beside it fits in, so that it does not change its width


@dataclass
class _Phase:
    """what: see above. total: how often it will tick. began: when. compiled: seconds of compilation before it. done:
    ticks so far. heartbeat: seconds after its beginning at which a plain stream hears of it next.
    """

    what: str
    total: int
    began: float
    compiled: float
    done: int = 0
    heartbeat: float = _HEARTBEAT_S

    def __str__(self) -> str:
        """The thing that is being worked on has the number after those that are done."""
        words = _WORDS.get(self.what, self.what)
        if not self.total:
            return words.partition(",")[0]
        return f"{words} {min(self.done + 1, self.total):,} of {self.total:,}"


class Progress:
    """Shows what a run is doing, with a clock that never stands still, and how long it will still take.

    Phases follow one another: `began` ends the one before. In a training step (from `step_began` to `completed`) the
    first episodes are its rollouts; all others are an evaluation.

    Args:
      plan: of a training run; None for what has no steps.
      start: the step to continue from.
      stream: where to write; a live line if it is a terminal, now and then a plain line if not.
      clock: seconds.
      compiled: seconds of compilation so far; they are no measure of what is still to come.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        compiled: Callable[[], float] = lambda: 0.0,
    ):
        self._plan, self._step, self._clock, self._compiled = plan or Plan(0), start, clock, compiled
        self._left = TimeLeft(self._plan)
        self._phase: _Phase | None = None
        self._rolls_out = False  # whether the step's rollouts are still to come
        self._step_began: tuple[float, float] | None = None  # the clock, and seconds not to be counted
        # Evaluations, and their seconds, since the step began or was completed.
        self._evaluated, self._uncounted = 0, 0.0
        self._lock = threading.RLock()
        self._screen = Screen(stream or sys.stderr, self._compose)

    def began(self, what: str, total: int) -> None:
        """A phase begins, and works through so many (0: it is not known) "programs", "episodes", "answers" or
        "batches".
        """
        with self._lock:
            self._end_phase()
            if what == "episodes":
                what = _ROLLOUT if self._rolls_out else _EVALUATION
                self._rolls_out = False
            self._phase = _Phase(what, total, self._clock(), self._compiled())
        self._screen.refresh()

    def step_began(self) -> None:
        """The next training step begins."""
        with self._lock:
            self._end_phase()
            self._step_began, self._rolls_out = (self._clock(), self._compiled()), True
            self._evaluated, self._uncounted = 0, 0.0

    def tick(self, n: int = 1) -> None:
        """So many more things of the phase are done."""
        with self._lock:
            if self._phase is not None:
                self._phase.done += n

    def completed(self, step: int, row: Mapping[str, float | None]) -> None:
        """Shows the row of a training step, in one line."""
        with self._lock:
            self._end_phase()
            if self._step_began is not None:
                began, compiled = self._step_began
                self._left.step_done(self._clock() - began - (self._compiled() - compiled) - self._uncounted)
            self._step, self._step_began, self._evaluated, self._uncounted = step, None, 0, 0.0
            left = self._left.seconds(step)
        line = f"step {step} of {self._plan.steps}: {step_line.describe(row)}"
        if left is not None and not self._screen.is_terminal:
            line += f", {format_seconds(left)} left"
        self.note(line)

    def note(self, text: str) -> None:
        """Writes lasting lines, above the live line where there is one."""
        self._screen.print(text)

    def close(self) -> None:
        """Takes the live line away. May be called twice."""
        self._screen.close()

    def _end_phase(self) -> None:
        phase, self._phase = self._phase, None
        if phase is None:
            return
        seconds = self._clock() - phase.began - (self._compiled() - phase.compiled)
        if phase.what == _EVALUATION:
            self._left.played(EVALUATED, phase.total, seconds)
            self._evaluated += 1
            self._uncounted += seconds if self._step_began else 0.0
        elif phase.what == _ROLLOUT:
            self._left.played(ROLLED_OUT, phase.total, seconds)

    def _seconds_left(self) -> float | None:
        now, phase, spent = self._clock(), self._phase, 0.0
        playing = (phase.total, phase.done, now - phase.began) if phase and phase.what == _EVALUATION else None
        if self._step_began is not None:
            began, compiled = self._step_began
            spent = now - began - (self._compiled() - compiled) - self._uncounted - (playing[2] if playing else 0.0)
        return self._left.seconds(self._step, spent, self._evaluated, playing)

    def _compose(self, columns: int) -> str:
        """The live line; for a plain stream (0 columns) a line of its own where it is time for one."""
        with self._lock:
            phase = self._phase
            if phase is None:
                return ""
            seconds = self._clock() - phase.began
            if not columns:
                if seconds < phase.heartbeat:
                    return ""
                phase.heartbeat *= 2
            left = self._seconds_left()
            return _live_line(str(phase), seconds, self._step_text(), self._share_done(), left, columns)

    def _step_text(self) -> str:
        return f"step {self._step + 1} of {self._plan.steps}" if self._step_began is not None else ""

    def _share_done(self) -> float:
        return self._step / self._plan.steps if self._plan.steps else 0.0


def _live_line(phase: str, seconds: float, step: str, share: float, left: float | None, columns: int) -> str:
    """The fullest form that fits; with 0 columns there is room for all but the bar."""
    working, soon = f"{phase} ({format_seconds(seconds)})", "" if left is None else f", {format_seconds(left)} left"
    short = working.replace(" of ", "/")
    steps, brief_steps = (f"{text}: " if step else "" for text in (step, step.replace(" of ", "/")))
    forms = [f"{steps}{working}{soon}", f"{brief_steps}{short}{soon}", f"{short}{soon}"]
    forms += [f"{short.rpartition(', ')[2]}{soon}", short]
    text = next((form for form in forms if len(form) <= columns or not columns), short[:columns])
    width = min(_BAR, columns - _BESIDE_BAR)
    if not step or width < _BAR // 3 or len(text) + width + 3 > columns:
        return text
    full = round(share * width)
    return f"[{'#' * full}{'-' * (width - full)}] {text}"


Interval = tuple[float, float]  # lower and upper end


@dataclass(frozen=True)
class Result:
    """One line of the last table: a success rate in [0, 1] before and after training (None: not measured), with their
    intervals where these are to be shown. comparable: whether both are of the same tasks; else no change is claimed.
    """

    name: str
    before: float | None
    after: float | None
    before_interval: Interval | None = None
    after_interval: Interval | None = None
    comparable: bool = True

    def cells(self) -> tuple[str, str, str, str]:
        before, after = _percent(self.before, self.before_interval), _percent(self.after, self.after_interval)
        change = ""
        if self.before is not None and self.after is not None and self.comparable:
            change = f"{100 * (self.after - self.before):+.1f}"
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
