# SPDX-License-Identifier: Apache-2.0

"""Answers of analysers and judges: text in; targets, a verdict or a hint out. Nothing here ever raises, whatever the
text.

The answer is the last complete JSON object that holds what was asked for. What stands around it does not matter:
reasoning, quoted calls with braces of their own, code fences, an answer that goes on. Of a review, entries are dropped
whose step is not a whole number in range (2.0 and "2" are), whose feedback is empty, or whose step repeats; the rest is
sorted and the first `max_targets` are kept. An answer that cannot be read drops its rollout; there is no retry.

Invariant 7: whatever is dropped is counted by reason.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hintsd_jax.hindsight.targets import Target
from hintsd_jax.texts import encodable

REASONS = ("unparsable", "truncated", "bad_step", "empty_feedback", "repeated_step", "over_limit")
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_LONGEST = 20_000  # characters of an answer that are looked at, its last ones: more than any has, and quick to search
_NUMBER = re.compile(r"\s*(?:step\s*)?#?\s*([+-]?\d{1,9})(?:\.0*)?\s*", re.IGNORECASE)
_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings


@dataclass(frozen=True)
class Parsed:
    """`targets` are sorted by step, unique in it, and at most the limit. `problem`: why the whole answer could not be
    read, else None. `dropped`: counts by reason, only those that occurred; "unparsable" and "truncated" count the
    answer, the others its entries."""

    targets: tuple[Target, ...]
    problem: str | None
    dropped: Mapping[str, int]


def parse_failures(
    text: str, num_steps: int, max_targets: int, only_step: int | None = None, cut: bool = False
) -> Parsed:
    """Targets of an episode of `num_steps` steps, from one of these forms (the last two share one feedback):

        {"failures": [{"step": 2, "feedback": "..."}]}
        {"failure_step": 2, "feedback": "..."}
        {"failure_steps": [2, 5], "feedback": "..."}

    Args:
      only_step: the step that was asked about (`PromptSet.step_feedback`); any other then counts as "bad_step".
      cut: the answer was cut at its limit of tokens; where it cannot be read it then counts as "truncated".
    """
    answer = _last_object(text, lambda value: _entries(value) is not None)
    if answer is None:
        problem = 'no complete JSON object with "failures", "failure_step" or "failure_steps"'
        problem += " before the answer was cut at its limit of tokens" if cut else ""
        return Parsed((), problem, {"truncated" if cut else "unparsable": 1})
    allowed = range(1, num_steps + 1) if only_step is None else (only_step,)
    by_step: dict[int, Target] = {}
    dropped: Counter[str] = Counter()
    for entry in _entries(answer) or ():
        entry = entry if isinstance(entry, dict) else {}
        step, feedback = whole_number(entry.get("step")), entry.get("feedback")
        if step is None or step not in allowed:
            dropped["bad_step"] += 1
        elif not isinstance(feedback, str) or not feedback.strip():
            dropped["empty_feedback"] += 1
        elif step in by_step:
            dropped["repeated_step"] += 1
        else:
            by_step[step] = Target(step, encodable(feedback.strip()))
    targets = sorted(by_step.values())
    if len(targets) > max_targets:
        dropped["over_limit"] = len(targets) - max_targets
    return Parsed(tuple(targets[:max_targets]), None, dict(dropped))


def parse_verdict(text: str) -> float | None:
    """1.0, -1.0 or 0.0 of `{"verdict": ...}`; None where there is none."""
    answer = _last_object(text, lambda value: whole_number(value.get("verdict")) in (1, -1, 0))
    return None if answer is None else float(whole_number(answer["verdict"]) or 0)


def parse_hint(text: str) -> tuple[bool, str | None]:
    """(whether the answer could be read, the hint of `{"hint": ...}`, None where it has none)."""
    answer = _last_object(text, lambda value: "hint" in value and isinstance(value["hint"], str | None))
    hint = (answer or {}).get("hint")
    return answer is not None, encodable(hint.strip()) if hint and not _is_placeholder(hint) else None


def whole_number(value: Any) -> int | None:
    """A whole number as models write it: 2, 2.0, "2", "step 2"; None for anything else."""
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value)):
        return int(match.group(1))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else None


def _entries(answer: Mapping[str, Any]) -> list | None:
    """The entries of a review's answer; None where it has no such form, or only repeats the form that was asked for."""
    feedback = answer.get("feedback")
    if isinstance(entries := answer.get("failures"), list):
        placeholders = [isinstance(entry, dict) and _is_placeholder(entry.get("feedback")) for entry in entries]
        return None if entries and all(placeholders) else entries
    if isinstance(steps := answer.get("failure_steps"), list):
        entries = [{"step": step, "feedback": feedback} for step in steps]
    elif "failure_step" in answer:
        entries = [{"step": answer["failure_step"], "feedback": feedback}]
    else:
        return None
    return None if _is_placeholder(feedback) else entries


def _is_placeholder(text: Any) -> bool:
    """The dots of a form that was asked for."""
    return isinstance(text, str) and bool(text.strip()) and not text.strip(".… \n")


def _last_object(text: str, wanted: Callable[[dict], bool]) -> dict | None:
    """The last complete JSON object outside of the reasoning that is `wanted`, itself or within another one."""
    text = text[-_LONGEST:]
    if text.lstrip().startswith(_THINK_OPEN):
        text = text.partition(_THINK_CLOSE)[2]  # empty where the reasoning never ended
    last, end = None, 0
    for start, stop, value in _objects(text):
        if _THINK_CLOSE in text[end:start]:
            last = None  # what came before was reasoning that nobody has opened
        end = stop
        for inner in _with_inner(value):
            last = inner if wanted(inner) else last
    return None if _THINK_CLOSE in text[end:] else last


def _objects(text: str) -> Iterator[tuple[int, int, dict]]:
    """(start, end, value) of the complete JSON objects of a text, from left to right, none within another."""
    position = 0
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = start + 1
        else:
            yield start, position, value


def _with_inner(value: Any) -> Iterator[dict]:
    """An object after all that it holds, so that the outermost comes last."""
    pending, objects = [value], []
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            objects.append(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    yield from reversed(objects)
