# SPDX-License-Identifier: Apache-2.0

"""What the engine knows of each of its slots, and what it has the cache do to them: chunks to prefill, positions to
copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from hintsd_jax.sampling.jobs import Job
from hintsd_jax.sampling.prefix import common_prefix_length


@dataclasses.dataclass
class Slot:
    """arrived: the prompt of the job, until it is placed in the cache. prompt: all but its last token are in the cache
    or about to be; kept after the job has ended, until the next one's prompt is placed, for others to copy. uncached:
    known tokens that are not in the cache yet. sizes: of the chunks of all of them but the last; None: as
    `EngineConfig.chunk_sizes` has it. cached: the tokens in the cache, from position 0 on. way: how they came there:
    what was prefilled in chunks of which size, what was sampled, what a rewrite kept. pending: the last known token
    when the generation began. limit: the most tokens of the generation. began: whether the job has had its prompt.
    waiting: for what the job answers: begun or submitted, not collected.
    """

    job: Job | None = None
    arrived: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    uncached: Sequence[int] = ()
    sizes: tuple[int, ...] | None = None
    cached: list[int] = dataclasses.field(default_factory=list)
    way: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    pending: int = 0
    limit: int = 0
    began: bool = False
    waiting: bool = False

    def rewrite(self, tokens: Sequence[int]) -> None:
        """Keeps of the cache what `tokens` begin with; the rest is uncached, at least the last token, which is to be
        pending.
        """
        common = common_prefix_length(self.cached, tokens[:-1])
        del self.cached[common:]
        self.way.append(("kept", common))
        self.uncached = tokens[common:]
        if common < len(self.prompt) - 1:
            self.prompt = ()  # the slot no longer has it for others to copy

    def is_like(self, other: Slot) -> bool:
        """Whether both have the same keys and values, bit by bit: of the same tokens, come in the same way."""
        return self.way == other.way and self.cached == other.cached


class Chunk(NamedTuple):
    """Tokens that one row of a prefill writes into a slot, from position `start` on."""

    slot: int
    start: int
    tokens: Sequence[int]


class Copy(NamedTuple):
    """The positions start..stop-1 of one slot that another one gets."""

    source: int
    target: int
    start: int
    stop: int
