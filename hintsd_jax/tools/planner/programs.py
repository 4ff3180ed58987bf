# SPDX-License-Identifier: Apache-2.0

"""Every compiled program of a run from shapes alone: config, policy's shape and mesh in, programs to lower out.

No weights and no devices are needed: the mesh may be of a described topology (`topologies`), so what a pod will hold
and do can be read off the real compiler's result on any machine. Invariant: these are the functions and layouts that a
run uses, not copies of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hintsd_jax.checkpoints.safetensors import read_json
from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.models import decoder, lora
from hintsd_jax.models.cached_attention import CACHE_AXES
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import FROZEN, serving_mesh, shardings, spec
from hintsd_jax.sampling import programs as sampling
from hintsd_jax.sampling.serving import is_by_layer
from hintsd_jax.storage import AnyPath
from hintsd_jax.training import train_step
from hintsd_jax.training.batching import blank_batch
from hintsd_jax.training.state import abstract


@dataclasses.dataclass(frozen=True)
class Program:
    """kind: "prefill", "copy", "decode", "update" or "apply". lower: traces and lowers it under its mesh. weight_bytes:
    of its weights (and of the train state) on one device. length, pair: an update's, see `BatchShapes.all`.
    """

    kind: str
    name: str
    lower: Callable[[], jax.stages.Lowered]
    weight_bytes: int = 0
    length: int = 0
    pair: int = 0


def described_policy(config: Config, file: AnyPath, layers: int | None = None, platform: str = "tpu") -> PolicyConfig:
    """The policy of a Hugging Face config.json, as the config's run has it on `platform`; `layers` cuts it short."""
    dtype, adapter = build.compute_dtype(config, platform), build.lora_config(config)
    policy = PolicyConfig.from_hf(read_json(file), compute_dtype=dtype, remat=config.policy.remat, lora=adapter)
    return dataclasses.replace(policy, num_layers=layers or policy.num_layers)


def programs(
    config: Config, policy: PolicyConfig, mesh: Mesh, stop_ids: tuple[int, ...] = (0,), platform: str = "tpu"
) -> Iterator[Program]:
    """The engine's programs on one process's part of the mesh (rollout, analysis and evaluation are the same three on
    other weights), then those of the update.
    """
    yield from _engine_programs(config, policy, serving_mesh(mesh, policy.num_kv_heads), stop_ids, platform)
    yield from _update_programs(config, policy, mesh, platform)


def _engine_programs(
    config: Config, policy: PolicyConfig, mesh: Mesh, stop_ids: tuple[int, ...], platform: str
) -> Iterator[Program]:
    engine, under = build.engine_config(config), partial(_under, mesh)
    served, cache = abstract_weights(policy, mesh, "serve"), abstract_cache(config, policy, mesh)
    if is_by_layer(platform):
        served = decoder.by_layer(served, _unstacked)
    whole = partial(_array, mesh=mesh, names=None)
    B, A = engine.slots, engine.max_tokens
    ids, size = lambda rows: whole((rows,), "int32"), bytes_on_one_device(served)
    for L in engine.prefill_buckets:
        R = engine.rows(L)
        rows = (whole((R, L), "int32"), ids(R), ids(R), None if policy.experts is None else ids(R))
        lower = partial(sampling.prefill.lower, served, policy, cache, *rows)
        yield Program("prefill", f"prefill {R} x {L}", under(lower), size)
    copied = ids(engine.prefill_rows)
    yield Program("copy", "copy", under(partial(sampling.copy_slots.lower, cache, copied, copied, copied, copied)))
    state = jax.tree.map(lambda x: whole(x.shape, x.dtype), sampling.idle_state(B, engine.context, A))
    lower = partial(sampling.decode.lower, served, policy, stop_ids, cache, state, whole((), "int32"))
    yield Program("decode", f"decode {B} slots x {engine.context}", under(lower), size)


