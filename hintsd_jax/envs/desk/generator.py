# SPDX-License-Identifier: Apache-2.0

"""Seeded generator of Desk tasks: (seed, index, length, difficulty) in, one task of JSON values out.

A task is a list of user requests. Six kinds are *decisions*: a look-up shows two labelled candidates, the tool accepts
both, the request names the label of the right one. `tell` asks for two things, of which the second is easily forgotten.
`add` is neutral. Kinds do not repeat within a task, so a label is asked for at most once. Where a copy is made before a
file is sent, it is the copy that is sent: a wrong version travels on unnoticed.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.envs.desk.office import EFFECTS, Office


@dataclasses.dataclass(frozen=True)
class DecisionKind:
    """A kind of request with a choice.

    request: the user's text, to be filled with label, key (what is looked up) and other (a second name). lookup, key:
    the look-up tool and its parameter. labels: of the two candidates. effect, choice, other: the tool that changes
    something, its parameter for the chosen candidate, and its parameter for the second name. shelf: the part of the
    office that the candidates stand in.

    The label stands at the request's end and the chosen candidate is the effect's first argument, in every kind alike:
    half a million weights learn one look-up sooner than six.
    """

    request: str
    lookup: str
    key: str
    labels: tuple[str, str]
    effect: str
    choice: str
    other: str | None
    shelf: str


DECISIONS: dict[str, DecisionKind] = {
    "copy": DecisionKind(
        request='Copy "{key}" to "{other}", the {label} one.',
        lookup="find_files",
        key="title",
        labels=("draft", "final"),
        effect="copy_file",
        choice="file",
        other="to",
        shelf="files",
    ),
    "delete": DecisionKind(
        request='Delete "{key}", the {label} one.',
        lookup="list_sizes",
        key="title",
        labels=("small", "large"),
        effect="delete_file",
        choice="file",
        other=None,
        shelf="files",
    ),
    "send": DecisionKind(
        request='Send "{other}" to "{key}", the {label} one.',
        lookup="find_contact",
        key="name",
        labels=("home", "work"),
        effect="send_file",
        choice="to",
        other="file",
        shelf="contacts",
    ),
    "forward": DecisionKind(
        request='Forward a mail of "{key}" to "{other}", the {label} one.',
        lookup="search_mail",
        key="sender",
        labels=("oldest", "newest"),
        effect="forward_mail",
        choice="mail",
        other="to",
        shelf="mails",
    ),
    "book": DecisionKind(
        request='Book a slot of "{key}" for "{other}", the {label} one.',
        lookup="free_slots",
        key="day",
        labels=("early", "late"),
        effect="book_slot",
        choice="slot",
        other="title",
        shelf="slots",
    ),
    "cancel": DecisionKind(
        request='Cancel "{key}", the {label} one.',
        lookup="find_events",
        key="title",
        labels=("first", "second"),
        effect="cancel_event",
        choice="event",
        other=None,
        shelf="events",
    ),
}
PLAIN_KINDS = ("tell", "add")
MAX_LENGTH = len(DECISIONS) + len(PLAIN_KINDS)


def generate_task(seed: int, index: int, length: int = 4, difficulty: int = 3) -> dict:
    """One task: `length` requests, `difficulty` of them decisions.

    Returns:
      `{"id", "world", "requests"}`: `world` is the office at the start; a request has `kind, text, lookup, label,
      wrong, calls`, where `lookup` and `calls` are the reference's `[tool, arguments]`, and `wrong` is the candidate
      that is shown but not asked for (None without a choice).

    Raises:
      ValueError: `difficulty` or `length - difficulty` exceed the kinds that there are.
    """
    if not 0 <= difficulty <= len(DECISIONS) or not 0 <= length - difficulty <= len(PLAIN_KINDS) or length < 1:
        raise ValueError(
            f"a Desk task has 0-{len(DECISIONS)} decisions and 0-{len(PLAIN_KINDS)} other requests,"
            f" got length={length}, difficulty={difficulty}"
        )
    rng = random.Random(f"desk-{seed}-{index}-{length}-{difficulty}")
    names = iter(rng.sample(NAMES, len(NAMES)))
    kinds = rng.sample(sorted(DECISIONS), difficulty) + rng.sample(PLAIN_KINDS, length - difficulty)
    rng.shuffle(kinds)
    office = Office(listings={}, files={}, mails=[], slots=[], events=[], contacts={})
    requests, copy = [], None
    for kind in kinds:
        if kind in DECISIONS:
            request = _decision(kind, rng, names, office, copy)
            if kind == "copy":
                copy = request["calls"][0][1]["to"]
        elif kind == "tell":
            mail, person = next(names), next(names)
            office.mails.append(mail)
            calls = [["archive_mail", {"mail": mail}], ["notify", {"name": person}]]
            request = _plain(kind, f'Archive "{mail}" and notify "{person}".', calls)
        else:
            person, address = next(names), next(names)
            calls = [["add_contact", {"name": person, "address": address}]]
            request = _plain(kind, f'Add "{person}" with "{address}".', calls)
        requests.append(request)
    return {"id": f"desk-{seed}-{index}", "world": office.to_json(), "requests": requests}


def _plain(kind: str, text: str, calls: list) -> dict:
    return {"kind": kind, "text": text, "lookup": None, "label": None, "wrong": None, "calls": calls}


def _decision(kind: str, rng: random.Random, names: Iterator[str], office: Office, copy: str | None) -> dict:
    """A request with a choice; its candidates go into the office. `copy`: a file that an earlier request makes."""
    decision = DECISIONS[kind]
    key, right, wrong = next(names), next(names), next(names)
    label = rng.choice(decision.labels)
    other = None
    if kind == "send":
        other = copy or next(names)
        if copy is None:
            office.files[other] = other
    elif decision.other:
        other = next(names)
    candidates = [[label, right], [next(each for each in decision.labels if each != label), wrong]]
    rng.shuffle(candidates)
    office.listings.setdefault(decision.lookup, {})[key] = candidates
    shelf = getattr(office, decision.shelf)
    for _, value in candidates:
        if decision.shelf == "files":
            shelf[value] = value
        elif decision.shelf != "contacts":  # an address is no entry of the book
            shelf.append(value)
    arguments = {decision.choice: right} | ({decision.other: other} if decision.other else {})
    return {
        "kind": kind,
        "text": decision.request.format(label=label, key=key, other=other),
        "lookup": [decision.lookup, {decision.key: key}],
        "label": label,
        "wrong": wrong,
        "calls": [[decision.effect, {name: arguments[name] for name in EFFECTS[decision.effect]}]],
    }
