# SPDX-License-Identifier: Apache-2.0

"""Why an update had nothing to train on: the metrics row of its step flows in, a few words for a person flow out.

Invariant: every count is one of the row's, under the word that it has there (docs/metrics.md), so that what is printed
and what is kept never differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def is_empty(row: Mapping[str, float | None]) -> bool:
    """Whether the update of this row had not a single action token."""
    return row.get("train/tokens") == 0


def reasons(row: Mapping[str, float | None]) -> str:
    """Such as "3 of 3 answers unreadable (2 unparsable, 1 truncated)" or "no episode failed"."""
    return "; ".join(_reasons(row)) or "no action was chosen"


def _reasons(row: Mapping[str, float | None]) -> Iterator[str]:
    if not row.get("rollout/episodes"):
        yield "no episode was played" + _counted(row, "rollout/dropped/", " ({})")
        return
    if row.get("hindsight/failed_episodes") == 0:
        yield "no episode failed"
    questions, readable = row.get("hindsight/questions") or 0, row.get("hindsight/readable_answers") or 0
    if unreadable := questions - readable:
        yield f"{unreadable} of {questions} answers unreadable" + _counted(row, "hindsight/dropped/", " ({})")
    elif dropped := _counted(row, "hindsight/dropped/"):
        yield f"hindsight: {dropped}"
    if dropped := _counted(row, "train/dropped/"):
        yield f"not trained on: {dropped}"


def _counted(row: Mapping[str, float | None], prefix: str, form: str = "{}") -> str:
    """What a row counts under a prefix, "2 unparsable, 1 truncated", in the form; "" where that is nothing."""
    counts = [
        f"{count} {name.removeprefix(prefix)}" for name, count in row.items() if name.startswith(prefix) and count
    ]
    return form.format(", ".join(counts)) if counts else ""
