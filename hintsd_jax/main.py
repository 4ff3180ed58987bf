"""The command line: `hintsd-jax train --config=desk --workdir=runs/desk [--config.optim.lr=1e-4 ...]`.

The same as `python -m hintsd_jax ...` and as `python -m hintsd_jax.main --mode=train ...`. Flags go in, one run comes
out; of plan what it would hold, with exit status 0 if that fits and 1 if not. Whatever the user can mend ends in one
line on stderr and exit status 2, before jax is imported where it can be; every other error is a bug and keeps its
traceback.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from hintsd_jax.config import files, reference, validation
from hintsd_jax.config.edge import unknown_key
from hintsd_jax.errors import UserError

MODES = {
    "train": "trains in --workdir, or continues what is there",
    "evaluate": "success of the newest checkpoint in --workdir, or of the policy that was never trained",
    "export": "writes a checkpoint of --workdir as Hugging Face directories and PEFT adapters",
    "plan": "says whether the run fits its devices; needs no --workdir",
    "report": "writes one HTML page about runs: hintsd-jax report WORKDIR [WORKDIR ...] [--out=report.html]",
}
FLAGS = {
    "config": "name of a shipped config, or path of a file with a get_config()",
    "workdir": "folder of this run; one that holds a run already continues it",
    "mode": f"what to do, if the first word does not say it: {', '.join(MODES)}",
    "print_config": "print the resolved config and end",
    "help": "print this and end",
}


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
    words = list(argv)
    mode = words.pop(0) if words and words[0] in MODES else None
    if mode == "report":
        return Command(mode, None, None, rest=words)
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, FLAGS["workdir"], flag_values=values)
    flags.DEFINE_enum("mode", "train", list(MODES), FLAGS["mode"], flag_values=values)
    flags.DEFINE_bool("print_config", False, FLAGS["print_config"], flag_values=values)
    words, named = _take_config(words)
    _refuse_unknown_keys(words)
    config = None if named is None else files.load(named)
    try:
        if config is not None:
            config_flags.DEFINE_config_dict(
                "config", config, FLAGS["config"], flag_values=values, sys_argv=["hintsd-jax", *words]
            )
        rest = values(["hintsd-jax", *words])[1:]
    except flags.Error as error:
        raise UserError(str(error).strip().splitlines()[-1]) from error
    except (AttributeError, KeyError) as error:  # only groups that take any key come so far
        raise UserError(f"unknown config key, to be given in the config file first: {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"a --config. flag cannot be read: {error}") from error
    if rest and values["mode"].value != "report":
        known = f"; modes are {', '.join(MODES)}" if mode is None else ""
        raise UserError(f"unexpected argument {rest[0]!r}: write settings as --config.key=value{known}")
    workdir, print_config = values["workdir"].value, bool(values["print_config"].value)
    return Command(mode or str(values["mode"].value), config, workdir, print_config, rest)


def run(command: Command) -> int:
    """Runs a command; returns its exit status.

    Raises:
      UserError: whatever the user can mend.
    """
    if command.mode == "report":
        return importlib.import_module("hintsd_jax.tools.report.__main__").main(command.rest)
    if command.config is None:
        raise UserError(f"--config is missing: {FLAGS['config']}; shipped are {', '.join(files.shipped())}")
    if not command.workdir and command.mode != "plan" and not command.print_config:
        problem = "missing" if command.workdir is None else "empty"
        raise UserError(f"--workdir is {problem}: give the {FLAGS['workdir']}")
    validation.check(command.config)  # before importing jax takes a second
    config = importlib.import_module("hintsd_jax.config.build").build(command.config)
    if command.print_config:
        print(ConfigDict(config.to_dict()))
        return 0
    logging.set_verbosity(logging.ERROR)  # orbax logs every save
    if command.mode == "plan":
        return 0 if importlib.import_module("hintsd_jax.tools.planner.plan").plan(config) else 1
    getattr(importlib.import_module(f"hintsd_jax.{command.mode}"), command.mode)(config, command.workdir)
    return 0


def main(argv: Sequence[str]) -> int:
    """`parse` and `run`, with what the user can mend as one line on stderr."""
    if not argv or {"--help", "-h", "-help", "--helpfull"} & set(argv) or argv[0] == "help":
        print(reference.help_text(MODES, FLAGS))
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


def _take_config(words: Sequence[str]) -> tuple[list[str], str | None]:
    """The words without --config=NAME (or --config NAME), and that name; the last one counts."""
    rest, named, position = [], None, 0
    while position < len(words):
        match = re.fullmatch(r"--?config(?:=(.*))?", words[position], re.DOTALL)
        if match is None:
            rest.append(words[position])
        elif match[1] is not None:
            named = match[1]
        elif position + 1 < len(words):
            position += 1
            named = words[position]
        else:
            raise UserError(f"--config has no value: give the {FLAGS['config']}")
        position += 1
    return rest, named


def _refuse_unknown_keys(words: Sequence[str]) -> None:
    for word in words:
        override = re.match(r"--?(?:no)?config\.([^=]*)", word)
        if override and (problem := unknown_key(override[1])):
            raise UserError(problem)


if __name__ == "__main__":
    cli()
