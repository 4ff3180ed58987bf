# SPDX-License-Identifier: Apache-2.0

"""Weighted next-token training of the embedded policy, and what it would do at a decision.

Small on purpose: one compiled step per phase.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.sampling.scoring import span_logprobs
from hintsd_jax.tools.desk_policy.demonstrator import Decision


def alike_by_word(embedding_VD: jax.Array, texts: Sequence[str], key: jax.Array) -> jax.Array:
    """Embeddings of which those whose tokens share their rarest word begin alike: half of the variance is the word's.

    A label is another token before a quote than without one, and a number another one in JSON: what is learned of one
    of them would else have to be learned again of each.

    Args:
      embedding_VD: as it was drawn, float [V, D]; rows beyond the texts stay as they are.
      texts: of the tokens, in the order of their ids.
    """
    words = [re.findall(r"[a-z]+|[0-9]+", text.lower()) for text in texts]
    uses = Counter(word for of_token in words for word in set(of_token))
    rarest = [min(of_token, key=lambda word: (uses[word], word), default=None) for of_token in words]
    numbers = {word: n for n, word in enumerate(sorted(uses))}
    words_WD = jnp.std(embedding_VD) * jax.random.normal(key, (len(numbers), embedding_VD.shape[1]))
    ids = np.array([v for v, word in enumerate(rarest) if word is not None])
    shared_ND = words_WD[np.array([numbers[rarest[v]] for v in ids])]
    return embedding_VD.at[ids].set((embedding_VD[ids] + shared_ND) / jnp.sqrt(2.0))


def _sums(params, policy: PolicyConfig, tokens_BT, weights_BT):
    """Weighted cross-entropy sum, weight sum, and how many full-weight tokens (and whole answers) the argmax gets
    right.
    """
    hidden_BTD = decoder.forward(params, policy, tokens_BT[:, :-1])
    logits_BTV = decoder.project(params, policy, hidden_BTD)
    targets_BT, weights_BT = tokens_BT[:, 1:], weights_BT[:, 1:]
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    counted_BT = weights_BT == 1.0
    right_BT = (jnp.argmax(logits_BTV, -1) == targets_BT) | ~counted_BT
    scored_B = jnp.any(counted_BT, axis=1)
    scores = {
        "right_tokens": jnp.sum(right_BT & counted_BT) / jnp.maximum(jnp.sum(counted_BT), 1),
        "right_rows": jnp.sum(jnp.all(right_BT, axis=1) & scored_B) / jnp.maximum(jnp.sum(scored_B), 1),
    }
    return jnp.sum(losses_BT * weights_BT), jnp.sum(weights_BT), scores


def make_step(policy: PolicyConfig, tx: optax.GradientTransformation) -> Callable:
    """A compiled `(params, opt_state, batch) -> (params, opt_state, metrics)`; donates its state."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        def loss_fn(params):
            loss, weight, metrics = 0.0, 0.0, {}
            for name, (tokens_BT, weights_BT) in batch.items():
                group_loss, group_weight, scores = _sums(params, policy, tokens_BT, weights_BT)
                loss, weight = loss + group_loss, weight + group_weight
                metrics |= {f"{name}/{key}": value for key, value in scores.items()}
            return loss / weight, metrics

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **metrics}

    return step


def decision_probabilities(params, policy: PolicyConfig, decisions: Sequence[Decision]) -> dict[str, dict[str, float]]:
    """What the policy would do at decisions.

    Returns, per kind and for "all": `sampled` = mean probability of the whole right action, `greedy` = share of
    decisions where the right action is likelier than the usual mistake, `right` and `wrong` = mean probability of the
    token with which either begins to differ from the other.
    """
    spans = [(d.context, action) for d in decisions for action in (d.right, d.wrong)]
    logprobs = span_logprobs(params, policy, spans, one_shape=True)
    deciding = [next(n for n, (a, b) in enumerate(zip(d.right, d.wrong, strict=False)) if a != b) for d in decisions]
    right, wrong = (np.array([span.sum() for span in logprobs[first::2]]) for first in (0, 1))
    values_ND = np.stack(
        [
            np.exp(right),
            right > wrong,
            *(np.exp([span[n] for span, n in zip(logprobs[first::2], deciding, strict=True)]) for first in (0, 1)),
        ],
        axis=1,
    )
    kinds, report = np.array([decision.kind for decision in decisions]), {}
    for kind in ("all", *sorted(set(kinds))):
        means = values_ND[slice(None) if kind == "all" else kinds == kind].mean(axis=0)
        report[kind] = dict(zip(("sampled", "greedy", "right", "wrong"), means.tolist(), strict=True))
    return report
