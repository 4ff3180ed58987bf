# SPDX-License-Identifier: Apache-2.0

"""The scripted demonstrator of Desk: tasks in; the actions and hints that the embedded policy learns from out, as text
(`hintsd_jax.tools.desk_policy` makes tokens of it).

Without a hint it makes mistakes by habit (`envs.desk.habits`). With a hint it does what the words say, right or wrong,
where they speak of the step at hand; other words leave it to its habits. What it says of episodes afterwards is in
`envs.desk.reviews`.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from hintsd_jax.envs.desk import feedback
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.habits import error_rate
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.tool_calls import parse_action

REPLY = "Done."


@dataclasses.dataclass(frozen=True)
class ReferenceStep:
    """One step of a reference.

    right: the right action. wrong: the unnoticed mistake that could stand in its place. hint: the correct feedback.
    call_hint: the same where the call was left out. argument_hint: where another argument was wrong, which says nothing
    of the choice. wrong_hint: feedback that asks for the mistake. kind: of the request, where there is something to
    decide.
    """

    right: str
    wrong: str | None = None
    hint: str = feedback.NEUTRAL
    call_hint: str | None = None
    argument_hint: str | None = None
    wrong_hint: str | None = None
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
    first = feedback.make_call(calls[0])  # what is said of a request that was answered at once
    steps = [ReferenceStep(call_text(*request["lookup"]), hint=first)] if request["lookup"] else []
    for index, (tool, arguments) in enumerate(calls):
        right, hint = call_text(tool, arguments), feedback.make_call([tool, arguments])
        if kind in DECISIONS:
            family, label = DECISIONS[kind].family, request["label"]
            choice = family.choice
            other = DECISIONS[kind].other_label(label)
            wrong = call_text(tool, arguments | {choice: request["wrong"]})
            steps.append(
                ReferenceStep(
                    right=choice_text(label, arguments[choice], right),
                    wrong=choice_text(other, request["wrong"], wrong),
                    hint=feedback.use_value(arguments[choice], label),
                    call_hint=hint,
                    argument_hint=feedback.use_value(arguments[family.other], None) if family.other else None,
                    wrong_hint=feedback.use_value(request["wrong"], other),
                    kind=kind,
                )
            )
        elif kind == "tell" and index == 1:  # the second of two things, which a hurried office forgets
            steps.append(ReferenceStep(right, REPLY, hint, wrong_hint=feedback.CLOSE, kind=kind))
        else:
            steps.append(ReferenceStep(right, hint=hint))
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
      error_scale: factor on the habits' rates.
    """
    for request in task["requests"]:
        rate = error_scale * error_rate(task, request)
        for step in reference_steps(request):
            mistake = step.wrong is not None and rng.random() < rate
            if on_step(step, step.wrong if mistake else None) == REPLY:
                break


def played(task: Mapping[str, Any], rng: random.Random, error_scale: float = 1.0) -> tuple[list[str], str]:
    """An episode as plain text.

    Returns:
      (actions, everything that was read and done, with the hints).
    """
    desk, actions = Desk(), []
    texts = [message["content"] for message in desk.reset(task).messages]

    def on_step(step: ReferenceStep, mistake: str | None) -> str:
        actions.append(mistake or step.right)
        result = desk.step(parse_action(actions[-1]))
        texts.extend([actions[-1], *(message["content"] for message in result.messages), step.hint])
        return actions[-1]

    demonstrate(task, rng, on_step, error_scale)
    return actions, "\n".join(texts)
