# SPDX-License-Identifier: Apache-2.0

"""What an engine is made with, and what a run of it says that it cost: numbers in, numbers out."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Shapes and schedule of an engine; they decide what is compiled.

    slots: jobs that run at once. context: positions a slot can hold. max_tokens: longest generation of any job.
    prefill_buckets: chunk lengths of prefill, ascending. prefill_rows: chunks of the shortest length that are prefilled
    at once; see `rows`.
    refill_fraction: the share of running slots that must have stopped before the decode loop hands back to the host.
    overlap_env: answers are fetched one decode call later, so that environments work beside decoding. free_cache: the
    cache is there during a run only, and made anew for each.
    """

    slots: int
    context: int
    max_tokens: int
    prefill_buckets: tuple[int, ...] = (16, 64, 256, 1024)
    prefill_rows: int = 8
    refill_fraction: float = 0.25
    overlap_env: bool = False
    free_cache: bool = False

    def rows(self, bucket: int) -> int:
        """Chunks of this length that are prefilled at once: about as many tokens as of the shortest, at least one."""
        return max(1, self.prefill_rows * self.prefill_buckets[0] // bucket)

    def chunk_sizes(self, tokens: int) -> tuple[int, ...]:
        """The chunks of so many tokens, longest first: as long as they are filled, but for an eighth of the last one;
        what is left goes into the shortest.
        """
        sizes = []
        for bucket in reversed(self.prefill_buckets):
            while tokens >= bucket - bucket // 8:
                sizes.append(bucket)
                tokens = max(0, tokens - bucket)
        return (*sizes, self.prefill_buckets[0]) if tokens else tuple(sizes)


@dataclasses.dataclass
class SamplingStats:
    """What a run cost. copied_tokens: known tokens whose keys and values came from another slot, without a prefill."""

    sampled_tokens: int = 0
    prefill_tokens: int = 0
    copied_tokens: int = 0
    decode_steps: int = 0

    def add(self, other: SamplingStats) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
