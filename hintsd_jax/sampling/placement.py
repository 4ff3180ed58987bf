# SPDX-License-Identifier: Apache-2.0

"""Which slot has what a new prompt begins with: the prompts that slots hold and those that have arrived flow in, copies
and what is left to prefill flow out.

A prompt is prefilled in chunks whose sizes follow from its length alone. Two prompts share as many of their first
chunks as are the same in size and tokens. Invariant: so what is copied is bit by bit what a prefill of the prompt alone
writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

Prompt = tuple[int, ...]
ChunkSizes = Callable[[int], tuple[int, ...]]  # number of tokens -> sizes of their chunks


class Placement(NamedTuple):
    """Of a prompt that has arrived. source: the slot that its first `shared` tokens are copied from; its own: they are
    there already; None: nothing is shared. sizes: of the chunks that are left to prefill. wave: those of wave 0 need
    nothing that is still to be prefilled, those of wave n + 1 copy from wave n.
    """

    slot: int
    source: int | None
    shared: int
    sizes: tuple[int, ...]
    wave: int


def place(held: Sequence[Prompt], arrived: Sequence[Prompt], chunk_sizes: ChunkSizes) -> list[Placement]:
    """Places for the prompts that have arrived, in the order of their slots.

    held, arrived: of every slot the prompt whose keys and values its row has, and the one that takes its place; empty
    where there is none. Copies are right one after the other: a row is copied from before it is overwritten, within a
    wave too.
    """
    owners: dict[tuple, list[int]] = {}  # a beginning -> the slots that have it, or will
    for slot, prompt in enumerate(held):
        for beginning in _beginnings(prompt, chunk_sizes):
            owners.setdefault(beginning, []).append(slot)
    placements: dict[int, Placement] = {}
    for slot, prompt in enumerate(arrived):
        if not prompt:
            continue
        beginnings = _beginnings(prompt, chunk_sizes)
        number = next((n for n in range(len(beginnings), 0, -1) if owners.get(beginnings[n - 1])), 0)
        sources = owners[beginnings[number - 1]] if number else []
        wave_after = lambda source: placements[source].wave + 1 if source in placements else 0
        source = slot if slot in sources else min(sources, key=wave_after, default=None)
        wave = 0 if source is None or source == slot else wave_after(source)
        shared = len(beginnings[number - 1][1]) if number else 0
        placements[slot] = Placement(slot, source, shared, chunk_sizes(len(prompt) - 1)[number:], wave)
        for beginning in _beginnings(held[slot], chunk_sizes):
            owners[beginning].remove(slot)  # its row is overwritten from here on
        for beginning in beginnings:
            owners.setdefault(beginning, []).append(slot)
    return list(placements.values())


def _beginnings(prompt: Prompt, chunk_sizes: ChunkSizes) -> list[tuple[tuple[int, ...], Prompt]]:
    """Of a prompt without its last token, after every chunk: (sizes of the chunks so far, the tokens so far)."""
    tokens = prompt[:-1]
    sizes = chunk_sizes(len(tokens))
    return [(sizes[: n + 1], tokens[:end]) for n, end in enumerate(itertools.accumulate(sizes))]
