"""Seeded generator of Desk tasks: (seed, index, length, difficulty) -> one JSON-able task.

A task is a list of user requests. Six kinds are *decisions*: a look-up shows two labelled candidates, the tool accepts
both, the request names the label of the right one. `tell` asks for two things, of which the second is easily forgotten.
`add` is neutral. Kinds do not repeat within a task, so a label is asked for at most once. Where a copy is made before a
file is sent, it is the copy that is sent: a wrong version travels on unnoticed.
"""

from __future__ import annotations

import dataclasses
import random

from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.envs.desk.world import EFFECTS, World


@dataclasses.dataclass(frozen=True)
class Decision:
    """A kind of request with a choice. `request` is filled with label, key (what is looked up) and other (a second
    name).

    The label stands at the request's end and the chosen candidate is the effect's first argument, in every kind alike:
    half a million weights learn one look-up sooner than six.
    """

    request: str
    lookup: str
    key: str  # the look-up's parameter
    labels: tuple[str, str]
    effect: str
    choice: str  # the effect's parameter that takes the chosen candidate
    other: str | None  # the effect's parameter that takes the second name
    shelf: str  # the part of the world that the candidates stand in


DECISIONS: dict[str, Decision] = {
    "copy": Decision(
        'Copy "{key}" to "{other}", the {label} one.',
        "find_files",
        "title",
        ("draft", "final"),
        "copy_file",
        "file",
        "to",
        "files",
    ),
    "delete": Decision(
        'Delete "{key}", the {label} one.',
        "list_sizes",
        "title",
        ("small", "large"),
        "delete_file",
        "file",
        None,
        "files",
    ),
    "send": Decision(
        'Send "{other}" to "{key}", the {label} one.',
        "find_contact",
        "name",
        ("home", "work"),
        "send_file",
        "to",
        "file",
        "contacts",
    ),
    "forward": Decision(
        'Forward a mail of "{key}" to "{other}", the {label} one.',
        "search_mail",
        "sender",
        ("oldest", "newest"),
        "forward_mail",
        "mail",
        "to",
        "mails",
    ),
    "book": Decision(
        'Book a slot of "{key}" for "{other}", the {label} one.',
        "free_slots",
        "day",
        ("early", "late"),
        "book_slot",
        "slot",
        "title",
        "slots",
    ),
    "cancel": Decision(
        'Cancel "{key}", the {label} one.',
        "find_events",
        "title",
        ("first", "second"),
        "cancel_event",
        "event",
        None,
        "events",
    ),
}
PLAIN_KINDS = ("tell", "add")
MAX_LENGTH = len(DECISIONS) + len(PLAIN_KINDS)


def generate_task(seed: int, index: int, length: int = 4, difficulty: int = 3) -> dict:
    """One task: `length` requests, `difficulty` of them decisions.

    Returns:
      `{"id", "world", "requests"}`; a request holds `kind, text, lookup, label, wrong, calls`: `lookup` and `calls` are
      the reference's `[tool, arguments]`, `wrong` the candidate that is shown but not asked for (None without a
      choice).

    Raises:
      ValueError: `difficulty` or `length - difficulty` exceed the kinds that there are.
    """
    if not 0 <= difficulty <= len(DECISIONS) or not 0 <= length - difficulty <= len(PLAIN_KINDS) or length < 1:
        raise ValueError(
            f"a Desk task has 0-{len(DECISIONS)} decisions and 0-{len(PLAIN_KINDS)} other requests, got length={length}, difficulty={difficulty}"
        )
    rng = random.Random(f"desk-{seed}-{index}-{length}-{difficulty}")
    names = iter(rng.sample(NAMES, len(NAMES)))
    kinds = rng.sample(sorted(DECISIONS), difficulty) + rng.sample(PLAIN_KINDS, length - difficulty)
    rng.shuffle(kinds)
    world = World(listings={}, files={}, mails=[], slots=[], events=[], contacts={})
    requests, copied = [], None
    for kind in kinds:
        if kind in DECISIONS:
            request = _decision(kind, rng, names, world, copied)
            if kind == "copy":
                copied = request["calls"][0][1]["to"]
        elif kind == "tell":
            mail, person = next(names), next(names)
            world.mails.append(mail)
            request = _plain(
                kind,
                f'Archive "{mail}" and notify "{person}".',
                [["archive_mail", {"mail": mail}], ["notify", {"name": person}]],
            )
        else:
            person, address = next(names), next(names)
            request = _plain(
                kind, f'Add "{person}" with "{address}".', [["add_contact", {"name": person, "address": address}]]
            )
        requests.append(request)
    return {"id": f"desk-{seed}-{index}", "world": world.to_json(), "requests": requests}


def _plain(kind: str, text: str, calls: list) -> dict:
    return {"kind": kind, "text": text, "lookup": None, "label": None, "wrong": None, "calls": calls}


def _decision(kind: str, rng: random.Random, names, world: World, copied: str | None) -> dict:
    decision = DECISIONS[kind]
    key, right, wrong = next(names), next(names), next(names)
    label = rng.choice(decision.labels)
    other = None
    if kind == "send":
        other = copied or next(names)
        if copied is None:
            world.files[other] = other
    elif decision.other:
        other = next(names)
    candidates = [[label, right], [next(lb for lb in decision.labels if lb != label), wrong]]
    rng.shuffle(candidates)
    world.listings.setdefault(decision.lookup, {})[key] = candidates
    shelf = getattr(world, decision.shelf)
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
        "calls": [[decision.effect, {p: arguments[p] for p in EFFECTS[decision.effect]}]],
    }
