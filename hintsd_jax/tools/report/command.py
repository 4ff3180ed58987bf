# SPDX-License-Identifier: Apache-2.0

"""The command of the report: `hintsd-jax report WORKDIR [WORKDIR ...] [--out=report.html] [--watch=10]`.

Folders of runs go in, finished, running or killed; one HTML file comes out that needs nothing else: no network, no
server, no fonts. It holds the curves of all runs, the last table, where the targets fall while training, and an episode
browser down to single tokens. With --watch the file is written again as long as a run goes on, and the page loads
itself again.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hintsd_jax.config.fields import expanded
from hintsd_jax.errors import UserError, writing
from hintsd_jax.runs import interruption
from hintsd_jax.texts import is_encodable
from hintsd_jax.tools.report import page
from hintsd_jax.tools.report.gather import gather
from hintsd_jax.tools.report.reading import open_runs

EPISODES = 2000
WATCH_S, LEAST_S, MOST_S = 10.0, 1.0, 86_400.0
_NEVER = threading.Event()


def report(
    workdirs: Sequence[str | os.PathLike], out: str | os.PathLike, episodes: int = EPISODES, live: float | None = None
) -> int:
    """Writes the report of some runs to `out`; returns its size in bytes.

    Args:
      episodes: at most so many are kept for browsing, whole training steps, evenly over runs and steps. Curves and
        targets count all.
      live: after so many seconds the page loads itself again, as long as a run is not finished; None: never.

    Raises:
      UserError: a folder that is no run, a file of it that cannot be read, a place that cannot be written.
    """
    runs, out = open_runs(workdirs), Path(out)
    text = page.render(gather(runs, episodes, None if all(run.is_finished for run in runs) else live))
    partial = out.with_name(f".{out.name}.partial")
    with writing(out, "make room or give another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
        return out.stat().st_size


def watch(workdirs: Sequence[str], out: str, episodes: int, seconds: float) -> int:
    """Writes the report whenever a run has written something, until all are finished or somebody ends it; the last
    page does not load itself again. Returns its size.

    Raises:
      UserError: as `report`.
    """
    seen, size = None, 0
    try:
        with interruption.deferred():  # a page is written whole before this ends
            while True:
                runs = open_runs(workdirs)
                state = [run.state() for run in runs]
                if state != seen:
                    seen, size = state, report(workdirs, out, episodes, live=seconds)
                    steps = ", ".join(f"{run.name} at step {run.steps} of {run.planned or '?'}" for run in runs)
                    print(f"{out}: {size / 1e6:.1f} MB; {steps}", flush=True)
                if all(run.is_finished for run in runs):
                    return size
                interruption.wait(_NEVER, seconds)
    except interruption.Interrupted:  # how a watch of a run that was killed ends: by Ctrl-C
        size = report(workdirs, out, episodes)
        print(f"{out}: written a last time; it no longer loads itself")
        return size


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{message}: hintsd-jax report WORKDIR [WORKDIR ...] [--out=report.html] [--episodes=N] [--watch=10]"
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises UserError where it cannot be read, and SystemExit after its help."""
    parser = _Parser(prog="hintsd-jax report", description="One self-contained HTML page about one or several runs.")
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the folder of a run, as given to --workdir")
    parser.add_argument("--out", default="report.html", help="the file to write (default: %(default)s)")
    parser.add_argument(
        "--episodes", type=int, default=EPISODES, help="episodes to keep for browsing, in all (default: %(default)s)"
    )
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=WATCH_S,
        metavar="SECONDS",
        help=f"while a run goes on, write the page again and again, and let it load itself; every {WATCH_S:g} s",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 0. argv: without the program's name.

    Raises:
      UserError: as `report`, and where the command line cannot be read.
    """
    try:
        flags = parse(argv)
    except SystemExit as end:  # its own --help
        return int(end.code or 0)
    if flags.episodes < 0:
        raise UserError(f"--episodes {flags.episodes} must not be negative: give 0 for none")
    if flags.watch is not None and not LEAST_S <= flags.watch <= MOST_S:
        raise UserError(f"--watch={flags.watch:g} must be {LEAST_S:g} to {MOST_S:,.0f} seconds")
    named = {"--out": flags.out} | {f"the workdir {workdir!r}": workdir for workdir in flags.workdirs}
    for what, path in named.items():
        if not (path.strip() and path.isprintable() and is_encodable(path)):
            raise UserError(f"{what} cannot be the name of a {'file' if what == '--out' else 'folder'}")
    if not flags.out.endswith(".html"):  # such as the config.json of a run
        raise UserError(f"--out={flags.out} would be no page: give a name that ends with .html")
    out = expanded(flags.out, "--out")
    workdirs = [expanded(workdir, "the workdir") for workdir in flags.workdirs]
    if flags.watch is not None:
        watch(workdirs, out, flags.episodes, flags.watch)
        return 0
    print(f"{flags.out}: {report(workdirs, out, flags.episodes) / 1e6:.1f} MB")
    return 0
