# SPDX-License-Identifier: Apache-2.0

"""The analyser's answer: text in, targets out.

Exactly step 2 of the method: reasoning traces are dropped; the text from the first `{` to the last `}` is JSON;
entries are dropped whose step is not a valid index, whose feedback is empty, or whose step repeats; the rest is
sorted and the first `max_targets` are kept. An answer that cannot be parsed drops its rollout; there is no retry.

Invariant 7: whatever is dropped is counted by reason.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hintsd_jax.hindsight.targets import Target
from hintsd_jax.texts import encodable

REASONS = ("unparsable", "bad_step", "empty_feedback", "repeated_step", "over_limit")
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Parsed:
    """`targets` are sorted by step, unique in it, and at most the limit. `problem`: why the whole answer was
    unparsable, else None. `dropped`: counts by reason, only those that occurred; "unparsable" counts the answer, the
    others its entries."""

    targets: tuple[Target, ...]
    problem: str | None
    dropped: Mapping[str, int]


def parse_failures(text: str, num_steps: int, max_targets: int, only_step: int | None = None) -> Parsed:
    """Targets of an episode of `num_steps` steps. Never raises, whatever the text.

    `only_step`: the step that was asked about (`step_feedback_messages`); any other then counts as "bad_step".
    """
    try:
        entries = _read_entries(text)
    except (ValueError, RecursionError) as error:
        return Parsed((), f"{type(error).__name__}: {error}", {"unparsable": 1})
    allowed = range(1, num_steps + 1) if only_step is None else (only_step,)
    by_step: dict[int, Target] = {}
    dropped: Counter[str] = Counter()
    for entry in entries:
        entry = entry if isinstance(entry, dict) else {}
        step, feedback = entry.get("step"), entry.get("feedback")
        if type(step) is not int or step not in allowed:  # `type`: True is an int to isinstance
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


def _read_entries(text: str) -> list:
    if text.lstrip().startswith(_THINK_OPEN):
        text = text.partition(_THINK_CLOSE)[2]  # empty when the reasoning never ended
    opened, close, rest = text.partition(_THINK_CLOSE)
    if not close:
        return _parse_entries(opened)
    # either reasoning that nobody has opened, or a feedback that speaks of the tag
    if "}" not in rest:
        raise ValueError("no JSON object after the reasoning")
    try:
        return _parse_entries(rest)
    except (ValueError, RecursionError):
        return _parse_entries(text)


def _parse_entries(text: str) -> list:
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise ValueError("no JSON object in the answer")
    answer = json.loads(text[start : end + 1])
    entries = answer.get("failures")
    if not isinstance(entries, list):
        raise ValueError('no list "failures" in the answer')
    return entries
