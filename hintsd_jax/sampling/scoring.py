# SPDX-License-Identifier: Apache-2.0

"""Scoring of given actions: contexts and actions flow in, the log-probability of every action token flows out.

Rows are sorted by length and padded to few shapes, one compiled program each; only action tokens are projected to the
vocabulary.

Letters: B rows, T tokens of context and action, A action tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh

TOKENS = 16_384  # that go through the policy at once
LOGITS = 1 << 27  # entries of all action tokens of a batch x vocabulary: 512 MiB


def span_logprobs(
    params: decoder.Params,
    policy: PolicyConfig,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    mesh: Mesh | None = None,
    one_shape: bool = False,
) -> list[np.ndarray]:
    """Log-probabilities (nats, temperature 1) of every row's action after its context: float32, one for each action
    token.

    Args:
      params: whole weights, as `decoder.forward` takes them.
      rows: (context ids, action ids), neither empty.
      mesh: where the weights lie; by default the first device alone.
      one_shape: pads all rows to the longest, so that one program is compiled: for few or short rows.
    """
    if any(not len(context) or not len(action) for context, action in rows):
        raise ValueError("a row without a context or without an action has no probability")
    shapes = [(_bucket(len(context) + len(action) - 1, 64), _bucket(len(action), 16)) for context, action in rows]
    if one_shape and rows:
        shapes = [(max(T for T, _ in shapes), max(A for _, A in shapes))] * len(rows)
    logprobs: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh):
        for T, A in sorted(set(shapes)):
            members = [n for n, shape in enumerate(shapes) if shape == (T, A)]
            B = _batch(T, A, policy.vocab_size)
            for first in range(0, len(members), B):
                part = members[first : first + B]
                scores_BA = np.asarray(_scores(params, policy, *_padded([rows[n] for n in part], B, T, A)))
                for n, scores_A in zip(part, scores_BA, strict=False):
                    logprobs[n] = scores_A[: len(rows[n][1])]
    return logprobs


@partial(jax.jit, static_argnums=1)
def _scores(params, policy: PolicyConfig, tokens_BT: jax.Array, at_BA: jax.Array, actions_BA: jax.Array) -> jax.Array:
    """`at_BA`: the index in T whose hidden state predicts the action token."""
    last_B = None if policy.experts is None else jnp.max(at_BA, axis=1)
    hidden_BTD = decoder.forward(params, policy, tokens_BT, last_B=last_B)
    hidden_BAD = jnp.take_along_axis(hidden_BTD, at_BA[:, :, None], axis=1)
    logp_BAV = jax.nn.log_softmax(decoder.project(params, policy, hidden_BAD), axis=-1)
    return jnp.take_along_axis(logp_BAV, actions_BA[:, :, None], axis=-1)[:, :, 0]


def _padded(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], B: int, T: int, A: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens_BT, at_BA, actions_BA = np.zeros((B, T), np.int32), np.zeros((B, A), np.int32), np.zeros((B, A), np.int32)
    for b, (context, action) in enumerate(rows):
        read = [*context, *action[:-1]]  # the last token is predicted, not read
        tokens_BT[b, : len(read)] = read
        at_BA[b, : len(action)] = len(context) - 1 + np.arange(len(action))
        actions_BA[b, : len(action)] = action
    return tokens_BT, at_BA, actions_BA


def _bucket(size: int, smallest: int) -> int:
    """The first of smallest x 1, 1.5, 2, 3, 4, 6, ... that holds `size`."""
    bucket = smallest
    while bucket < size:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def _batch(T: int, A: int, V: int) -> int:
    """Rows of a batch: as many as the limits let in, a power of two."""
    most = max(1, min(TOKENS // T, LOGITS // (A * V)))
    return 1 << (most.bit_length() - 1)
