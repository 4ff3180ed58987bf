# SPDX-License-Identifier: Apache-2.0

"""What the demonstrator says of episodes afterwards: a task and the texts of its actions in; the right review, the
right feedback on a step, and what a judge of one step can know out.

A review's lines set side by side what was asked for and what was done, and end with the first two that differ:
`#8 oldest newest bad`, `#14 late late asked hakin given hazed bad`. A small network compares two words that stand next
to each other; that a name in a call is none that the user said, a page earlier, it does not see.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Fault
from hintsd_jax.envs.desk import feedback
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.desk.office import LOOKUPS
from hintsd_jax.envs.tool_calls import parse_action

NO_HINT, LOOK_UP_FIRST, LOOK_ELSEWHERE = "", "Look it up first.", "Look up another name."
# What a line says went wrong, where nothing is set side by side: a call left out, another tool, a step that brought
# nothing.
FORGOT, TOOL, WASTED = "forgot", "tool", "wasted"
# What stands before a name: the user's, and the call's.
ASKED, GIVEN = " asked ", " given "
REVIEW_WORDS = (FORGOT, TOOL, WASTED)
_LABELS = {label: kind for kind, decision in DECISIONS.items() for label in decision.labels}


def review(task: Mapping[str, Any], actions: Sequence[str]) -> tuple[list[str], tuple[Fault, ...]]:
    """The right review of an episode, however it was played: a short line per step, and the environment's faults.

    Returns:
      (lines, faults): `#2 final draft bad` (asked, taken) where something was chosen, `#3 asked hakin given hakin ok`
      of the other arguments of a call, `#5 forgot bad` where something went wrong otherwise, `#4 ok` elsewhere.
    """
    desk = Desk()
    desk.reset(task)
    lines = []
    for number, text in enumerate(actions, start=1):
        request, entries, faults = task["requests"][desk.office.hour], len(desk.office.ledger), len(desk.faults)
        desk.step(parse_action(text))
        new = [(tool, arguments) for _, tool, arguments, _ in desk.office.ledger[entries:]]
        lines.append(f"#{number} {_what(request, new, len(desk.faults) > faults)}")
    found = desk.report().faults or ()
    for fault in found:  # what an episode that a limit has cut lacks is known at its end alone
        if not lines[fault.step - 1].endswith("bad"):
            lines[fault.step - 1] = f"#{fault.step} {WASTED} bad"
    return lines, found


def _what(request: Mapping[str, Any], new: Sequence[tuple[str, Mapping[str, str]]], faulty: bool) -> str:
    """A line's words on one step. new: the effects that it had."""
    verdict = "bad" if faulty else "ok"
    tools = [tool for tool, _ in request["calls"]]
    if not new:
        return f"{FORGOT} {verdict}" if faulty else verdict
    tool, given = new[0]
    if tool not in tools:
        return f"{TOOL} {verdict}"
    asked, shown = request["calls"][tools.index(tool)][1], {}
    if request["kind"] in DECISIONS:
        decision, label = DECISIONS[request["kind"]], request["label"]
        shown = {asked[decision.family.choice]: label, request["wrong"]: decision.other_label(label)}
    words = ""
    for parameter, name in asked.items():
        other = given[parameter]
        both_shown = name in shown and other in shown
        words += f" {shown[name]} {shown[other]}" if both_shown else f"{ASKED}{name}{GIVEN}{other}"
        if name != other:
            break
    return f"{words.lstrip()} {verdict}"


def says_more_than_ok(line: str) -> bool:
    """Whether a line says what was chosen or what went wrong."""
    return len(line.split()) > 2


def asks_for_words(line: str) -> bool:
    """Whether there is more to say of a line's step than "Go on.": something went wrong there, or was chosen."""
    return line.endswith("bad") or line.split()[1] in _LABELS


def review_answer(lines: Sequence[str], faults: Sequence[Fault]) -> str:
    """The analyser's answer in the format that is asked for: the lines that say more than `ok`, then the JSON."""
    failures = [{"step": fault.step, "feedback": fault.feedback} for fault in faults]
    told = [line for line in lines if says_more_than_ok(line)]
    return "\n".join([*told, json.dumps({"failures": failures})])


def step_feedback(task: Mapping[str, Any], actions: Sequence[str], step: int) -> tuple[str, str]:
    """The right feedback on a given step, faulty or not: (its review line, the feedback)."""
    lines, faults = review(task, actions)
    line = lines[step - 1]
    for fault in faults:
        if fault.step == step:
            return line, fault.feedback
    if not asks_for_words(line):
        return line, feedback.NEUTRAL
    asked = line.split()[1]
    request = task["requests"][_hour(actions, step)]
    return line, feedback.use_value(request["calls"][0][1][DECISIONS[request["kind"]].family.choice], asked)


def _hour(actions: Sequence[str], step: int) -> int:
    """The request that is open at a step."""
    earlier = [parse_action(text) for text in actions[: step - 1]]
    return sum(not (action.calls or action.problem) for action in earlier)


def step_feedback_answer(line: str, step: int, text: str) -> str:
    """The analyser's answer to a question about one step."""
    return line + "\n" + json.dumps({"failures": [{"step": step, "feedback": text}]})


def step_verdict(action: str, observation: str) -> tuple[int, str]:
    """What a judge can know who sees one step and what came next, and nothing of what the user asked for: an error
    shows a mistake; so does a tool that does not go with the label that the action says it takes; a look-up that found
    something was right; of anything else nobody can tell.

    Returns:
      (verdict in {1, -1, 0}, the hint, "" where there is none).
    """
    expected, calls = _announced_tool(action), parse_action(action).calls
    if "Error" in observation:
        return -1, LOOK_ELSEWHERE if calls and calls[0].name in LOOKUPS else LOOK_UP_FIRST
    if expected and calls and calls[0].name != expected:
        return -1, f"Call {expected} instead."
    return (1 if observation.startswith("Found") else 0), NO_HINT


def _announced_tool(action: str) -> str | None:
    """The tool that goes with the label that an action says it takes; None where it says none."""
    words = action.partition("<tool_call>")[0].split()
    kind = _LABELS.get(words[1]) if len(words) > 1 and words[0] == "Take" else None
    return DECISIONS[kind].family.effect if kind else None
