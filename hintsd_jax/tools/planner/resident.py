# SPDX-License-Identifier: Apache-2.0

"""What stays on a device in each phase of a run: config, policy's shape and mesh in, bytes by name and phase out.

These rows are exact. Shapes, dtypes and layouts are those of the run (`programs`). Phases:

- rollout: decoding and analysis. All that training carries, the cache of all slots, and the served copy of the weights.
- update: the same, and the gradients. Of the served copy only that of frozen weights stays (`sampling.serving`).

Invariant: a served copy counts only where dtype or layout differ from training's, or where layers are served apart
(on GPU and CPU, `decoder.by_layer`); elsewhere the arrays are the same ones.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.sampling.serving import is_by_layer
from hintsd_jax.tools.planner.programs import abstract_cache, abstract_weights, bytes_on_one_device
from hintsd_jax.training.state import OptimConfig, abstract

PHASES = ("rollout", "update")


class Resident(NamedTuple):
    """Arrays that stay: bytes on one device in each of `PHASES`; note: what they are."""

    name: str
    rollout: int
    update: int
    note: str


def resident_arrays(
    config: Config, policy: PolicyConfig, mesh: AbstractMesh, serving: AbstractMesh, platform: str
) -> list[Resident]:
    """The rows, those of 0 bytes included. serving: the mesh of one process that rolls out."""
    weights = _weight_bytes(policy, mesh, serving, build.optimizer_config(config))
    apart = weights.apart if is_by_layer(platform) else 0
    engine, dtype = build.engine_config(config), policy.compute_dtype
    cache = bytes_on_one_device(abstract_cache(config, policy, serving))
    cache_note = f"{engine.slots} x {engine.context:,}, {dtype}, {cache / engine.slots / 2**30:.2f} a slot"
    initial = weights.trained if build.keeps_initial_weights(config) else 0
    in_both = lambda name, size, note: Resident(name, size, size, note)
    return [
        in_both(
            "weights", weights.frozen or weights.trained, f"{dtype}, frozen" if policy.lora else "float32, trained"
        ),
        in_both("adapter", weights.trained if policy.lora else 0, "float32, trained"),
        in_both("EMA", weights.trained, "float32, the teacher"),
        in_both("optimizer", weights.moments, "float32, two moments"),
        in_both("initial weights", initial, "to analyse with (hindsight.analyser) or stay near (grpo.reference_kl)"),
        Resident(
            "served copy",
            weights.served + apart,
            weights.served_frozen,
            f"{dtype}, in serving's layout" + ", layers apart" * bool(apart),
        ),
        Resident("KV slots", cache, 0 if engine.free_cache else cache, cache_note),
        Resident("gradients", 0, weights.trained, "float32, summed over batches"),
    ]


class _WeightBytes(NamedTuple):
    """On one device. served: all that serving has a copy of its own of; served_frozen: what never changes of that.
    apart: what more it has where layers are served apart; only a copy of what is trained needs not to stay beside it.
    """

    frozen: int
    trained: int
    moments: int
    served: int
    served_frozen: int
    apart: int


@functools.cache
def _weight_bytes(policy: PolicyConfig, mesh: AbstractMesh, serving: AbstractMesh, optim: OptimConfig) -> _WeightBytes:
    train, serve = abstract_weights(policy, mesh, "train"), abstract_weights(policy, serving, "serve")
    copied = partial(
        copied_bytes, whole_replicas=mesh.size == serving.size * (mesh.shape["data"] // serving.shape["data"])
    )
    served = copied(train, serve)
    frozen, trained = (train, train.pop("lora")) if policy.lora else ({}, train)
    layers = {"layers": serve["layers"], "lora": serve["lora"]["layers"]} if policy.lora else serve["layers"]
    copies = serve["lora"] if policy.lora else serve
    of_trained = copied({"layers": trained["layers"]}, {"layers": copies["layers"]})
    return _WeightBytes(
        frozen=bytes_on_one_device(frozen),
        trained=bytes_on_one_device(trained),
        moments=bytes_on_one_device(abstract(trained, optim).opt_state),
        served=served,
        served_frozen=copied(frozen, {name: serve[name] for name in frozen}),
        apart=bytes_on_one_device(layers) - of_trained,
    )


def copied_bytes(train: Any, serve: Any, whole_replicas: bool = True) -> int:
    """Bytes on one device of the leaves that serving has a copy of its own of: where dtype or parts differ.

    whole_replicas: whether each process has all of the weights that are trained or frozen. Then a device's part is the
    same in both layouts where it is as large, because both count parts in one order (`serving_mesh`).
    """

    def own(here: jax.ShapeDtypeStruct, there: jax.ShapeDtypeStruct) -> int:
        parts = [leaf.sharding.shard_shape(leaf.shape) for leaf in (here, there)]
        whole = parts[0] == here.shape
        same = here.dtype == there.dtype and parts[0] == parts[1] and (whole_replicas or whole)
        return 0 if same else bytes_on_one_device(there)

    return sum(jax.tree.leaves(jax.tree.map(own, train, serve)))
