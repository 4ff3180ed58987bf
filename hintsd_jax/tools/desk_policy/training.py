# SPDX-License-Identifier: Apache-2.0

"""Weighted next-token training of the embedded policy: demonstrations in, parameters out.

Small on purpose: one compiled step per phase, fresh tokens for every step from a seeded demonstrator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.hindsight.prompts.base import HINT, VERDICT
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.sampling.scoring import span_logprobs
from hintsd_jax.tools.desk_policy.demonstrator import Decision, Demonstrator, WeightedTokens, demonstration
from hintsd_jax.tools.desk_policy.drills import lab_drill, names_drill

# The kinds of rows that stand in arrays of one length.
GROUPS: dict[str, tuple[str, ...]] = {
    "episodes": ("plain", "hinted"),
    "reviews": ("review", "step_feedback"),
    "guided": ("guided",),
    "judgements": ("verdict", "hint"),
    "drills": ("names_drill", "lab_drill"),
}

Batch = dict[str, tuple[np.ndarray, np.ndarray]]  # group -> tokens int32 [B, T] and weights float32 [B, T]


def padded(rows: Sequence[WeightedTokens], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [B, T] and weights float32 [B, T], right padded.

    Raises ValueError for a longer row: one that is cut would teach something else.
    """
    tokens_BT = np.zeros((len(rows), length), np.int32)
    weights_BT = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        n = len(row.ids)
        if n > length:
            raise ValueError(f"a row of {n} tokens does not fit into {length}")
        tokens_BT[b, :n], weights_BT[b, :n] = row.ids, row.weights
    return tokens_BT, weights_BT


def batches(phase, demonstrator: Demonstrator, task_seed: int) -> Iterator[Batch]:
    """Endless batches of a phase, in the groups `GROUPS`, each of a length of its own.

    `phase.rows` gives the number of rows of each kind, `phase.shapes` (length, difficulty) pairs to draw tasks from.
    With `phase.clean` the demonstrator makes no mistakes (the look-ups are learned first, the habits later); reviews
    are always of episodes with faults.
    """
    rng, chat, index = demonstrator.rng, demonstrator.chat, 0
    contradict, errors = phase.contradict_rate, 1.0 - phase.clean

    def task() -> dict:
        nonlocal index
        index += 1
        return generate_task(task_seed, index, *rng.choice(phase.shapes), kinds="all")

    def failed() -> tuple[dict, Episode]:
        while True:
            played = task()
            episode = demonstrator.play_faulty(played)
            if not episode.success:
                return played, episode

    rows: dict[str, Callable[[], WeightedTokens]] = {
        "plain": lambda: demonstration(demonstrator.play(task(), errors)),
        "hinted": lambda: demonstrator.hinted(task(), task(), contradict, errors),
        "review": lambda: demonstrator.review(*failed(), max_targets=rng.choice((1, 3, 3))),
        "step_feedback": lambda: demonstrator.step_feedback(*failed()),
        "guided": lambda: demonstrator.guided(task(), task()),
        "verdict": lambda: demonstrator.judgement(task(), task(), VERDICT),
        "hint": lambda: demonstrator.judgement(task(), task(), HINT),
        "names_drill": lambda: names_drill(chat, rng, phase.drill_length),
        "lab_drill": lambda: lab_drill(chat, rng, phase.drill_decisions),
    }
    while True:
        batch = {}
        for group, kinds in GROUPS.items():
            made = [rows[kind]() for kind in kinds for _ in range(phase.rows[kind])]
            if made:
                batch[group] = padded(made, phase.lengths[group])
        yield batch


def prefetched(iterator: Iterator[Any], depth: int = 4) -> Generator[Any, None, None]:
    """Runs an endless iterator in a thread of its own, in order: tokenising goes on while the devices compute. What the
    iterator raises is raised here.
    """
    pool = ThreadPoolExecutor(1)
    waiting = deque(pool.submit(next, iterator) for _ in range(depth))
    try:
        while True:
            waiting.append(pool.submit(next, iterator))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
