# SPDX-License-Identifier: Apache-2.0

"""Attention to a cache by kernels: queries of some rows and the cache flow in, mixed values flow out.

GPU: flash attention of our own in Pallas' form for Triton, for decoding (keys are split among blocks of threads, as in
flash decoding) and for prefill alike. TPU: decoding alone, by Pallas' paged attention.

All read each slot's keys and values up to a row's own length, from where the cache has them: [B, K, S, C] is taken for
B x K sequences of one kv head, which is a view and no copy. The plain forms of `cached_attention` read blocks, and
XLA's GPU compiler copies each before its product, so that a byte of the cache goes through memory three times; loops
whose rounds depend on lengths wait for the host besides (`benchmarks/gpu.py` measures both).

Invariant: as in `cached_attention`; what a row mixes depends on its own keys only, however many rows there are; a row
of length 0 mixes zeros.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from hintsd_jax.models import cudnn

# TPU: positions of a page, all of which come into the chip at once (keys and values twice: 1 MiB of 1,024 x 128); the
# largest that divides a slot is taken.
PAGES = (1024, 512, 256, 128)
# GPU, found on an H200: queries (of all heads that read a kv head) that a block of threads has, elements of keys that
# it scores at once, and the fewest positions that it reads.
_QUERIES, _ELEMENTS, _PART = 64, 64 * 128, 512
_FEWEST = 16  # rows, and columns, that tensor cores multiply: fewer queries or keys are filled up
_WARPS = 4  # of a block of threads
_MIN = jnp.finfo(jnp.float32).min  # finite: a row whose every key is hidden must give no NaN


def fits_tpu(q_BKGTC: jax.Array, keys_BKSC: jax.Array) -> bool:
    """Whether the TPU kernel takes these shapes; it computes with keys and values in bfloat16."""
    return keys_BKSC.dtype == jnp.bfloat16 and q_BKGTC.shape[-1] % 128 == 0 and _page(keys_BKSC) > 0


def fits_gpu(q_RKGTC: jax.Array, keys_BKSC: jax.Array) -> bool:
    """Whether the GPU kernel takes these shapes: 16 bits, because its products of float32 would be TF32. Programs for
    GPUs that are not here are made for such as can run it.
    """
    if jax.default_backend() == "gpu" and not cudnn.gpu_is_here():
        return False
    return keys_BKSC.dtype in (jnp.bfloat16, jnp.float16) and q_RKGTC.shape[-1] in (32, 64, 128, 256)


def part_of(queries: int, positions: int) -> int:
    """Keys that a block of threads reads on GPU, of a slot of so many positions, where so many queries read a kv head:
    the more of these, the longer, as there are blocks enough and what parts leave to be merged stays small.
    """
    return min(max(_PART, pl.next_power_of_2(2 * queries)), max(_FEWEST, pl.next_power_of_2(positions)))


def attend_tpu(q_BKGTC, keys_BKSC, values_BKSC, slot_B, length_BT) -> jax.Array:
    """As `cached_attention.attend_all_slots`, for shapes of one token that fit."""
    B, K, S, C = keys_BKSC.shape
    P = _page(keys_BKSC)
    paged = lambda x_BKSC: x_BKSC.reshape(1, B * K * S // P, P, C)
    page = jnp.arange(B * K * S // P, dtype=jnp.int32).reshape(B * K, S // P)
    length = jnp.repeat(length_BT[:, 0], K)
    q = q_BKGTC.reshape(B * K, -1, C)
    mixed = paged_attention(q, paged(keys_BKSC), paged(values_BKSC), length, page, pages_per_compute_block=1)
    return mixed.reshape(q_BKGTC.shape).astype(jnp.float32)


def attend_gpu(
    q_RKGTC, keys_BKSC, values_BKSC, slot_R, length_RT, window: int | None = None, *, interpret: bool = False
) -> jax.Array:
    """Row r reads slot `slot_R[r]`: its first token the first `length_RT[r, 0]` keys, each further token one more, or
    all none where that is 0; with a window each the last of these -> mixed_RKGTC, float32. For shapes that fit.
    interpret: as Python on any backend.

    A block of threads has some queries of one row and kv head, and one part of the keys; parts are merged by
    log-sum-exp, in float32.
    """
    (R, K, G, T, C), S = q_RKGTC.shape, keys_BKSC.shape[2]
    N, Q = R * K, T * G
    tile = min(_QUERIES, max(_FEWEST, pl.next_power_of_2(Q)))
    block = max(_FEWEST, _ELEMENTS // C)
    stages = 3 if C <= 128 else 2  # of loading ahead: what they take must fit into the 99 KiB of smaller cards
    positions = S if window is None else min(S, window + T - 1)  # that the tokens of a row see
    part = part_of(Q, positions)
    parts = pl.cdiv(positions, part)
    by_query = lambda *dims: pl.BlockSpec((None, None, tile, *dims), lambda n, i, j: (n, j, i, *(0 for _ in dims)))
    made = lambda *dims: jax.ShapeDtypeStruct((N, parts, Q, *dims), jnp.float32)
    of_row = pl.BlockSpec((None,), lambda n, i, j: (n,))
    everywhere = pl.BlockSpec()
    mixed_NPQC, total_NPQ, top_NPQ = pl.pallas_call(
        partial(_attend_part, queries=Q, group=G, part=part, block=min(block, part), window=window),
        grid=(N, pl.cdiv(Q, tile), parts),
        in_specs=[of_row, of_row, pl.BlockSpec((None, tile, C), lambda n, i, j: (n, i, 0)), everywhere, everywhere],
        out_specs=[by_query(C), by_query(), by_query()],
        out_shape=[made(C), made(), made()],
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=stages),
        interpret=interpret,
        name="flash_attention_to_cache",
    )(
        jnp.ravel(slot_R[:, None] * K + jnp.arange(K, dtype=jnp.int32)),  # the sequence that each reads
        jnp.repeat(length_RT[:, 0], K),
        q_RKGTC.transpose(0, 1, 3, 2, 4).reshape(N, Q, C),  # neighbours in a tile see nearly the same keys
        *(x_BKSC.reshape(-1, S, C) for x_BKSC in (keys_BKSC, values_BKSC)),
    )
    weight_NPQ = jnp.exp(top_NPQ - jnp.max(top_NPQ, axis=1, keepdims=True))
    total_NQ = jnp.sum(total_NPQ * weight_NPQ, axis=1)
    mixed_NQC = jnp.sum(mixed_NPQC * weight_NPQ[..., None], axis=1)
    mixed_NQC = mixed_NQC / jnp.where(total_NQ > 0, total_NQ, 1.0)[..., None]
    return mixed_NQC.reshape(R, K, T, G, C).transpose(0, 1, 3, 2, 4)


def _attend_part(
    sequence,
    length,
    q_QC,
    keys_NSC,
    values_NSC,
    mixed_QC,
    total_Q,
    top_Q,
    *,
    queries: int,
    group: int,
    part: int,
    block: int,
    window: int | None,
) -> None:
    """The kernel: softmax of a tile of queries over one part of the keys that the queries of their row see, `block` at
    a time. References to memory flow in. Keys beyond those that the tile's last query sees are not read.
    """
    tile, n = q_QC.shape[0], sequence[()]
    first = pl.program_id(2) * part
    if window is not None:
        first += jnp.maximum(length[()] - window, 0)
    query = pl.program_id(1) * tile + jnp.arange(tile)
    is_query = query < queries
    q = triton.load(q_QC.at[:, :], mask=is_query[:, None], other=0.0)
    # Token by token, the heads of a group beside each other.
    stop_of = lambda query: jnp.where(length[()] > 0, length[()] + query // group, 0)
    stop_Q, last = stop_of(query), stop_of(jnp.minimum((pl.program_id(1) + 1) * tile, queries) - 1)
    last = jnp.minimum(last, keys_NSC.shape[1])

    def add(i: jax.Array, before: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        mixed, total, top = before
        start = first + i * block
        index = start + jnp.arange(block)
        read = lambda x_NSC: triton.load(x_NSC.at[n, pl.ds(start, block), :], mask=(index < last)[:, None], other=0.0)
        scores = triton.dot(q, read(keys_NSC).T)
        is_seen = index[None] < stop_Q[:, None]
        if window is not None:
            is_seen &= index[None] >= stop_Q[:, None] - window
        scores = jnp.where(is_seen, scores, _MIN)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # A block that is hidden whole from a query that has seen nothing yet must not weigh exp(0) = 1.
        weights = jnp.where(is_seen, jnp.exp(scores - new_top[:, None]), 0.0)
        of_before = jnp.exp(top - new_top)
        values = read(values_NSC)
        added = triton.dot(weights.astype(values.dtype), values)
        return mixed * of_before[:, None] + added, total * of_before + jnp.sum(weights, axis=1), new_top

    nothing = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(tile, jnp.float32), jnp.full(tile, _MIN))
    blocks = pl.cdiv(jnp.clip(last - first, 0, part), block)
    mixed, total, top = jax.lax.fori_loop(0, blocks, add, nothing)
    triton.store(mixed_QC.at[:, :], mixed, mask=is_query[:, None])
    triton.store(total_Q.at[:], total, mask=is_query)
    triton.store(top_Q.at[:], top, mask=is_query)


def _page(keys_BKSC: jax.Array) -> int:
    """The first of the sizes of a page that divides a slot, else 0."""
    return next((size for size in PAGES if keys_BKSC.shape[2] % size == 0), 0)
