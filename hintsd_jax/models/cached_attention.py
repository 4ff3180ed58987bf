# SPDX-License-Identifier: Apache-2.0

"""Attention to a cache: new heads of some rows flow in, the cache with their keys and values and what they mix flow
out.

The cache of a layer is kept [B, K, S, C]: slots, kv heads, positions, head dimension. So the keys of a head are one
matrix that a product reads as it lies, and a stretch of positions of one slot is read, written or copied by itself. R
rows of T tokens are served at once: one token of every slot (decoding, R = B), or some chunks of prompts (prefill).
H query heads in G = H / K groups.

A row's keys are read block by block and merged by log-sum-exp as in flash attention (arXiv:2205.14135). On CPU a
decoding step reads a list of blocks, those of all rows one behind the other, so it costs the sum of what is in the
slots. On accelerators a kernel reads what is in the slots (`cache_kernels`); where none takes the shapes, larger blocks
of all slots are read, up to the longest row, because there a short loop costs more than the keys that it saves. Rows of
a prefill read their own blocks everywhere, on GPU by the kernel. Layers with a window keep all positions, as slots are
copied and reused by position, but read those of their window only.

Invariants: a query attends to the positions up to its own, in its own slot, of these to the last of a window; a block
of others is not read or changes no bit; the softmax is float32; no array as large as a slot is made. Under a mesh each
device does this for its own slots and heads, and decoding crosses no devices.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hintsd_jax.models import cache_kernels
from hintsd_jax.models.sharding import spec

KeysValues = tuple[jax.Array, jax.Array]  # of one layer, each [B, K, S, C]
CACHE_AXES = ("slots", "act_kv_heads", "length", "act_head_dim")

_MIN = jnp.finfo(jnp.float32).min  # finite: a row whose every key is hidden must give no NaN
# Keys that are read at once. CPU: the block stays in its nearest memory (16 slots x 4,700 positions: 128 was as good as
# any of 64 to 512). Accelerators: a block must be worth a round of the loop.
_CPU_BLOCK, _CPU_PREFILL_BLOCK, BLOCK = 128, 256, 1024
_CPU_BLOCKS = 16  # of decoding, that one round of its loop reads: a round costs what some thousand keys cost


class _Partial(NamedTuple):
    """A softmax over some of the keys: exp(score - top) summed with the values, and alone; float32. T is left out where
    it is 1.
    """

    mixed_RKGTC: jax.Array
    total_RKGT: jax.Array
    top_RKGT: jax.Array


def write_and_attend(
    q_RTHC: jax.Array,
    k_RTKC: jax.Array,
    v_RTKC: jax.Array,
    cache: KeysValues,
    start_R: jax.Array,
    slot_R: jax.Array | None = None,
    window: int | None = None,
) -> tuple[jax.Array, KeysValues]:
    """Writes the keys and values of R rows at positions start, start + 1, ... of their slots; then token t of a row
    attends to the positions 0..start + t of its slot, with a window to so many of them at most, the last ->
    (mixed_RTHC in the dtype of `q`, the cache).

    start_R, slot_R: int32. Without slots, row b is slot b. What would stand at a position >= S is not written; a row of
    a slot >= B, or one that starts at a position >= S, writes and reads nothing, and mixes zeros. Donate the cache to
    update it in place.
    """
    if window is not None and window >= cache[0].shape[2]:
        window = None
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        mixed_RTHC, *updated = _local((), window, q_RTHC, k_RTKC, v_RTKC, *cache, start_R, slot_R)
        return mixed_RTHC, (updated[0], updated[1])
    kept = spec(cache[0].shape, CACHE_AXES, mesh, "serve")
    slots, heads = kept[0] or (), kept[1]
    rows = kept[0] if slot_R is None else None  # the rows of a prefill are on every device
    new, row = PartitionSpec(rows, None, heads, None), PartitionSpec(rows)
    mixed_RTHC, *updated = jax.shard_map(
        partial(_local, slots, window),
        in_specs=(new, new, new, kept, kept, row, None if slot_R is None else row),
        out_specs=(new, kept, kept),
        check_vma=False,
    )(q_RTHC, k_RTKC, v_RTKC, *cache, start_R, slot_R)
    return mixed_RTHC, (updated[0], updated[1])


def copy_positions(cache_BKSC: jax.Array, source_R, target_R, first, size: int, stop_R) -> jax.Array:
    """The cache (keys or values of a layer) with `size` positions from `first` on copied from slots to others, for the
    rows whose `stop` lies beyond `first`. All are read before any is written; targets >= B go nowhere.
    """
    _, K, _, C = cache_BKSC.shape
    read = lambda slot: jax.lax.dynamic_slice(cache_BKSC, (slot, 0, first, 0), (1, K, size, C))[0]
    piece_RKTC = jax.vmap(read)(source_R)
    target_R = jnp.where(first < stop_R, target_R, cache_BKSC.shape[0])
    first_R = jnp.broadcast_to(first, target_R.shape)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _write(cache_BKSC, piece_RKTC, *_here((), target_R, first_R, cache_BKSC), first_R)
    kept = spec(cache_BKSC.shape, CACHE_AXES, mesh, "serve")

    def local(cache_BKSC, piece_RKTC, target_R, first_R):
        return _write(cache_BKSC, piece_RKTC, *_here(kept[0] or (), target_R, first_R, cache_BKSC), first_R)

    rows, whole = PartitionSpec(None, kept[1]), PartitionSpec()
    put = jax.shard_map(local, in_specs=(kept, rows, whole, whole), out_specs=kept, check_vma=False)
    return put(cache_BKSC, piece_RKTC, target_R, first_R)


def _here(slot_axes: tuple[str, ...], slot_R, start_R, cache_BKSC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(numbers of the slots among this device's, any for a row that is not here; whether a row is here)."""
    B, _, S, _ = cache_BKSC.shape
    slot_R = slot_R - (jax.lax.axis_index(slot_axes) * B if slot_axes else 0)
    return jnp.clip(slot_R, 0, B - 1), (slot_R >= 0) & (slot_R < B) & (start_R < S)


