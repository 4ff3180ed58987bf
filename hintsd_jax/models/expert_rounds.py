# SPDX-License-Identifier: Apache-2.0

"""Who computes what when in a mixture of experts: the experts that a router has chosen flow in, rounds of as many rows
for every expert flow out. Letters: see `experts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def rows_of_expert(X: int, K: int, number: int, few: int) -> int:
    """Rows of each expert in a round, of X tokens with K of `number` experts each: twice as many as it has on average,
    so that one round is enough but for unlike experts, in whole 8.
    """
    return X if few >= X else min(X, max(few, 8 * -(-2 * X * K // (8 * number))))


class Rounds(NamedTuple):
    """number: of rounds; a plain 1 where one is enough whatever the router says. here_M:
    whether the choice is computed on this device. round_M: in which. place_M: where in the round's rows, of E x C.
    rows(round) -> (choice_EC, which choice a row is, valid_EC). C: rows of an expert.
    """

    number: Any
    here_M: jax.Array
    round_M: jax.Array
    place_M: jax.Array
    rows: Callable[[Any], tuple[jax.Array, jax.Array]]
    C: int


def in_rounds(expert_XK: jax.Array, real_X: jax.Array | None, first: Any, E: int, number: int, few: int) -> Rounds:
    """The rounds of X tokens with K experts each, of `number` in all; the `E` from `first` on are here.

    real_X: False for padding, which nobody computes. few: up to so many tokens every expert takes each of them.
    """
    X, K = expert_XK.shape
    expert_XK = expert_XK - first
    here_XK = (expert_XK >= 0) & (expert_XK < E)
    if real_X is not None:
        here_XK &= real_X[:, None]
    here_M = here_XK.reshape(-1)
    if few >= X:
        chosen_EXK = (expert_XK[None] == jnp.arange(E)[:, None, None]) & here_XK
        choice_EX = jnp.arange(X) * K + jnp.argmax(chosen_EXK, axis=-1)
        place_M = (jnp.clip(expert_XK, 0, E - 1) * X + jnp.arange(X)[:, None]).reshape(-1)
        return Rounds(1, here_M, jnp.zeros_like(place_M), place_M, lambda _: (choice_EX, chosen_EXK.any(-1)), X)
    C = rows_of_expert(X, K, number, few)
    expert_M = jnp.where(here_M, expert_XK.reshape(-1), E)
    order_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
    stop_E = jnp.searchsorted(expert_M[order_M], jnp.arange(E), side="right").astype(jnp.int32)
    start_E = jnp.concatenate([jnp.zeros(1, jnp.int32), stop_E[:-1]])
    rank_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(X * K, dtype=jnp.int32), unique_indices=True)
    at_M = jnp.clip(expert_M, 0, E - 1)
    rank_M -= start_E[at_M]

    def rows(number: Any) -> tuple[jax.Array, jax.Array]:
        sorted_EC = start_E[:, None] + number * C + jnp.arange(C)
        return order_M[jnp.clip(sorted_EC, 0, X * K - 1)], sorted_EC < stop_E[:, None]

    return Rounds(-(-jnp.max(stop_E - start_E) // C), here_M, rank_M // C, at_M * C + rank_M % C, rows, C)


def over_rounds(rounds: Rounds, one: Callable, carry: Any) -> Any:
    """`one(number, carry)` for every round."""
    return one(0, carry) if isinstance(rounds.number, int) else jax.lax.fori_loop(0, rounds.number, one, carry)


def taken(rounds: Rounds, number: Any, rows: jax.Array, so_far_M: jax.Array) -> jax.Array:
    """What choices have so far, and from a round's rows [E, C, ...] those that are computed in it."""
    mine_M = rounds.here_M & (rounds.round_M == number)
    taken_M = rows.reshape(-1, *rows.shape[2:])[rounds.place_M]
    return jnp.where(mine_M.reshape(-1, *(1,) * (taken_M.ndim - 1)), taken_M, so_far_M)
