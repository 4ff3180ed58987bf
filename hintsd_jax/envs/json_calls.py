# SPDX-License-Identifier: Apache-2.0

"""Tool calls whose arguments are one JSON object: a text in, its calls out, and back, in the styles HERMES, BARE, JSON
and FENCED (see `envs.tool_calls`).

Invariant: an object is read by a JSON decoder from its first character on, so that a tag, a fence or a ";" inside a
string argument is only text. Reading takes time in proportion to the text.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.call_reading import (
    BARE,
    CLOSE,
    DECODER,
    FENCED,
    HERMES,
    JSON,
    OPEN,
    PYTHON_END,
    PYTHON_START,
    PYTHON_TAG,
    CallProblem,
    after_thinking,
    check_value,
    read_json,
    skip_space,
)

# Of objects in one text that cannot be read: finding out about each takes time with the text before it.
MAX_BROKEN = 1_000

_EITHER = ("arguments", "parameters")
_ARGUMENTS = {HERMES: _EITHER[:1], BARE: _EITHER[1:], JSON: _EITHER, FENCED: _EITHER}
_TAG = re.compile("</?tool_call>")
_SEPARATOR = re.compile(r"[ \t\r]*[;\n][ \t\r\n]*")
# Where Llama 4's own template has what is said beside the calls.
_SAID = re.compile(rf"{re.escape(PYTHON_START)}.*?{re.escape(PYTHON_END)}", re.DOTALL)
_OBJECTS = re.compile(r'(?:\[\s*)?\{\s*"')
_BROKEN_CALL = re.compile(r'(?:\[\s*)?\{\s*"(?:name|arguments|parameters)"\s*:')
_FENCE = re.compile(r"^[ \t]{0,8}```[ \t]*([^\s`]*)[ \t]*\r?$", re.MULTILINE)
_FENCE_END = re.compile(r"\s*+```")


def write_calls(calls: Sequence[ToolCall], style: str) -> str:
    """The calls as the style has them. Raises ValueError for an argument that is NaN or infinite."""
    key = _ARGUMENTS[style][0]
    objects = [
        json.dumps({"name": call.name, key: call.arguments}, ensure_ascii=False, allow_nan=False) for call in calls
    ]
    if style == HERMES:
        return "\n".join(f"{OPEN}\n{each}\n{CLOSE}" for each in objects)
    return "\n".join(f"```json\n{each}\n```" for each in objects) if style == FENCED else "\n".join(objects)


def read_tagged(text: str) -> tuple[ToolCall, ...]:
    """HERMES: the calls in `<tool_call>` blocks. Raises ValueError for one that cannot be read, as all readers here."""
    calls = []
    position = after_thinking(text)
    while tag := _TAG.search(text, position):
        if tag.group() == CLOSE:
            raise CallProblem("frame", f"{CLOSE} without {OPEN}")
        payload, end = read_json(text, tag.end(), f"call {len(calls) + 1}")
        position = skip_space(text, end)
        if not text.startswith(CLOSE, position):
            raise CallProblem("frame", f"call {len(calls) + 1} does not end with {CLOSE} after its JSON object")
        position += len(CLOSE)
        calls.append(_to_call(payload, len(calls) + 1, HERMES))
    return tuple(calls)


def read_bare(text: str) -> tuple[ToolCall, ...]:
    """BARE: the objects that the whole text is, but for what Llama 4 says between its tags."""
    position = skip_space(text, after_thinking(text))
    said = _SAID.match(text, position)
    position = skip_space(text, said.end()) if said else position
    if text.startswith(PYTHON_TAG, position):
        position += len(PYTHON_TAG)
    elif not text.startswith("{", position):
        return ()
    calls = []
    while True:
        payload, end = read_json(text, position, f"call {len(calls) + 1}")
        calls.append(_to_call(payload, len(calls) + 1, BARE))
        if skip_space(text, end) == len(text):
            return tuple(calls)
        separator = _SEPARATOR.match(text, end)
        if not separator:
            raise CallProblem("frame", f'call {len(calls)} is followed by more than ";" or a newline and the next call')
        position = separator.end()


def read_anywhere(text: str) -> tuple[ToolCall, ...]:
    """JSON: every object with a name and arguments. Other JSON is text; of what cannot be read only the place is known,
    and it is read on behind it.
    """
    calls: list[ToolCall] = []
    position, broken = after_thinking(text), 0
    while start := _OBJECTS.search(text, position):
        try:
            value, position = DECODER.raw_decode(text, start.start())
        except json.JSONDecodeError as error:
            if _BROKEN_CALL.match(text, start.start()):
                read_json(text, start.start(), f"call {len(calls) + 1}")  # says where it breaks
            position, broken = max(error.pos, start.start() + 1), _one_more(broken)
            continue
        calls += _calls_in(value, len(calls), JSON)
    return tuple(calls)


def read_fenced(text: str) -> tuple[ToolCall, ...]:
    """FENCED: the objects with a name and arguments, alone or in a list, that a code fence holds. Other fences are
    text.
    """
    calls: list[ToolCall] = []
    position, broken = after_thinking(text), 0
    while fence := _FENCE.search(text, position):
        start, number = skip_space(text, fence.end()), len(calls) + 1
        if fence[1].lower() in ("", "json") and _OBJECTS.match(text, start):
            try:
                value, end = DECODER.raw_decode(text, start)
            except json.JSONDecodeError:
                if _BROKEN_CALL.match(text, start):
                    read_json(text, start, f"call {number}")
                broken = _one_more(broken)
            else:
                found, closed = _calls_in(value, len(calls), FENCED), _FENCE_END.match(text, end)
                if found and not closed:
                    raise CallProblem("frame", f"call {number} does not end with ``` after its JSON object")
                if closed:
                    calls, position = calls + found, closed.end()
                    continue
        closing = _FENCE.search(text, fence.end())
        while closing and closing[1]:  # a line such as ```json does not close a fence
            closing = _FENCE.search(text, closing.end())
        if closing is None:
            break
        position = closing.end()
    return tuple(calls)


def _one_more(broken: int) -> int:
    if broken >= MAX_BROKEN:
        raise CallProblem("json", f"more than {MAX_BROKEN:,} objects are not valid JSON")
    return broken + 1


def _calls_in(value: Any, before: int, style: str) -> list[ToolCall]:
    """The calls that a JSON value is: an object, or a list of nothing else; none where it is other data."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(_is_like_call(each) for each in values):
        return []
    return [_to_call(each, before + number, style) for number, each in enumerate(values, 1)]