def _update_programs(config: Config, policy: PolicyConfig, mesh: Mesh, platform: str) -> Iterator[Program]:
    algorithm, optim, under = build.algorithm(config), build.optimizer_config(config), partial(_under, mesh)
    shapes, loss = algorithm.batch_shapes(mesh, platform), algorithm.loss
    weights = abstract_weights(policy, mesh, "train")
    frozen, trained = (weights, weights.pop("lora")) if policy.lora else (None, weights)
    state = abstract(trained, optim)
    sums: Any = dict.fromkeys(loss.sum_names, _array((), "float32", mesh, None))
    accumulator = train_step.Accumulator(grads=state.params, sums=sums)
    reference = trained if loss.needs_reference else None
    size = sum(map(bytes_on_one_device, (frozen, state, reference)))
    lay = lambda leaf: _array(leaf.shape, leaf.dtype, mesh, ("batch",) + ("length",) * (leaf.ndim - 1), "train")
    for length, pair in shapes.all():
        batch = jax.tree.map(lay, blank_batch(shapes, length, pair))
        arrays = (frozen, state, accumulator, batch, reference)
        lower = partial(train_step.accumulate.lower, *arrays, policy=policy, loss=loss)
        name = f"update {shapes.batch_size} x {length} + {shapes.tokens(length, pair)[1]}"
        yield Program("update", name, under(lower), size, length, pair)
    when = jax.tree.map(lambda x: _array(x.shape, x.dtype, mesh, None), train_step.When.at())
    lower = partial(train_step.apply.lower, state, accumulator, when, loss=loss, optim=optim)
    yield Program("apply", "apply", under(lower), size)


def abstract_weights(policy: PolicyConfig, mesh: Mesh | AbstractMesh, role: str) -> dict[str, Any]:
    """Shapes, dtypes and layouts of all weights: what is trained in float32, what is served or frozen in the compute
    dtype, but for norms.
    """
    return dict(_laid_out(policy, mesh, role))


@functools.cache
def _laid_out(policy: PolicyConfig, mesh: Mesh | AbstractMesh, role: str) -> Any:
    (weights, axes), roles = _shapes(policy), {"lora": role}
    if policy.lora is None:
        roles = dict.fromkeys(weights, role)
    layout = {name: shardings(weights[name], axes[name], mesh, roles.get(name, FROZEN)) for name in weights}

    def lay(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        trained = policy.lora is None or path[0].key == "lora"
        full = path[-1].key == "scale" or (trained and role == "train")
        return jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype("float32" if full else policy.compute_dtype), sharding=sharding
        )

    return jax.tree_util.tree_map_with_path(lay, weights, layout)


def _unstacked(leaf: jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    """`decoder.unstacked` of a laid out shape."""
    sharding: Any = leaf.sharding
    where = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)] * leaf.shape[0]


@functools.cache
def _shapes(policy: PolicyConfig) -> tuple[Any, Any]:
    """All weights and their logical axes; traced once, because a plan asks for many layouts."""
    weights = decoder.abstract_params(policy)
    axes = decoder.logical_axes(policy)
    if policy.lora:
        weights["lora"] = jax.eval_shape(partial(lora.init_adapter, policy), jax.random.key(0))
        axes["lora"] = lora.logical_axes(policy)
    return weights, axes


def abstract_cache(
    config: Config, policy: PolicyConfig, mesh: Mesh | AbstractMesh
) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
    """The cache of all slots, as `decoder.init_cache` makes it."""
    engine = build.engine_config(config)
    shape = (engine.slots, policy.num_kv_heads, engine.context, policy.head_dim)
    layer = _array(shape, policy.compute_dtype, mesh, CACHE_AXES)
    return [(layer, layer)] * policy.num_layers


def bytes_on_one_device(tree: Any) -> int:
    """Of laid out arrays, abstract or not."""
    return sum(_elements(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def elements_on_one_device(tree: Any) -> int:
    """The number of entries of laid out arrays, abstract or not."""
    return sum(map(_elements, jax.tree.leaves(tree)))


def _elements(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _under(mesh: Mesh, lower: Callable[[], jax.stages.Lowered]) -> Callable[[], jax.stages.Lowered]:
    def call() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            return lower()

    return call


def _array(
    shape: tuple[int, ...],
    dtype: Any,
    mesh: Mesh | AbstractMesh,
    names: tuple[str, ...] | None,
    role: str = "serve",
) -> jax.ShapeDtypeStruct:
    """names: of the logical axes; None: the whole array on every device."""
    where = PartitionSpec() if names is None else spec(shape, names, mesh, role)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, where))
