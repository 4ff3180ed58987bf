# SPDX-License-Identifier: Apache-2.0

"""The distribution that tokens are really drawn from: logits in, which tokens may come and how likely they are out.

Ids that the tokenizer does not know never come: their logits are lowered where logits are made (`decoder.project`), so
that every distribution, of student, teacher and reference too, is one over the others. Then it is the softmax of
logits / temperature, of which the `top_k` likeliest tokens stay, and of these the smallest set of likeliest ones with a
mass of `top_p`; what stays is normalised again. The sampler draws from it, and the update takes every ratio of student
and sampler under it, so that both sides of a ratio mean the same thing.

Letters: X tokens (or rows of a batch), V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Of a token that never comes: exp() of it is 0 at any temperature in use, and 0 times it is 0, as it is not of -inf.
_NEVER = -1e9
_HALVINGS = 30  # separates probabilities that differ by more than 2^-30 of the row's largest


@dataclasses.dataclass(frozen=True)
class SamplingDistribution:
    """The settings of a run's rollouts. Hashable: part of a static argument of the compiled update.

    temperature: 0 takes the likeliest token; a log-probability is then that at temperature 1, without filters.
    top_p, top_k: see `lowest_kept`; 1 and 0 keep all tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def filters(self) -> bool:
        """Whether some tokens cannot come."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)

    @property
    def is_softmax(self) -> bool:
        """Whether it is the plain softmax of the logits (or greedy, see above)."""
        return not self.filters and self.temperature in (0.0, 1.0)

    def lowest_kept(self, logits_XV: jax.Array) -> jax.Array | None:
        """The smallest scaled logit [X] of a token that may come; None where all may."""
        if not self.filters:
            return None
        rows = logits_XV.shape[0]
        return lowest_kept(
            logits_XV / self.temperature, jnp.full(rows, self.top_p), jnp.full(rows, self.top_k, jnp.int32)
        )

    def logprobs(
        self, logits_XV: jax.Array, tokens_X: jax.Array, like_XV: jax.Array, lowest_X: jax.Array | None
    ) -> jax.Array:
        """Log-probabilities [X] of tokens, differentiable.

        Among the tokens whose scaled logit in `like_XV` is at least `lowest_X` (None: among all), and the token itself:
        that one was drawn, whatever the rounding. A teacher's are taken among the student's tokens.
        """
        scaled_XV = logits_XV if self.is_softmax else logits_XV / self.temperature
        if lowest_X is not None:
            itself_XV = jnp.arange(logits_XV.shape[-1])[None] == tokens_X[:, None]
            kept_XV = (like_XV / self.temperature >= lowest_X[:, None]) | itself_XV
            scaled_XV = jnp.where(jax.lax.stop_gradient(kept_XV), scaled_XV, -jnp.inf)
        # Not by log_softmax, which would be one more array of the size of the logits.
        at_token_X = jnp.take_along_axis(scaled_XV, tokens_X[:, None], axis=-1)[:, 0]
        return at_token_X - jax.nn.logsumexp(scaled_XV, axis=-1)


def without_unknown(logits: jax.Array, unknown_ids: tuple[tuple[int, int], ...]) -> jax.Array:
    """The logits [..., V] with those of these ids (each from first to last, last excluded) so low that they never come.
    Without any the same array. A mask of V constants, fused into what reads the logits.
    """
    if not unknown_ids:
        return logits
    known_V = np.ones(logits.shape[-1], bool)
    for first, last in unknown_ids:
        known_V[first:last] = False
    return jnp.where(known_V.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, _NEVER)


def lowest_kept(scaled_XV: jax.Array, top_p_X: jax.Array, top_k_X: jax.Array) -> jax.Array:
    """The smallest logit [X] that top-k, then top-p of what is left, keeps.

    Args:
      scaled_XV: float32 logits, divided by the temperature.
      top_p_X: the smallest set of likeliest tokens with at least this mass stays; 1 keeps all.
      top_k_X: int32, the k likeliest tokens stay; 0 keeps all. Tokens tied with the last one kept stay as well.
    """
    by_count_XV = _keep_at_least(scaled_XV, lambda kept_XV, _: jnp.sum(kept_XV, -1), top_k_X)
    by_count_XV |= (top_k_X <= 0)[:, None]
    left_XV = jnp.where(by_count_XV, scaled_XV, -jnp.inf)
    by_mass_XV = _keep_at_least(left_XV, lambda kept_XV, p_XV: jnp.sum(jnp.where(kept_XV, p_XV, 0.0), -1), top_p_X)
    by_mass_XV |= (top_p_X >= 1.0)[:, None]
    # What stays are the largest logits, ties included: one number says which.
    return jnp.min(jnp.where(by_count_XV & by_mass_XV, scaled_XV, jnp.inf), axis=-1)


def _keep_at_least(
    scaled_XV: jax.Array, measure: Callable[[jax.Array, jax.Array], jax.Array], wanted_X: jax.Array
) -> jax.Array:
    """The smallest set {v: p_v >= t} whose measure reaches `wanted`, as a mask. A threshold found by halving needs no
    sort of the vocabulary.
    """
    probs_XV = jax.nn.softmax(scaled_XV, axis=-1)
    largest_X = jnp.max(probs_XV, axis=-1)

    def halve(_, bounds):
        low_X, high_X = bounds
        middle_X = 0.5 * (low_X + high_X)
        enough_X = measure(probs_XV >= middle_X[:, None], probs_XV) >= wanted_X
        return jnp.where(enough_X, middle_X, low_X), jnp.where(enough_X, high_X, middle_X)

    low_X, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(largest_X), largest_X))
    # The most likely token always stays: no set may be empty, whatever the rounding.
    return probs_XV >= jnp.minimum(low_X, largest_X)[:, None]
