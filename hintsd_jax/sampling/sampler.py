# SPDX-License-Identifier: Apache-2.0

"""One token per row from logits, with temperature, top-k and top-p as traced arrays: another temperature compiles
nothing.

A token is found by its place: the vocabulary is cut into some parts, one of them is drawn by its mass, and so on within
it. That takes a few random numbers a row, where the Gumbel-max trick takes one for each of up to 151,936 tokens and
then the largest of all, which on CPU was half of a step of a small model.

Invariant: a row's token depends on its own logits, key and parameters only, bit by bit.

Letters: X tokens that are left, N parts of C tokens each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hintsd_jax.models.sampling_distribution import lowest_kept

_FEW = 128  # tokens, of which one is drawn at once


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws a token for each row.

    Args:
      logits_BV: float32.
      keys_B: typed PRNG keys, one a row.
      temperature_B: 0 takes the most likely token.
      top_p_B, top_k_B: which tokens may come, see `sampling_distribution.lowest_kept`; int32 the second.

    Returns:
      (tokens_B int32, logprobs_B float32): the log-prob is that of the distribution which the token was drawn from;
      where the temperature is 0, the policy's own at temperature 1, unfiltered.
    """
    warm_B = temperature_B > 0
    scaled_BV = logits_BV / jnp.where(warm_B, temperature_B, 1.0)[:, None]
    filtering = jnp.any(warm_B & ((top_p_B < 1.0) | (top_k_B > 0)))
    all_kept = lambda scaled_BV, *_: jnp.full_like(scaled_BV[:, 0], -jnp.inf)
    lowest_B = jax.lax.cond(filtering, lowest_kept, all_kept, scaled_BV, top_p_B, top_k_B)
    lowest_B = jnp.where(warm_B, lowest_B, -jnp.inf)
    left_BX = jnp.where(scaled_BV >= lowest_B[:, None], scaled_BV, -jnp.inf)

    sizes = _sizes(left_BX.shape[1])
    uniform_BL = jax.vmap(lambda key: jax.random.uniform(key, (len(sizes),)))(keys_B)
    top_B = jnp.max(left_BX, axis=-1)
    total_B = jnp.sum(jnp.exp(left_BX - top_B[:, None]), axis=-1)
    token_B = jnp.zeros(left_BX.shape[0], jnp.int32)
    for N, uniform_B in zip(sizes, uniform_BL.T, strict=True):
        C = -(-left_BX.shape[1] // N)
        padded_BX = jnp.pad(left_BX, [(0, 0), (0, N * C - left_BX.shape[1])], constant_values=-jnp.inf)
        left_BNC = padded_BX.reshape(-1, N, C)
        chosen_B = jnp.where(warm_B, _drawn(left_BNC, top_B, uniform_B), _first_with_top(left_BNC, top_B))
        is_chosen_BN = jnp.arange(N) == chosen_B[:, None]
        # Not by a gather: where the vocabulary lies on several devices, each has its part of this.
        left_BX = jnp.max(jnp.where(is_chosen_BN[..., None], left_BNC, -jnp.inf), axis=1)
        token_B += chosen_B * C
    return token_B, left_BX[:, 0] - top_B - jnp.log(total_B)


def _sizes(tokens: int) -> list[int]:
    """Into how many parts what is left is cut, time after time, until one token is left.

    A power of two that divides the vocabulary, so that parts lie on devices as the vocabulary does; later, when few
    tokens are left, they are padded.
    """
    sizes = []
    while tokens > _FEW:
        divisor = min(tokens & -tokens, _FEW)
        sizes.append(divisor if divisor >= 16 else 64)
        tokens = -(-tokens // sizes[-1])
    return [*sizes, tokens]


def _drawn(left_BNC: jax.Array, top_B: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """A part, as likely as its tokens together; one without mass never comes."""
    mass_BN = jnp.sum(jnp.exp(left_BNC - top_B[:, None, None]), axis=-1)
    # Sums may be rounded so that a later one is smaller: the largest of those that may come is the whole.
    stop_BN = jnp.where(mass_BN > 0, jnp.cumsum(mass_BN, axis=-1), 0.0)
    target_B = uniform_B * jnp.max(stop_BN, axis=-1)
    return jnp.argmax(stop_BN > target_B[:, None], axis=-1).astype(jnp.int32)


def _first_with_top(left_BNC: jax.Array, top_B: jax.Array) -> jax.Array:
    """The first part with the likeliest token."""
    return jnp.argmax(jnp.max(left_BNC, axis=-1) == top_B[:, None], axis=-1).astype(jnp.int32)
