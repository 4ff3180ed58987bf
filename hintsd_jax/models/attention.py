# SPDX-License-Identifier: Apache-2.0

"""Attention of grouped queries over keys: projected, rotated heads flow in, mixed values flow out.

Two ways to attend: `attend_causal` within a row (training), `attend_past` to a prefix of past keys and to one's own
branch (in `attend_branches`, the teacher); a cache has a module of its own (`cached_attention`). Each scores a stretch
of keys at a time, and stretches are merged by log-sum-exp as in flash attention (arXiv:2205.14135), so that no T x T
array of all heads exists.

A row holds one sequence, or several one behind the other: then `first_BT`, int32, is the index at which the sequence of
each token begins. In a layer with a window a token sees itself and so many tokens before it.

Invariants: a query attends to the keys that its mask names, nothing else; a stretch that is hidden from it changes no
bit of its result; the softmax is float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hintsd_jax.models import cudnn, splash, tiled

_MIN = jnp.finfo(jnp.float32).min  # finite: a row whose every key is hidden must give no NaN
KEY_BLOCK = 1024  # keys of a trunk that are read at once
_TILE = 512  # queries, and keys, whose scores exist at once in a row that attends to itself: 34 MB for 32 heads


class Branches(NamedTuple):
    """Which keys the tokens of branches may attend to; M tokens in a row, some branches one behind the other.

    prefix_start_BM, prefix_stop_BM: int32, those of the trunk's keys that lie in [start, stop). branch_id_BM: int32,
    the branch a token belongs to (-1: padding); it also attends to the earlier tokens of its own branch, and to itself.
    """

    prefix_start_BM: jax.Array
    prefix_stop_BM: jax.Array
    branch_id_BM: jax.Array


class Window(NamedTuple):
    """keys: how many a token sees at most, itself included. acts: whether this layer has the window, bool; layers of
    one scan differ in it.
    """

    keys: int
    acts: jax.Array


class _Partial(NamedTuple):
    """A softmax over some of the keys: exp(score - top) summed with the values, and alone; float32."""

    mixed_BKGTC: jax.Array
    total_BKGT: jax.Array
    top_BKGT: jax.Array


def _grouped(q_BTHC: jax.Array, kv_heads: int) -> jax.Array:
    """Query heads by the kv head that they read (head h reads h // G), scaled by 1/sqrt(C): [B, K, G, T, C]."""
    B, T, H, C = q_BTHC.shape
    return (q_BTHC * C**-0.5).reshape(B, T, kv_heads, H // kv_heads, C).transpose(0, 2, 3, 1, 4)


def _ungrouped(mixed_BKGTC: jax.Array, dtype) -> jax.Array:
    B, K, G, T, C = mixed_BKGTC.shape
    return mixed_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, C).astype(dtype)


def _scores(q_BKGTC: jax.Array, k_BSKC: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    # The query heads of a group are stacked along T, so that each kv head is one plain matrix product. On CPU this form
    # took 0.75 of the time of the five-letter einsum (forward and backward, T 128-512).
    B, K, G, T, C = q_BKGTC.shape
    scores = jnp.einsum(
        "bkqc,bksc->bkqs",
        q_BKGTC.reshape(B, K, G * T, C),
        k_BSKC.transpose(0, 2, 1, 3),
        preferred_element_type=jnp.float32,
    )
    return jnp.where(visible_BTS[:, None, None], scores.reshape(B, K, G, T, -1), _MIN)


def _mix(weights_BKGTS: jax.Array, v_BSKC: jax.Array, dtype=None) -> jax.Array:
    B, K, G, T, S = weights_BKGTS.shape
    weights = weights_BKGTS.astype(v_BSKC.dtype).reshape(B, K, G * T, S)
    mixed = jnp.einsum("bkqs,bksc->bkqc", weights, v_BSKC.transpose(0, 2, 1, 3), preferred_element_type=dtype)
    return mixed.reshape(B, K, G, T, -1)


def attend(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Softmax attention of H query heads over K key-value heads (H a multiple of K), all keys at once.

    `visible_BTS`, bool [B or 1, T, S]: the keys that a query attends to. Returns [B, T, H, C] in the dtype of `q`.
    """
    weights_BKGTS = jax.nn.softmax(_scores(_grouped(q_BTHC, k_BSKC.shape[2]), k_BSKC, visible_BTS), axis=-1)
    return _ungrouped(_mix(weights_BKGTS, v_BSKC), q_BTHC.dtype)


def _partial(q_BKGTC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, visible_BTS: jax.Array) -> _Partial:
    scores_BKGTS = _scores(q_BKGTC, k_BSKC, visible_BTS)
    top_BKGT = jnp.max(scores_BKGTS, axis=-1)
    weights_BKGTS = jnp.exp(scores_BKGTS - top_BKGT[..., None])
    return _Partial(_mix(weights_BKGTS, v_BSKC, jnp.float32), jnp.sum(weights_BKGTS, axis=-1), top_BKGT)


def _merge(a: _Partial, b: _Partial) -> _Partial:
    """The softmax over the keys of both. A part that was hidden has the lowest top and is weighed by exactly zero."""
    top = jnp.maximum(a.top_BKGT, b.top_BKGT)
    of_a, of_b = jnp.exp(a.top_BKGT - top), jnp.exp(b.top_BKGT - top)
    mixed = a.mixed_BKGTC * of_a[..., None] + b.mixed_BKGTC * of_b[..., None]
    return _Partial(mixed, a.total_BKGT * of_a + b.total_BKGT * of_b, top)


def _attend_prefix(
    q_BKGTC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, start_BT: jax.Array, stop_BT: jax.Array
) -> _Partial:
    """Queries that attend to the keys [start, stop). Blocks of keys before and beyond those of all are not even read.
    Not differentiable in reverse (the number of blocks is a value).
    """
    S, shape = k_BSKC.shape[1], q_BKGTC.shape
    nothing = _Partial(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:-1], jnp.float32), jnp.full(shape[:-1], _MIN))
    within = lambda index_S: (index_S >= start_BT[..., None]) & (index_S < stop_BT[..., None])
    first, last = jnp.min(jnp.where(start_BT < stop_BT, start_BT, S)), jnp.max(stop_BT)
    if S <= 2 * KEY_BLOCK:
        whole = lambda: _partial(q_BKGTC, k_BSKC, v_BSKC, within(jnp.arange(S)))
        return jax.lax.cond(first < last, whole, lambda: nothing)

    def add(n: jax.Array, total: _Partial) -> _Partial:
        start = jnp.minimum(n * KEY_BLOCK, S - KEY_BLOCK)  # the last block may begin early: what it repeats is hidden
        index_S = start + jnp.arange(KEY_BLOCK)
        visible_BTS = (index_S >= n * KEY_BLOCK) & within(index_S)
        k, v = (jax.lax.dynamic_slice_in_dim(x, start, KEY_BLOCK, axis=1) for x in (k_BSKC, v_BSKC))
        return _merge(total, _partial(q_BKGTC, k, v, visible_BTS))

    return jax.lax.fori_loop(first // KEY_BLOCK, -(-last // KEY_BLOCK), add, nothing)


def _finish(softmax: _Partial, dtype) -> jax.Array:
    return _ungrouped(softmax.mixed_BKGTC / softmax.total_BKGT[..., None], dtype)


def attend_causal(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    first_BT: jax.Array | None = None,
    window: Window | None = None,
) -> jax.Array:
    """Attention within a row: query t attends to keys first..t, by default to 0..t, of these to the last of a window.
    Differentiable. In tiles (`tiled`), but long rows go through a kernel on TPU (`splash`) and, in 16 bits, without a
    window and with one sequence in a row, on GPU (`cudnn`).
    """
    if window is not None and window.keys >= q_BTHC.shape[1]:
        window = None
    seen_BT = _first_seen(first_BT, window, q_BTHC.shape[1])

    def in_tiles(largest: int, keep: bool = False) -> Any:
        return lambda q, k, v, first_BT, seen_BT: tiled.attend_causal(q, k, v, seen_BT, largest, keep)

    forms: dict[str, Any] = {"cpu": in_tiles(_cpu_tile(*q_BTHC.shape[:3]), keep=True), "default": in_tiles(_TILE)}
    if splash.fits(q_BTHC, k_BTKC):
        of_tpu = lambda keys: lambda q, k, v, first_BT, seen_BT: splash.attend_causal(q, k, v, first_BT, keys)
        forms["tpu"] = _by_layer(window, of_tpu(None), of_tpu(window and window.keys))
    if first_BT is None and cudnn.fits(q_BTHC, k_BTKC):
        of_gpu = lambda q, k, v, first_BT, seen_BT: cudnn.attend_causal(q, k, v, first_BT)
        forms["cuda"] = _by_layer(window, of_gpu, in_tiles(_TILE))
    return jax.lax.platform_dependent(q_BTHC, k_BTKC, v_BTKC, first_BT, seen_BT, **forms)


def _cpu_tile(B: int, T: int, H: int) -> int:
    """Where the scores of a tile, of all rows and heads, stay within 4 MiB, and so in a core's caches; and four or more
    tiles in a row, as half of those on the diagonal is for nothing (`benchmarks/causal_attention.py`).
    """
    return max([tile for tile in (128, 256) if B * H * tile**2 <= 2**20 and -(-T // tile) >= 4], default=64)


def _by_layer(window: Window | None, full: Any, windowed: Any) -> Any:
    """A kernel has one window, or none, for all layers of a scan: each layer chooses among two."""
    return full if window is None else lambda *arrays: jax.lax.cond(window.acts, windowed, full, *arrays)


def _first_seen(first_BT: jax.Array | None, window: Window | None, T: int) -> jax.Array | None:
    """The index of the first key that a query sees, [B or 1, T]; None where that is 0 for all."""
    if window is None:
        return first_BT
    begin_1T = jnp.where(window.acts, jnp.maximum(jnp.arange(T) - window.keys + 1, 0), 0)[None]
    return begin_1T if first_BT is None else jnp.maximum(first_BT, begin_1T)


def rows_may_be_packed(platform: str) -> bool:
    """Whether several sequences in a row cost no more than alone. Not on "gpu": what jax makes public of cuDNN's kernel
    knows no sequences within a row, and tiles take three times as long as it.
    """
    return platform != "gpu"


def attend_past(
    q_BMHC: jax.Array,
    k_BMKC: jax.Array,
    v_BMKC: jax.Array,
    past_k_BSKC: jax.Array,
    past_v_BSKC: jax.Array,
    branches: Branches,
    positions_BM: jax.Array | None = None,
    window: Window | None = None,
) -> jax.Array:
    """Branches after past keys: a token attends to a range of the S past keys, and to its own branch up to itself; in
    a layer with a window to the last of these, by its position (int32), which counts from the range's start. Not
    differentiable in reverse.
    """
    q_BKGMC = _grouped(q_BMHC, k_BMKC.shape[2])
    M, start_BM = q_BMHC.shape[1], branches.prefix_start_BM
    same_BMM = branches.branch_id_BM[:, :, None] == branches.branch_id_BM[:, None, :]
    visible_BMM = same_BMM & jnp.tri(M, dtype=bool)[None]
    if window is not None:
        assert positions_BM is not None  # by which a window reaches into the prefix
        is_far_MM = jnp.tri(M, k=-window.keys, dtype=bool)
        visible_BMM &= ~(window.acts & is_far_MM)[None]
        begin_BM = start_BM + jnp.maximum(positions_BM - window.keys + 1, 0)
        start_BM = jnp.where(window.acts, begin_BM, start_BM)
    own = _partial(q_BKGMC, k_BMKC, v_BMKC, visible_BMM)
    if past_k_BSKC.shape[1]:
        prefix = _attend_prefix(q_BKGMC, past_k_BSKC, past_v_BSKC, start_BM, branches.prefix_stop_BM)
        own = _merge(prefix, own)
    return _finish(own, q_BMHC.dtype)


def attend_branches(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    branches: Branches,
    first_BP: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    window: Window | None = None,
) -> jax.Array:
    """A trunk of P tokens and M branch tokens in one row of T = P + M. The trunk is causal (see `attend_causal`);
    branches attend to ranges of it (see `attend_past`). Not differentiable in reverse.
    """
    P = q_BTHC.shape[1] - branches.branch_id_BM.shape[1]
    q, k, v = q_BTHC[:, P:], k_BTKC[:, P:], v_BTKC[:, P:]
    positions_BM = None if positions_BT is None else positions_BT[:, P:]
    mixed_BMHC = attend_past(q, k, v, k_BTKC[:, :P], v_BTKC[:, :P], branches, positions_BM, window)
    if P == 0:
        return mixed_BMHC
    mixed_BPHC = attend_causal(q_BTHC[:, :P], k_BTKC[:, :P], v_BTKC[:, :P], first_BP, window)
    return jnp.concatenate([mixed_BPHC, mixed_BMHC], axis=1)
