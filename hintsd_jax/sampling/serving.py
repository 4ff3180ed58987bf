# SPDX-License-Identifier: Apache-2.0

"""Weights as training lays them out flow in, weights as serving needs them flow out: split over all devices, in the
compute dtype, and where the compiler would copy slices of stacked ones, layer by layer.

A decoding step reads every weight once, so it needs them in the dtype that it computes in, and never gathered.
Invariant: where the parts on this process's devices and the dtype are what they were, the arrays that come out have the
memory of those that went in, and are no copies, but for those of layers that stand by themselves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import AXES, serving_mesh, shardings


def is_by_layer(platform: str) -> bool:
    """Whether layers are served apart there: see `decoder.by_layer`."""
    return platform in ("cpu", "gpu")


class ServingLayout:
    """`layout(params)` -> the same weights for the engine. Weights under an adapter never change: their copy in another
    dtype or other parts, if one is needed, is kept. What is apart by layer is made anew each time: an update is where
    memory is short.

    by_layer: whether layers stand apart, by default as `is_by_layer` has it.
    """

    def __init__(self, policy: PolicyConfig, mesh: Mesh, by_layer: bool | None = None):
        self._policy, self._mesh = policy, mesh
        self._by_layer = is_by_layer(mesh.devices.flat[0].platform) if by_layer is None else by_layer
        self._axes = decoder.logical_axes(policy) | ({"lora": lora.logical_axes(policy)} if policy.lora else {})
        # id of an array -> the array (so that no other gets this id) and its copy
        self._frozen: dict[int, tuple[jax.Array, jax.Array]] = {}

    def __call__(self, params: decoder.Params) -> decoder.Params:
        axes = {name: self._axes[name] for name in params}
        layout = shardings(params, axes, self._mesh, "serve")
        frozen = {id(leaf) for leaf in jax.tree.leaves({**params, "lora": {}})} if "lora" in params else set()

        def lay(path: tuple, leaf: jax.Array, sharding: Any) -> jax.Array:
            if id(leaf) in self._frozen:
                return self._frozen[id(leaf)][1]
            # RMSNorm computes in float32 whatever the rest does.
            dtype = leaf.dtype if path[-1].key == "scale" else self._policy.compute_dtype
            laid = _put(leaf.astype(dtype), sharding, self._policy.num_kv_heads)
            if id(leaf) in frozen:
                self._frozen[id(leaf)] = (leaf, laid)
            return laid

        if not self._by_layer:
            return jax.tree_util.tree_map_with_path(lay, params, layout)
        # One after the other: a stacked copy is gone before the next one is made.
        later = jax.tree_util.tree_map_with_path(lambda *leaf: partial(lay, *leaf), params, layout)
        apart = decoder.by_layer(later, lambda one: decoder.unstacked(one()))
        return jax.tree.map(lambda one: one() if isinstance(one, partial) else one, apart)


def _put(leaf: jax.Array, sharding: NamedSharding, kv_heads: int) -> jax.Array:
    """The array on the devices of `sharding`, which are devices of its own, from the parts that are there already where
    they are the same ones.
    """
    there, wanted = leaf.sharding.devices_indices_map(leaf.shape), sharding.devices_indices_map(leaf.shape)
    if any(there.get(device) != index for device, index in wanted.items()):
        if leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        leaf = _for_every_process(leaf, sharding.spec, kv_heads)
    parts = [part.data for part in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


def _for_every_process(leaf: jax.Array, spec: PartitionSpec, kv_heads: int) -> jax.Array:
    """An array of all processes so that each has the whole of it, split over its own devices by `spec`."""
    mesh: Any = leaf.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue] - of a NamedSharding
    meshes = [serving_mesh(mesh, kv_heads, process).devices for process in range(jax.process_count())]
    everywhere = Mesh(np.stack(meshes), ("process", *AXES), axis_types=(AxisType.Auto,) * (1 + len(AXES)))
    return jax.device_put(leaf, NamedSharding(everywhere, spec))
