# SPDX-License-Identifier: Apache-2.0

"""The command line: `hintsd-jax train --config=desk --workdir=runs/desk [--config.optim.lr=1e-4 ...]`.

The same as `python -m hintsd_jax ...` and as `python -m hintsd_jax.main --mode=train ...`. Flags go in, one run comes
out; of plan what it would hold, with exit status 0 if that fits and 1 if not. Whatever the user can mend ends in one
line on stderr and exit status 2, before jax is imported where it can be; every other error is a bug and keeps its
traceback. A reader of the output that leaves, as `head` does, ends nothing. A signal ends it with status 130 or 75 (see
`runs.interruption`), after which the same command goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from absl import logging
from ml_collections import ConfigDict

import hintsd_jax
from hintsd_jax.config import files, flags, reference, validation
from hintsd_jax.config.edge import flatten
from hintsd_jax.errors import UserError, reason, told
from hintsd_jax.runs import interruption
from hintsd_jax.texts import did_you_mean

MODES = {
    "train": "trains in --workdir, or continues what is there",
    "evaluate": "success of the newest checkpoint in --workdir, or of the policy that was never trained",
    "export": "writes a checkpoint of --workdir as Hugging Face directories and PEFT adapters",
    "check": "plays episodes of an environment and prints what the policy sees; needs no --workdir",
    "plan": "says whether the run fits its devices; needs no --workdir",
    "report": "writes one HTML page about runs: hintsd-jax report WORKDIR [WORKDIR ...] [--out=report.html]",
}
_BY_ALL_PROCESSES = ("train", "evaluate")
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
        return importlib.import_module("hintsd_jax.tools.report.command").main(command.rest)
    if command.config is None:
        where = "" if command.workdir is None else f", and --workdir={command.workdir} holds no run"
        raise UserError(
            f"--config is missing{where}: {flags.FLAGS['config']}; shipped are {', '.join(files.shipped())}"
        )
    without_workdir = {"check": "hintsd_jax.check", "plan": "hintsd_jax.tools.planner.plan"}.get(command.mode)
    workdir = "" if without_workdir or command.print_config else flags.checked_workdir(command.workdir)
    validation.check(command.config)  # before importing jax takes a second
    config = importlib.import_module("hintsd_jax.config.build").build(command.config)
    if command.print_config:
        print("\n".join(f"{name} = {value!r}" for name, value in flatten(config.to_dict()).items()))
        return 0
    logging.set_verbosity(logging.FATAL)  # orbax logs every save, and what it raises afterwards
    if without_workdir:
        return 0 if getattr(importlib.import_module(without_workdir), command.mode)(config) else 1
    where = "library" if command.mode in _BY_ALL_PROCESSES else command.mode
    getattr(importlib.import_module(f"hintsd_jax.{where}"), command.mode)(config, workdir)
    return 0


def main(argv: Sequence[str]) -> int:
    """`parse` and `run`, with what the user can mend as one line on stderr. Returns the exit status."""
    with _lasting_output() as output, interruption.handled():
        try:
            with told():
                status = _main(argv)
                output.flush()  # here, so that a disk that is full by then is told
                return status
        except UserError as error:
            line = error
        except interruption.Interrupted as stop:
            print(f"interrupted ({stop}): the same command {_after(argv)}", file=sys.stderr)
            return stop.status
        print(f"error: {' '.join(str(line).split())}", file=sys.stderr)
        return 2


def _after(argv: Sequence[str]) -> str:
    """What a command that was interrupted does when it is given again; it may not have been read yet."""
    modes = {word.removeprefix("--mode=") for word in argv if word in MODES or word.startswith("--mode=")}
    return "begins anew" if modes & (MODES.keys() - {"train"}) else "continues from the last checkpoint, if any"


def _main(argv: Sequence[str]) -> int:
    first = argv[0] if argv else "help"
    if first == "--version":
        print(f"hintsd-jax {hintsd_jax.__version__}")
        return 0
    if first == "help" or (_HELP & set(argv) and first != "report"):  # report has a --help of its own
        print(reference.help_text(MODES, flags.FLAGS))
        return 0 if argv else 2
    return run(parse(argv))


def cli() -> None:
    """The console script. Modules of the folder where it starts are found, as with `python -m`."""
    sys.path.insert(0, os.getcwd())
    status = main(sys.argv[1:])
    if status in (interruption.GO_ON, interruption.BY_HAND):
        interruption.leave(status)
    sys.exit(status)


class _Lasting:
    """A stream that goes on without its reader: what nobody can read any more goes nowhere.

    Raises UserError where the output's own disk is full, of stdout; of stderr there is no place left to say so.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._guarded(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._guarded(self._stream.flush)

    def _guarded(self, call: Any, *args: str) -> None:
        try:
            call(*args)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what Python flushes when it ends goes there as well
            os.close(nowhere)
            if self._name == "stdout" and not isinstance(error, BrokenPipeError):
                raise UserError(f"the output cannot be written ({reason(error)}): make room for it") from error


@contextlib.contextmanager
def _lasting_output() -> Iterator[_Lasting]:
    """Gives stdout; both streams as `_Lasting`, and none of them closed, or of an encoding that lacks a character."""
    before, lasting = (sys.stdout, sys.stderr), []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        lasting.append(_Lasting(stream, name))
        setattr(sys, name, lasting[-1])
    try:
        yield lasting[0]
    finally:
        sys.stdout, sys.stderr = before


if __name__ == "__main__":
    cli()
