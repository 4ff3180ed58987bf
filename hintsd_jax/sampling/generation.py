# SPDX-License-Identifier: Apache-2.0

"""The shortest job: a prompt goes in, what is sampled after it comes out, and it is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hintsd_jax.sampling.jobs import Sampling


class Generation:
    """A `Job` of a single span. ids, logprobs: of its tokens, the stop token included; log-probs as `sampler.sample`
    gives them. cut: it ended at its limit of tokens. tick: called when it is there.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        key: np.ndarray,
        sampling: Sampling,
        context: int,
        tick: Callable[[], object] = lambda: None,
    ):
        self.prompt, self.key, self.sampling, self.context = prompt, key, sampling, context
        self._tick = tick
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.cut = False

    def begin(self, slot: int) -> Sequence[int]:
        return self.prompt

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        self.ids, self.logprobs, self.cut = ids, logprobs, not stopped
        self._tick()

    def collect(self) -> None:
        return None
