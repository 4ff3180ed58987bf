# SPDX-License-Identifier: Apache-2.0

"""Scripts of Desk tasks for the scripted policy: a task in, the texts of an episode's actions out: the reference, or
the reference with one fault at a known step.

The demonstrator's wording throughout, one call a step. After the fault all goes on as the reference has it, so that
there is no other; where the office no longer allows a later call, it answers with an error, as it always does.

Invariant: everything follows from the task, the kinds of fault and the seed. Scripts know the ground truth: they are
for measuring hindsight, and for the reviews of the embedded policy's warm-up. `hintsd_jax.train` never reads them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import CallError
from hintsd_jax.envs.call_reading import BARE, HERMES, OPEN
from hintsd_jax.envs.desk.demonstrations import REPLY, call_text, reference_steps
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.desk.office import EFFECTS, PARAMETERS, Office
from hintsd_jax.envs.desk.reference import office_before
from hintsd_jax.envs.script import Script, choose_site
from hintsd_jax.envs.tool_calls import parse_action, render_calls

CHOICES = {
    **{f"wrong_{kind}": f"the other candidate is taken in a request to {kind}" for kind in DECISIONS},
    "forgotten_call": "of two things that were asked for, the second is left out",
}
OTHER_FAULTS = {
    "dropped_call": "the call that a request asks for is left out, after its look-up",
    "wrong_argument": "an argument that was given in the request has another value, which exists",
    "wrong_tool": "another tool that changes something is called, with as many of the arguments as it takes",
    "early_stop": "the last request is answered at once, without a call",
}
FAULTS = {
    **CHOICES,
    **OTHER_FAULTS,
    "wrong_order": "two successive calls of a request change places",
}

Site = tuple[int, int]
"""A request and a step of it, both 0-based."""


def ground_truth(task: Mapping[str, Any], style: str = HERMES) -> Script:
    """The reference's steps. style: of their calls, see `envs.tool_calls`."""
    return Script(tuple(_in_style(text, style) for texts in _texts(task) for text in texts))


def sites(task: Mapping[str, Any], fault: str) -> list[Site]:
    """Where a kind of fault can be put into a task.

    Raises ValueError for a kind that is not in `FAULTS`.
    """
    if fault not in FAULTS:
        raise ValueError(f"no fault {fault!r}: choose one of {', '.join(FAULTS)}")
    return [site for site in _call_sites(task) if _faulty(task, fault, site, random.Random(0)) is not None]


def with_fault(
    task: Mapping[str, Any], fault: str, seed: int, site: Site | None = None, style: str = HERMES
) -> Script | None:
    """The reference with one fault: at `site` (one of `sites(task, fault)`), or at one that the seed draws.

    None where the task has no place for it. Raises ValueError for another kind or site.
    """
    rng, site = choose_site(task["id"], fault, seed, sites(task, fault), site)
    if site is None:
        return None
    actions, (step,) = with_faults(task, [(fault, site)], rng)
    return Script(tuple(_in_style(text, style) for text in actions), fault, step)


def with_faults(
    task: Mapping[str, Any], faults: Sequence[tuple[str, Site]], rng: random.Random
) -> tuple[tuple[str, ...], list[int]]:
    """The reference with several faults, each a kind at one of its sites, in different requests: (the texts of the
    actions, the faulty steps in the order of `faults`).

    Raises ValueError for two faults in one request, and for one that has no place where it is to stand.
    """
    texts = _texts(task)
    if len({hour for _, (hour, _) in faults}) < len(faults):
        raise ValueError("two faults in one request")
    for fault, (hour, index) in faults:
        faulty = _faulty(task, fault, (hour, index), rng)
        if faulty is None:
            raise ValueError(f"a task has no place for {fault!r} at {(hour, index)}")
        texts[hour] = texts[hour][:index] + faulty
    steps = [sum(map(len, texts[:hour])) + index + 1 for _, (hour, index) in faults]
    return tuple(text for part in texts for text in part), steps


def _in_style(text: str, style: str) -> str:
    """An action with its calls in another style; without what it says first where the style takes nothing but calls."""
    said, tag, _ = text.partition(OPEN)
    if style == HERMES or not tag:
        return text
    return ("" if style == BARE else said) + render_calls(parse_action(text).calls, style)


def _texts(task: Mapping[str, Any]) -> list[list[str]]:
    return [[step.right for step in reference_steps(request)] for request in task["requests"]]


def _call_sites(task: Mapping[str, Any]) -> list[Site]:
    """The steps that a fault can stand in: all but the closing replies."""
    return [(hour, index) for hour, texts in enumerate(_texts(task)) for index in range(len(texts) - 1)]


def _faulty(task: Mapping[str, Any], fault: str, site: Site, rng: random.Random) -> list[str] | None:
    """The texts of a request from the faulty step on; None where this fault has no place there."""
    (hour, index), request = site, task["requests"][site[0]]
    steps, kind = reference_steps(request), request["kind"]
    first = 1 if request["lookup"] else 0  # the step of the request's first call
    rest = [step.right for step in steps[index + 1 :]]
    if fault == "early_stop":
        return [REPLY] if hour == len(task["requests"]) - 1 and index == 0 else None
    if index < first:
        return None
    call = request["calls"][index - first]
    match fault:
        case "forgotten_call":
            return [REPLY] if kind == "tell" and index == 1 else None
        case "dropped_call":
            # the first call of "tell" could still be made after its second, which is the forgotten call
            return rest if kind != "tell" else None
        case "wrong_argument":
            changed = _other_arguments(task, site, call)
            return [_with_call(steps[index].right, call[0], rng.choice(changed)), *rest] if changed else None
        case "wrong_tool":
            others = [tool for tool in EFFECTS if tool != call[0] and set(EFFECTS[tool]) <= call[1].keys()]
            if not others:
                return None
            tool = rng.choice(others)
            return [_with_call(steps[index].right, tool, {name: call[1][name] for name in EFFECTS[tool]}), *rest]
        case "wrong_order":
            return [steps[index + 1].right, steps[index].right, *rest[1:]] if len(rest) > 1 else None
    wrong = steps[index].wrong
    return [wrong, *rest] if wrong is not None and fault == f"wrong_{kind}" else None


def _with_call(text: str, tool: str, arguments: Mapping[str, str]) -> str:
    """The same step, what it says first included, with another call."""
    return text.partition("<tool_call>")[0] + call_text(tool, {name: arguments[name] for name in PARAMETERS[tool]})


def _other_arguments(task: Mapping[str, Any], site: Site, call: Sequence) -> list[dict[str, str]]:
    """The call's arguments with one of them, not a candidate that was chosen, replaced by another of the task's names
    that the office takes there. Unlike a wrong choice, nothing that was shown speaks for it.
    """
    (hour, _), (tool, arguments) = site, call
    kind, office = task["requests"][hour]["kind"], office_before(task, hour)
    parameters = [name for name in arguments if kind not in DECISIONS or name != DECISIONS[kind].family.choice]
    names = sorted(set(_names(task)))
    changed = [arguments | {key: name} for key in parameters for name in names if name not in arguments.values()]
    return [candidate for candidate in changed if _accepts(office, tool, candidate)]


def _names(task: Mapping[str, Any]) -> Iterator[str]:
    """The names in the task's requests and among its candidates."""
    for request in task["requests"]:
        for _, arguments in [*request["calls"], *([request["lookup"]] if request["lookup"] else [])]:
            yield from arguments.values()


def _accepts(office: Office, tool: str, arguments: Mapping[str, str]) -> bool:
    try:
        office.clone().call(tool, dict(arguments))
    except CallError:
        return False
    return True
