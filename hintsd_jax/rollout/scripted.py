# SPDX-License-Identifier: Apache-2.0

"""A policy that plays scripts, behind the engine's interface: jobs and the texts of their actions in, the same calls to
the jobs out as from the real engine.

With it known behaviour goes through the whole loop (text -> ids -> parse -> execute -> score -> hindsight) without a
model.

Invariant: a job cannot tell it from `sampling.Engine`. It gets token ids that end with the stop token, cut where the
engine would cut them (a longer action than the job or the engine allows, a full context), and the log-prob of each is
0: a script is certain.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.sampling import EngineConfig, Job, Rewrite, SamplingStats

UNBOUNDED = EngineConfig(slots=1, context=1 << 30, max_tokens=1 << 30)


class ScriptedEngine:
    """Plays scripts in place of `sampling.Engine`.

    Args:
      chat: turns texts into ids, and says how an action ends.
      script: job -> the texts of its actions, in order; read only as far as the job goes. The job of an episode has the
        episode as `job.episode`.
      config: the limits of the engine that it stands for; none by default.
    """

    def __init__(self, chat: ChatFormat, script: Callable[[Job], Iterable[str]], config: EngineConfig = UNBOUNDED):
        self._chat, self._script, self.config = chat, script, config

    def run(self, params: Any, jobs: Iterable[Job]) -> SamplingStats:
        """Plays all jobs to their end, as many at once as there are slots; `params` are not used. Of the
        `SamplingStats` only `sampled_tokens` is counted.

        Raises:
          UserError: a prompt leaves no room for a single token.
          ValueError: a script ends before its job does.
        """
        stats, queue = SamplingStats(), deque(jobs)
        slots: list[_Play | None] = [None] * self.config.slots
        while queue or any(slots):
            for index, play in enumerate(slots):
                if play is None and queue:
                    new = slots[index] = _Play(queue.popleft())
                    new.begin(index)  # all slots first: what the jobs wait for runs side by side
            for index, play in enumerate(slots):
                if play is not None and not self._go_on(play, stats):
                    slots[index] = None
        return stats

    programs = 0

    def compile(self, params: Any, tick: Callable[[], object] = lambda: None) -> None:
        """There is nothing to compile."""

    def _go_on(self, play: _Play, stats: SamplingStats) -> bool:
        """Takes what a job has answered and gives it its next action; whether it goes on."""
        if not play.collect():
            return False
        job, context = play.job, min(play.job.context, self.config.context)
        if not 1 <= play.length < context:
            raise UserError(
                f"a context of {play.length} tokens leaves no room in one of {context}: raise it, or shorten the prompt"
            )
        if play.texts is None:
            play.texts = iter(self._script(job))
        text = next(play.texts, None)
        if text is None:
            raise ValueError("a script ended before its job")
        limit = min(job.sampling.max_tokens, self.config.max_tokens, context - play.length)
        ids = list(self._chat.encode(text)[:limit])
        job.submit(ids, [0.0] * len(ids), ids[-1] in self._chat.stop_ids)
        stats.sampled_tokens += len(ids)
        play.length += len(ids)
        play.waits = True
        return True


@dataclasses.dataclass
class _Play:
    """A job in its slot. texts: its script, once it is under way. length: of its context, in tokens. waits: for what
    the job answers.
    """

    job: Job
    texts: Iterator[str] | None = None
    length: int = 0
    waits: bool = True

    def begin(self, slot: int) -> None:
        prompt = self.job.begin(slot)
        if prompt is not None:
            self.length, self.waits = len(prompt), False

    def collect(self) -> bool:
        """Whether the job goes on."""
        answer = self.job.collect() if self.waits else ()
        if answer is None:
            return False
        self.length = len(answer.tokens) if isinstance(answer, Rewrite) else self.length + len(answer)
        return True
