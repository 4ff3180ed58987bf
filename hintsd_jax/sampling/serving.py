# SPDX-License-Identifier: Apache-2.0

"""Weights as training lays them out flow in, weights as serving needs them flow out: split over all devices, in the
compute dtype.

A decoding step reads every weight once, so it needs them in the dtype that it computes in, and never gathered.
Invariant: where layout and dtype are what they were, the arrays that come out are the ones that went in, not copies.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import shardings


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
            laid = jax.device_put(leaf.astype(dtype), sharding)
            if id(leaf) in frozen:
                self._frozen[id(leaf)] = (leaf, laid)
            return laid

        return jax.tree_util.tree_map_with_path(lay, params, layout)
