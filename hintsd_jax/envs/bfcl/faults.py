# SPDX-License-Identifier: Apache-2.0

"""Which steps broke an episode, as well as the ground truth can show. PRIVILEGED.

In: the calls of an episode and those of the ground truth, by user turn, and the first turn that failed. Out:
`FaultyStep`s.

The played calls of every turn are aligned with the expected ones, those of the ground truth. What does not match
becomes edits: another argument, another tool, a surplus call, a missing call, a call at another place. Then episodes
are replayed with some of the edits applied: a fault is an edit without which the failing turn does not come out right.
So detours and harmless extra calls are not named where something else explains the failure.

Limits: alignment knows names and values, not meanings, so of another way to the same end the whole way is named; what
follows from a wrong value that was read back is named beside it; a harmless call that stands alone exactly where
another is missing is taken for a wrong choice; steps after the first failing turn are not examined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.bfcl.execute import Backends
from hintsd_jax.envs.bfcl.score import Scorer, parse_call

MAX_REPLAYS = 150  # each takes some milliseconds
_NOTHING = object()


@dataclass(frozen=True)
class PlayedCall:
    """A call of the episode: its step, from 1 on, and the text of its result."""

    step: int
    call: ToolCall
    result: str


@dataclass(frozen=True)
class PlayedTurn:
    """A user turn that has ended: its calls in order, and the step that ended it, or would have where a limit did."""

    calls: tuple[PlayedCall, ...]
    step: int


@dataclass(frozen=True)
class FaultyStep:
    """A step that broke the outcome. description: names tools and arguments, no values of the ground truth. expected:
    the ground truth's calls.
    """

    step: int
    description: str
    expected: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pair:
    """One place of an alignment: an index among the played calls, one among the expected ones, or both."""

    played: int | None
    expected: int | None
    equal: bool = False

    @property
    def one_sided(self) -> bool:
        """A surplus call or a missing one."""
        return self.played is None or self.expected is None


@dataclass(frozen=True)
class _Edit:
    """Places of one turn's alignment that are put right together; `stretch` numbers the stretch between matches that
    they stand in.
    """

    turn: int
    places: tuple[int, ...]
    stretch: int


class FaultSearch:
    """Looks for the faults of one failed episode.

    Args:
      make_backends: gives the initial state.
      turns: those that have ended.
      ground_truth: call expressions, as [user turn][call].
      failing: the first turn that the scorer found wrong, from 0 on.
    """

    def __init__(
        self,
        make_backends: Callable[[], Backends],
        turns: Sequence[PlayedTurn],
        ground_truth: Sequence[Sequence[str]],
        failing: int,
    ):
        self._make_backends, self._turns = make_backends, turns
        self._ground_truth, self._failing = ground_truth, failing
        self._replays = 0
        backends = make_backends()  # for its signatures only
        bound = lambda call: ToolCall(call.name, backends.bound(call.name, call.arguments))
        self._played = [[bound(played.call) for played in turn.calls] for turn in turns[: failing + 1]]
        self._expected = [[_expected_call(backends, text) for text in calls] for calls in ground_truth[: failing + 1]]
        self._paths = [self._align(turn) for turn in range(failing + 1)]

    def faulty_steps(self) -> list[FaultyStep]:
        """In order of steps, one for each step; empty where the calls are the ground truth's own."""
        edits: dict[int, list[_Edit]] = {}
        for edit in self._needed([edit for turn in range(self._failing + 1) for edit in self._edits(turn)]):
            edits.setdefault(self._step(edit), []).append(edit)
        return [self._faulty_step(step, edits[step]) for step in sorted(edits)]

    def _align(self, turn: int) -> list[_Pair]:
        """The cheapest way from the played calls of a turn to the expected ones."""
        calls, played, expected = self._turns[turn].calls, self._played[turn], self._expected[turn]
        cost = [[0.0] * (len(expected) + 1) for _ in range(len(played) + 1)]  # of what is left from (i, j) on
        both = [[_cost(calls[i], played[i], expected[j]) for j in range(len(expected))] for i in range(len(played))]
        for i in range(len(played), -1, -1):
            for j in range(len(expected), -1, -1):
                ways = []
                if i < len(played):
                    ways.append(1 + cost[i + 1][j])
                if j < len(expected):
                    ways.append(1 + cost[i][j + 1])
                if i < len(played) and j < len(expected):
                    ways.append(both[i][j] + cost[i + 1][j + 1])
                cost[i][j] = min(ways, default=0.0)
        path, i, j = [], 0, 0
        while i < len(played) or j < len(expected):
            if i < len(played) and j < len(expected) and cost[i][j] == both[i][j] + cost[i + 1][j + 1]:
                path.append(_Pair(i, j, played[i] == expected[j]))
                i, j = i + 1, j + 1
            elif j < len(expected) and cost[i][j] == 1 + cost[i][j + 1]:
                path.append(_Pair(None, j))
                j += 1
            else:
                path.append(_Pair(i, None))
                i += 1
        return self._replacements(turn, path)

    def _replacements(self, turn: int, path: list[_Pair]) -> list[_Pair]:
        """The path, in which a surplus call beside a missing one, with nothing else between two matches, is one call in
        place of another.
        """
        merged: list[_Pair] = []
        surplus = [self._played[turn][pair.played] for pair in path if pair.played is not None and pair.one_sided]
        missing = [self._expected[turn][pair.expected] for pair in path if pair.expected is not None and pair.one_sided]
        for place, pair in enumerate(path):
            last = merged[-1] if merged else None
            alone = not any(near.one_sided for near in (*path[place - 2 : place - 1], *path[place + 1 : place + 2]))
            if alone and last and (replacement := _replacement(last, pair)):
                played, expected = replacement
                # a call that was only made at another place is no replacement
                moved = self._played[turn][played] in missing or self._expected[turn][expected] in surplus
                if not moved:
                    merged[-1] = _Pair(played, expected)
                    continue
            merged.append(pair)
        return merged

    def _edits(self, turn: int) -> list[_Edit]:
        """The edits of a turn in order. A call that is surplus here and missing there was made at the wrong place: one
        edit.
        """
        path, stretch = self._paths[turn], 0
        edits: list[_Edit] = []
        moved: set[int] = set()
        for place, pair in enumerate(path):
            stretch += pair.equal
            if pair.equal or place in moved:
                continue
            later = range(place + 1, len(path))
            places = [place, *[n for n in later if n not in moved and self._same_call(turn, pair, path[n])][:1]]
            if pair.one_sided:
                moved.update(places)
            edits.append(_Edit(turn, tuple(places), stretch))
        return edits

    def _same_call(self, turn: int, one: _Pair, other: _Pair) -> bool:
        """Whether one is surplus, the other missing, and both are the same call."""
        pair = _replacement(one, other)
        return pair is not None and self._played[turn][pair[0]] == self._expected[turn][pair[1]]

    def _needed(self, edits: list[_Edit]) -> list[_Edit]:
        """Edits without which the failing turn stays wrong: one alone if there is one, else a set of which none can be
        left out.
        """
        recent = sorted(edits, key=lambda edit: -edit.turn)  # stable: in order within a turn
        for edit in recent:
            if self._repairs([edit]):
                return [edit]
        if len(edits) < 2 or not self._repairs(edits):
            return [edit for edit in edits if edit.turn == self._failing] or edits
        groups = [[edit for edit in edits if edit.turn < self._failing]]
        groups += [
            [edit for edit in edits if (edit.turn, edit.stretch) == key]
            for key in dict.fromkeys((edit.turn, edit.stretch) for edit in edits)
        ]
        extra = [edit for edit in edits if self._is_extra(edit)]
        groups += [[edit] for edit in (*extra, *(edit for edit in edits if edit not in extra))]
        needed = edits
        for group in groups:
            fewer = [edit for edit in needed if edit not in group]
            if fewer and len(fewer) < len(needed) and self._repairs(fewer):
                needed = fewer
        return needed

    def _is_extra(self, edit: _Edit) -> bool:
        return all(self._paths[edit.turn][place].expected is None for place in edit.places)

    def _repairs(self, edits: Sequence[_Edit]) -> bool:
        """Whether the episode, replayed with these edits, is right up to the failing turn."""
        if self._replays == MAX_REPLAYS:
            return False
        self._replays += 1
        chosen = {(edit.turn, place) for edit in edits for place in edit.places}
        backends, scorer = self._make_backends(), Scorer(self._make_backends(), self._ground_truth)
        for turn, path in enumerate(self._paths):
            calls = [self._call(turn, pair, (turn, place) in chosen) for place, pair in enumerate(path)]
            if scorer.end_turn(backends, [backends.call(call.name, call.arguments) for call in calls if call]):
                return False
        return True

    def _call(self, turn: int, pair: _Pair, edited: bool) -> ToolCall | None:
        if edited:
            return None if pair.expected is None else self._expected[turn][pair.expected]
        return None if pair.played is None else self._turns[turn].calls[pair.played].call

    def _step(self, edit: _Edit) -> int:
        """Where it should have gone otherwise: at the call itself; for a missing one, at the next call that is right or
        stands for one.
        """
        return min(self._place_step(edit.turn, place) for place in edit.places)

    def _place_step(self, turn: int, place: int) -> int:
        path, calls = self._paths[turn], self._turns[turn].calls
        played = path[place].played
        if played is not None:
            return calls[played].step
        following = (
            calls[pair.played].step for pair in path[place:] if pair.played is not None and pair.expected is not None
        )
        return next(following, self._turns[turn].step)

    def _faulty_step(self, step: int, edits: Sequence[_Edit]) -> FaultyStep:
        expected = [
            self._ground_truth[edit.turn][pair.expected]
            for edit in edits
            for pair in (self._paths[edit.turn][place] for place in edit.places)
            if pair.expected is not None
        ]
        descriptions = dict.fromkeys(self._describe(edit) for edit in edits)
        return FaultyStep(step, " ".join(descriptions), tuple(dict.fromkeys(expected)))

    def _describe(self, edit: _Edit) -> str:
        pairs = [self._paths[edit.turn][place] for place in edit.places]
        played = next((self._played[edit.turn][pair.played] for pair in pairs if pair.played is not None), None)
        expected = next((self._expected[edit.turn][pair.expected] for pair in pairs if pair.expected is not None), None)
        if played and len(pairs) == 2:
            return f"{played.name} was called too {'late' if pairs[0].played is None else 'early'}."
        if played and expected:
            if played.name != expected.name:
                return f"{played.name} was called where {expected.name} was needed."
            return f"{played.name} was called {', '.join(_argument_faults(played, expected))}."
        if played:
            return f"{played.name} should not have been called here."
        assert expected, "an edit has a call on one side at least"
        if self._place_step(edit.turn, edit.places[0]) == self._turns[edit.turn].step:
            return f"The user turn was ended without a call of {expected.name}."
        return f"Before this there should be a call of {expected.name}."