def _local(
    slot_axes: tuple[str, ...], window: int | None, q_RTHC, k_RTKC, v_RTKC, keys_BKSC, values_BKSC, start_R, slot_R
):
    """`write_and_attend` on one device, whose slots are a part of all by the mesh's `slot_axes`."""
    (R, T, H, C), (B, K, S, _) = q_RTHC.shape, keys_BKSC.shape
    q_RKGTC = (q_RTHC * C**-0.5).reshape(R, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    k_RKTC, v_RKTC = (x.transpose(0, 2, 1, 3) for x in (k_RTKC, v_RTKC))
    is_decoding = slot_R is None
    if is_decoding:
        is_here_R, slot_R = start_R < S, jnp.arange(B)
        put = lambda old_BKSC, new_BKTC: old_BKSC.at[slot_R[:, None], jnp.arange(K), start_R[:, None]].set(
            new_BKTC[:, :, 0], mode="drop"
        )
        keys_BKSC, values_BKSC = put(keys_BKSC, k_RKTC), put(values_BKSC, v_RKTC)
        attend = attend_slots
    else:
        slot_R, is_here_R = _here(slot_axes, slot_R, start_R, keys_BKSC)
        put = lambda old_BKSC, new_RKTC: _write(old_BKSC, new_RKTC, slot_R, is_here_R, start_R)
        keys_BKSC, values_BKSC = put(keys_BKSC, k_RKTC), put(values_BKSC, v_RKTC)
        attend = attend_rows
    length_RT = jnp.where(is_here_R[:, None], start_R[:, None] + 1 + jnp.arange(T), 0)
    mixed_RKGTC = attend(q_RKGTC, keys_BKSC, values_BKSC, slot_R, length_RT, window)
    mixed_RTHC = mixed_RKGTC.transpose(0, 3, 1, 2, 4).reshape(R, T, H, C).astype(q_RTHC.dtype)
    if slot_axes and not is_decoding:
        mixed_RTHC = jax.lax.psum(mixed_RTHC, slot_axes)  # zeros but on the device that has the slot
    return mixed_RTHC, keys_BKSC, values_BKSC


def _write(old_BKSC: jax.Array, new_RKTC: jax.Array, slot_R, is_here_R, start_R) -> jax.Array:
    """The cache with the rows written, one window of positions after the other. A window that would pass the end begins
    early; what it has before the row's start, and all of it for a row that is not here, is written as it was.
    """
    (K, T, C), S = new_RKTC.shape[1:], old_BKSC.shape[2]
    W = min(T, S)

    def one(r: jax.Array, cache_BKSC: jax.Array) -> jax.Array:
        first = jnp.clip(start_R[r], 0, S - W)
        index_W = first + jnp.arange(W)
        at = (slot_R[r], 0, first, 0)
        padded = jnp.pad(new_RKTC[r], [(0, 0), (W, 0), (0, 0)])
        new_KWC = jax.lax.dynamic_slice_in_dim(padded, W + first - start_R[r], W, axis=1)
        kept_KWC = jax.lax.dynamic_slice(cache_BKSC, at, (1, K, W, C))[0]
        is_new_W = is_here_R[r] & (index_W >= start_R[r])
        return jax.lax.dynamic_update_slice(cache_BKSC, jnp.where(is_new_W[:, None], new_KWC, kept_KWC)[None], at)

    return jax.lax.fori_loop(0, len(slot_R), one, old_BKSC)


def by_row(block: int, q_RKGTC, keys_BKSC, values_BKSC, slot_R, length_RT, window: int | None = None) -> jax.Array:
    """Every row reads the blocks of its own slot, those of its window, up to its own length -> mixed_RKGTC, float32."""
    (R, K, _, _, C), S = q_RKGTC.shape, keys_BKSC.shape[2]
    block = min(block, S)

    def row(r: jax.Array, mixed_RKGTC: jax.Array) -> jax.Array:
        q_1KGTC, length_1T = (jax.lax.dynamic_slice_in_dim(x, r, 1) for x in (q_RKGTC, length_RT))

        def read(x_BKSC: jax.Array, first: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(x_BKSC, (slot_R[r], 0, first, 0), (1, K, block, C))

        mixed_1KGTC = _blocks(
            q_1KGTC, partial(read, keys_BKSC), partial(read, values_BKSC), length_1T, block, S, window
        )
        return jax.lax.dynamic_update_slice_in_dim(mixed_RKGTC, mixed_1KGTC, r, axis=0)

    return jax.lax.fori_loop(0, R, row, jnp.zeros(q_RKGTC.shape, jnp.float32))


def _listed_blocks(q_BKGTC, keys_BKSC, values_BKSC, slot_B, length_BT, window: int | None = None) -> jax.Array:
    """Row b reads slot b, T = 1; W listed blocks hold those of all rows, `_CPU_BLOCKS` of which are read at once ->
    mixed_BKGTC, float32.

    A row's blocks are merged in their order, whatever is read beside them: no neighbour changes a bit of it.
    """
    (B, K, G, _, C), S = q_BKGTC.shape, keys_BKSC.shape[2]
    block, most = min(_CPU_BLOCK, S), B * -(-S // _CPU_BLOCK)
    if window is not None:
        most = B * min(-(-S // _CPU_BLOCK), -(-(window - 1) // block) + 1)
    N = min(_CPU_BLOCKS, most)
    q_BKGC, length_B, W = q_BKGTC[:, :, :, 0], length_BT[:, 0], -(-most // N) * N
    begin_B = _first_seen(length_B, window)
    blocks_B = -(-length_B // block) - begin_B // block
    stop_B = jnp.cumsum(blocks_B)
    row_W = jnp.sum(jnp.arange(W)[:, None] >= stop_B, axis=1, dtype=jnp.int32)  # B: no block
    row_or_last_W = jnp.minimum(row_W, B - 1)
    first_W = (jnp.arange(W) - (stop_B - blocks_B - begin_B // block)[row_or_last_W]) * block
    rounds = -(-stop_B[-1] // N)
    of_round = lambda x_W, n: jax.lax.dynamic_slice_in_dim(x_W, n * N, N)

    def score(n: jax.Array, scored: tuple[_Partial, jax.Array]) -> tuple[_Partial, jax.Array]:
        parts_W, top_BKG = scored
        row_N, first_N = of_round(row_or_last_W, n), of_round(first_W, n)
        start_N = jnp.minimum(first_N, S - block)  # the last block may begin early: what it repeats is hidden

        def read(x_BKSC: jax.Array) -> jax.Array:
            one = lambda row, start: jax.lax.dynamic_slice(x_BKSC, (row, 0, start, 0), (1, K, block, C))[0]
            return jax.vmap(one)(row_N, start_N)

        keys_NKSC, values_NKSC = read(keys_BKSC), read(values_BKSC)
        index_NS = start_N[:, None] + jnp.arange(block)
        begin_N = jnp.maximum(first_N, begin_B[row_N])
        visible_NS = (index_NS >= begin_N[:, None]) & (index_NS < length_B[row_N][:, None])
        scores = jnp.einsum("nkgc,nksc->nkgs", q_BKGC[row_N], keys_NKSC, preferred_element_type=jnp.float32)
        scores_NKGS = jnp.where(visible_NS[:, None, None], scores, _MIN)
        top_NKG = jnp.max(scores_NKGS, axis=-1)
        weights_NKGS = jnp.exp(scores_NKGS - top_NKG[..., None])  # a listed block has a key that is seen
        mixed_NKGC = jnp.einsum(
            "nkgs,nksc->nkgc", weights_NKGS.astype(values_NKSC.dtype), values_NKSC, preferred_element_type=jnp.float32
        )
        put = lambda old_W, new_N: jax.lax.dynamic_update_slice_in_dim(old_W, new_N, n * N, axis=0)
        parts_W = jax.tree.map(put, parts_W, _Partial(mixed_NKGC, jnp.sum(weights_NKGS, axis=-1), top_NKG))
        return parts_W, top_BKG.at[of_round(row_W, n)].max(top_NKG, mode="drop")

    def merge(n: jax.Array, merged: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mixed_N, total_N, top_N = (of_round(x_W, n) for x_W in parts_W)
        weight_NKG = jnp.exp(top_N - top_BKG[of_round(row_or_last_W, n)])
        add = lambda sum_B, new_N: sum_B.at[of_round(row_W, n)].add(new_N, mode="drop")
        return add(merged[0], mixed_N * weight_NKG[..., None]), add(merged[1], total_N * weight_NKG)

    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    parts_W = _Partial(zeros(W, K, G, C), zeros(W, K, G), zeros(W, K, G))
    parts_W, top_BKG = jax.lax.fori_loop(0, rounds, score, (parts_W, jnp.full((B, K, G), _MIN)))
    mixed_BKGC, total_BKG = jax.lax.fori_loop(0, rounds, merge, (zeros(B, K, G, C), zeros(B, K, G)))
    return (mixed_BKGC / jnp.where(total_BKG > 0, total_BKG, 1.0)[..., None])[:, :, :, None]


def _first_seen(length: jax.Array, window: int | None) -> jax.Array:
    """The first of so many keys that the last of them sees."""
    return jnp.zeros_like(length) if window is None else jnp.maximum(length - window, 0)


def attend_slots(q_BKGTC, keys_BKSC, values_BKSC, slot_B, length_BT, window: int | None = None) -> jax.Array:
    """Row b, one token, reads slot b in the form that the platform has for these shapes -> mixed_BKGTC, float32."""
    forms: dict[str, Any] = {"cpu": _listed_blocks, "default": attend_all_slots}
    if window is None and cache_kernels.fits_tpu(q_BKGTC, keys_BKSC):
        forms["tpu"] = lambda *arrays, window: cache_kernels.attend_tpu(*arrays)
    if cache_kernels.fits_gpu(q_BKGTC, keys_BKSC):
        forms["cuda"] = cache_kernels.attend_gpu
    forms = {platform: partial(attend, window=window) for platform, attend in forms.items()}
    return jax.lax.platform_dependent(q_BKGTC, keys_BKSC, values_BKSC, slot_B, length_BT, **forms)


def attend_rows(q_RKGTC, keys_BKSC, values_BKSC, slot_R, length_RT, window: int | None = None) -> jax.Array:
    """Row r, some tokens, each of which sees one key more than the one before it, reads slot `slot_R[r]` in the form
    that the platform has for these shapes -> mixed_RKGTC, float32.
    """
    forms: dict[str, Any] = {"cpu": partial(by_row, _CPU_PREFILL_BLOCK), "default": partial(by_row, BLOCK)}
    if cache_kernels.fits_gpu(q_RKGTC, keys_BKSC):
        forms["cuda"] = cache_kernels.attend_gpu
    forms = {platform: partial(attend, window=window) for platform, attend in forms.items()}
    return jax.lax.platform_dependent(q_RKGTC, keys_BKSC, values_BKSC, slot_R, length_RT, **forms)


def attend_all_slots(q_BKGTC, keys_BKSC, values_BKSC, slot_B, length_BT, window: int | None = None) -> jax.Array:
    """Row b reads slot b; all read the blocks from the first to the last that any sees -> mixed_BKGTC, float32."""
    S = keys_BKSC.shape[2]
    block = min(BLOCK, S)
    read = lambda x_BKSC, first: jax.lax.dynamic_slice_in_dim(x_BKSC, first, block, axis=2)
    return _blocks(q_BKGTC, partial(read, keys_BKSC), partial(read, values_BKSC), length_BT, block, S, window)


def _blocks(q_RKGTC, keys_from, values_from, length_RT, block: int, S: int, window: int | None) -> jax.Array:
    """Softmax over the first `length_RT` of S keys, or the last of these that a window has, read as `keys_from(first)`,
    [R, K, block, C].
    """
    R, K, G, T, C = q_RKGTC.shape
    q_RKQC = q_RKGTC.reshape(R, K, G * T, C)  # each kv head is one plain matrix product
    shape = (R, K, G, T)
    nothing = _Partial(jnp.zeros((*shape, C), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, _MIN))
    begin_RT = _first_seen(length_RT, window)
    lowest = jnp.min(jnp.where(length_RT > 0, begin_RT, S))

    def add(n: jax.Array, before: _Partial) -> _Partial:
        first = jnp.minimum(n * block, S - block)  # the last block may begin early: what it repeats is hidden
        index_S = first + jnp.arange(block)
        begin_RT1 = jnp.maximum(n * block, begin_RT)[..., None]
        visible_RTS = (index_S >= begin_RT1) & (index_S < length_RT[..., None])
        keys_RKSC, values_RKSC = keys_from(first), values_from(first)
        scores = jnp.einsum("rkqc,rksc->rkqs", q_RKQC, keys_RKSC, preferred_element_type=jnp.float32)
        scores_RKGTS = jnp.where(visible_RTS[:, None, None], scores.reshape(*shape, block), _MIN)
        top_RKGT = jnp.maximum(before.top_RKGT, jnp.max(scores_RKGTS, axis=-1))
        # A block that is hidden whole from a query that has seen nothing yet must not weigh exp(0) = 1.
        weights_RKGTS = jnp.where(visible_RTS[:, None, None], jnp.exp(scores_RKGTS - top_RKGT[..., None]), 0.0)
        weights = weights_RKGTS.astype(values_RKSC.dtype).reshape(R, K, G * T, block)
        mixed = jnp.einsum("rkqs,rksc->rkqc", weights, values_RKSC, preferred_element_type=jnp.float32)
        of_before = jnp.exp(before.top_RKGT - top_RKGT)
        return _Partial(
            before.mixed_RKGTC * of_before[..., None] + mixed.reshape(*shape, C),
            before.total_RKGT * of_before + jnp.sum(weights_RKGTS, axis=-1),
            top_RKGT,
        )

    softmax = jax.lax.fori_loop(lowest // block, -(-jnp.max(length_RT) // block), add, nothing)
    total_RKGT = jnp.where(softmax.total_RKGT > 0, softmax.total_RKGT, 1.0)
    return softmax.mixed_RKGTC / total_RKGT[..., None]
