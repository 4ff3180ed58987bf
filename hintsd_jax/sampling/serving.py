# SPDX-License-Identifier: Apache-2.0

"""Weights as training lays them out flow in, weights as serving needs them flow out: split over all devices, in the
compute dtype.

A decoding step reads every weight once, so it needs them in the dtype that it computes in, and never gathered.
Invariant: where the parts on this process's devices and the dtype are what they were, the arrays that come out have the
memory of those that went in, and are no copies.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import AXES, serving_mesh, shardings


class ServingLayout:
    """`layout(params)` -> the same weights for the engine. Weights under an adapter never change: their copy, if one is
    needed, is kept.
    """

    def __init__(self, policy: PolicyConfig, mesh: Mesh):
        self._policy, self._mesh = policy, mesh
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

        return jax.tree_util.tree_map_with_path(lay, params, layout)


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
