# SPDX-License-Identifier: Apache-2.0

"""The scripted demonstrator of Desk: tasks in; the actions, hints, reviews and verdicts that the embedded policy has
learned from out, as text (`hintsd_jax.tools.desk_policy` makes tokens of it).

Without a hint it makes mistakes, at a rate that differs by kind of request (`ERROR_RATES`): on two kinds the wrong
action is its *usual* one, so a policy that only becomes surer of itself becomes worse. With a correct hint it makes
none. Its reviews of failed episodes are always right.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Fault
from hintsd_jax.envs.desk import feedback, reference
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.generator import DECISIONS
from hintsd_jax.envs.tool_calls import parse_action

ERROR_RATES = {
    "copy": 0.05,
    "send": 0.1,
    "book": 0.1,
    "cancel": 0.15,
    "delete": 0.6,
    "forward": 0.65,
    "tell": 0.15,
    "add": 0.0,
}
REPLY = "Done."
# How a review names what was done; one word each, so that the word leads to the call.
REVIEW_VERBS = {
    "copy": "copied",
    "send": "sent",
    "book": "booked",
    "cancel": "cancelled",
    "delete": "deleted",
    "forward": "forwarded",
}


@dataclasses.dataclass(frozen=True)
class ReferenceStep:
    """One step of a reference.

    right: the right action. wrong: the unnoticed mistake that could stand in its place. hint: the correct feedback.
    kind: of the request, where there is something to decide.
    """

    right: str
    wrong: str | None = None
    hint: str = feedback.NEUTRAL
    kind: str | None = None


def call_text(tool: str, arguments: Mapping[str, str]) -> str:
    """A tool call as the demonstrator writes it."""
    return "<tool_call>\n" + json.dumps({"name": tool, "arguments": arguments}) + "\n</tool_call>"


def choice_text(label: str, value: str, call: str) -> str:
    """An action that says its choice before the call: the look-up then takes two short hops, which half a million
    weights can learn.
    """
    return f'Take {label} "{value}".\n{call}'


def reference_steps(request: Mapping[str, Any]) -> list[ReferenceStep]:
    """The reference's steps for one request, its closing reply included."""
    kind, calls = request["kind"], request["calls"]
    steps = [ReferenceStep(call_text(*request["lookup"]))] if request["lookup"] else []
    for index, (tool, arguments) in enumerate(calls):
        right = call_text(tool, arguments)
        if kind in DECISIONS:
            choice = DECISIONS[kind].choice
            other = next(label for label in DECISIONS[kind].labels if label != request["label"])
            wrong = call_text(tool, arguments | {choice: request["wrong"]})
            hint = feedback.use_value(arguments[choice], request["label"])
            right = choice_text(request["label"], arguments[choice], right)
            wrong = choice_text(other, request["wrong"], wrong)
            steps.append(ReferenceStep(right, wrong, hint, kind))
        elif kind == "tell" and index == 1:  # the second of two things, which a hurried office forgets
            steps.append(ReferenceStep(right, REPLY, feedback.make_call([tool, arguments]), kind))
        else:
            steps.append(ReferenceStep(right))
    return [*steps, ReferenceStep(REPLY)]


def demonstrate(
    task: Mapping[str, Any],
    rng: random.Random,
    on_step: Callable[[ReferenceStep, str | None], str],
    error_scale: float = 1.0,
) -> None:
    """Walks through the task as the demonstrator would.

    Args:
      on_step: gets each step of the reference and, where the demonstrator makes a mistake, its wrong action, else None;
        returns the action that is really taken (a closing reply in place of a call skips the rest of the request).
      error_scale: factor on `ERROR_RATES`.
    """
    for request in task["requests"]:
        for step in reference_steps(request):
            mistake = step.wrong is not None and rng.random() < error_scale * ERROR_RATES[request["kind"]]
            if on_step(step, step.wrong if mistake else None) == REPLY:
                break


def review(task: Mapping[str, Any], actions: Sequence[str]) -> tuple[list[str], tuple[Fault, ...]]:
    """The right review of an episode, however it was played: a short line per step, and the environment's faults.

    Returns:
      (lines, faults): `#2 final "a" copied "b" bad` where something was chosen, `#5 forgot "c" bad` where something was
      left out, `#3 ok` elsewhere.
    """
    desk = Desk()
    desk.reset(task)
    lines = []
    for number, text in enumerate(actions, start=1):
        hour, entries, faults = desk.office.hour, len(desk.office.ledger), len(desk.faults)
        desk.step(parse_action(text))
        faulty = len(desk.faults) > faults
        request = task["requests"][hour]
        new = desk.office.ledger[entries:]
        if request["kind"] in DECISIONS and new and new[0][1] == request["calls"][0][0]:
            choice = DECISIONS[request["kind"]].choice
            expected, chosen = request["calls"][0][1][choice], new[0][2][choice]
            what = f'{request["label"]} "{expected}" {REVIEW_VERBS[request["kind"]]} "{chosen}" '
        elif faulty and not new:
            left_out = reference.missing_calls(desk.office, task, hour)[0]
            what = f'forgot "{next(iter(left_out[1].values()))}" '
        else:
            what = ""
        lines.append(f"#{number} {what}{'bad' if faulty else 'ok'}")
    return lines, desk.report().faults or ()


def review_answer(lines: Sequence[str], faults: Sequence[Fault]) -> str:
    """The analyser's answer in the format that is asked for: free text first, the JSON last."""
    failures = [{"step": fault.step, "feedback": fault.feedback} for fault in faults]
    return "\n".join(lines) + "\n" + json.dumps({"failures": failures})


def step_feedback(task: Mapping[str, Any], actions: Sequence[str], step: int) -> tuple[str, str]:
    """The right feedback on a given step, faulty or not: (its review line, the feedback)."""
    lines, faults = review(task, actions)
    line = lines[step - 1]
    for fault in faults:
        if fault.step == step:
            return line, fault.feedback
    if '"' not in line:
        return line, feedback.NEUTRAL
    return line, feedback.use_value(line.split('"')[1], line.split()[1])


def step_feedback_answer(line: str, step: int, text: str) -> str:
    """The analyser's answer to a question about one step."""
    return line + "\n" + json.dumps({"failures": [{"step": step, "feedback": text}]})


def step_verdict(task: Mapping[str, Any], actions: Sequence[str], step: int) -> str:
    """The right answer of a judge who sees one step alone: the verdict is the truth, the feedback only what can be
    known.
    """
    faults = [fault for fault in review(task, actions)[1] if fault.step == step]
    failures = [{"step": 1, "feedback": feedback.without_names(fault.feedback)} for fault in faults]
    return f"#1 {'bad' if faults else 'ok'}\n" + json.dumps({"failures": failures})


def transcript(task: Mapping[str, Any], rng: random.Random) -> str:
    """Everything that a demonstration, its hints and its review say, as plain text (the tokenizer's corpus)."""
    desk, actions = Desk(), []
    texts = [message["content"] for message in desk.reset(task).messages]

    def on_step(step: ReferenceStep, mistake: str | None) -> str:
        actions.append(mistake or step.right)
        result = desk.step(parse_action(actions[-1]))
        texts.extend([actions[-1], *(message["content"] for message in result.messages), step.hint])
        return actions[-1]

    demonstrate(task, rng, on_step)
    return "\n".join([*texts, review_answer(*review(task, actions))])
