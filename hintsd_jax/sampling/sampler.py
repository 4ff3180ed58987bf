# SPDX-License-Identifier: Apache-2.0

"""One token per row from logits, with temperature, top-k and top-p as traced arrays: another temperature compiles
nothing.

Invariant: a row's token depends on its own logits, key and parameters only, bit by bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_HALVINGS = 30  # separates probabilities that differ by more than 2^-30 of the row's largest


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws by the Gumbel-max trick.

    Args:
      logits_BV: float32.
      keys_B: typed PRNG keys, one a row.
      temperature_B: 0 takes the most likely token.
      top_p_B: smallest set of most likely tokens with at least this mass (after temperature); 1 keeps all.
      top_k_B: int32, the k most likely tokens; 0 keeps all. Tokens tied with the last one kept stay as well.

    Returns:
      (tokens_B int32, logprobs_B float32): the log-prob is the policy's own, at temperature 1 and unfiltered.
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    warm_B = temperature_B > 0
    scaled_BV = logits_BV / jnp.where(warm_B, temperature_B, 1.0)[:, None]
    filtering = jnp.any(warm_B & ((top_p_B < 1.0) | (top_k_B > 0)))
    scaled_BV = jax.lax.cond(filtering, _filter, lambda x, *_: x, scaled_BV, top_p_B, top_k_B)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:]))(keys_B)
    drawn_B = jnp.argmax(scaled_BV + noise_BV, axis=-1)
    tokens_B = jnp.where(warm_B, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]


def _filter(scaled_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Top-k first, then top-p of what is left. A threshold found by halving needs no sort of the vocabulary."""
    by_count = _keep_at_least(scaled_BV, lambda kept_BV, _: jnp.sum(kept_BV, -1), top_k_B)
    scaled_BV = jnp.where(by_count | (top_k_B <= 0)[:, None], scaled_BV, -jnp.inf)
    by_mass = _keep_at_least(scaled_BV, lambda kept_BV, p_BV: jnp.sum(jnp.where(kept_BV, p_BV, 0.0), -1), top_p_B)
    return jnp.where(by_mass | (top_p_B >= 1.0)[:, None], scaled_BV, -jnp.inf)


def _keep_at_least(scaled_BV: jax.Array, measure, wanted_B: jax.Array) -> jax.Array:
    """The smallest set {v: p_v >= t} whose measure reaches `wanted`, as a mask."""
    probs_BV = jax.nn.softmax(scaled_BV, axis=-1)
    largest_B = jnp.max(probs_BV, axis=-1)

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = 0.5 * (low_B + high_B)
        enough_B = measure(probs_BV >= middle_B[:, None], probs_BV) >= wanted_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    low_B, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(largest_B), largest_B))
    # The most likely token always stays: no set may be empty, whatever the rounding.
    return probs_BV >= jnp.minimum(low_B, largest_B)[:, None]
