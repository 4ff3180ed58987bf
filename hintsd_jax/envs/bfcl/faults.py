"""Which steps broke an episode, as well as the ground truth can tell. PRIVILEGED.

In: the calls that were made and those of the ground truth, by user turn, and the first turn that failed. Out:
`Finding`s.

The made calls of every turn are aligned with the ground truth's. What does not match becomes edits: another argument,
another tool, a call too many, a call missing, a call at another place. Then episodes are played again with some of the
edits made: a fault is an edit without which the failing turn does not come out right. So detours and harmless extra
calls are not named where something else explains the failure.

Limits: alignment knows names and values, not meanings, so of another way to the same end the whole way is named; what
follows from a wrong value that was read back is named beside it; a harmless call that stands alone exactly where
another is missing is taken for a wrong choice; steps after the first failing turn are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.bfcl.execute import World
from hintsd_jax.envs.bfcl.score import Judge, parse_call

MAX_REPLAYS = 150  # each takes some milliseconds
_NOTHING = object()


@dataclass(frozen=True)
class Made:
    """A call of the episode: in which step (1-based), and what came of it."""

    step: int
    call: ToolCall
    result: str


@dataclass(frozen=True)
class Ended:
    """A user turn that has ended: its calls in order, and the step that ended it."""

    calls: tuple[Made, ...]
    step: int


@dataclass(frozen=True)
class Finding:
    """A step that broke the outcome; `what` names tools and arguments, `expected` gives the ground truth's calls."""

    step: int
    what: str
    expected: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pair:
    """One place of an alignment: an index among the made calls, one among the ground truth's, or both."""

    made: int | None
    wanted: int | None
    equal: bool = False


@dataclass(frozen=True)
class _Edit:
    """Places of one turn's alignment that are put right together; `run` numbers the stretch between matches that they
    stand in.
    """

    turn: int
    places: tuple[int, ...]
    run: int


