# SPDX-License-Identifier: Apache-2.0

"""Causal attention of whole rows by the splash kernel (Pallas, TPU), each device its own rows and heads: heads flow in,
mixed values flow out.

The scores never leave the chip: at T = 24,576 the plain form moves over 100 GB a layer through memory. The kernel knows
nothing of meshes, so it is called under `shard_map`, with rows and heads split as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from hintsd_jax.models.sharding import spec

_VECTOR_WIDTH = 128  # of a TPU's registers; head_dim and T must be multiples of it
# On-chip tiles at most; with two backward kernels they need 0.2 GB at T = 24,576 (fused: 4.5 GB).
_QUERY_BLOCK, _KEY_BLOCK = 512, 1024
_SHORTEST = 512  # rows up to here are one tile of plain JAX


def fits(q_BTHC: jax.Array, k_BTKC: jax.Array) -> bool:
    """Whether the kernel takes these shapes on the current mesh: long rows, query and kv heads split alike."""
    _, T, _, C = q_BTHC.shape
    if T <= _SHORTEST or T % _VECTOR_WIDTH or C % _VECTOR_WIDTH:
        return False
    return are_split_alike(q_BTHC, k_BTKC)


def are_split_alike(q_BTHC: jax.Array, k_BTKC: jax.Array) -> bool:
    """Whether every device has the kv heads of its query heads on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or _spec(q_BTHC, mesh, "act_heads")[2] == _spec(k_BTKC, mesh, "act_kv_heads")[2]


def _spec(x_BTHC: jax.Array, mesh, heads: str):
    return spec(x_BTHC.shape, ("batch", "length", heads, "act_head_dim"), mesh, "train")


def attend_causal(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    first_BT: jax.Array | None = None,
    window: int | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend_causal`, for shapes that `fits`. window: keys that a query sees at most. `interpret`: run as
    Python on any backend, slowly.
    """

    def local(q_BTHC, k_BTKC, v_BTKC, *first_BT):
        q, k, v = (x.swapaxes(1, 2) for x in (q_BTHC * q_BTHC.shape[-1] ** -0.5, k_BTKC, v_BTKC))
        blocks = min(_QUERY_BLOCK, q.shape[2]), min(_KEY_BLOCK, q.shape[2])
        one_row = _kernel(q.shape[1], q.shape[2], *blocks, window, interpret)
        sequences = [kernel.SegmentIds(first, first) for first in first_BT]  # where it begins names a sequence
        return cast(jax.Array, jax.vmap(one_row)(q, k, v, *sequences)).swapaxes(1, 2)

    return on_each_device(local, q_BTHC, k_BTKC, v_BTKC, *(() if first_BT is None else (first_BT,)))


def on_each_device(
    attend: Callable[..., jax.Array], q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, *more_BT: jax.Array
):
    """`attend` of each device's own rows and heads, for a kernel that knows nothing of meshes (`are_split_alike`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q_BTHC, k_BTKC, v_BTKC, *more_BT)
    q_spec, kv_spec = _spec(q_BTHC, mesh, "act_heads"), _spec(k_BTKC, mesh, "act_kv_heads")
    specs = (q_spec, kv_spec, kv_spec, *(spec(x.shape, ("batch", "length"), mesh, "train") for x in more_BT))
    # check_vma: a kernel does not say along which axes its output varies
    split = jax.shard_map(attend, in_specs=specs, out_specs=q_spec, check_vma=False)
    return split(q_BTHC, k_BTKC, v_BTKC, *more_BT)


def _kernel(heads: int, T: int, query_block: int, key_block: int, window: int | None, interpret: bool):
    query_block, key_block = _divisor(T, query_block), _divisor(T, key_block)
    half = _divisor(key_block, max(_VECTOR_WIDTH, key_block // 2))
    blocks = kernel.BlockSizes(
        block_q=query_block, block_kv=key_block, block_kv_compute=half,
        block_q_dkv=query_block, block_kv_dkv=key_block, block_kv_dkv_compute=half,
        block_q_dq=query_block, block_kv_dq=key_block,
    )  # fmt: skip
    seen = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    mask = masks.MultiHeadMask([seen] * heads)
    return kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=blocks, interpret=interpret)


def _divisor(size: int, most: int) -> int:
    """The largest part of `size` of at most `most` that is whole registers wide, as `size` is."""
    widest = most // _VECTOR_WIDTH * _VECTOR_WIDTH
    return next(part for part in range(widest, 0, -_VECTOR_WIDTH) if size % part == 0)
