# SPDX-License-Identifier: Apache-2.0

"""The command of the report: `hintsd-jax report WORKDIR [WORKDIR ...] [--out=report.html]`.

Folders of runs go in, finished, running or killed; one HTML file comes out that needs nothing else: no network, no
server, no fonts. It holds the curves of all runs, the last table, where the targets fall while training, and an episode
browser down to single tokens.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hintsd_jax.config.fields import expanded
from hintsd_jax.errors import UserError, writing
from hintsd_jax.texts import is_encodable
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
    partial = out.with_name(f".{out.name}.partial")
    with writing(out, "make room or give another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
        return out.stat().st_size


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: hintsd-jax report WORKDIR [WORKDIR ...] [--out=report.html] [--episodes=N]")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises UserError where it cannot be read, and SystemExit after its help."""
    parser = _Parser(prog="hintsd-jax report", description="One self-contained HTML page about one or several runs.")
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the folder of a run, as given to --workdir")
    parser.add_argument("--out", default="report.html", help="the file to write (default: %(default)s)")
    parser.add_argument(
        "--episodes", type=int, default=EPISODES, help="episodes to keep for browsing, in all (default: %(default)s)"
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
    named = {"--out": flags.out} | {f"the workdir {workdir!r}": workdir for workdir in flags.workdirs}
    for what, path in named.items():
        if not (path.strip() and path.isprintable() and is_encodable(path)):
            raise UserError(f"{what} cannot be the name of a {'file' if what == '--out' else 'folder'}")
    if not flags.out.endswith(".html"):  # such as the config.json of a run
        raise UserError(f"--out={flags.out} would be no page: give a name that ends with .html")
    out = expanded(flags.out, "--out")
    size = report([expanded(workdir, "the workdir") for workdir in flags.workdirs], out, flags.episodes)
    print(f"{flags.out}: {size / 1e6:.1f} MB")
    return 0