def _is_like_call(value: Any) -> bool:
    return isinstance(value, dict) and "name" in value and any(key in value for key in _EITHER)


def _to_call(payload: Any, number: int, style: str) -> ToolCall:
    keys = _ARGUMENTS[style]
    if not isinstance(payload, dict):
        raise CallProblem("not_a_call", f"call {number} is not a JSON object")
    arguments_key = next((key for key in keys if key in payload), keys[0])
    for key in ("name", arguments_key):
        if key not in payload:
            raise CallProblem("not_a_call", f'call {number} lacks "{key}"')
    # Llama 3 models often write this, as their documentation does.
    if style != HERMES and payload.get("type") == "function":
        payload = {key: value for key, value in payload.items() if key != "type"}
    if unknown := sorted(payload.keys() - {"name", arguments_key}):
        raise CallProblem("not_a_call", f"call {number} has the unknown key {unknown[0]!a}")
    name, arguments = payload["name"], payload[arguments_key]
    if not (isinstance(name, str) and name):
        raise CallProblem("not_a_call", f'call {number}: "name" must be a non-empty string')
    if not isinstance(arguments, dict):
        raise CallProblem("not_a_call", f'call {number}: "{arguments_key}" must be an object')
    check_value(payload, number)
    return ToolCall(name, arguments)
