# SPDX-License-Identifier: Apache-2.0

"""The rows of every update of the warm-up, made ahead of it in processes of their own.

An update's rows come from a seed of its own, so they are the same in however many processes they are made and wherever
a stopped warm-up goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from hintsd_jax.envs.desk import script
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.hindsight.prompts.base import HINT, VERDICT
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.tools.desk_policy.demonstrator import Demonstrator, WeightedTokens, demonstration
from hintsd_jax.tools.desk_policy.drills import compare_drill, copy_drill, lab_drill, recall_drill, told_drill

# How the kinds of rows are reported together.
GROUPS: dict[str, tuple[str, ...]] = {
    "episodes": ("plain", "hinted"),
    "reviews": ("review", "step_feedback"),
    "arguments": ("argument_review",),
    "guided": ("guided",),
    "judgements": ("verdict", "hint"),
    "copies": ("copy_drill",),
    "recalls": ("recall_drill",),
    "comparisons": ("compare_drill",),
    "look_ups": ("lab_drill",),
    "told": ("told_drill",),
}
Array = Any  # NumPy where rows are made; jax where they are learned from
_STEP = 2  # arrays have a multiple of so many rows, so that there are few programs


class Batch(NamedTuple):
    """N rows of any length, packed into B of length T, one behind the other.

    tokens_BT, int32. weights_BT, float32: of each token's loss; 0 for the first of a row, which nothing precedes, and
    for padding. first_BT, int32: the index at which the row of a token begins. row_BT, int32: its number, N: padding.
    group_N, int32: of a row, its number in `GROUPS`.
    """

    tokens_BT: Array
    weights_BT: Array
    first_BT: Array
    row_BT: Array
    group_N: Array


_chat: list[ChatFormat] = []  # of this process: see `start`


def packed(groups: Mapping[str, Sequence[WeightedTokens]], length: int) -> Batch:
    """The rows, by group, where the fewest tokens are left beside them, the longest first.

    Raises ValueError for a row that is longer than `length`: one that is cut would teach something else.
    """
    rows = [(row, list(GROUPS).index(group)) for group, made in groups.items() for row in made]
    filled: list[int] = []
    places: dict[int, tuple[int, int]] = {}  # row -> where it stands
    for n in sorted(range(len(rows)), key=lambda n: -len(rows[n][0].ids)):
        size = len(rows[n][0].ids)
        if size > length:
            raise ValueError(f"a row of {size} tokens does not fit into {length}")
        fitting = [b for b, used in enumerate(filled) if used + size <= length]
        best = max(fitting, key=lambda b: filled[b], default=len(filled))
        if best == len(filled):
            filled.append(0)
        places[n] = best, filled[best]
        filled[best] += size
    shape = -(-len(filled) // _STEP) * _STEP, length
    tokens_BT, weights_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    first_BT, row_BT = np.tile(np.arange(length, dtype=np.int32), (shape[0], 1)), np.full(shape, len(rows), np.int32)
    for n, (b, first) in places.items():
        row, here = rows[n][0], np.s_[b, first : first + len(rows[n][0].ids)]
        tokens_BT[here], weights_BT[here] = row.ids, row.weights
        weights_BT[b, first], first_BT[here], row_BT[here] = 0.0, first, n
    return Batch(tokens_BT, weights_BT, first_BT, row_BT, np.array([group for _, group in rows], np.int32))


def make_batch(phase: Any, chat: ChatFormat, seed: int) -> Batch:
    """The rows of one update.

    `phase.rows` gives the number of rows of each kind that there are, `phase.shapes` (length, difficulty) pairs to draw
    tasks from. With `phase.clean` the demonstrator makes no mistakes (the look-ups are learned first, the habits
    later); reviews are always of episodes with faults.

    Raises ValueError for a row that is longer than `phase.length`.
    """
    demonstrator, index = Demonstrator(chat, seed), 0
    rng, contradict, errors = demonstrator.rng, phase.contradict_rate, 1.0 - phase.clean

    def task() -> dict:
        nonlocal index
        index += 1
        return generate_task(seed, index, *rng.choice(phase.shapes))

    def failed() -> tuple[dict, Episode]:
        while True:
            played = task()
            episode = demonstrator.play_faulty(played, phase.other_faults)
            if not episode.success:
                return played, episode

    def with_other_names() -> tuple[dict, Episode]:
        while True:
            played = task()
            if script.sites(played, "wrong_argument"):
                return played, demonstrator.play_with_other_names(played)

    kinds: dict[str, Callable[[], WeightedTokens]] = {
        "plain": lambda: demonstration(demonstrator.play(task(), errors)),
        "hinted": lambda: demonstrator.hinted(task(), task(), contradict, errors, phase.foreign),
        "review": lambda: demonstrator.review(*failed(), max_targets=rng.choice((1, 3, 3))),
        "argument_review": lambda: demonstrator.review(*with_other_names(), max_targets=3),
        "step_feedback": lambda: demonstrator.step_feedback(*failed(), phase.of_told),
        "guided": lambda: demonstrator.guided(task(), task(), phase.contrary),
        "verdict": lambda: demonstrator.judgement(task(), task(), VERDICT),
        "hint": lambda: demonstrator.judgement(task(), task(), HINT),
        "copy_drill": lambda: copy_drill(chat, rng, phase.drill_length),
        "recall_drill": lambda: recall_drill(chat, rng, phase.drill_length),
        "compare_drill": lambda: compare_drill(chat, rng, phase.drill_length),
        "lab_drill": lambda: lab_drill(chat, rng, phase.drill_decisions),
        "told_drill": lambda: told_drill(chat, rng, phase.drill_decisions),
    }
    made = {
        group: [kinds[kind]() for kind in members for _ in range(phase.rows.get(kind, 0))]
        for group, members in GROUPS.items()
    }
    return packed(made, phase.length)


def processes(tokenizer: Any) -> ProcessPoolExecutor:
    """Where rows are made: on all processors but one, or the one."""
    context = multiprocessing.get_context("spawn")  # JAX has threads, and they do not survive a fork
    return ProcessPoolExecutor(max((os.cpu_count() or 2) - 1, 1), context, initializer=start, initargs=(tokenizer,))


def start(tokenizer: Any) -> None:
    """Of a worker, before its first batch. One in a process ends with the process that started it, however that
    ended: it would wait for work for ever.
    """
    _chat[:] = [ChatFormat(tokenizer)]
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def ahead(
    workers: Executor, phase: Any, seeds: Iterable[int], depth: int | None = None
) -> Generator[Batch, None, None]:
    """The batches of `seeds`, in order; up to `depth` (two for each processor) are made while earlier ones are used.
    What a worker raises is raised here.
    """
    waiting: deque = deque()
    try:
        for seed in seeds:
            waiting.append(workers.submit(_made, phase, seed))
            if len(waiting) > (depth or 2 * (os.cpu_count() or 1)):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _made(phase: Any, seed: int) -> Batch:
    return make_batch(phase, _chat[0], seed)
