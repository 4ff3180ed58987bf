"""The entry: `python -m hintsd_jax.main --config=configs/desk.py --workdir=runs/desk --mode=train
[--config.optim.lr=1e-4 ...]`.

Flags go in, one run comes out; of --mode=plan what it would hold, with exit status 0 if that fits and 1 if not.
Whatever the user can mend ends in one line on stderr and exit status 2, before jax is imported where it can be; every
other error is a bug and keeps its traceback.
"""

import importlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from hintsd_jax.config import schema as schema
from hintsd_jax.config.validation import validate
from hintsd_jax.errors import UserError

config_flags.DEFINE_config_file("config", None, "The config file, such as configs/desk.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "The folder of this run; one that holds a run already continues it.")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "export", "plan"],
    "What to do; plan says whether the run fits, and needs no --workdir.",
)


def run(argv: list[str]) -> None:
    """Checks the flags and runs the mode."""
    mode = flags.FLAGS.mode
    for name in ("config",) if mode == "plan" else ("config", "workdir"):
        if flags.FLAGS[name].value is None:
            raise UserError(f"--{name} is missing: {flags.FLAGS[name].help}")
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: write settings as --config.key=value")
    config, workdir = validate(flags.FLAGS.config), flags.FLAGS.workdir
    logging.set_verbosity(logging.ERROR)  # orbax logs every save
    module = importlib.import_module(
        {"plan": "hintsd_jax.tools.planner.plan"}.get(mode, f"hintsd_jax.{mode}")
    )  # here, because importing jax takes a second
    if mode == "plan":
        sys.exit(0 if module.plan(config) else 1)
    getattr(module, mode)(config, workdir)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; what is wrong with them becomes one clear line."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(
            str(error).strip().splitlines()[-1]
        ) from error  # of a failing config file: its traceback's last line
    except (
        AttributeError,
        KeyError,
    ) as error:  # ml_collections refuses a key, from the command line or in the config file
        for arg in argv:
            override = re.match(r"--?(?:no)?config\.([^=]+)", arg)
            if override and (problem := schema.unknown_key(override[1])):
                raise UserError(problem) from error
        if "config is locked" in str(error) or any(f".{group}." in " ".join(argv) for group in schema.FREE):
            raise UserError(f"unknown config key: {error.args[0]}") from error
        raise
    except OSError as error:
        raise UserError(f"the config file cannot be read: {_cause(error)}") from error
    try:
        if flags.FLAGS.config is not None:
            flags.FLAGS.config.keys()  # an unreadable file raises at the first access only
    except OSError as error:
        raise UserError(f"the config file cannot be read: {_cause(error)}") from error
    return rest


def _cause(error: OSError) -> str:
    """What ml_collections hides in three lines: the operating system's own word."""
    found = re.search(r"\[Errno \d+\] (.*)", str(error))
    return found[1] if found else str(error)


def _guarded(function):
    """`function`, with the user's errors as one line and a non-zero status."""

    def call(argv):
        try:
            return function(argv)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
            sys.exit(130)

    return call


if __name__ == "__main__":
    app.run(_guarded(run), flags_parser=_guarded(parse))
