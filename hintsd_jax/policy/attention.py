"""Attention of grouped queries over keys, and rotary positions. Projected heads flow in, mixed values flow out.

Invariant: a query sees keys at its own position and before it, nothing else; softmax and rotary angles are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Cosine and sine of the rotary angles, float32, [B or 1, T, C / 2]; made once and shared by all layers."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BT: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Rotary angles position * theta^(-2i/C), i < C/2 (RoFormer, arXiv:2104.09864), in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x_BTHC: jax.Array, by: Rotation) -> jax.Array:
    """Turns the pairs (i, i + C/2) of every head, the half-split layout of Hugging Face checkpoints. Keeps the dtype."""
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHC.dtype)


def attend(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, last_BT: jax.Array) -> jax.Array:
    """Softmax attention of H query heads over K key-value heads (H a multiple of K; head h reads h // (H / K)).

    `last_BT`, int [B or 1, T], is the last key index that each query sees. Returns [B, T, H, C] in the dtype of `q`.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    # The query heads of a group are stacked along T, so that each kv head is one plain matrix product. On CPU this form
    # took 0.75 of the time of the five-letter einsum (forward and backward, T 128-512).
    q_BKGTC = (q_BTHC * C**-0.5).reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    k_BKSC, v_BKSC = k_BSKC.transpose(0, 2, 1, 3), v_BSKC.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bkqc,bksc->bkqs", q_BKGTC.reshape(B, K, -1, C), k_BKSC, preferred_element_type=jnp.float32)
    seen_BTS = jnp.arange(S) <= last_BT[..., None]
    # A large finite number, not -inf: a row whose every key were hidden would give NaN gradients.
    logits_BKGTS = jnp.where(seen_BTS[:, None, None], logits.reshape(B, K, -1, T, S), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BKSC.dtype).reshape(B, K, -1, S)
    mixed_BKGTC = jnp.einsum("bkqs,bksc->bkqc", weights, v_BKSC).reshape(B, K, -1, T, C)
    return mixed_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


def attend_causal(q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array) -> jax.Array:
    """`attend` within one sequence: query t sees keys 0..t.

    Blocks of queries read only the keys up to their own end, so that half of the T x T square is never computed: on CPU 0.5
    of the time of the whole square at T = 512. At most 8 blocks, because they are unrolled into the program, and none below 256
    queries, where they save no time but double that of compiling.
    """
    T = q_BTHC.shape[1]
    size = max(256, -(-T // 8))
    blocks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        last_BT = jnp.arange(start, stop)[None]
        blocks.append(attend(q_BTHC[:, start:stop], k_BTKC[:, :stop], v_BTKC[:, :stop], last_BT))
    return jnp.concatenate(blocks, axis=1)
