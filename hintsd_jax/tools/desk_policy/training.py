# SPDX-License-Identifier: Apache-2.0

"""Weighted next-token training of the embedded policy, and what it would do at a decision.

Small on purpose: a compiled step per phase, and per number of rows into which an update's are packed.
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
from hintsd_jax.tools.desk_policy.rows import GROUPS, Batch


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


def _loss(params, policy: PolicyConfig, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(mean cross-entropy by weight, of each group of rows the shares of full-weight tokens, and of whole rows of them,
    that the argmax gets right).
    """
    first_BT, targets_BT, weights_BT = batch.first_BT[:, :-1], batch.tokens_BT[:, 1:], batch.weights_BT[:, 1:]
    hidden_BTD = decoder.forward(params, policy, batch.tokens_BT[:, :-1], first_BT=first_BT)
    logits_BTV = decoder.project(params, policy, hidden_BTD)
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    N, counted_BT = len(batch.group_N), weights_BT == 1.0
    of_rows = lambda x_BT: jax.ops.segment_sum(jnp.ravel(x_BT).astype(jnp.int32), jnp.ravel(batch.row_BT[:, 1:]), N)
    counted_N = of_rows(counted_BT)
    wrong_N = of_rows(counted_BT & (jnp.argmax(logits_BTV, -1) != targets_BT))
    of_groups = lambda x_N: jax.ops.segment_sum(x_N.astype(jnp.int32), batch.group_N, len(GROUPS))
    share = lambda part_N, whole_N: of_groups(part_N) / jnp.maximum(of_groups(whole_N), 1)
    scored_N = counted_N > 0
    scores = {
        "right_tokens": share(counted_N - wrong_N, counted_N),
        "right_rows": share(scored_N & (wrong_N == 0), scored_N),
    }
    by_group = {f"{name}/{key}": score[n] for n, name in enumerate(GROUPS) for key, score in scores.items()}
    return jnp.sum(losses_BT * weights_BT) / jnp.sum(weights_BT), by_group


def make_step(policy: PolicyConfig, tx: optax.GradientTransformation) -> Callable:
    """A compiled `(params, opt_state, batch) -> (params, opt_state, metrics)`; donates its state."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch: Batch):
        loss_fn = lambda params: _loss(params, policy, batch)
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
