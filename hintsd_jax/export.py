# SPDX-License-Identifier: Apache-2.0

"""Export: a run's checkpoint flows in, directories flow out that transformers, vLLM and SGLang read.

A whole directory (config, weights with the adapter merged, tokenizer, chat template) in the form of the checkpoint that
training began with, and the adapters in PEFT's format, of the student and of its EMA, the teacher.

Invariants: what training did not change is written as it was, bit for bit, in its own dtype. Neither a device nor the
whole model is needed: weights pass through host memory parameter by parameter. A directory has its final name only when
all of it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hintsd_jax import hub
from hintsd_jax.checkpoints.huggingface import open_checkpoint, read_config, write_like
from hintsd_jax.checkpoints.parameters import parameters
from hintsd_jax.checkpoints.peft import save_adapter
from hintsd_jax.checkpoints.safetensors import TensorFiles
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.config import continuing
from hintsd_jax.config.build import lora_config
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.jsonl import read_object
from hintsd_jax.model_card import Card
from hintsd_jax.models import lora
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.policies import pinned
from hintsd_jax.runs.metrics import read_metrics
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.storage import AnyPath, is_folder, is_remote, located

# Whose weights, as the config names them -> their tree in the train state.
_TREES = {"student": "params", "ema": "ema"}

# Reads a part of a tree: nested dicts down to the wanted arrays -> the same dicts with arrays.
Reader = Callable[[Any], Any]


def export(config: Config, workdir: str) -> list[AnyPath]:
    """Writes `export/step_<n>/` in the workdir (or `export.path`): `student/`, `ema/`, `student_adapter/`,
    `ema_adapter/`, those asked for, each with its model card; pushes them where `export.push_to` says so.

    Returns the directories and prints them, and what a merge in a short dtype has lost of an adapter.

    Raises:
      UserError: no such checkpoint, a missing or changed `policy.path`, a place that cannot be written; a push that
        fails, after the directories are written.
    """
    if config.export.push_to:
        hub.check_push(config.export.push_to)
        if is_remote(config.export.path or workdir):
            raise UserError("export.push_to needs export.path = a folder on a disk of this machine")
    if not is_folder(located(workdir) / "checkpoints"):
        raise UserError(f"{workdir}: there is no run with checkpoints; give the --workdir of one that was trained")
    config = pinned(config, workdir)
    policy = read_config(config.policy.location, lora=lora_config(config))
    source = open_checkpoint(located(config.policy.location), policy)
    # The base model may lie elsewhere than it did while training.
    with Workdir.open(workdir, config, may_differ=continuing.or_of("eval.", "policy.path")) as folder:
        checkpoints = Checkpoints.open(folder.path, config)
        step = checkpoints.chosen(config.export.checkpoint, "export.checkpoint")
        out = located(config.export.path or folder.path / "export" / f"step_{step:06d}")
        dtype = None if config.export.dtype == "auto" else config.export.dtype
        held_out = read_object(folder.path / "held_out.json") or {}
        row = next((row for row in read_metrics(folder.path / "metrics.jsonl") if row["step"] == step), {})
        base = hub.name_of(config.policy.path) or hub.Name(config.policy.location, "")
        written, lines = [], []
        for name, tree in _TREES.items():
            card = lambda is_adapter, name=name: Card(config, name, is_adapter, step, held_out, row).text()
            read = lambda part, tree=tree: checkpoints.restore_part(step, {tree: part})[tree]
            adapter = read(_adapter_shapes(policy)) if policy.lora else None
            if name in config.export.weights:
                survival = Survival()
                tensors = (
                    _trained(policy, read) if adapter is None else _merged(policy, source, adapter, dtype, survival)
                )
                written.append(out / name)
                write_like(written[-1], config.policy.location, source, tensors, dtype, card(False))
                lines += [f"{name}: {survival.line()}"] if survival.line() else []
            if adapter is not None:
                written.append(out / f"{name}_adapter")
                save_adapter(written[-1], policy, adapter, base.model, base.revision or None, card(True))
        checkpoints.close()
    for path in written:
        print(f"step {step}: {path}")
    print(*lines, sep="\n", end="\n" * bool(lines))
    if config.export.push_to:
        folders, to = [Path(path) for path in written], config.export.push_to
        message = f"Step {step} of {config.env.name} by {config.algorithm}"
        print(f"pushed: {hub.push(folders, to, private=config.export.push_private, message=message)}")
    return written


def _adapter_shapes(policy: PolicyConfig) -> lora.Adapter:
    return jax.eval_shape(partial(lora.init_adapter, policy), jax.random.key(0))


def _trained(policy: PolicyConfig, read: Reader) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensors of weights that were all trained; one of our parameters is read at a time."""
    for parameter in parameters(policy):
        wanted: Any = 0  # any leaf that is not an array comes as NumPy
        for key in reversed(parameter.path):
            wanted = {key: wanted}
        weight = read(wanted)
        for key in parameter.path:
            weight = weight[key]
        yield from parameter.hf_tensors(weight)


def _merged(
    policy: PolicyConfig, source: TensorFiles, adapter: lora.Adapter, dtype: str | None, survival: Survival
) -> Iterator[tuple[str, np.ndarray]]:
    """Those of the checkpoint that training began with, the adapter merged into its targets. dtype: that they will be
    written in (None: each as it was); `survival` learns what that leaves of the adapter.
    """
    settings, pairs = lora.settings(policy), {}
    for target in lora.targets(policy):
        part, module = target.path
        pairs["layers", part, module, "kernel"] = adapter["layers"][part][module]
    for parameter in parameters(policy):
        pair = pairs.get(parameter.path)
        for place, name in zip(np.ndindex(*parameter.stack), parameter.hf_names, strict=True):
            weight = source.read(name, parameter.hf_shape)
            if pair is not None:
                merged = lora.merge(weight.T, {key: stack[place] for key, stack in pair.items()}, settings).T
                survival.add(weight, merged, jnp.dtype(dtype or weight.dtype))
                weight = merged
            yield name, weight


class Survival:
    """How much of an adapter is left in merged weights once these are rounded to a dtype.

    `added` and `meant` are squared norms over all merged weights: of what merging changes in them as they are written,
    and of what the adapter adds. `error` is that of their difference.
    """

    def __init__(self):
        self.added = self.meant = self.error = 0.0
        self.dtype = np.dtype(np.float32)

    def add(self, weight: np.ndarray, merged: np.ndarray, dtype: np.dtype) -> None:
        """One weight [out, in] as it was, and as it is in float32 with the adapter merged into it."""
        rounded = lambda values: values.astype(dtype).astype(np.float32)
        added, meant = rounded(merged) - rounded(weight), merged - weight.astype(np.float32)
        self.dtype = dtype
        self.added += float(np.square(added, dtype=np.float64).sum())
        self.meant += float(np.square(meant, dtype=np.float64).sum())
        self.error += float(np.square(added - meant, dtype=np.float64).sum())

    def line(self) -> str:
        """One line for people where rounding changes more than a hundredth of the adapter's effect, else ""."""
        if self.dtype == np.float32 or self.error <= 1e-4 * self.meant:
            return ""
        added, meant = math.sqrt(self.added), math.sqrt(self.meant)
        wrong = math.sqrt(self.error / self.meant)
        return (
            f"{self.dtype.name} holds weights too coarsely for this adapter: merging added {added:.3g} of {meant:.3g}"
            f" (norms over all merged weights: {added / meant:.0%}; {wrong:.0%} of the adapter's effect is rounding"
            " error). Export with --config.export.dtype=float32, or use the adapter itself"
        )
