# SPDX-License-Identifier: Apache-2.0

"""The demonstrator's habits: a kind of decision and the order of its candidates in; what the habit takes, and how often
it does, out.

With its habit's rate the demonstrator takes what the habit says, else the candidate that is meant. So it errs only
where the habit says another one: with habits that follow a fixed label or a place in the list at half of the decisions.
Where the rate is above one half the habit is the *usual* action, so a policy that only becomes surer of itself becomes
worse.

Why these habits. If all of them lay in one direction, one lesson anywhere would mend them all, and it would not matter
which step one learns from: six kinds that each took the candidate that was *not* named were mended by 41 lessons. A
small network can hold each of these apart:

- `label`, one label of the pair whatever is asked: a preference for one token. No label belongs to two kinds, so
  another kind's lesson does not touch it.
- `first`, `last`: where the candidate stands. This needs attention to a place instead of a word, switched on by the
  kind, and the two pull in opposite directions.
- `named`, the named label where the request excludes it; `unnamed`, the label that is not named where the request wants
  the named one. Both misread the request, with opposite signs: to follow the named word more mends `unnamed` and makes
  `named` worse.

Whether they are held apart is to be measured on a policy: train on one kind's lessons, look at the others' rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.desk.kinds import DECISIONS

FIRST, LAST, NAMED, UNNAMED = "the first", "the last", "the named", "the unnamed"


@dataclasses.dataclass(frozen=True)
class Habit:
    """follows: a label of the kind, or one of FIRST, LAST (in the list of candidates), NAMED, UNNAMED (in the request).
    rate: how often it decides.
    """

    follows: str
    rate: float


HABITS: dict[str, Habit] = {
    "copy": Habit("draft", 0.2),
    "copy_signed": Habit(NAMED, 0.6),
    "copy_short": Habit(FIRST, 0.7),
    "copy_public": Habit("secret", 0.65),
    "delete": Habit("small", 0.8),
    "delete_damaged": Habit("intact", 0.6),
    "delete_dull": Habit(NAMED, 0.15),
    "delete_cached": Habit(LAST, 0.65),
    "send": Habit(UNNAMED, 0.1),
    "send_main": Habit(LAST, 0.75),
    "send_local": Habit("foreign", 0.2),
    "send_postal": Habit(FIRST, 0.3),
    "forward": Habit(UNNAMED, 0.6),
    "forward_urgent": Habit("urgent", 0.65),
    "forward_paid": Habit(NAMED, 0.25),
    "forward_open": Habit(LAST, 0.2),
    "book": Habit(FIRST, 0.1),
    "book_quiet": Habit("busy", 0.8),
    "book_near": Habit(NAMED, 0.05),
    "book_indoor": Habit(UNNAMED, 0.2),
    "cancel": Habit(LAST, 0.3),
    "cancel_weekly": Habit(FIRST, 0.6),
    "cancel_fixed": Habit("moved", 0.1),
    "cancel_online": Habit("online", 0.6),
}
# How often the second of two things is forgotten.
FORGETS = 0.1


def habitual_label(kind: str, wanted: str, listed: Sequence[str]) -> str:
    """The label that the habit of a kind of decision takes. wanted: the one that is meant. listed: both, as they are
    shown.
    """
    habit, decision = HABITS[kind], DECISIONS[kind]
    named = decision.named(wanted)
    choices = {FIRST: listed[0], LAST: listed[-1], NAMED: named, UNNAMED: decision.other_label(named)}
    return habit.follows if habit.follows in decision.labels else choices[habit.follows]


def error_rate(task: Mapping[str, Any], request: Mapping[str, Any]) -> float:
    """How often the demonstrator errs at the decision of a request, or forgets its second call."""
    kind = request["kind"]
    if kind not in HABITS:
        return FORGETS if kind == "tell" else 0.0
    tool, arguments = request["lookup"]
    listed = [label for label, _ in task["world"]["listings"][tool][next(iter(arguments.values()))]]
    return HABITS[kind].rate if habitual_label(kind, request["label"], listed) != request["label"] else 0.0
