# SPDX-License-Identifier: Apache-2.0

"""Tool calls in the style of a chat template: an action's text in, an `Action` out, and back.

Two styles. HERMES (Qwen): `<tool_call>`, one JSON object {"name": str, "arguments": object}, `</tool_call>`, with
nothing but whitespace between; text may stand around the blocks. BARE (Llama 3): the action is nothing but objects
{"name": str, "parameters": object}, separated by ";" or a newline, with or without `<|python_tag|>` before them; text
that begins otherwise holds no call. An object is read by a JSON decoder from its first character on, so that a tag or
a ";" inside a string argument is only text. A leading `<think>` block is reasoning: no call is read in it.

Invariant: `parse_action` never raises, whatever the text, and it is all or nothing: one call that cannot be read gives
a `problem` and no calls. What it accepts survives `render_call` unchanged and encodes as UTF-8.
"""

import json
import math
import re
from typing import Any

from hintsd_jax.envs.base import Action, ToolCall
from hintsd_jax.texts import is_encodable

HERMES, BARE = "hermes", "bare"
STYLES = (HERMES, BARE)
OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# Of an integer. Python has such a limit too, which a library (mpmath) may lift; without one a megabyte takes a minute.
MAX_DIGITS = 4_000
# Of nested arrays and objects: far above real arguments, far below Python's recursion limit.
MAX_DEPTH = 32

_ARGUMENTS = {HERMES: "arguments", BARE: "parameters"}
_SPACE = re.compile(r"[ \t\r\n]*")
_TAG = re.compile("</?tool_call>")
_SEPARATOR = re.compile(r"[ \t\r]*[;\n][ \t\r\n]*")


def render_call(call: ToolCall, style: str = HERMES) -> str:
    """The text of one call exactly as the chat templates of its style write it.

    Raises:
      ValueError: an argument is NaN or infinite.
    """
    payload = json.dumps({"name": call.name, _ARGUMENTS[style]: call.arguments}, ensure_ascii=False, allow_nan=False)
    return f"{OPEN}\n{payload}\n{CLOSE}" if style == HERMES else payload


def parse_action(text: str, style: str = HERMES, cut_at: int = 0) -> Action:
    """Reads every tool call of a sampled action; never raises. See the module docstring for what is accepted.

    cut_at: the number of tokens at which the action was cut; 0 where it came to its end.
    """
    try:
        return Action(text, calls=(_read_blocks if style == HERMES else _read_bare)(text))
    except (ValueError, RecursionError) as error:  # RecursionError: the C decoder on thousands of brackets
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if cut_at:
            return Action(text, problem=f"the action was cut at {cut_at} tokens: {problem}", problem_kind="cut")
        return Action(text, problem=problem, problem_kind="json")


def _read_blocks(text: str) -> tuple[ToolCall, ...]:
    calls = []
    position = _after_thinking(text)
    while tag := _TAG.search(text, position):
        if tag.group() == CLOSE:
            raise ValueError(f"{CLOSE} without {OPEN}")
        payload, end = _read_object(text, tag.end(), len(calls) + 1)
        position = _skip_space(text, end)
        if not text.startswith(CLOSE, position):
            raise ValueError(f"call {len(calls) + 1} does not end with {CLOSE} after its JSON object")
        position += len(CLOSE)
        calls.append(_to_call(payload, len(calls) + 1, HERMES))
    return tuple(calls)


def _read_bare(text: str) -> tuple[ToolCall, ...]:
    position = _skip_space(text, _after_thinking(text))
    if text.startswith(PYTHON_TAG, position):
        position += len(PYTHON_TAG)
    elif not text.startswith("{", position):
        return ()
    calls = []
    while True:
        payload, end = _read_object(text, position, len(calls) + 1)
        calls.append(_to_call(payload, len(calls) + 1, BARE))
        if _skip_space(text, end) == len(text):
            return tuple(calls)
        separator = _SEPARATOR.match(text, end)
        if not separator:
            raise ValueError(f'call {len(calls)} is followed by more than ";" or a newline and the next call')
        position = separator.end()


def _read_object(text: str, position: int, number: int) -> tuple[Any, int]:
    """(the JSON value that comes next, where it ends)."""
    start = _skip_space(text, position)
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        # the position counts from the object's first character, where a reader would look
        raise ValueError(f"call {number} is not valid JSON: {error.msg} at character {error.pos - start}") from None


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _after_thinking(text: str) -> int:
    start = _skip_space(text, 0)
    if not text.startswith(THINK_OPEN, start):
        return 0
    end = text.find(THINK_CLOSE, start)
    if end < 0:
        raise ValueError(f"{THINK_OPEN} without {THINK_CLOSE}")
    return end + len(THINK_CLOSE)


def _to_call(payload: Any, number: int, style: str) -> ToolCall:
    arguments_key = _ARGUMENTS[style]
    if not isinstance(payload, dict):
        raise ValueError(f"call {number} is not a JSON object")
    for key in ("name", arguments_key):
        if key not in payload:
            raise ValueError(f'call {number} lacks "{key}"')
    # Llama 3 models often write this, as their documentation does.
    if style == BARE and payload.get("type") == "function":
        payload = {key: value for key, value in payload.items() if key != "type"}
    if unknown := sorted(payload.keys() - {"name", arguments_key}):
        raise ValueError(f"call {number} has the unknown key {unknown[0]!a}")
    name, arguments = payload["name"], payload[arguments_key]
    if not (isinstance(name, str) and name):
        raise ValueError(f'call {number}: "name" must be a non-empty string')
    if not isinstance(arguments, dict):
        raise ValueError(f'call {number}: "{arguments_key}" must be an object')
    _check(payload, number)
    return ToolCall(name, arguments)


def _check(payload: Any, number: int) -> None:
    """Raises ValueError for deep nesting and text that is not Unicode. Iterative, so that depth itself cannot hurt."""
    pending = [(payload, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str):
            if not is_encodable(value):
                raise ValueError(f"call {number} holds half of a surrogate pair")
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise ValueError("nested too deeply")
            children = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            pending.extend((child, depth + 1) for child in children)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return result


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"the number {literal[:20]} is too large")
    return value


def _integer(literal: str) -> int:
    if len(literal) > MAX_DIGITS:
        raise ValueError(f"the number {literal[:20]} has {len(literal)} digits")
    return int(literal)


def _no_constant(literal: str) -> None:
    raise ValueError(f"{literal} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=_finite, parse_int=_integer, parse_constant=_no_constant
)
