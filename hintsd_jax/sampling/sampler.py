# SPDX-License-Identifier: Apache-2.0

"""One token per row from logits, with temperature, top-k and top-p as traced arrays: another temperature compiles
nothing.

Invariant: a row's token depends on its own logits, key and parameters only, bit by bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hintsd_jax.models.sampling_distribution import lowest_kept


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws by the Gumbel-max trick.

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
    scaled_BV = jnp.where(scaled_BV >= lowest_B[:, None], scaled_BV, -jnp.inf)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:]))(keys_B)
    drawn_B = jnp.argmax(scaled_BV + noise_BV, axis=-1)
    tokens_B = jnp.where(warm_B, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)
    logprobs_BV = jax.nn.log_softmax(scaled_BV, axis=-1)
    return tokens_B, jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]
