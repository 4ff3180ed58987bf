# SPDX-License-Identifier: Apache-2.0

"""The trainer from Python: a config and a workdir go in, results come out; the same as the commands.

Importing this changes nothing in the process: no logging, no device, no signal. What the user can mend is a `UserError`
with the one line that the command prints. Ctrl-C is Python's own KeyboardInterrupt: what was saved stays, and the same
call goes on from there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from hintsd_jax import evaluate as evaluation
from hintsd_jax import processes
from hintsd_jax import train as training
from hintsd_jax.config import build, edge, files, flags
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError, told
from hintsd_jax.results import EvaluationResult, TrainResult
from hintsd_jax.text_engine import Generated, TextEngine

__all__ = [
    "EvaluationResult",
    "Generated",
    "TextEngine",
    "TrainResult",
    "UserError",
    "evaluate",
    "load_config",
    "train",
]


def load_config(named: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of a shipped name ("desk") or of a file, to be changed as you like: `config.optim.steps = 3`.

    overrides: by dotted key, as on the command line: {"optim.steps": 3}. A class of your own stands for its path:
    {"env.name": MyEnvironment}.

    Raises:
      UserError: no such config, or a key that it does not have.
    """
    config = files.load(named)
    overrides = {key: _path_of(value) if isinstance(value, type) else value for key, value in (overrides or {}).items()}
    edge.change_environment(config, overrides.get("env.name"))
    for key, value in overrides.items():
        if problem := edge.unknown_key(key):
            raise UserError(problem)
        edge.set_key(config, key, value)
    return config


def _path_of(part: type) -> str:
    return f"{part.__module__}:{part.__qualname__}"


def train(config: ConfigDict | Config, workdir: str | os.PathLike) -> TrainResult:
    """Trains in `workdir`, or continues what is there: `hintsd-jax train`. Prints progress on stderr and the last table
    on stdout.

    Args:
      config: of `load_config` or of a config file's `get_config()`.
      workdir: a folder of its own, or gs://bucket/folder.

    Raises:
      UserError: whatever the user can mend; what was saved by then stays, and the same call goes on.
    """
    with _run(config, workdir) as (built, folder):
        return training.train(built, folder)


def evaluate(config: ConfigDict | Config, workdir: str | os.PathLike) -> EvaluationResult:
    """Success of the newest checkpoint in `workdir`, or of the policy that was never trained: `hintsd-jax evaluate`.
    Prints a table.

    Raises:
      UserError: as `train`.
    """
    with _run(config, workdir) as (built, folder):
        return evaluation.evaluate(built, folder)


@contextlib.contextmanager
def _run(config: ConfigDict | Config, workdir: str | os.PathLike) -> Iterator[tuple[Config, str]]:
    """The checked config and workdir, with the other processes of the run, if there are any."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # as the command: orbax and tfds remark on what is no matter
    with told(), contextlib.ExitStack() as afterwards:
        afterwards.callback(logging.set_verbosity, verbosity)
        folder = flags.checked_workdir(os.fspath(workdir))
        built = config if isinstance(config, Config) else build.build(config)
        values = edge.flatten(built.to_dict())
        same = {name: value for name, value in values.items() if not name.startswith("distributed.")}
        with processes.joined(built.distributed, same=repr((same, folder))):
            yield built, folder
