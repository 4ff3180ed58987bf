# SPDX-License-Identifier: Apache-2.0

"""Scripts of BFCL tasks for the scripted policy: a task in, the texts of an episode's actions out: the ground truth, or
the ground truth with one fault at a known step.

A user turn is its calls, then a text without a call that closes it. A fault is put into the script with one call a
step: there, the step in which it happens is beyond doubt. It is the first action that differs from the ground truth's.

Invariant: everything follows from the task, the kind of fault and the seed. Scripts know the ground truth: they
measure the loop, the scores and hindsight, and as dialogues for `sft` stand for a policy that errs never.
"""

import importlib
import inspect
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.bfcl.execute import tool_docs
from hintsd_jax.envs.bfcl.score import parse_call
from hintsd_jax.envs.call_reading import HERMES
from hintsd_jax.envs.script import Script, choose_site
from hintsd_jax.envs.tool_calls import render_calls

DONE = "Done."
FAULTS = {
    "dropped_call": "one call is left out",
    "wrong_argument": "one argument of a call has another value of its type",
    "wrong_tool": "another tool is called, with as many of the arguments as it takes",
    "wrong_order": "two successive calls of a user turn change places",
    "early_stop": "from some call on, and in all later user turns, no tool is called",
}

Site = tuple[int, int]
"""A user turn and a call in it, both 0-based."""


def ground_truth_calls(task: Mapping[str, Any]) -> list[list[ToolCall]]:
    """The ground truth as [user turn][call], every argument by its name."""
    class_names = json.loads(task["entry"])["involved_classes"]
    return [[_read_call(text, class_names) for text in turn] for turn in json.loads(task["ground_truth"])]


def ground_truth(task: Mapping[str, Any], one_call_a_step: bool = False, style: str = HERMES) -> Script:
    """The ground truth: all calls of a user turn in one step, or one call a step. style: see `envs.tool_calls`."""
    return Script(_actions(ground_truth_calls(task), one_call_a_step, style))


def sites(task: Mapping[str, Any], fault: str) -> list[Site]:
    """Where a kind of fault can be put into a task.

    Raises ValueError for a kind that is not in `FAULTS`.
    """
    turns = ground_truth_calls(task)
    places = [(turn, call) for turn, calls in enumerate(turns) for call in range(len(calls))]
    match fault:
        case "dropped_call":
            return places
        case "wrong_argument":
            return [(turn, call) for turn, call in places if turns[turn][call].arguments]
        case "wrong_tool":
            docs = _first_docs(task)
            return [(turn, call) for turn, call in places if _other_tools(turns[turn][call], docs)]
        case "wrong_order":
            successive = [(turn, call) for turn, call in places if call + 1 < len(turns[turn])]
            return [(turn, call) for turn, call in successive if turns[turn][call] != turns[turn][call + 1]]
        case "early_stop":
            return places[:-1]  # stopping at the last call is to drop it
    raise ValueError(f"no fault {fault!r}: choose one of {', '.join(FAULTS)}")


def with_fault(
    task: Mapping[str, Any], fault: str, seed: int, site: Site | None = None, style: str = HERMES
) -> Script | None:
    """The ground truth, one call a step, with one fault: at `site` (one of `sites(task, fault)`), or at one that the
    seed draws.

    None where the task has no place for it. Raises ValueError for another kind or site.
    """
    rng, site = choose_site(task["id"], fault, seed, sites(task, fault), site)
    if site is None:
        return None
    turns, (turn, call) = ground_truth_calls(task), site
    step = sum(len(calls) + 1 for calls in turns[:turn]) + call + 1
    calls = turns[turn]
    match fault:
        case "dropped_call":
            del calls[call]
        case "wrong_argument":
            calls[call] = _with_other_value(calls[call], turns, rng)
        case "wrong_tool":
            doc = rng.choice(_other_tools(calls[call], _first_docs(task)))
            takes = doc["parameters"]["properties"]
            arguments = {name: value for name, value in calls[call].arguments.items() if name in takes}
            calls[call] = ToolCall(doc["name"], arguments)
        case "wrong_order":
            calls[call : call + 2] = [calls[call + 1], calls[call]]
        case "early_stop":
            turns[turn:] = [calls[:call], *([] for _ in turns[turn + 1 :])]
    return Script(_actions(turns, True, style), fault, step)


def _actions(turns: Sequence[Sequence[ToolCall]], one_call_a_step: bool, style: str) -> tuple[str, ...]:
    actions = []
    for calls in turns:
        steps = [[call] for call in calls] if one_call_a_step else [calls] if calls else []
        actions += [*(render_calls(step, style) for step in steps), DONE]
    return tuple(actions)


def _read_call(text: str, class_names: Sequence[str]) -> ToolCall:
    """A ground-truth expression such as "sort('report.pdf')"; literals only."""
    name, keywords, positional = parse_call(text)
    names = list(inspect.signature(_method(name, class_names)).parameters)[1:]  # without self
    return ToolCall(name, dict(zip(names, positional, strict=False)) | keywords)


def _method(name: str, class_names: Sequence[str]) -> Any:
    paths = importlib.import_module("bfcl_eval.constants.executable_backend_config").CLASS_FILE_PATH_MAPPING
    owner = next(owner for owner in reversed(class_names) if any(doc["name"] == name for doc in tool_docs(owner)))
    return getattr(getattr(importlib.import_module(paths[owner]), owner), name)


def _first_docs(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The documentation of the tools that the agent has from the start."""
    entry = json.loads(task["entry"])
    late = {name for names in entry.get("missed_function", {}).values() for name in names}
    return [doc for owner in entry["involved_classes"] for doc in tool_docs(owner) if doc["name"] not in late]


def _other_tools(call: ToolCall, docs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tools that the call's arguments are enough for, those that take the most of them."""
    given = call.arguments.keys()
    others = [doc for doc in docs if doc["name"] != call.name and set(doc["parameters"]["required"]) <= given]
    shared = [len(given & doc["parameters"]["properties"].keys()) for doc in others]
    return [doc for doc, count in zip(others, shared, strict=True) if count == max(shared)]


def _with_other_value(call: ToolCall, turns: Sequence[Sequence[ToolCall]], rng: random.Random) -> ToolCall:
    values = [value for calls in turns for other in calls for value in other.arguments.values()]
    texts = sorted({value for value in values if isinstance(value, str)})
    name = rng.choice(sorted(call.arguments))
    return ToolCall(call.name, call.arguments | {name: _other_value(call.arguments[name], texts, rng)})


def _other_value(value: Any, texts: Sequence[str], rng: random.Random) -> Any:
    """A mistake that a policy could make: a number that is off, another of the task's texts, an entry missing."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + rng.choice((1, 2, 10))
        case str():
            return rng.choice([text for text in texts if text != value] or [f"{value}_2"])
        case list():
            return value[:-1] if value else list(texts[:1])
        case dict() if value:
            name = rng.choice(sorted(value))
            return value | {name: _other_value(value[name], texts, rng)}
    raise ValueError(f"no ground truth has an argument like {value!r}")
