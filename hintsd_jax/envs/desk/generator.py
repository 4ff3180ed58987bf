# SPDX-License-Identifier: Apache-2.0

"""Seeded generator of Desk tasks: (seed, index, length, difficulty) in, one task of JSON values out.

A task is a list of user requests: decisions (`kinds.DECISIONS`) and neutral ones between them. `tell` asks for two
things, of which the second is easily forgotten; `add` is one call; a follow-up looks at what an earlier decision made.
Where a copy is made before a file is sent, it is the copy that is sent. So a wrong choice travels on, and shows late,
in what the agent reads, when nothing can be undone.

Kinds may repeat within a task, and tasks are as long as there are names for.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from hintsd_jax.envs.desk.kinds import DECISIONS, FOLLOW_UPS, PLAIN_KINDS
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.envs.desk.office import EFFECTS, Office

# How often a neutral request is a follow-up where there is something to follow.
FOLLOW_UP_RATE = 0.6
NAMES_A_DECISION, NAMES_A_NEUTRAL = 4, 2  # at most


@dataclasses.dataclass
class _Drafts:
    """What a task under construction draws on: its random numbers, the names that are left, its office, copies that
    were not sent yet, and (follow-up's kind, thing) of decisions that nothing has followed yet.
    """

    rng: random.Random
    names: Iterator[str]
    office: Office
    copies: list[str] = dataclasses.field(default_factory=list)
    things: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def generate_task(seed: int, index: int, length: int = 8, difficulty: int = 6) -> dict:
    """One task: `length` requests, `difficulty` of them decisions.

    Returns:
      `{"id", "world", "requests"}`: `world` is the office at the start; a request has `kind, text, lookup, label,
      wrong, calls`, where `lookup` and `calls` are the reference's `[tool, arguments]`, `label` is the one that is
      meant, whether or not the text names it, and `wrong` is the candidate that is shown but not meant (None without a
      choice).

    Raises:
      ValueError: there are no tasks of this length and difficulty, such as one with too few names.
    """
    _check(length, difficulty)
    # The last word is left of an earlier choice; without it all tasks, and every figure measured on them, were others.
    rng = random.Random(f"desk-{seed}-{index}-{length}-{difficulty}-all")
    office = Office(listings={}, files={}, mails=[], slots=[], events=[], contacts={})
    drafts = _Drafts(rng, iter(rng.sample(NAMES, len(NAMES))), office)
    planned = rng.choices(sorted(DECISIONS), k=difficulty) + ["neutral"] * (length - difficulty)
    rng.shuffle(planned)
    requests = [_decision(kind, drafts) if kind in DECISIONS else _neutral(kind, drafts) for kind in planned]
    return {"id": f"desk-{seed}-{index}", "world": office.to_json(), "requests": requests}


def _check(length: int, difficulty: int) -> None:
    shape = f"got length={length}, difficulty={difficulty}"
    if length < 1 or not 0 <= difficulty <= length:
        raise ValueError(f"a Desk task has 1 request or more, of which 0 to all are decisions, {shape}")
    needed = NAMES_A_DECISION * difficulty + NAMES_A_NEUTRAL * (length - difficulty)
    if needed > len(NAMES):
        raise ValueError(
            f"a Desk task has up to {len(NAMES)} names, {NAMES_A_DECISION} for a decision and {NAMES_A_NEUTRAL} for any"
            f" other request: {needed} are too many, {shape}"
        )


def _neutral(kind: str, drafts: _Drafts) -> dict:
    """A request without a choice; `kind` "neutral" leaves open which."""
    rng, names = drafts.rng, drafts.names
    if kind == "neutral":
        if drafts.things and rng.random() < FOLLOW_UP_RATE:
            return _follow_up(*drafts.things.pop(rng.randrange(len(drafts.things))), person=next(names))
        kind = rng.choice(PLAIN_KINDS)
    if kind == "tell":
        mail, person = next(names), next(names)
        drafts.office.mails.append(mail)
        calls = [["archive_mail", {"mail": mail}], ["notify", {"name": person}]]
        return _request(kind, f'Archive "{mail}" and notify "{person}".', calls)
    person, address = next(names), next(names)
    calls = [["add_contact", {"name": person, "address": address}]]
    return _request(kind, f'Add "{person}" with "{address}".', calls)


def _follow_up(kind: str, thing: str, person: str) -> dict:
    family = FOLLOW_UPS[kind]
    text = family.follow_up.format(thing=thing, person=person)
    return _request(kind, text, [["notify", {"name": person}]], [family.check, {family.checked: thing}])


def _request(kind: str, text: str, calls: list, lookup: list | None = None) -> dict:
    return {"kind": kind, "text": text, "lookup": lookup, "label": None, "wrong": None, "calls": calls}


def _decision(kind: str, drafts: _Drafts) -> dict:
    """A request with a choice; its candidates go into the office."""
    decision, rng, names, office = DECISIONS[kind], drafts.rng, drafts.names, drafts.office
    family = decision.family
    key, right, wrong = next(names), next(names), next(names)
    label = rng.choice(decision.labels)
    other = None
    if family.effect == "send_file" and drafts.copies:
        other = drafts.copies.pop()
    elif family.other:
        other = next(names)
        if family.effect == "send_file":
            office.files[other] = other
    candidates = [[label, right], [decision.other_label(label), wrong]]
    rng.shuffle(candidates)
    office.listings.setdefault(family.lookup, {})[key] = candidates
    shelf = getattr(office, family.shelf)
    for _, value in candidates:
        if family.shelf == "files":
            shelf[value] = value
        elif family.shelf != "contacts":  # an address is no entry of the book
            shelf.append(value)
    if family.effect == "copy_file" and other:
        drafts.copies.append(other)
    drafts.things.append((decision.follow_up, other or key))
    arguments = {family.choice: right} | ({family.other: other} if family.other else {})
    effect = [family.effect, {name: arguments[name] for name in EFFECTS[family.effect]}]
    text = family.request.format(key=key, other=other, which=decision.which(label))
    return _request(kind, text, [effect], [family.lookup, {family.key: key}]) | {"label": label, "wrong": wrong}
