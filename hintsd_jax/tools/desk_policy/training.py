"""Weighted next-token training of the embedded policy: rows of token ids in, parameters out.

Small on purpose: one compiled step per phase, fresh rows for every step from a seeded demonstrator.
"""

from __future__ import annotations

import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.tools.desk_policy.rows import Demonstrator, Row

FAILURES_KEPT = 256  # recent failed episodes that reviews and advice are drawn from


def pad_rows(rows: Sequence[Row], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows -> tokens int32 [B, T] and weights float32 [B, T], right padded; longer rows are cut."""
    tokens_BT = np.zeros((len(rows), length), np.int32)
    weights_BT = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        n = min(len(row.ids), length)
        tokens_BT[b, :n], weights_BT[b, :n] = row.ids[:n], row.weights[:n]
    return tokens_BT, weights_BT


def batches(phase, demonstrator: Demonstrator, task_seed: int) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Endless batches of a phase: `{"episodes": [B1, T1], "answers": [B2, T2], "started": [B3, T3]}` rows of tokens and
    weights.

    `phase.rows` gives the number of rows of each sort, `phase.shapes` (length, difficulty) pairs to draw tasks from.
    With `phase.clean` the demonstrator makes no mistakes (the look-ups are learned first, the habits later); reviews
    are always of episodes with mistakes.
    """
    rng, index = demonstrator.rng, 0
    failures, played = (deque(maxlen=FAILURES_KEPT) for _ in range(2))

    def fresh_task() -> dict:
        nonlocal index
        index += 1
        return generate_task(task_seed, index, *rng.choice(phase.shapes))

    def play() -> Row:
        task = fresh_task()
        episode = demonstrator.play(task)
        played.append((task, episode))
        if not episode.success:
            failures.append((task, episode))
        return demonstrator.row(demonstrator.play(task, error_scale=0.0) if phase.clean else episode)

    while len(failures) < FAILURES_KEPT // 8:
        play()
    counts = phase.rows
    while True:
        episodes = [play() for _ in range(counts.plain)] + [
            demonstrator.drill_row(phase.drill_length) for _ in range(counts.drill)
        ]
        hinted = {
            "error_scale": 1.0 - phase.clean,
            "contradict_rate": phase.contradict_rate,
            "vague_rate": phase.vague_rate,
        }
        answers = [demonstrator.hinted_row(fresh_task(), **hinted) for _ in range(counts.hinted)]
        answers += [
            demonstrator.review_row(*rng.choice(failures), max_targets=rng.choice((1, 3, 3)))
            for _ in range(counts.review)
        ]
        answers += [demonstrator.advice_row(*rng.choice(failures)) for _ in range(counts.advice)]
        answers += [demonstrator.judge_row(*rng.choice(played)) for _ in range(counts.judge)]
        started = [demonstrator.started_row(fresh_task()) for _ in range(counts.started)]
        groups = {
            "episodes": (episodes, phase.episode_length),
            "answers": (answers, phase.answer_length),
            "started": (started, phase.started_length),
        }
        yield {name: pad_rows(rows, length) for name, (rows, length) in groups.items() if rows}


def prefetched(iterator: Iterator, depth: int = 4) -> Iterator:
    """Runs an endless iterator in a thread of its own, in order: tokenising goes on while the devices compute. What the
    iterator raises is raised here."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in iterator:
                if not put((item, None)):
                    return
        except BaseException as error:  # the consumer would wait for ever
            put((None, error))

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()


def _sums(params, config: PolicyConfig, tokens_BT, weights_BT):
    """Weighted cross-entropy sum, weight sum, and how many full-weight tokens (and whole answers) the argmax gets
    right.
    """
    hidden_BTD = decoder.forward(params, config, tokens_BT[:, :-1])
    logits_BTV = decoder.project(params, config, hidden_BTD)
    targets_BT, weights_BT = tokens_BT[:, 1:], weights_BT[:, 1:]
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    wanted_BT = weights_BT == 1.0
    right_BT = (jnp.argmax(logits_BTV, -1) == targets_BT) | ~wanted_BT
    scored_B = jnp.any(wanted_BT, axis=1)
    return (
        jnp.sum(losses_BT * weights_BT),
        jnp.sum(weights_BT),
        {
            "right_tokens": jnp.sum(right_BT & wanted_BT) / jnp.maximum(jnp.sum(wanted_BT), 1),
            "right_rows": jnp.sum(jnp.all(right_BT, axis=1) & scored_B) / jnp.maximum(jnp.sum(scored_B), 1),
        },
    )


def make_step(config: PolicyConfig, tx: optax.GradientTransformation) -> Callable:
    """A compiled `(params, opt_state, batch) -> (params, opt_state, metrics)`; donates its state."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        def loss_fn(params):
            loss, weight, metrics = 0.0, 0.0, {}
            for name, (tokens_BT, weights_BT) in batch.items():
                group_loss, group_weight, scores = _sums(params, config, tokens_BT, weights_BT)
                loss, weight = loss + group_loss, weight + group_weight
                metrics |= {f"{name}/{key}": value for key, value in scores.items()}
            return loss / weight, metrics

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **metrics}

    return step


@partial(jax.jit, static_argnums=1)
def _span_logprobs(params, config: PolicyConfig, tokens_BT, spans_BT):
    logits_BTV = decoder.project(params, config, decoder.forward(params, config, tokens_BT[:, :-1]))
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    return -jnp.sum(losses_BT * spans_BT[:, 1:], axis=1)


def decision_probabilities(
    params, config: PolicyConfig, demonstrator: Demonstrator, tasks, hinted: bool, length: int
) -> dict:
    """What the policy would do at each decision after right steps only.

    Returns, per kind and for "all": `sampled` = mean probability of the whole right action, `greedy` = share of
    decisions where the right action is likelier than the habitual mistake.
    """
    decisions = [d for task in tasks for d in demonstrator.decisions(task, hinted)]
    scores = []
    for attribute in ("right", "wrong"):
        rows = [
            Row(d.context + getattr(d, attribute), [0.0] * len(d.context) + [1.0] * len(getattr(d, attribute)))
            for d in decisions
        ]
        parts = [pad_rows(rows[i : i + 64], length) for i in range(0, len(rows), 64)]
        scores.append(np.concatenate([np.asarray(_span_logprobs(params, config, *part)) for part in parts]))
    right, wrong = scores
    kinds = np.array([d.kind for d in decisions])
    report = {}
    for kind in ("all", *sorted(set(kinds))):
        chosen = slice(None) if kind == "all" else kinds == kind
        report[kind] = {"sampled": float(np.exp(right[chosen]).mean()), "greedy": float((right > wrong)[chosen].mean())}
    return report


def seeded_demonstrator(chat, tokenizer, seed: int) -> Demonstrator:
    return Demonstrator(chat, tokenizer, random.Random(seed))
