"""The frame of every battery: seeded cases go in, the ending of each comes out, on a page and as JSON.

  python -m benchmarks.batteries.<name> [--seed N] [--cases N]

A module of a battery gives `main(NAME, TITLE, make_cases)`: `make_cases(rng, count, folder)` returns about `count`
cases, drawn from the `random.Random` alone, which may use the scratch folder. The page is
`benchmarks/results/battery_<name>.md`, the data `.json` beside it. The process ends with 1 if any case is bad.

A case is bad if a traceback reaches the user, if a result of nothing but zeros comes without a line that says why, if a
run is lost, or if something hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pages import RESULTS, markdown_table
from hintsd_jax.errors import UserError

LIMIT_SECONDS = 300.0
_SHOWN = 300  # characters of what a case said


class Ending(enum.StrEnum):
    """How a case ended."""

    FINE = "fine"  # a sane result
    REFUSED = "refused"  # one line that says what to mend, exit status 2
    COUNTED = "counted"  # went on; what the world did wrong is counted and said
    TRACEBACK = "traceback"  # bad: of a bug, or no one line
    SILENT = "silent"  # bad: zeros, or other settings, and no line that says so
    LOST = "lost"  # bad: a run that cannot be continued, or a file half-written
    HUNG = "hung"  # bad


BAD = (Ending.TRACEBACK, Ending.SILENT, Ending.LOST, Ending.HUNG)


class Outcome(NamedTuple):
    """ending, and what the user saw: a line or two."""

    ending: Ending
    says: str = ""


class Case(NamedTuple):
    """name: unique, with the kind before a colon ("json cut: config.json"). run: plays it; may raise a UserError
    (refused); whatever else it raises is a traceback that reaches the user.
    """

    name: str
    run: Callable[[], Outcome]

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]


class _Hung(BaseException):
    """No Exception, so that nothing that catches those keeps a case alive."""


def play(case: Case, limit_seconds: float = LIMIT_SECONDS) -> Outcome:
    """The outcome of a case. Call it in the main thread: the limit is a signal."""
    try:
        with _limit(limit_seconds):
            return case.run()
    except UserError as error:
        return Outcome(Ending.REFUSED, str(error))
    except _Hung:
        return Outcome(Ending.HUNG, f"no end within {limit_seconds:g} s")
    except KeyboardInterrupt:
        raise
    except BaseException:  # a bug, or an exit from somewhere within
        return Outcome(Ending.TRACEBACK, traceback.format_exc().strip())


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def ring(*unused: object) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Printed(NamedTuple):
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def outcome(self) -> Outcome:
        """Refused or fine; a traceback where it is neither 0 (or 1, a plan that does not fit) nor one line with 2."""
        last = (self.out.strip() or self.err.strip()).splitlines()[-1:]
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]  # progress may stand before it
        if (
            self.status == 2
            and len(errors) == 1
            and self.err.endswith(f"{errors[0]}\n")
            and "Traceback" not in self.err
        ):
            return Outcome(Ending.REFUSED, errors[0])
        if self.status in (0, 1) and "Traceback" not in self.err:
            return Outcome(Ending.FINE, "".join(last))
        return Outcome(Ending.TRACEBACK, f"status {self.status}: {self.err.strip() or self.out.strip()}")


def command(*argv: str) -> Printed:
    """`hintsd-jax ARGV` in this process."""
    from hintsd_jax import main as entry

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = entry.main(argv)
    return Printed(status, out.getvalue(), err.getvalue())


MakeCases = Callable[[random.Random, int, Path], Sequence[Case]]


def run(cases: Sequence[Case], limit_seconds: float = LIMIT_SECONDS) -> list[tuple[Case, Outcome, float]]:
    """Every case with its outcome and seconds; bad ones and the count are said on stderr as they come."""
    results = []
    for number, case in enumerate(cases, start=1):
        began = time.monotonic()
        outcome = play(case, limit_seconds)
        results.append((case, outcome, time.monotonic() - began))
        if outcome.ending in BAD:
            print(f"{outcome.ending}: {case.name}\n{outcome.says}", file=sys.stderr)
        if number % 25 == 0 or number == len(cases):
            bad = sum(each.ending in BAD for _, each, _ in results)
            print(f"{number} of {len(cases)} cases, {bad} bad", file=sys.stderr, flush=True)
    return results


def page(title: str, seed: int, results: Sequence[tuple[Case, Outcome, float]]) -> str:
    """The page: how many of each kind ended how, one case of each, and every bad one."""
    endings = [ending for ending in Ending if any(outcome.ending == ending for _, outcome, _ in results)]
    by_kind: dict[str, list[tuple[Case, Outcome]]] = {}
    for case, outcome, _ in results:
        by_kind.setdefault(case.kind, []).append((case, outcome))
    rows = []
    for kind, played in by_kind.items():
        counts, (case, outcome) = Counter(outcome.ending for _, outcome in played), played[0]
        example = f"{case.name.partition(':')[2].strip() or kind}: {_line(outcome.says)}"
        rows.append([kind, len(played), *(counts[ending] for ending in endings), example])
    total = Counter(outcome.ending for _, outcome, _ in results)
    rows.append(["**all**", len(results), *(total[ending] for ending in endings), ""])
    header = ["kind", "cases", *endings, "one of them"]
    bad = [
        f"- {outcome.ending}: `{case.name}`: {_line(outcome.says)}" for case, outcome, _ in results if is_bad(outcome)
    ]
    seconds = sum(spent for *_, spent in results)
    return "\n".join(
        [
            f"# {title}",
            "",
            f"{len(results)} cases, seed {seed}, {seconds:.0f} s; {len(bad)} bad.",
            "",
            markdown_table(header, rows, left=(0, len(header) - 1)),
            *(["", "Bad:", "", *bad] if bad else []),
            "",
        ]
    )


def is_bad(outcome: Outcome) -> bool:
    return outcome.ending in BAD


def _line(text: str) -> str:
    """A text as a cell shows it: without the run's own folders, one line, not too long."""
    for folder, name in {tempfile.gettempdir(): "<tmp>", os.getcwd(): ".", os.path.expanduser("~"): "~"}.items():
        text = text.replace(folder, name)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def main(name: str, title: str, make_cases: MakeCases, count: int, argv: Sequence[str] | None = None) -> int:
    """The command of a battery; its exit status. count: of cases by default."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.batteries.{name}", description=title)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=count, help="how many, about (default: %(default)s)")
    parser.add_argument("--only", default="", help="those whose name holds this; nothing is written then")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="battery_") as folder:
        cases = make_cases(random.Random(flags.seed), flags.cases, Path(folder))
        results = run([case for case in cases if flags.only in case.name])
    text = page(title, flags.seed, results)
    print(text)
    if not flags.only:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"battery_{name}.md").write_text(text, encoding="utf-8")
        data: dict[str, Any] = {
            "seed": flags.seed,
            "cases": [
                {"name": case.name, "ending": outcome.ending, "says": _line(outcome.says)}
                for case, outcome, _ in results
            ],
        }
        (RESULTS / f"battery_{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return int(any(is_bad(outcome) for _, outcome, _ in results))
