# SPDX-License-Identifier: Apache-2.0

"""Episode records in, what the page shows of them out: one short row for the list, one whole entry to open, and the
counts of targets.

A record is a line of `episodes/step_*.jsonl`: `Episode.to_json` with "hindsight" and "trained". Token ids and the
sampler's log-probs stay behind; texts beyond a limit are cut and say so; numbers are rounded to four
digits, those of tokens to three.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LONGEST = 20_000  # characters of one text
MOST_TOKENS = 4_000  # tokens of one action span
PER_TOKEN = ("divergence", "teacher_gap", "advantage")  # those of them that the loss has
BINS = 10  # of an episode's length, for relative positions


NAMED, NOTHING, UNREADABLE, SKIPPED = "named", "nothing", "unreadable", "skipped"


def row(record: Mapping[str, Any], training: bool = True) -> dict[str, Any]:
    """What the list shows of an episode. A task that comes again in a training step has a name of its own each time.

    review: what hindsight made of it (see `review`). missed: whether it was looked back on and none of the steps that
    it named is one of those that the environment's report calls a cause. divergence: the mean over its trained tokens,
    nats, or None. training: whether it could have been looked back on and trained on.
    """
    again = record.get("occurrence") or 0
    looked_back, named = review(record) if training else "", targets(record)
    faults = {fault["step"] for fault in (record.get("report") or {}).get("faults") or ()}
    return {
        "task": str(record.get("task_id", "")) + (f" ({again + 1})" if again else ""),
        "rollout": int(record.get("rollout") or 0),
        "success": int(bool(record.get("success"))),
        "steps": len(record.get("steps") or ()),
        "ended": str(record.get("ended") or ""),
        "targets": named,
        "trained": [span["step"] for span in record.get("trained") or ()],
        "review": looked_back,
        "missed": int(looked_back in (NAMED, NOTHING, UNREADABLE) and bool(faults) and not faults & set(named)),
        "tokens": sum((step.get("stop") or 0) - (step.get("start") or 0) for step in record.get("steps") or ()),
        "divergence": _mean_divergence(record),
    }


def review(record: Mapping[str, Any]) -> str:
    """What hindsight made of an episode: NAMED a step, named NOTHING, its answer was UNREADABLE; SKIPPED: it failed and
    was not looked back on; "": it succeeded, and nobody looked.
    """
    hindsight = record.get("hindsight")
    if not hindsight:
        return "" if record.get("success") else SKIPPED
    if hindsight.get("targets"):
        return NAMED
    return UNREADABLE if hindsight.get("problem") else NOTHING


def _mean_divergence(record: Mapping[str, Any]) -> float | int | None:
    values = [value for span in record.get("trained") or () for value in span.get("divergence") or ()]
    finite = [value for value in map(number, values) if value is not None]
    return number(sum(finite) / len(finite), 3) if finite else None


def targets(record: Mapping[str, Any]) -> list[int]:
    """The steps (1-based) that hindsight named. Raises ValueError where the episode has no such step."""
    named = [target["step"] for target in (record.get("hindsight") or {}).get("targets") or ()]
    length = len(record.get("steps") or ())
    if not all(type(step) is int and 1 <= step <= length for step in named):
        raise ValueError(f"a target that is none of the {length} steps")
    return named


def entry(record: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page shows of an episode once it is opened."""
    report = record.get("report") or {}
    hindsight = record.get("hindsight")
    facts = ("analyser", "privileged", "select", "feedback_position", "problem")
    return {
        "reward": number(record.get("reward") or 0.0),
        "detail": clip(record.get("detail") or ""),
        "prompt_length": record.get("prompt_length") or 0,
        "prompt": [
            {"role": str(message.get("role", "")), "content": clip(message.get("content"))}
            for message in record.get("prompt_messages") or ()
        ],
        "steps": [_step(step) for step in record.get("steps") or ()],
        "faults": [_target(fault) for fault in report.get("faults") or ()],
        "report": clip(report.get("summary") or ""),
        "hindsight": hindsight
        and {
            **{name: hindsight.get(name) for name in facts},
            "answer": clip(hindsight.get("answer") or ""),
            "targets": [_target(target) for target in hindsight.get("targets") or ()],
        },
        "trained": [_span(span) for span in record.get("trained") or ()],
    }