def _expected_call(backends: Backends, text: str) -> ToolCall:
    name, keywords, positional = parse_call(text)
    return ToolCall(name, backends.bound(name, keywords, positional))


def _replacement(one: _Pair, other: _Pair) -> tuple[int, int] | None:
    """(played, expected) of a surplus call and a missing one, in any order; None for other pairs."""
    if one.played is None:
        one, other = other, one
    if one.played is None or one.expected is not None or other.expected is None or other.played is not None:
        return None
    return one.played, other.expected


def _cost(played: PlayedCall, call: ToolCall, expected: ToolCall) -> float:
    """Of taking one call, `call` with all its arguments by name, for another. Above 2 they count rather as two things:
    one surplus and one missing.
    """
    if call == expected:
        return 0.0
    if call.name == expected.name:
        keys = call.arguments.keys() | expected.arguments.keys()
        differing = sum(call.arguments.get(key, _NOTHING) != expected.arguments.get(key, _NOTHING) for key in keys)
        # of several attempts the one that went through is the one that counts
        return 1 + 0.5 * differing / len(keys) + 0.2 * failed(played)
    values = [value for value in call.arguments.values() if value and not isinstance(value, bool)]
    if any(value in expected.arguments.values() for value in values):
        return 1.6
    return 1.8 if failed(played) else 2.1


def failed(played: PlayedCall) -> bool:
    """Whether the result of a call is an error."""
    return "error" in played.result[:40].lower()


def _argument_faults(played: ToolCall, expected: ToolCall) -> Iterator[str]:
    given = played.arguments
    if wrong := [key for key, value in expected.arguments.items() if key in given and given[key] != value]:
        yield f"with a wrong value for {' and '.join(wrong)}"
    if lacking := [key for key in expected.arguments if key not in given]:
        yield f"without {' and '.join(lacking)}"
    if surplus := [key for key in given if key not in expected.arguments]:
        yield f"with {' and '.join(surplus)}, which it does not take"
