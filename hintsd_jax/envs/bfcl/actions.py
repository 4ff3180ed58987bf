# SPDX-License-Identifier: Apache-2.0

"""The two dialogue formats: an action goes in, its calls come out; calls and results go in, messages come out.

"official" is how the benchmark's handler for Qwen reads and answers, "paper" how HINT-SD's released environment does.
The host loop's parser is stricter than both, so the text of an action is read again here; of an action in another style
of calls, or without `<tool_call>`, the host loop's calls are taken. Where neither reads a call, but the host loop
says why one could not be read, `problem_messages` tells the agent.

Invariant: nothing raises, whatever the text, nothing of it is evaluated, and reading takes time in proportion to it.
"""

import json
import re
from collections.abc import Iterator, Sequence

from hintsd_jax.envs.base import Action, Message, ToolCall
from hintsd_jax.envs.call_reading import HERMES, MAX_DIGITS, OPEN, THINK_CLOSE
from hintsd_jax.texts import encodable

OFFICIAL, PAPER = "official", "paper"
FORMATS = (OFFICIAL, PAPER)

# The two ends of a handler's block: in "official" `<tool_call>\n(.*?)\n</tool_call>`, in "paper"
# `<tool_call>\s*(\{.*?\})\s*</tool_call>`. Searched for one after the other: as one expression they take time with the
# square of a text that opens blocks and never closes them.
_OPENING = {OFFICIAL: re.compile(r"<tool_call>\n"), PAPER: re.compile(r"<tool_call>\s*(?=\{)")}
_CLOSING = {OFFICIAL: re.compile(r"\n</tool_call>"), PAPER: re.compile(r"(?<=\})\s*</tool_call>")}


def read_calls(action: Action, form: str) -> tuple[ToolCall, ...]:
    """The calls that the format's own handler runs for this action; where there are none, the user turn ends."""
    if OPEN not in action.text or action.style not in ("", HERMES):
        return action.calls
    return _read_paper(action.text) if form == PAPER else _read_official(action.text)


def result_messages(calls: Sequence[ToolCall], results: Sequence[str], form: str) -> tuple[Message, ...]:
    """The messages that bring an agent the results of its calls, in order."""
    if form == OFFICIAL:
        return tuple({"role": "tool", "content": encodable(result)} for result in results)
    blocks = []
    for number, (call, result) in enumerate(zip(calls, results, strict=True), 1):
        content = _loads(result) if result.strip().startswith(("{", "[")) else None
        entry = {"name": f"{call.name}_{number}", "content": result if content is None else content}
        blocks.append(f"<tool_call>\n{json.dumps(entry, ensure_ascii=False)}\n</tool_call>\n")
    return ({"role": "user", "content": encodable("".join(blocks))},)


def problem_messages(problem: str, form: str) -> tuple[Message, ...]:
    """What an agent reads whose call could not be read: an error in place of a result."""
    return result_messages([ToolCall("unreadable_call", {})], [f"Error during execution: {problem}"], form)


def _read_official(text: str) -> tuple[ToolCall, ...]:
    """Blocks that are not JSON are passed over; one that is JSON but no call makes the whole action none."""
    calls = []
    for block in blocks(text.rpartition(THINK_CLOSE)[2], OFFICIAL):
        payload = _loads(block)
        if payload is None and block.strip() != "null":
            continue
        if not isinstance(payload, dict) or not isinstance(payload.get("name"), str):
            return ()
        arguments = payload.get("arguments")
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        if not isinstance(arguments, dict):
            return ()
        calls.append(ToolCall(payload["name"], arguments))
    return tuple(calls)


def _read_paper(text: str) -> tuple[ToolCall, ...]:
    """Blocks that are no call are passed over; arguments that cannot be read count as none."""
    calls = []
    for block in blocks(text, PAPER):
        payload = _loads(block)
        if not isinstance(payload, dict) or not isinstance(payload.get("name"), str) or "arguments" not in payload:
            continue
        arguments = payload["arguments"]
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        calls.append(ToolCall(payload["name"], arguments if isinstance(arguments, dict) else {}))
    return tuple(calls)


def blocks(text: str, form: str) -> Iterator[str]:
    """What stands in the blocks of a text, as the handler of the format divides it."""
    position = 0
    while (opening := _OPENING[form].search(text, position)) and (
        closing := _CLOSING[form].search(text, opening.end())
    ):
        yield text[opening.end() : closing.start()]
        position = closing.end()


def _integer(literal: str) -> int:
    if len(literal) > MAX_DIGITS:  # as Python itself, where no library has lifted its limit
        raise ValueError("too many digits")
    return int(literal)


def _loads(text: str) -> object:
    """The JSON value, None where there is none; read by Python, as in both handlers (NaN is a number, of two equal keys
    the last one counts).
    """
    try:
        return json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets
        return None
