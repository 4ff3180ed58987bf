# SPDX-License-Identifier: Apache-2.0

"""A fork: another run's workdir flows in, the state or the weights that a new run begins with flow out.

Invariant: the other run stays as it is, and may be going on. A new run that is killed before it has a checkpoint of its
own begins with the same one again, whatever the other has saved meanwhile.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from hintsd_jax import processes
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.jsonl import read_object
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.storage import absolute
from hintsd_jax.training.state import OptimConfig, TrainState, create

# Where these differ the same arrays are another function.
_SAME = ("rank", "alpha", "rslora", "targets")
_CARRIED = {
    "state": "its weights, EMA and optimizer's moments",
    "weights": "its weights; the EMA is a copy of them, the optimizer is new",
}
_CHOSEN = "fork.json"


def forked(config: Config, folder: Workdir, shape: TrainState, optim: OptimConfig) -> tuple[TrainState, str]:
    """The state to begin with, laid out as `shape`, its count of steps 0; and a line that says what it is.

    Raises:
      UserError: `fork.path` holds no run, no such checkpoint, one that is damaged, or one of another adapter or model.
    """
    with _opened(config, folder) as (checkpoints, step, other):
        if config.fork.carry == "state":
            zero = jnp.zeros_like(shape.step, device=shape.step.sharding)
            state = checkpoints.restore(step, shape)[0].replace(step=zero)
        else:
            state = create(checkpoints.restore_part(step, {"params": shape.params})["params"], optim)
    carried = f"{_CARRIED[config.fork.carry]}{other}. Steps count from 0"
    return state, f"begins with step {step} of {absolute(config.fork.path)}: {carried}"


def forked_params(config: Config, folder: Workdir, shape: Any) -> tuple[Any, str]:
    """The trained weights to begin with, laid out as `shape`; and a line on what they are. Raises as `forked`."""
    with _opened(config, folder) as (checkpoints, step, other):
        params = checkpoints.restore_part(step, {"params": shape})["params"]
    return params, f"the weights of step {step} of {absolute(config.fork.path)}{other}"


@contextlib.contextmanager
def _opened(config: Config, folder: Workdir) -> Iterator[tuple[Checkpoints, int, str]]:
    """The other run's checkpoints, the step to begin with, and what there is to say of its policy."""
    source = absolute(config.fork.path)
    there = (read_object(source / "config.json", "a config written by this program") or {}).get("config")
    if not isinstance(there, dict):
        raise UserError(f"fork.path = {source} holds no run: give the --workdir of one that was trained")
    _check_adapter(config, there)
    moved = there["policy"]["path"]
    with contextlib.closing(Checkpoints(source / "checkpoints", config.checkpoint.keep, read_only=True)) as checkpoints:
        step = _chosen(config, folder, checkpoints)
        yield checkpoints, step, f"; it was trained on {moved}" if moved != config.policy.path else ""


def _check_adapter(config: Config, there: dict) -> None:
    here, other = json.loads(json.dumps(config.lora.to_dict())), there.get("lora", {})
    for name in _SAME if here["rank"] or other.get("rank") else ():
        if here[name] != other.get(name):
            raise UserError(
                f"fork.path = {config.fork.path} was trained with lora.{name} = {other.get(name)!r}, this run has"
                f" {here[name]!r}: set it alike"
            )


def _chosen(config: Config, folder: Workdir, checkpoints: Checkpoints) -> int:
    """The step to begin with: once chosen, it is written into the new workdir."""
    pinned = read_object(folder.run_path / _CHOSEN, "a file written by this program")
    if pinned is None:
        pinned = {"step": checkpoints.chosen(config.fork.checkpoint, "fork.checkpoint")}
    step = processes.gather(pinned.get("step"), "the fork")[0]
    if processes.leads():
        folder.write_text(_CHOSEN, json.dumps({"path": config.fork.path, "step": step}) + "\n")
    return checkpoints.chosen(str(step), "fork.checkpoint")
