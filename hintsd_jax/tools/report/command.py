# SPDX-License-Identifier: Apache-2.0

"""The command of the report: `python -m hintsd_jax.tools.report WORKDIR [WORKDIR ...] [--out report.html]`.

Folders of runs go in, finished, running or killed; one HTML file comes out that needs nothing else: no network, no
server, no fonts. It holds the curves of all runs, the last table, where the targets fall while training, and an episode
browser down to single tokens. What the user can mend ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hintsd_jax.errors import UserError
from hintsd_jax.tools.report import page
from hintsd_jax.tools.report.gather import gather
from hintsd_jax.tools.report.reading import open_runs

EPISODES = 2000


def report(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike, episodes: int = EPISODES) -> int:
    """Writes the report of some runs to `out`; returns its size in bytes.

    Args:
      episodes: at most so many are kept for browsing, whole training steps, evenly over runs and steps. Curves and
        targets count all.

    Raises:
      UserError: a folder that is no run, a file of it that cannot be read, a place that cannot be written.
    """
    text = page.render(gather(open_runs(workdirs), episodes))
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    return out.stat().st_size


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hintsd_jax.tools.report", description="One self-contained HTML page about one or several runs."
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the folder of a run, as given to --workdir")
    parser.add_argument("--out", default="report.html", help="the file to write (default: %(default)s)")
    parser.add_argument(
        "--episodes", type=int, default=EPISODES, help="episodes to keep for browsing, in all (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. argv: without the program's name; by default the process's own."""
    flags = parse(argv)
    try:
        if flags.episodes < 0:
            raise UserError(f"--episodes {flags.episodes} must not be negative: give 0 for none")
        size = report(flags.workdirs, flags.out, flags.episodes)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{flags.out}: {size / 1e6:.1f} MB")
    return 0