class Search:
    """Looks for the faults of one failed episode.

    `make_world()` gives the initial state, `turns` are those that have ended, `ground_truth[turn]` holds call
    expressions, `failing` is the 0-based index of the first turn that the judge found wrong.
    """

    def __init__(
        self,
        make_world: Callable[[], World],
        turns: Sequence[Ended],
        ground_truth: Sequence[Sequence[str]],
        failing: int,
    ):
        self._make_world, self._turns, self._ground_truth, self._failing = make_world, turns, ground_truth, failing
        self._replays = 0
        world = make_world()  # only its signatures are asked for
        bound = lambda call: ToolCall(call.name, world.bound(call.name, call.arguments))
        self._made = [[bound(made.call) for made in turn.calls] for turn in turns[: failing + 1]]
        self._wanted = [[_wanted(world, text) for text in calls] for calls in ground_truth[: failing + 1]]
        self._paths = [self._align(turn) for turn in range(failing + 1)]

    def findings(self) -> list[Finding]:
        """In order of steps, one for each step; empty where the calls are the ground truth's own."""
        found: dict[int, list[_Edit]] = {}
        for edit in self._needed([edit for turn in range(self._failing + 1) for edit in self._edits(turn)]):
            found.setdefault(self._step(edit), []).append(edit)
        return [self._finding(step, found[step]) for step in sorted(found)]

    def _align(self, turn: int) -> list[_Pair]:
        """The cheapest way from the made calls of a turn to the wanted ones."""
        played, made, wanted = self._turns[turn].calls, self._made[turn], self._wanted[turn]
        cost = [[0.0] * (len(wanted) + 1) for _ in range(len(made) + 1)]  # of what is left from (i, j) on
        both = [[_cost(played[i], made[i], wanted[j]) for j in range(len(wanted))] for i in range(len(made))]
        for i in range(len(made), -1, -1):
            for j in range(len(wanted), -1, -1):
                ways = []
                if i < len(made):
                    ways.append(1 + cost[i + 1][j])
                if j < len(wanted):
                    ways.append(1 + cost[i][j + 1])
                if i < len(made) and j < len(wanted):
                    ways.append(both[i][j] + cost[i + 1][j + 1])
                cost[i][j] = min(ways, default=0.0)
        path, i, j = [], 0, 0
        while i < len(made) or j < len(wanted):
            if i < len(made) and j < len(wanted) and cost[i][j] == both[i][j] + cost[i + 1][j + 1]:
                path.append(_Pair(i, j, made[i] == wanted[j]))
                i, j = i + 1, j + 1
            elif j < len(wanted) and cost[i][j] == 1 + cost[i][j + 1]:
                path.append(_Pair(None, j))
                j += 1
            else:
                path.append(_Pair(i, None))
                i += 1
        return self._replacements(turn, path)

    def _replacements(self, turn: int, path: list[_Pair]) -> list[_Pair]:
        """A call too many beside a missing one, with nothing else between two matches, is one call in place of another."""
        merged: list[_Pair] = []
        surplus = [self._made[turn][pair.made] for pair in path if pair.wanted is None]
        missing = [self._wanted[turn][pair.wanted] for pair in path if pair.made is None]
        for place, pair in enumerate(path):
            last = merged[-1] if merged else None
            alone = not _loose(path[place - 2 : place - 1]) and not _loose(path[place + 1 : place + 2])
            if (
                alone
                and last
                and {last.made is None, pair.made is None} == {True, False}
                and _loose([last])
                and _loose([pair])
            ):
                one, other = (last, pair) if pair.made is None else (pair, last)
                moved = self._made[turn][one.made] in missing or self._wanted[turn][other.wanted] in surplus
                if not moved:
                    merged[-1] = _Pair(one.made, other.wanted)
                    continue
            merged.append(pair)
        return merged

    def _edits(self, turn: int) -> list[_Edit]:
        """The edits of a turn in order. A call that is too many here and missing there was made at the wrong place: one
        edit.
        """
        path, edits, moved, run = self._paths[turn], [], set(), 0
        for place, pair in enumerate(path):
            run += pair.equal
            if pair.equal or place in moved:
                continue
            places = [place]
            if _loose([pair]):
                places += [
                    other
                    for other in range(place + 1, len(path))
                    if other not in moved and self._same(turn, pair, path[other])
                ][:1]
                moved.update(places)
            edits.append(_Edit(turn, tuple(places), run))
        return edits

    def _same(self, turn: int, one: _Pair, other: _Pair) -> bool:
        if one.made is None:
            one, other = other, one
        if one.made is None or not _loose([one, other]) or other.made is not None:
            return False
        return self._made[turn][one.made] == self._wanted[turn][other.wanted]

    def _needed(self, edits: list[_Edit]) -> list[_Edit]:
        """Edits without which the failing turn stays wrong: one alone if there is such, else a set of which none can be
        left out.
        """
        recent = sorted(edits, key=lambda edit: -edit.turn)  # stable: in order within a turn
        for edit in recent:
            if self._mends([edit]):
                return [edit]
        if len(edits) < 2 or not self._mends(edits):
            return [edit for edit in edits if edit.turn == self._failing] or edits
        groups = [[edit for edit in edits if edit.turn < self._failing]]
        groups += [
            [edit for edit in edits if (edit.turn, edit.run) == key]
            for key in dict.fromkeys((e.turn, e.run) for e in edits)
        ]
        extra = [edit for edit in edits if self._is_extra(edit)]
        groups += [[edit] for edit in (*extra, *(edit for edit in edits if edit not in extra))]
        needed = edits
        for group in groups:
            fewer = [edit for edit in needed if edit not in group]
            if fewer and len(fewer) < len(needed) and self._mends(fewer):
                needed = fewer
        return needed

    def _is_extra(self, edit: _Edit) -> bool:
        return all(self._paths[edit.turn][place].wanted is None for place in edit.places)

    def _mends(self, edits: Sequence[_Edit]) -> bool:
        """Whether the episode, played again with these edits, is right up to the failing turn."""
        if self._replays == MAX_REPLAYS:
            return False
        self._replays += 1
        chosen = {(edit.turn, place) for edit in edits for place in edit.places}
        world, judge = self._make_world(), Judge(self._make_world(), self._ground_truth)
        for turn, path in enumerate(self._paths):
            calls = [self._call(turn, pair, (turn, place) in chosen) for place, pair in enumerate(path)]
            if judge.end_turn(world, [world.call(call.name, call.arguments) for call in calls if call]):
                return False
        return True

    def _call(self, turn: int, pair: _Pair, edited: bool) -> ToolCall | None:
        if edited:
            return None if pair.wanted is None else self._wanted[turn][pair.wanted]
        return None if pair.made is None else self._turns[turn].calls[pair.made].call

    def _step(self, edit: _Edit) -> int:
        """Where it should have gone otherwise: at the call itself; for a missing one, at the next call that is right or
        stands for one.
        """
        return min(self._place_step(edit.turn, place) for place in edit.places)

    def _place_step(self, turn: int, place: int) -> int:
        path, calls = self._paths[turn], self._turns[turn].calls
        if path[place].made is not None:
            return calls[path[place].made].step
        following = (
            calls[pair.made].step for pair in path[place:] if pair.made is not None and pair.wanted is not None
        )
        return next(following, self._turns[turn].step)

    def _finding(self, step: int, edits: Sequence[_Edit]) -> Finding:
        wanted = [
            self._ground_truth[edit.turn][pair.wanted]
            for edit in edits
            for pair in (self._paths[edit.turn][place] for place in edit.places)
            if pair.wanted is not None
        ]
        return Finding(step, " ".join(dict.fromkeys(self._words(edit) for edit in edits)), tuple(dict.fromkeys(wanted)))

    def _words(self, edit: _Edit) -> str:
        pairs = [self._paths[edit.turn][place] for place in edit.places]
        made = next((self._made[edit.turn][pair.made] for pair in pairs if pair.made is not None), None)
        wanted = next((self._wanted[edit.turn][pair.wanted] for pair in pairs if pair.wanted is not None), None)
        if len(pairs) == 2:
            return f"{made.name} was called too {'late' if pairs[0].made is None else 'early'}."
        if wanted is None:
            return f"{made.name} should not have been called here."
        if made is None:
            ended = self._place_step(edit.turn, edit.places[0]) == self._turns[edit.turn].step
            return f"{'The user turn was ended without a call of' if ended else 'Before this there should be a call of'} {wanted.name}."
        if made.name != wanted.name:
            return f"{made.name} was called where {wanted.name} was needed."
        return f"{made.name} was called {', '.join(_argument_faults(made, wanted))}."


