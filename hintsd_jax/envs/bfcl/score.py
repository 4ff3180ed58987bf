# SPDX-License-Identifier: Apache-2.0

"""The benchmark's score of an episode, turn by turn.

In: after each user turn, the episode's backends and the results of its calls. Out: None, or the first `TurnFailure`,
which decides.

Invariants: the comparison is the benchmark's own (`state_checker`, `response_checker`); only the instances that it
compares are ours. Everything in a `TurnFailure` is text: no live object leaves this module. Ground-truth values are in
`expected` alone.
"""

import ast
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hintsd_jax.envs.bfcl.execute import Backends

FORCE_TERMINATED = "multi_turn:force_terminated"
EMPTY_TURN = "multi_turn:empty_turn_model_response"
MAX_DIFFERENCES = 8
CLIP_CHARS = 200
# Python 3.11 counts the depth of a parse in one place for all threads, and fails where two of them parse at once.
_PARSING = threading.Lock()


@dataclass(frozen=True)
class TurnFailure:
    """Why an episode does not count as solved.

    turn: from 0 on. error_type: as the benchmark names it. differences: what was wrong, without the values of the
    ground truth. expected: those values, and the ground truth's own calls.
    """

    turn: int
    error_type: str
    differences: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()


class Scorer:
    """Follows one episode with backends of its own, on which the ground truth is played.

    Args:
      backends: new ones, used by nobody else.
      ground_truth: call expressions such as "cd(folder='document')", as [user turn][call].
    """

    def __init__(self, backends: Backends, ground_truth: Sequence[Sequence[str]]):
        # Imported late: the wheel is optional, and only a scorer needs it.
        from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker

        self._checker: Any = multi_turn_checker
        self._backends = backends
        self._ground_truth = ground_truth
        self._turn = 0
        self._results: list[str] = []  # of all turns: a result that came earlier need not be asked for again
        self.failure: TurnFailure | None = None
        self.valid_turns: list[bool] = []  # whether each turn that has ended would pass on its own

    def end_turn(self, backends: Backends, results: Sequence[str]) -> TurnFailure | None:
        """Scores the user turn that just ended, from the episode's backends and the results of all calls in it (uncut,
        in order). Returns the first failure of the episode, None while there is none.
        """
        turn, calls = self._turn, self._ground_truth[self._turn]
        self._turn += 1
        self._results += results
        expected = [self._backends.call(*parse_call(call)) for call in calls]
        # A turn whose ground truth is empty is not checked; the benchmark looks at the state in the next one.
        failure = self._compare(turn, backends, results, expected) if calls else None
        self.valid_turns.append(failure is None)
        self.failure = self.failure or failure
        return self.failure

    def _compare(
        self, turn: int, backends: Backends, results: Sequence[str], expected: list[str]
    ) -> TurnFailure | None:
        calls = tuple(f"call {call}" for call in self._ground_truth[turn])
        if not results:
            return TurnFailure(turn, EMPTY_TURN, ("no tool was called in this turn",), calls)
        verdict = self._checker.state_checker(backends.instances, self._backends.instances)
        if not verdict["valid"]:
            state = list(itertools.islice(_differences(backends.instances, self._backends.instances), MAX_DIFFERENCES))
            differences = tuple(f"{where} {what}" for where, what, _ in state)
            values = tuple(f"{where}: {value}" for where, _, value in state if value)
            return TurnFailure(turn, verdict["error_type"], differences, calls + values)
        verdict = self._checker.response_checker(self._results, expected, turn)
        if not verdict["valid"]:
            missing = verdict["details"]["missing_items"]
            results_of = zip(self._ground_truth[turn], expected, strict=True)
            tools = dict.fromkeys(parse_call(call)[0] for call, result in results_of if result in missing)
            differences = tuple(f"a result of {tool} was needed and never seen" for tool in tools)
            values = tuple(f"the result {_clip(item)}" for item in missing)
            return TurnFailure(turn, verdict["error_type"], differences, calls + values)
        return None


def force_terminated(turn: int, reason: str) -> TurnFailure:
    """The failure of an episode with fewer user turns than the ground truth has. It replaces all others."""
    return TurnFailure(turn, FORCE_TERMINATED, (reason,))


def parse_call(call: str) -> tuple[str, dict[str, Any], tuple[Any, ...]]:
    """(name, keyword arguments, positional arguments) of a ground-truth expression; literals only.

    Raises:
      ValueError: it is no plain call.
    """
    with _PARSING:
        node = ast.parse(call, mode="eval").body
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"not a plain call: {call}")
    keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return node.func.id, keywords, tuple(ast.literal_eval(argument) for argument in node.args)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(where, what is wrong, what the ground truth has) for the public attributes of every backend, as text."""
    for name in theirs:
        for attribute in vars(theirs[name]):
            if not attribute.startswith("_"):
                yield from _walk(
                    f"{name}.{attribute}", getattr(ours[name], attribute), getattr(theirs[name], attribute)
                )


def _walk(where: str, ours: Any, theirs: Any) -> Iterator[tuple[str, str, str]]:
    # Walks only where both sides have an entry, so the ground truth's (finite) tree bounds it, whatever the episode
    # built.
    if ours == theirs:
        return
    mine, other = _entries(ours), _entries(theirs)
    if mine is None or other is None or type(ours) is not type(theirs):
        yield where, f"is {_describe(ours)}, which is not right", f"should be {_describe(theirs)}"
        return
    for key in other:
        if key in mine:
            yield from _walk(f"{where}/{key}", mine[key], other[key])
        else:
            yield f"{where}/{key}", "is missing", f"should be {_describe(other[key])}"
    for key in mine:
        if key not in other:
            yield f"{where}/{key}", "should not be there", ""
    if mine == other and getattr(ours, "name", None) != getattr(theirs, "name", None):
        yield where, f"has the name {ours.name!r}, which is not right", f"should have the name {theirs.name!r}"


def _entries(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, dict):
        return value
    contents = getattr(value, "contents", None)  # a directory of GorillaFileSystem
    return contents if isinstance(contents, dict) else None


def _describe(value: Any) -> str:
    if (entries := _entries(value)) is not None:
        return f"a set of {len(entries)} entries"  # never printed whole: a directory can be copied into itself
    return _clip(repr(getattr(value, "content", value)))  # a file is its content


def _clip(text: str) -> str:
    return text if len(text) <= CLIP_CHARS else f"{text[:CLIP_CHARS]}... ({len(text)} characters)"