def clip(text: Any) -> str:
    """A text of at most `LONGEST` characters, and how many were left out."""
    text = "" if text is None else str(text)
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}\n[{len(text) - LONGEST:,} more characters are in the run's folder]"


def number(value: Any, digits: int = 4) -> float | int | None:
    """So many significant digits; what is no finite number becomes None."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.{digits}g}")


def plain(value: Any) -> bool:
    """Whether JSON has a word for it: infinities and NaN have none."""
    return not isinstance(value, float) or math.isfinite(value)


class TargetCounts:
    """Where targets fall, by training step: `add` takes the records of a step, `to_json` gives

    `{"steps": [S], "absolute": [S][longest], "relative": [S][BINS], "episodes": [S], "mean": [S]}`: counts by step of
    the episode (the first column is step 1) and by tenth of the episode, the episodes with a target, and the mean step
    of the targets.
    """

    def __init__(self):
        self._targets: dict[int, list[tuple[int, int]]] = {}  # training step -> (step, length of the episode)
        self._episodes: dict[int, int] = {}

    def add(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Counts the targets of one training step's episodes."""
        for record in records:
            named = targets(record)
            self._targets.setdefault(step, []).extend((target, len(record.get("steps") or ())) for target in named)
            self._episodes[step] = self._episodes.get(step, 0) + bool(named)

    def to_json(self) -> dict[str, Any] | None:
        """The counts; None where no episode has a target."""
        longest = max((target for pairs in self._targets.values() for target, _ in pairs), default=0)
        if not longest:
            return None
        absolute = [[0] * longest for _ in self._targets]
        relative = [[0] * BINS for _ in self._targets]
        for n, pairs in enumerate(self._targets.values()):
            for target, length in pairs:
                absolute[n][target - 1] += 1
                relative[n][tenth(target, length)] += 1
        means = [sum(n for n, _ in pairs) / len(pairs) if pairs else None for pairs in self._targets.values()]
        return {
            "steps": list(self._targets),
            "absolute": absolute,
            "relative": relative,
            "episodes": list(self._episodes.values()),
            "mean": [number(value) for value in means],
        }


def tenth(step: int, length: int) -> int:
    """Which tenth of an episode of `length` steps the middle of a step (1-based) lies in: 0 to BINS - 1."""
    return min(max(int(BINS * (step - 0.5) / max(length, 1)), 0), BINS - 1)


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": clip(step.get("text")),
        "observation": clip(step.get("observation")),
        "tokens": (step.get("stop") or 0) - (step.get("start") or 0),
        "reward": number(step.get("reward") or 0.0),
        "note": "; ".join(_notes(step)),
    }


def _notes(step: Mapping[str, Any]) -> Iterator[str]:
    if step.get("cut"):
        yield "cut at its token limit"
    if step.get("problem"):
        yield f"its call could not be read ({step['problem']})"


def _target(target: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": target.get("step"), "feedback": clip(target.get("feedback"))}


def _span(span: Mapping[str, Any]) -> dict[str, Any]:
    """One trained action span: aligned lists. `teacher_best` is None where it is the sampled token."""
    kept: dict[str, Any] = {
        "step": span["step"],
        "tokens": len(span["pieces"]),
        "pieces": [clip(piece) for piece in span["pieces"][:MOST_TOKENS]],
    }
    for name in PER_TOKEN:
        if span.get(name):
            kept[name] = [number(value, 3) for value in span[name][:MOST_TOKENS]]
    if span.get("teacher_best"):
        pairs = zip(span["teacher_best"], span["pieces"][:MOST_TOKENS], strict=False)
        kept["teacher_best"] = [None if best == piece else clip(best) for best, piece in pairs]
    return kept
