# SPDX-License-Identifier: Apache-2.0

"""Looking back on episodes while others are still being played: each episode flows in when it is over, in any order;
what an algorithm makes of all of them flows out.

Where another machine answers, its answers need not wait for the last episode: the algorithm runs in a thread beside the
rollouts, on episodes that it has to wait for. Invariant: it reads the same episodes in the same order as afterwards, so
what is asked, in which order, and what comes of it do not depend on who was quicker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.runs import interruption


class Arriving(Sequence[Episode]):
    """Episodes in their order, some still to come: going through them waits for each; their number, and any by its
    index, are there once all are. Raises GivenUp where they do not come.
    """

    def __init__(self):
        self._over: dict[int, Episode | None] = {}
        self._complete = self._given_up = False
        self._changed = threading.Condition()

    def put(self, place: int, episode: Episode | None) -> None:
        """What became of the episode with this place in the order: None where it could not be played."""
        with self._changed:
            self._over[place] = episode
            self._changed.notify_all()

    def complete(self) -> None:
        """No more come."""
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """Those that have not come never will."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Episode]:
        place = 0
        while self._is_over(place):
            if (episode := self._over[place]) is not None:
                yield episode
            place += 1

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def _is_over(self, place: int) -> bool:
        """Waits; False where there is no such place."""
        with self._changed:
            self._changed.wait_for(lambda: place in self._over or self._complete or self._given_up)
            if self._given_up:
                raise GivenUp
            return place in self._over


class GivenUp(Exception):
    """Whoever plays the episodes has failed, or was interrupted."""


class LookingBack:
    """A context manager around the rollouts of a step.

    Args:
      analyse: of the algorithm: episodes -> what comes of looking back on them.
      beside: whether it runs beside the rollouts; else after them, in the thread that asks for it.
      waiting: called when the rollouts are over and answers are waited for.
    """

    def __init__(self, analyse: Callable[[Sequence[Episode]], Hindsight], beside: bool, waiting: Callable[[], object]):
        self._analyse, self._beside, self._waiting = analyse, beside, waiting
        self._episodes, self._done = Arriving(), threading.Event()
        self._outcome: Hindsight | BaseException = Hindsight()

    def __enter__(self) -> LookingBack:
        if self._beside:
            threading.Thread(target=self._work, name="looking back", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._episodes.give_up()

    def over(self, place: int, episode: Episode | None) -> None:
        """See `Arriving.put`."""
        self._episodes.put(place, episode)

    def hindsight(self, episodes: Sequence[Episode]) -> Hindsight:
        """What came of `episodes`, all that were played; waits for it. Raises what `analyse` does."""
        if not self._beside:
            return self._analyse(episodes)
        self._waiting()
        self._episodes.complete()
        interruption.wait(self._done)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def _work(self) -> None:
        try:
            self._outcome = self._analyse(self._episodes)
        except BaseException as error:  # raised again where the outcome is asked for
            self._outcome = error
        self._done.set()
