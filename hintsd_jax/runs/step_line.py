# SPDX-License-Identifier: Apache-2.0

"""What a training step came to, in one line that a person can read: its metrics row flows in, words flow out.

Invariant: every number is one of the row's, and a reason goes under the word that it has there (docs/metrics.md), so
that what is printed and what is kept never differ. A step that learnt nothing says so, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

Row = Mapping[str, float | None]


def is_empty(row: Row) -> bool:
    """Whether the update of this row had not a single action token."""
    return row.get("train/tokens") == 0


def describe(row: Row) -> str:
    """Such as "success 37.5 %, 31 targets named, 2 of 40 answers unreadable (2 truncated), loss 0.0123, 940 tokens/s",
    or "success 0.0 %, 0 targets named, 3 of 3 answers unreadable (3 unparsable), update skipped: nothing to train on".
    """
    return ", ".join(_parts(row))


def _parts(row: Row) -> Iterator[str]:
    if row.get("rollout/episodes") == 0:
        if row.get("rollout/begun") != 0:  # an offline algorithm begins none
            yield "no episode was played"
    elif (success := row.get("rollout/success")) is not None:
        yield f"success {100 * success:.1f} %"
    yield from _lost(row)
    yield from _hindsight(row)
    yield from _update(row)
    tokens, seconds = row.get("rollout/tokens"), row.get("time/step")
    if tokens is not None and seconds and row.get("rollout/begun") != 0:
        yield f"{tokens / seconds:,.0f} tokens/s"


def _lost(row: Row) -> Iterator[str]:
    """Episodes that were begun and count for nothing, or never began."""
    if lost := _counted(row, "rollout/dropped/"):
        begun = row.get("rollout/begun")
        total = sum(value or 0 for name, value in row.items() if name.startswith("rollout/dropped/"))
        yield f"{total:g} of {begun:g} episodes lost ({lost})" if begun else f"{total:g} episodes lost ({lost})"
    if failed := sum(value or 0 for name, value in row.items() if name.startswith(_COSTLESS)):
        yield f"{failed:g} reports or closings of environments failed"


_COSTLESS = ("rollout/failed_calls/report/", "rollout/failed_calls/close/")  # these calls' failures cost no episode


def _hindsight(row: Row) -> Iterator[str]:
    questions, readable = row.get("hindsight/questions") or 0, row.get("hindsight/readable_answers") or 0
    dropped, targets = _counted(row, "hindsight/dropped/"), row.get("hindsight/targets") or 0
    if questions or dropped or targets:
        yield f"{targets:g} {'target' if targets == 1 else 'targets'} named"
    if unreadable := questions - readable:
        why = _counted(row, "hindsight/dropped/", lambda word: word not in _NOT_UNREADABLE)
        yield f"{unreadable:g} of {questions:g} answers unreadable" + (f" ({why})" if why else "")
        dropped = _counted(row, "hindsight/dropped/", lambda word: word in _NOT_UNREADABLE)
    if dropped and is_empty(row):
        yield f"looking back: {dropped}"


# Reasons for a target less that are no unreadable answer's.
_NOT_UNREADABLE = {
    *("nothing_named", "bad_step", "empty_feedback", "repeated_step", "over_limit"),  # of one that was read
    *("no_steps", "no_report"),  # where nobody was asked
}


def _update(row: Row) -> Iterator[str]:
    dropped = _counted(row, "train/dropped/")
    if row.get("train/nonfinite"):
        what = "skipped: a number was not finite" if row.get("train/skipped") else "broke the weights: not finite"
        yield f"update {what}"
    elif is_empty(row):
        played, failed = row.get("rollout/episodes"), row.get("hindsight/failed_episodes")
        reasons = ["no episode failed"] if failed == 0 and played != 0 else []
        reasons += [f"not trained on: {dropped}"] if dropped else []
        did = "skipped: " if row.get("train/skipped", 1) else "without a token (optim.empty_updates = step): "
        yield f"update {did}{'; '.join(reasons) or 'nothing to train on'}"
        return
    elif (loss := row.get("train/loss")) is not None:
        yield f"loss {loss:.4f}"
    if not row.get("train/nonfinite") and (lost := _counted(row, "train/dropped/", lambda word: word in _TOO_LONG)):
        yield f"actions not trained on: {lost}"


# Actions that could have been learnt from; what has nothing to learn from is no loss.
_TOO_LONG = ("action_too_long", "student_too_long", "teacher_too_long")


def _counted(row: Row, prefix: str, wanted: Callable[[str], bool] = lambda word: True) -> str:
    """What a row counts under a prefix, "2 unparsable, 1 truncated"; "" where that is nothing."""
    names = {name: name.removeprefix(prefix) for name in row if name.startswith(prefix)}
    counts = [f"{row[name]:g} {word}" for name, word in names.items() if row[name] and wanted(word)]
    return ", ".join(counts)
