# SPDX-License-Identifier: Apache-2.0

"""Causal attention of whole rows in square tiles, in plain JAX with a backward pass of its own: heads flow in, mixed
values flow out.

As in flash attention (arXiv:2205.14135, 2307.08691): the scores of one tile exist at a time, those above the diagonal
never; a running maximum and sum make the softmax; the backward pass makes a tile's weights again from what the forward
pass keeps of each query, its mixed values and its log-sum-exp.

Invariant: a query attends to itself and to the keys before it; what comes after it changes no bit of its result.

Letters: N tiles along a row, Q tokens of a tile, R = G x Q rows of a matrix product: the queries of the G heads that
read one kv head.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

_MIN = jnp.finfo(jnp.float32).min

_scores = partial(jnp.einsum, "bkrc,bksc->bkrs", preferred_element_type=jnp.float32)
_weighted = partial(jnp.einsum, "bkrs,bksc->bkrc", preferred_element_type=jnp.float32)
_to_keys = partial(jnp.einsum, "bkrs,bkrc->bksc", preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_causal(q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, largest: int) -> jax.Array:
    """As `attention.attend_causal`, in tiles of up to `largest` x `largest`; any T, H a multiple of K."""
    return _forward(q_BTHC, k_BTKC, v_BTKC, largest)[0]


def _forward(q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, largest: int):
    T, K = k_BTKC.shape[1:3]
    Q = _tile(T, largest)
    q_NBKRC = _tiles(q_BTHC * q_BTHC.shape[-1] ** -0.5, K, Q)
    k_NBKQC, v_NBKQC = _tiles(k_BTKC, K, Q), _tiles(v_BTKC, K, Q)
    shape = q_NBKRC.shape[1:]

    def of_queries(_, inputs):
        n, q_BKRC = inputs

        def add(m, softmax, visible_RQ=None):
            mixed_BKRC, total_BKR, top_BKR = softmax
            k_BKQC, v_BKQC = k_NBKQC[m], v_NBKQC[m]
            scores_BKRQ = _masked(_scores(q_BKRC, k_BKQC), visible_RQ)
            new_BKR = jnp.maximum(top_BKR, jnp.max(scores_BKRQ, axis=-1))
            weights_BKRQ, scale_BKR = jnp.exp(scores_BKRQ - new_BKR[..., None]), jnp.exp(top_BKR - new_BKR)
            mixed_BKRC = mixed_BKRC * scale_BKR[..., None] + _weighted(weights_BKRQ.astype(v_BKQC.dtype), v_BKQC)
            return mixed_BKRC, total_BKR * scale_BKR + jnp.sum(weights_BKRQ, axis=-1), new_BKR

        nothing = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:-1], jnp.float32), jnp.full(shape[:-1], _MIN)
        softmax = jax.lax.fori_loop(0, n, add, nothing)
        mixed_BKRC, total_BKR, top_BKR = add(n, softmax, _diagonal(shape[2], Q))
        return None, ((mixed_BKRC / total_BKR[..., None]).astype(q_BKRC.dtype), top_BKR + jnp.log(total_BKR))

    _, (mixed_NBKRC, lse_NBKR) = jax.lax.scan(of_queries, None, (jnp.arange(q_NBKRC.shape[0]), q_NBKRC))
    mixed_BTHC = _row(mixed_NBKRC, Q, T)
    return mixed_BTHC, (q_BTHC, k_BTKC, v_BTKC, mixed_BTHC, lse_NBKR)


def _backward(largest: int, kept, pull_BTHC: jax.Array):
    """With weights p = exp(score - lse), pulled p' = pull v^T, and what a query's row of the softmax' Jacobian takes
    off, pull . mixed: score' = p (p' - pull . mixed).
    """
    q_BTHC, k_BTKC, v_BTKC, mixed_BTHC, lse_NBKR = kept
    (T, K), C = k_BTKC.shape[1:3], q_BTHC.shape[-1]
    Q = _tile(T, largest)
    q_NBKRC = _tiles(q_BTHC * C**-0.5, K, Q)
    k_NBKQC, v_NBKQC, pull_NBKRC = _tiles(k_BTKC, K, Q), _tiles(v_BTKC, K, Q), _tiles(pull_BTHC, K, Q)
    taken_BTH1 = jnp.einsum("bthc,bthc->bth", pull_BTHC, mixed_BTHC, preferred_element_type=jnp.float32)[..., None]
    taken_NBKR = _tiles(taken_BTH1, K, Q)[..., 0]

    def of_queries(grads, inputs):
        n, q_BKRC, pull_BKRC, lse_BKR, taken_BKR = inputs

        def add(m, grads, visible_RQ=None):
            dq_BKRC, dk_NBKQC, dv_NBKQC = grads
            k_BKQC, v_BKQC = k_NBKQC[m], v_NBKQC[m]
            weights_BKRQ = jnp.exp(_masked(_scores(q_BKRC, k_BKQC), visible_RQ) - lse_BKR[..., None])
            ds_BKRQ = (weights_BKRQ * (_scores(pull_BKRC, v_BKQC) - taken_BKR[..., None])).astype(q_BKRC.dtype)
            dk_NBKQC = dk_NBKQC.at[m].add(_to_keys(ds_BKRQ, q_BKRC))
            dv_NBKQC = dv_NBKQC.at[m].add(_to_keys(weights_BKRQ.astype(pull_BKRC.dtype), pull_BKRC))
            return dq_BKRC + _weighted(ds_BKRQ, k_BKQC), dk_NBKQC, dv_NBKQC

        grads = jax.lax.fori_loop(0, n, add, (jnp.zeros(q_BKRC.shape, jnp.float32), *grads))
        dq_BKRC, *grads = add(n, grads, _diagonal(q_BKRC.shape[2], Q))
        return tuple(grads), dq_BKRC

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_NBKQC, v_NBKQC))
    inputs = (jnp.arange(q_NBKRC.shape[0]), q_NBKRC, pull_NBKRC, lse_NBKR, taken_NBKR)
    (dk_NBKQC, dv_NBKQC), dq_NBKRC = jax.lax.scan(of_queries, nothing, inputs)
    grads = (_row(dq_NBKRC, Q, T) * C**-0.5, _row(dk_NBKQC, Q, T), _row(dv_NBKQC, Q, T))
    return tuple(grad.astype(x.dtype) for grad, x in zip(grads, kept, strict=False))


attend_causal.defvjp(_forward, _backward)


def _tile(T: int, largest: int) -> int:
    """The tokens of each of as many equal tiles as a row needs, in whole 8."""
    return 8 * -(-T // (8 * -(-T // largest)))


def _tiles(x_BTHC: jax.Array, kv_heads: int, Q: int) -> jax.Array:
    """A row's tiles one behind the other, padded with zeros: [N, B, K, G * Q, C] (head h reads kv head h // G)."""
    B, T, H, C = x_BTHC.shape
    N, G = -(-T // Q), H // kv_heads
    x_BTHC = jnp.pad(x_BTHC, [(0, 0), (0, N * Q - T), (0, 0), (0, 0)])
    return x_BTHC.reshape(B, N, Q, kv_heads, G, C).transpose(1, 0, 3, 4, 2, 5).reshape(N, B, kv_heads, G * Q, C)


def _row(x_NBKRC: jax.Array, Q: int, T: int) -> jax.Array:
    """The inverse of `_tiles`."""
    N, B, K, R, C = x_NBKRC.shape
    x_BNQKGC = x_NBKRC.reshape(N, B, K, R // Q, Q, C).transpose(1, 0, 4, 2, 3, 5)
    return x_BNQKGC.reshape(B, N * Q, K * (R // Q), C)[:, :T]


def _diagonal(rows: int, Q: int) -> jax.Array:
    """Which keys of its own tile a query sees, [G * Q, Q]."""
    return jnp.tile(jnp.tri(Q, dtype=bool), (rows // Q, 1))


def _masked(scores_BKRQ: jax.Array, visible_RQ: jax.Array | None) -> jax.Array:
    return scores_BKRQ if visible_RQ is None else jnp.where(visible_RQ, scores_BKRQ, _MIN)
