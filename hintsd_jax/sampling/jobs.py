# SPDX-License-Identifier: Apache-2.0

"""What the engine serves: a dialogue with a policy, and how its answers are sampled. Types only.

A job gives its prompt, takes every sampled span and answers it with more tokens, until it is over. Episodes and the
analyser's questions are jobs; the engine knows neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a job samples.

    temperature: 0 takes the most likely token. top_p: 1 keeps all tokens. top_k: 0 keeps all tokens. max_tokens: the
    most tokens of one generation. is_complete: of the ids sampled so far, whether they need no more; asked from time to
    time, and the generation ends where it is so. None: only a stop token or the limit ends it.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    is_complete: Callable[[Sequence[int]], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """A job's new context, in place of all that it had.

    key: a new one for what is sampled from here on. A key is folded with the position, and positions come again.
    """

    tokens: Sequence[int]
    key: np.ndarray


class Job(Protocol):
    """A dialogue. Once a slot is free for it the engine begins it, samples after its prompt, gives the span to `submit`
    and goes on after `collect`.

    context: the most tokens that the dialogue may have, sampled ones included; at most the engine's. key: uint32 [2],
    raw data of a threefry key, this job's own.
    """

    context: int
    key: np.ndarray
    sampling: Sampling

    def begin(self, slot: int) -> Sequence[int] | None:
        """Takes the number of the slot that the job has until it is over, and gives its prompt as token ids. Must not
        block: None where the prompt is still to come, by the first `collect`, as a `Rewrite`.
        """

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        """Takes a sampled span (its stop token included; `stopped` False if it was cut at a limit). Must not block."""

    def collect(self) -> Sequence[int] | Rewrite | None:
        """The tokens that answer the span, a whole new context, or None when the job is over. May block."""
