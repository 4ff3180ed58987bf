# SPDX-License-Identifier: Apache-2.0

"""The kinds of requests that Desk's tasks are made of, as a table of data.

A *decision* is a family (which tools, which words) with a pair of labels: a look-up shows two labelled candidates, the
tool accepts both, and the request says which one is meant. Six families with four pairs each make 24 kinds. No label
belongs to two kinds.

Half of the kinds name the candidate that is wanted ("..., the draft one."), half name the other one ("..., not the
signed one."): to follow the named label more is right in the first and wrong in the second, so a lesson learned at one
kind is no lesson for all.

`FOLLOW_UPS` are neutral: they ask for the thing that an earlier decision of that family made, under the name that the
user gave it. Their look-up shows what was really taken there, when it is too late.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """What decisions about the same thing have in common.

    request: the user's text, to be filled with key (what is looked up), other (a second name) and which (one). lookup,
    key: the look-up tool and its parameter. effect, choice, other: the tool that changes something, its parameter for
    the chosen candidate, and its parameter for the second name. shelf: the part of the office that the candidates stand
    in. follow_up: the text of a later request, with thing (what the decision made, or the key where it made nothing)
    and person. check, checked: the look-up that such a request needs, and its parameter.

    The label stands at the request's end and the chosen candidate is the effect's first argument, in every family
    alike: a small network learns one look-up sooner than six.
    """

    request: str
    lookup: str
    key: str
    effect: str
    choice: str
    other: str | None
    shelf: str
    follow_up: str
    check: str
    checked: str


FAMILIES: dict[str, Family] = {
    "copy": Family(
        request='Copy "{key}" to "{other}", {which}.',
        lookup="find_files",
        key="title",
        effect="copy_file",
        choice="file",
        other="to",
        shelf="files",
        follow_up='Read "{thing}" and notify "{person}".',
        check="read_file",
        checked="file",
    ),
    "delete": Family(
        request='Delete "{key}", {which}.',
        lookup="list_sizes",
        key="title",
        effect="delete_file",
        choice="file",
        other=None,
        shelf="files",
        follow_up='See what is left of "{thing}" and notify "{person}".',
        check="list_sizes",
        checked="title",
    ),
    "send": Family(
        request='Send "{other}" to "{key}", {which}.',
        lookup="find_contact",
        key="name",
        effect="send_file",
        choice="to",
        other="file",
        shelf="contacts",
        follow_up='See where "{thing}" went and notify "{person}".',
        check="find_contact",
        checked="name",
    ),
    "forward": Family(
        request='Forward a mail of "{key}" to "{other}", {which}.',
        lookup="search_mail",
        key="sender",
        effect="forward_mail",
        choice="mail",
        other="to",
        shelf="mails",
        follow_up='See what "{thing}" got and notify "{person}".',
        check="search_mail",
        checked="sender",
    ),
    "book": Family(
        request='Book a slot of "{key}" for "{other}", {which}.',
        lookup="free_slots",
        key="day",
        effect="book_slot",
        choice="slot",
        other="title",
        shelf="slots",
        follow_up='See when "{thing}" is and notify "{person}".',
        check="find_events",
        checked="title",
    ),
    "cancel": Family(
        request='Cancel "{key}", {which}.',
        lookup="find_events",
        key="title",
        effect="cancel_event",
        choice="event",
        other=None,
        shelf="events",
        follow_up='See what remains of "{thing}" and notify "{person}".',
        check="find_events",
        checked="title",
    ),
}


@dataclasses.dataclass(frozen=True)
class DecisionKind:
    """A family with the labels of its two candidates. excludes: whether the request names the one that is not meant.
    follow_up: the kind of request that looks at what it made.
    """

    family: Family
    labels: tuple[str, str]
    excludes: bool
    follow_up: str

    def other_label(self, label: str) -> str:
        """The other one of the two."""
        return self.labels[1] if label == self.labels[0] else self.labels[0]

    def named(self, label: str) -> str:
        """The label that a request names which asks for `label`."""
        return self.other_label(label) if self.excludes else label

    def which(self, label: str) -> str:
        """The words of a request that asks for `label`."""
        return f"{'not ' if self.excludes else ''}the {self.named(label)} one"


# For each family: its pairs of labels. The first pair's kind has the family's name.
_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "copy": (("draft", "final"), ("signed", "blank"), ("short", "full"), ("public", "secret")),
    "delete": (("small", "large"), ("damaged", "intact"), ("dull", "sharp"), ("cached", "saved")),
    "send": (("home", "work"), ("main", "spare"), ("local", "foreign"), ("postal", "legal")),
    "forward": (("oldest", "newest"), ("urgent", "normal"), ("paid", "unpaid"), ("open", "sealed")),
    "book": (("early", "late"), ("quiet", "busy"), ("near", "far"), ("indoor", "outdoor")),
    "cancel": (("first", "second"), ("weekly", "daily"), ("fixed", "moved"), ("online", "onsite")),
}
# Whether requests with the first, second, third and fourth pair of a family exclude.
_EXCLUDES = (False, True, True, False)

DECISIONS: dict[str, DecisionKind] = {
    name if number == 0 else f"{name}_{pair[0]}": DecisionKind(FAMILIES[name], pair, excludes, f"check_{name}")
    for name, pairs in _PAIRS.items()
    for number, (pair, excludes) in enumerate(zip(pairs, _EXCLUDES, strict=True))
}
FOLLOW_UPS: dict[str, Family] = {f"check_{name}": family for name, family in FAMILIES.items()}
PLAIN_KINDS = ("tell", "add")
