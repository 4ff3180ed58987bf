# SPDX-License-Identifier: Apache-2.0

"""A policy that plays scripts, behind the engine's interface: jobs and the texts of their actions in, the same calls to
the jobs out as from the real engine.

With it known behaviour goes through the whole loop (text -> ids -> parse -> execute -> score -> hindsight) without a
model.

Invariant: a job cannot tell it from `sampling.Engine`. It gets token ids that end with the stop token, cut where the
engine would cut them (a longer action than the job or the engine allows, a full context), and the log-prob of each is
0: a script is certain.
"""

from collections.abc import Callable, Iterable
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
        """Plays all jobs to their end, one after the other; `params` are not used. Of the `SamplingStats` only
        `sampled_tokens` is counted.

        Raises:
          UserError: a prompt leaves no room for a single token.
          ValueError: a script ends before its job does.
        """
        stats = SamplingStats()
        for job in jobs:
            self._play(job, stats)
        return stats

    programs = 0

    def compile(self, params: Any, tick: Callable[[], object] = lambda: None) -> None:
        """There is nothing to compile."""

    def _play(self, job: Job, stats: SamplingStats) -> None:
        context, prompt = min(job.context, self.config.context), job.begin(0)
        if prompt is None:
            first = job.collect()
            if first is None:
                return  # over before it began
            prompt = first.tokens if isinstance(first, Rewrite) else first
        texts, length = iter(self._script(job)), len(prompt)
        while True:
            if not 1 <= length < context:
                raise UserError(
                    f"a context of {length} tokens leaves no room in one of {context}: raise it, or shorten the prompt"
                )
            text = next(texts, None)
            if text is None:
                raise ValueError("a script ended before its job")
            limit = min(job.sampling.max_tokens, self.config.max_tokens, context - length)
            ids = list(self._chat.encode(text)[:limit])
            job.submit(ids, [0.0] * len(ids), ids[-1] in self._chat.stop_ids)
            stats.sampled_tokens += len(ids)
            answer = job.collect()
            if answer is None:
                return
            length = len(answer.tokens) if isinstance(answer, Rewrite) else length + len(ids) + len(answer)
