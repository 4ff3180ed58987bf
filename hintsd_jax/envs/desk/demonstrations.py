"""The scripted demonstrator of Desk: what the embedded policy learned its habits, its obedience and its reviews from.

Unhinted it errs silently, at a rate that differs by kind of request (`ERROR_RATES`): on two kinds the wrong action is
its *usual* one, so sharpening its distribution makes it worse, not better. With a correct hint it never errs. Its
reviews of failed episodes are always right. All that is text; `hintsd_jax.tools.desk_policy` makes tokens of it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence

from hintsd_jax.envs.desk import advice, solver
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
DEEDS = {
    "copy": "copied",
    "send": "sent",
    "book": "booked",
    "cancel": "cancelled",
    "delete": "deleted",
    "forward": "forwarded",
}


@dataclasses.dataclass(frozen=True)
class Move:
    """One step of a reference: the right action, the silent mistake that could stand in its place, and the correct
    hint.
    """

    right: str
    wrong: str | None = None
    hint: str = advice.NEUTRAL
    kind: str | None = None  # the kind of request, where there is something to decide


def call_text(tool: str, arguments: dict[str, str]) -> str:
    return "<tool_call>\n" + json.dumps({"name": tool, "arguments": arguments}) + "\n</tool_call>"


def taking(label: str, value: str, call: str) -> str:
    """A choice is said before it is made: the look-up then takes two short hops, which half a million weights can
    learn.
    """
    return f'Take {label} "{value}".\n{call}'


def moves(request: dict) -> list[Move]:
    """The reference's steps for one request, its closing reply included."""
    kind, calls = request["kind"], request["calls"]
    steps = [Move(call_text(*request["lookup"]))] if request["lookup"] else []
    for index, (tool, arguments) in enumerate(calls):
        right = call_text(tool, arguments)
        if kind in DECISIONS:
            choice = DECISIONS[kind].choice
            other = next(label for label in DECISIONS[kind].labels if label != request["label"])
            wrong = call_text(tool, arguments | {choice: request["wrong"]})
            hint = advice.use(arguments[choice], request["label"])
            right, wrong = taking(request["label"], arguments[choice], right), taking(other, request["wrong"], wrong)
            steps.append(Move(right, wrong, hint, kind))
        elif kind == "tell" and index == 1:  # the second of two things, which a hurried office forgets
            steps.append(Move(right, REPLY, advice.still_to_do([tool, arguments]), kind))
        else:
            steps.append(Move(right))
    return [*steps, Move(REPLY)]


def demonstrate(
    task: dict, rng: random.Random, on_step: Callable[[Move, str | None], str], error_scale: float = 1.0
) -> None:
    """Walks the task; `on_step(move, erring_action or None)` is told the move and, if the demonstrator would err, its
    wrong action, and returns the action that is really taken (a forgetful reply skips the rest of the request)."""
    for request in task["requests"]:
        for move in moves(request):
            errs = move.wrong is not None and rng.random() < error_scale * ERROR_RATES[request["kind"]]
            if on_step(move, move.wrong if errs else None) == REPLY:
                break


def review(task: dict, actions: Sequence[str]) -> tuple[list[str], tuple]:
    """The right review of any played episode: a short line per step, and the environment's faults.

    Returns:
      (lines, faults): `#2 final "a" copied "b" bad` where something was chosen, `#5 forgot "c" bad` where something was
      left out, `#3 ok` elsewhere.
    """
    desk = Desk()
    desk.reset(task)
    lines = []
    for number, text in enumerate(actions, start=1):
        hour, entries, faults = desk.world.hour, len(desk.world.ledger), len(desk.faults)
        desk.step(parse_action(text))
        faulty = len(desk.faults) > faults
        verdict = "bad" if faulty else "ok"
        request = task["requests"][hour]
        new = desk.world.ledger[entries:]
        if request["kind"] in DECISIONS and new and new[0][1] == request["calls"][0][0]:
            choice = DECISIONS[request["kind"]].choice
            middle = (
                f'{request["label"]} "{request["calls"][0][1][choice]}" {DEEDS[request["kind"]]} "{new[0][2][choice]}" '
            )
        elif faulty and not new:
            left_out = solver.missing_calls(desk.world, task, hour)[0]
            middle = f'forgot "{next(iter(left_out[1].values()))}" '
        else:
            middle = ""
        lines.append(f"#{number} {middle}{verdict}")
    return lines, desk.report().faults


def review_answer(lines: Sequence[str], faults: Sequence) -> str:
    """The analyser's answer in the method's format: free text first, the JSON last."""
    failures = [{"step": fault.step, "feedback": fault.feedback} for fault in faults]
    return "\n".join(lines) + "\n" + json.dumps({"failures": failures})


def advise(task: dict, actions: Sequence[str], step: int) -> tuple[str, str]:
    """The right feedback on a given step: (its review line, the words)."""
    lines, faults = review(task, actions)
    for fault in faults:
        if fault.step == step:
            return lines[step - 1], fault.feedback
    line = lines[step - 1]
    if '"' not in line:
        return line, advice.NEUTRAL
    return line, advice.use(line.split('"')[1], line.split()[1])


def advice_answer(line: str, step: int, feedback: str) -> str:
    return line + "\n" + json.dumps({"failures": [{"step": step, "feedback": feedback}]})


def judge(task: dict, actions: Sequence[str], step: int) -> str:
    """The right answer of a judge who sees one step alone, in the method's format: the verdict is the truth, the words
    only what can be known.
    """
    faults = [fault for fault in review(task, actions)[1] if fault.step == step]
    failures = [{"step": 1, "feedback": advice.without_names(fault.feedback)} for fault in faults]
    return f"#1 {'bad' if faults else 'ok'}\n" + json.dumps({"failures": failures})


def transcript(task: dict, rng: random.Random) -> str:
    """Everything that a demonstration, its hints and its review say, as plain text (the tokenizer's corpus)."""
    desk, actions = Desk(), []
    texts = [message["content"] for message in desk.reset(task).messages]

    def on_step(move: Move, erring: str | None) -> str:
        actions.append(erring or move.right)
        turn = desk.step(parse_action(actions[-1]))
        texts.extend([actions[-1], *(message["content"] for message in turn.messages), move.hint])
        return actions[-1]

    demonstrate(task, rng, on_step)
    return "\n".join([*texts, review_answer(*review(task, actions))])
