# SPDX-License-Identifier: Apache-2.0

"""Which steps of an episode brought nothing. In: every step's calls with their results. Out: the first such step.

A step is wasted if its action could not be read, or if each of its calls got an error or repeated one that was made in
the same user turn with the same result. No outcome breaks by one of them; enough of them use up the limits, so in an
episode that a limit has cut the first of them is where it should have gone otherwise (the rule of Desk too).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hintsd_jax.envs.bfcl.faults import PlayedCall, failed

UNREADABLE = "The call in this step could not be read."
NOTHING_NEW = "This step only got errors, or repeated calls of this user turn with the same results."


@dataclass(frozen=True)
class WastedStep:
    """step: from 1 on. reason: one sentence."""

    step: int
    reason: str


class Waste:
    """Follows one episode, step by step."""

    def __init__(self):
        self._seen: set[tuple[str, str, str]] = set()  # calls of the user turn with their results
        self._in_turn: WastedStep | None = None
        self._in_episode: WastedStep | None = None

    @property
    def first(self) -> WastedStep | None:
        """The first wasted step of the current user turn; where it has none, of the episode."""
        return self._in_turn or self._in_episode

    def end_turn(self) -> None:
        """The next step belongs to another user turn."""
        self._seen, self._in_turn = set(), None

    def note_unreadable(self, step: int) -> None:
        """An action whose calls could not be read, and that did not end the user turn."""
        self._note(WastedStep(step, UNREADABLE))

    def note_calls(self, step: int, calls: Sequence[PlayedCall]) -> None:
        """The calls of a step, at least one."""
        useful = False
        for played in calls:
            made = (played.call.name, repr(sorted(played.call.arguments.items())), played.result)
            useful = useful or not (failed(played) or made in self._seen)
            self._seen.add(made)
        if not useful:
            self._note(WastedStep(step, NOTHING_NEW))

    def _note(self, wasted: WastedStep) -> None:
        self._in_turn = self._in_turn or wasted
        self._in_episode = self._in_episode or wasted