def _wanted(world: World, text: str) -> ToolCall:
    name, keywords, positional = parse_call(text)
    return ToolCall(name, world.bound(name, keywords, positional))


def _loose(pairs: Sequence[_Pair]) -> bool:
    """Whether there are any, and each stands on one side alone."""
    return bool(pairs) and all(pair.made is None or pair.wanted is None for pair in pairs)


def _cost(played: Made, made: ToolCall, wanted: ToolCall) -> float:
    """Of taking one call for the other. Above 2 they are rather two things: one too many and one missing."""
    if made == wanted:
        return 0.0
    if made.name == wanted.name:
        keys = made.arguments.keys() | wanted.arguments.keys()
        differing = sum(made.arguments.get(key, _NOTHING) != wanted.arguments.get(key, _NOTHING) for key in keys)
        return (
            1 + 0.5 * differing / len(keys) + 0.2 * _failed(played)
        )  # the attempt that went through is the one that counts
    if any(
        value in wanted.arguments.values() for value in made.arguments.values() if not isinstance(value, bool) and value
    ):
        return 1.6
    return 1.8 if _failed(played) else 2.1


def _failed(played: Made) -> bool:
    return "error" in played.result[:40].lower()


def _argument_faults(made: ToolCall, wanted: ToolCall) -> Iterator[str]:
    if wrong := [
        key for key, value in wanted.arguments.items() if key in made.arguments and made.arguments[key] != value
    ]:
        yield f"with a wrong value for {' and '.join(wrong)}"
    if lacking := [key for key in wanted.arguments if key not in made.arguments]:
        yield f"without {' and '.join(lacking)}"
    if surplus := [key for key in made.arguments if key not in wanted.arguments]:
        yield f"with {' and '.join(surplus)}, which it does not take"
