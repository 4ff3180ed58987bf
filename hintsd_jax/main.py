# SPDX-License-Identifier: Apache-2.0

"""The command line: `hintsd-jax train --config=desk --workdir=runs/desk [--config.optim.lr=1e-4 ...]`.

The same as `python -m hintsd_jax ...` and as `python -m hintsd_jax.main --mode=train ...`. Flags go in, one run comes
out; of plan what it would hold, with exit status 0 if that fits and 1 if not. Whatever the user can mend ends in one
line on stderr and exit status 2, before jax is imported where it can be; every other error is a bug and keeps its
traceback.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

import hintsd_jax
from hintsd_jax.config import files, flags, reference, validation
from hintsd_jax.config.edge import flatten
from hintsd_jax.errors import UserError
from hintsd_jax.texts import did_you_mean, is_encodable

MODES = {
    "train": "trains in --workdir, or continues what is there",
    "evaluate": "success of the newest checkpoint in --workdir, or of the policy that was never trained",
    "export": "writes a checkpoint of --workdir as Hugging Face directories and PEFT adapters",
    "plan": "says whether the run fits its devices; needs no --workdir",
    "report": "writes one HTML page about runs: hintsd-jax report WORKDIR [WORKDIR ...] [--out=report.html]",
}
_HELP = {"--help", "-h", "-help", "--helpfull"}


class Command(NamedTuple):
    """A parsed command line."""

    mode: str
    config: ConfigDict | None
    workdir: str | None
    print_config: bool = False
    rest: Sequence[str] = ()


def parse(argv: Sequence[str]) -> Command:
    """Reads the arguments after the program's name.

    Raises:
      UserError: an unknown flag, mode or key, a value that cannot be read, a config file that cannot be used.
    """
    words, mode = flags.take(argv, "mode")
    if words and words[0] in MODES:
        first = words.pop(0)
        if mode not in (None, first):
            raise UserError(f"{first} and --mode={mode} are two modes: give one")
        mode = first
    mode = "train" if mode is None else mode
    if mode not in MODES:
        raise UserError(f"--mode={mode} is unknown: {did_you_mean(mode, MODES)}")
    if mode == "report":
        return Command(mode, None, None, rest=words)
    config, workdir, print_config, rest = flags.parse(words)
    if rest and rest[0] in MODES:
        raise UserError(f"the mode {rest[0]} comes first, and only one: hintsd-jax {rest[0]} --config=...")
    if rest:
        hint = did_you_mean(rest[0], MODES, "write settings as --config.key=value, and the mode first")
        raise UserError(f"unexpected argument {rest[0]!r}: {hint}")
    return Command(mode, config, workdir, print_config)


def run(command: Command) -> int:
    """Runs a command; returns its exit status.

    Raises:
      UserError: whatever the user can mend.
    """
    if command.mode == "report":
        if not command.rest:
            raise UserError("report needs folders of runs: hintsd-jax report WORKDIR [WORKDIR ...]")
        try:
            return importlib.import_module("hintsd_jax.tools.report.command").main(command.rest)
        except SystemExit as end:  # its own --help, or a flag that it does not know
            return int(end.code or 0)
    if command.config is None:
        raise UserError(f"--config is missing: {flags.FLAGS['config']}; shipped are {', '.join(files.shipped())}")
    if not (command.workdir or "").strip() and command.mode != "plan" and not command.print_config:
        problem = "missing" if command.workdir is None else "empty"
        raise UserError(f"--workdir is {problem}: give the {flags.FLAGS['workdir']}")
    if command.workdir and not (is_encodable(command.workdir) and command.workdir.isprintable()):
        raise UserError(f"--workdir={command.workdir!r} cannot be the name of a folder")
    validation.check(command.config)  # before importing jax takes a second
    config = importlib.import_module("hintsd_jax.config.build").build(command.config)
    if command.print_config:
        _print("\n".join(f"{name} = {value!r}" for name, value in flatten(config.to_dict()).items()))
        return 0
    logging.set_verbosity(logging.ERROR)  # orbax logs every save
    if command.mode == "plan":
        return 0 if importlib.import_module("hintsd_jax.tools.planner.plan").plan(config) else 1
    getattr(importlib.import_module(f"hintsd_jax.{command.mode}"), command.mode)(config, command.workdir)
    return 0


def main(argv: Sequence[str]) -> int:
    """`parse` and `run`, with what the user can mend as one line on stderr."""
    first = argv[0] if argv else "help"
    if first == "--version":
        print(f"hintsd-jax {hintsd_jax.__version__}")
        return 0
    if first == "help" or (_HELP & set(argv) and first != "report"):  # report has a --help of its own
        _print(reference.help_text(MODES, flags.FLAGS))
        return 0 if argv else 2
    try:
        return run(parse(argv))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT


def cli() -> None:
    """The console script. Modules of the folder where it starts are found, as with `python -m`."""
    sys.path.insert(0, os.getcwd())
    sys.exit(main(sys.argv[1:]))


def _print(text: str) -> None:
    """Prints a long text; its reader may leave in the middle, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends


if __name__ == "__main__":
    cli()
