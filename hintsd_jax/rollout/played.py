# SPDX-License-Identifier: Apache-2.0

"""What came of playing tasks: the episodes that were played, and a count of all that were not.

Invariant 8: an episode that its environment's failure kept from beginning, or ended, is no evidence about the policy.
It is not among `Rollouts.episodes`, which alone are scored, looked back on and trained on, but counted: begun = played
+ dropped.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hintsd_jax.rollout.episode import Episode
from hintsd_jax.sampling import SamplingStats

PROMPT_TOO_LONG = "prompt_too_long"


@dataclasses.dataclass(frozen=True)
class EnvFailure:
    """A call of an environment that failed. task_id, rollout: of the episode. call: "reset", "step 3", "report" or
    "close" (of which the episode is not known). reason, detail, traceback: see `env_call.CallFailure`.
    """

    task_id: str
    rollout: int
    call: str
    reason: str
    detail: str
    traceback: str = ""


class Rollouts(NamedTuple):
    """What came of playing tasks: `begun` = len(episodes) + sum of `dropped`.

    episodes: those that were played, in task order, then rollout order. dropped: the others by reason: their
    environment failed (ENV_ERROR, ENV_TIMEOUT, ENV_DIED), or their prompt does not fit (PROMPT_TOO_LONG). stats: what
    sampling cost. too_long: task -> the tokens of its prompt, where that does not fit. failures: every call that
    failed, those that cost no episode (a report, a close) too. lost: what was played of episodes that their environment
    ended; for the record only.
    """

    episodes: list[Episode]
    dropped: Counter[str]
    stats: SamplingStats
    too_long: Mapping[str, int] = {}
    failures: tuple[EnvFailure, ...] = ()
    lost: Sequence[Episode] = ()

    @classmethod
    def none(cls) -> Rollouts:
        """Nothing was to be played."""
        return cls([], Counter(), SamplingStats())

    @classmethod
    def together(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """What several processes have played, in their order; they share the tasks out in this order."""
        stats, dropped, too_long = SamplingStats(), Counter(), {}
        for part in parts:
            stats.add(part.stats)
            dropped.update(part.dropped)
            too_long |= part.too_long
        episodes = [episode for part in parts for episode in part.episodes]
        failures = tuple(failure for part in parts for failure in part.failures)
        return cls(episodes, dropped, stats, too_long, failures, [episode for part in parts for episode in part.lost])

    @property
    def begun(self) -> int:
        """Episodes that were to be played."""
        return len(self.episodes) + sum(self.dropped.values())

    @property
    def failed(self) -> int:
        """Episodes that their environments' failures cost."""
        return sum(number for reason, number in self.dropped.items() if reason != PROMPT_TOO_LONG)

    def describe_too_long(self) -> str:
        """The prompts that do not fit, in words: "1,054 to 1,071 tokens in 2 tasks"."""
        shortest, longest = min(self.too_long.values()), max(self.too_long.values())
        lengths = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
        return f"{lengths} tokens in {len(self.too_long)} {'task' if len(self.too_long) == 1 else 'tasks'}"
