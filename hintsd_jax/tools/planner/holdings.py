"""What stays on a device while a run does something: config, policy shape and mesh in, bytes by name and phase out.
Exact.

Shapes, dtypes and layouts are those of the run (`aot`), so these rows are not estimates. Phases:

- rollout: decoding and analysis. All that training carries, the cache of all slots, and the served copy of the weights.
- update: the same, and the gradients. Of the served copy only that of frozen weights stays (`sampling.serving`).

Invariant: a served copy counts only where dtype or layout differ from training's; elsewhere the arrays are the same
ones.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.session import optim_config
from hintsd_jax.tools.planner import aot
from hintsd_jax.training.state import OptimConfig, abstract

PHASES = ("rollout", "update")


class Holding(NamedTuple):
    """Bytes on one device in each of `PHASES`; note: what they are."""

    name: str
    rollout: int
    update: int
    note: str


def holdings(config: ConfigDict, policy: PolicyConfig, mesh: AbstractMesh) -> list[Holding]:
    """The rows, those of 0 bytes included."""
    frozen, params, moments, adapter, served, kept = _weights(policy, mesh, optim_config(config))
    cache = aot.held(aot.abstract_cache(config, policy, mesh))
    initial = params if config.hindsight.analyser == "initial_policy" else 0
    everywhere = lambda name, size, note: Holding(name, size, size, note)
    return [
        everywhere(
            "weights", frozen or params, f"{policy.compute_dtype}, frozen" if policy.lora else "float32, trained"
        ),
        everywhere("adapter", adapter, "float32, trained"),
        everywhere("EMA", params, "float32, the teacher"),
        everywhere("optimizer", moments, "float32, two moments"),
        everywhere("initial weights", initial, "hindsight.analyser = initial_policy"),
        Holding("served copy", served, kept, f"{policy.compute_dtype}, in serving's layout"),
        everywhere(
            "KV slots",
            cache,
            f"{config.rollout.slots} x {max(config.rollout.context, config.hindsight.context):,}, {policy.compute_dtype}, {cache / config.rollout.slots / 2**30:.2f} a slot",
        ),
        Holding("gradients", 0, params, "float32, summed over batches"),
    ]


@functools.cache
def _weights(policy: PolicyConfig, mesh: AbstractMesh, optim: OptimConfig) -> tuple[int, ...]:
    """Bytes of the frozen weights, of what is trained, its moments, the adapter, all that serving copies, and what it
    keeps of that.
    """
    train, serve = (aot.abstract_weights(policy, mesh, role) for role in ("train", "serve"))
    served = copied(train, serve)
    frozen, trained = (train, train.pop("lora")) if policy.lora else ({}, train)
    kept = copied(frozen, {name: serve[name] for name in frozen})  # a copy of frozen weights never changes: made once
    params, moments = aot.held(trained), aot.held(abstract(trained, optim).opt_state)
    return aot.held(frozen), params, moments, params if policy.lora else 0, served, kept


def copied(train: Any, serve: Any) -> int:
    """Bytes on one device of the leaves that serving has a copy of its own of."""

    def own(here: jax.ShapeDtypeStruct, there: jax.ShapeDtypeStruct) -> int:
        same = here.dtype == there.dtype and here.sharding.spec == there.sharding.spec
        return 0 if same else aot.held(there)

    return sum(jax.tree.leaves(jax.tree.map(own, train, serve)))
