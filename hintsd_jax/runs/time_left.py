# SPDX-License-Identifier: Apache-2.0

"""How long a run will still take: seconds that steps and evaluations took flow in, an estimate flows out.

What is still to come is known: so many training steps, and these evaluations. A step costs what the last ones cost; an
evaluation what one of the same size would cost at the pace of the last one, or else its episodes at the rate of those
that were played. Seconds of compilation are left out by whoever measures: they do not come again.
"""

from __future__ import annotations

import dataclasses
from collections import deque

EVALUATED, ROLLED_OUT = "evaluated", "rolled_out"  # what episodes were played for
_STEPS = 5  # so many last ones count: a policy that gets better has shorter steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run has to do. steps: training steps. eval_every: steps between evaluations, 0: none but after the last.
    eval_episodes: of each of these. test_episodes: of each part of the held-out test, before and after.
    """

    steps: int
    eval_every: int = 0
    eval_episodes: int = 0
    test_episodes: tuple[int, ...] = ()

    def evaluations_after(self, step: int) -> list[int]:
        """The episodes of each evaluation that is still to come after so many steps."""
        at = [n for n in range(step + 1, self.steps + 1) if self.is_evaluation_step(n)]
        return [self.eval_episodes] * len(at) + list(self.test_episodes)

    def is_evaluation_step(self, step: int) -> bool:
        return step == self.steps or bool(self.eval_every and step % self.eval_every == 0)


class TimeLeft:
    """Adds up what was measured. All times in seconds."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._is_first = True
        self._evaluations: dict[int, float] = {}  # episodes -> seconds of the last evaluation of this size
        self._played = {EVALUATED: (0, 0.0), ROLLED_OUT: (0, 0.0)}  # (episodes, seconds)

    def played(self, kind: str, episodes: int, seconds: float) -> None:
        """Episodes were played, EVALUATED or ROLLED_OUT."""
        before = self._played[kind]
        self._played[kind] = (before[0] + episodes, before[1] + seconds)
        if kind == EVALUATED:
            pace = seconds / self._evaluations.get(episodes, seconds) if seconds else 1.0
            self._evaluations = {
                size: before * _carried(pace, episodes, size) for size, before in self._evaluations.items()
            }
            self._evaluations[episodes] = seconds

    def step_done(self, seconds: float) -> None:
        """A training step took so long, its evaluation not counted."""
        if self._is_first and self._steps:
            self._steps.clear()  # the first of a process is slower: files, caches and memory are made
            self._is_first = False
        self._steps.append(seconds)

    def seconds(
        self, step: int, spent: float = 0.0, evaluated: int = 0, playing: tuple[int, int, float] | None = None
    ) -> float | None:
        """The estimate, or None while no step is done.

        Args:
          step: training steps done.
          spent: on the next one so far.
          evaluated: evaluations of it, or after the last step, that are over.
          playing: of an evaluation that runs, its episodes, how many are over, and the seconds so far.
        """
        if not self._steps:
            return None
        each, steps = sum(self._steps) / len(self._steps), self._plan.steps - step
        left = max(each - spent, 0.0) + each * (steps - 1) if steps > 0 else 0.0
        evaluations = self._plan.evaluations_after(step)[evaluated:]
        if playing is None or not evaluations:
            return left + sum(map(self._evaluation, evaluations))
        rest, pace = self._rest(*playing)
        later = (_carried(pace, playing[0], size) * self._evaluation(size) for size in evaluations[1:])
        return left + rest + sum(later)

    def _rest(self, episodes: int, over: int, seconds: float) -> tuple[float, float]:
        """Of an evaluation that runs: what is left of it, and how it goes compared with what was expected. The more of
        its episodes are over, the more these say.
        """
        whole, share = self._evaluation(episodes), over / max(episodes, 1)
        by_episodes = seconds / share - seconds if over else 0.0
        rest = (1 - share) * max(whole - seconds, 0.0) + share * by_episodes
        return rest, 1.0 if not whole else (1 - share) + share * (seconds + rest) / whole

    def _evaluation(self, episodes: int) -> float:
        if episodes in self._evaluations:
            return self._evaluations[episodes]
        played, seconds = self._played[EVALUATED if self._evaluations else ROLLED_OUT]
        return episodes * seconds / played if played else 0.0


def _carried(pace: float, episodes: int, size: int) -> float:
    """What the pace of an evaluation of so many episodes says of one of another size: policy and machine are the same,
    but a few episodes say little about many.
    """
    return pace ** (episodes / (episodes + size))
