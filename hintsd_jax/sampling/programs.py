# SPDX-License-Identifier: Apache-2.0

"""The engine's three compiled programs: prefill, copy of a prefix, decode. Each takes the cache and gives it back
(donated), and is called under the engine's mesh.

A slot's row of the cache holds the keys and values of positions 0..length-1; its *pending* token, the last one known,
stands at position `length` and is fed by the next decode step. So prefill needs no logits at all, and a sampled token
enters the cache when the next one is drawn. What lies beyond `length` is garbage that is overwritten before anything
attends to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hintsd_jax.models import cached_attention, decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import constrain
from hintsd_jax.sampling.sampler import sample

COPY_BLOCK = 64  # positions of a slot that are copied at once: an observation is short
Array = Any  # NumPy on the host between decode calls, where the engine writes into it; jax's inside the program


class DecodeState(NamedTuple):
    """What every slot is doing; B slots, A = most tokens of one generation.

    pending_B: int32, the last known token. position_B: int32, its position. active_B: bool, is sampling.
    count_B: int32, tokens sampled in this generation. limit_B: int32, the most that it may have.
    tokens_BA: int32 and logprobs_BA: float32, what was sampled. key_B2: uint32, raw data of the job's key.
    temperature_B, top_p_B: float32 and top_k_B: int32, of the job's sampling.
    """

    pending_B: Array
    position_B: Array
    active_B: Array
    count_B: Array
    limit_B: Array
    tokens_BA: Array
    logprobs_BA: Array
    key_B2: Array
    temperature_B: Array
    top_p_B: Array
    top_k_B: Array


def idle_state(slots: int, context: int, max_tokens: int) -> DecodeState:
    """The state of idle slots, as NumPy arrays. Positions are out of range: an idle slot writes nothing."""
    B, A = slots, max_tokens
    return DecodeState(
        pending_B=np.zeros(B, np.int32),
        position_B=np.full(B, context, np.int32),
        active_B=np.zeros(B, bool),
        count_B=np.zeros(B, np.int32),
        limit_B=np.zeros(B, np.int32),
        tokens_BA=np.zeros((B, A), np.int32),
        logprobs_BA=np.zeros((B, A), np.float32),
        key_B2=np.zeros((B, 2), np.uint32),
        temperature_B=np.zeros(B, np.float32),
        top_p_B=np.ones(B, np.float32),
        top_k_B=np.zeros(B, np.int32),
    )


@partial(jax.jit, static_argnums=1, donate_argnums=2)
def prefill(params, config: PolicyConfig, cache, tokens_RL, start_R, slots_R, length_R=None):
    """Writes R rows of L tokens, from position `start` on, into the given slots. Rows with slot >= B go nowhere.

    Rows shorter than L are padded on the right: the padding lands beyond the slot's length, where it does no harm.
    length_R: how long they are, for policies with experts; see `decoder.extend`.
    """
    return decoder.extend(params, config, tokens_RL, start_R, slots_R, cache, length_R)


@partial(jax.jit, donate_argnums=0)
def copy_slots(cache, source_R, target_R, start_R, stop_R):
    """Copies the positions start..stop-1 of slots to others, in whole blocks: what stands before them there must be the
    same in both. Targets >= B go nowhere. No slot that is read may be written in the same call.
    """
    S = cache[0][0].shape[2]
    block = min(COPY_BLOCK, S)

    def one_block(n, cache):
        first = jnp.minimum(n * block, S - block)
        to_R = jnp.where(first + block > start_R, stop_R, 0)
        copy = lambda x: cached_attention.copy_positions(x, source_R, target_R, first, block, to_R)
        return jax.tree.map(copy, cache)

    begin = jnp.min(jnp.where(stop_R > start_R, start_R, S)) // block
    return jax.lax.fori_loop(begin, -(-jnp.max(stop_R) // block), one_block, cache)


@partial(jax.jit, static_argnums=(1, 2), donate_argnums=(3,))
def decode(params, config: PolicyConfig, stop_ids: tuple[int, ...], cache, state: DecodeState, quota):
    """Samples in all active slots until `quota` of them have stopped, or none is left.

    A slot stops with a stop token (which it keeps) or at its limit. Idle slots read and write nothing of the cache. The
    key of a token is folded from its job and its position alone.

    Returns:
      (cache, state, steps): `active` is now False where a generation ended.
    """
    stops = jnp.array(stop_ids, jnp.int32)
    begun = jnp.sum(state.active_B)
    rows = jnp.arange(state.pending_B.shape[0])

    def go_on(carry):
        _, state, _ = carry
        running = jnp.sum(state.active_B)
        return (running > 0) & (begun - running < quota)

    def step(carry):
        cache, state, steps = carry
        position_B = jnp.where(state.active_B, state.position_B, cache[0][0].shape[2])
        hidden_BD, cache = decoder.decode_step(params, config, state.pending_B, position_B, cache)
        logits_BV = constrain(decoder.project(params, config, hidden_BD), "serve", "batch", "act_vocab")
        keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.key_B2), state.position_B)
        token_B, logprob_B = sample(logits_BV, keys_B, state.temperature_B, state.top_p_B, state.top_k_B)
        active_B = state.active_B
        column_B = jnp.where(active_B, state.count_B, state.tokens_BA.shape[1])  # out of range: dropped
        count_B = state.count_B + active_B
        stopped_B = jnp.any(token_B[:, None] == stops[None], axis=1) | (count_B >= state.limit_B)
        state = state._replace(
            pending_B=jnp.where(active_B, token_B, state.pending_B),
            position_B=state.position_B + active_B,
            active_B=active_B & ~stopped_B,
            count_B=count_B,
            tokens_BA=state.tokens_BA.at[rows, column_B].set(token_B, mode="drop"),
            logprobs_BA=state.logprobs_BA.at[rows, column_B].set(logprob_B, mode="drop"),
        )
        return cache, state, steps + 1

    return jax.lax.while_loop(go_on, step, (cache, state, jnp.int32(0)))
