# SPDX-License-Identifier: Apache-2.0

"""Tool calls in the form that is expected of a policy: an action's text in, an `Action` out, and back.

Three styles. HERMES (Qwen): `<tool_call>`, one JSON object {"name": str, "arguments": object}, `</tool_call>`, with
nothing but whitespace between; text may stand around the blocks. BARE (Llama 3): the action is nothing but objects
{"name": str, "parameters": object}, separated by ";" or a newline, with or without `<|python_tag|>` before them. JSON
(what coder models write): every object with "name" and "arguments" or "parameters", alone or in lists, wherever it
stands: bare, in a code fence, between tags. An object is read by a JSON decoder from its first character on, so that a
tag or a ";" inside a string argument is only text. A leading `<think>` block is reasoning: no call is read in it.

Where no call is found, but what looks like one in another form (`envs.other_forms`), that is a problem too: an action
that was meant to call a tool never passes for one that calls none.

A fourth style, CODE, is of environments whose agents act by code: see `envs.code_blocks`.

Invariant: `parse_action` never raises, whatever the text, takes time in proportion to it, and it is all or nothing: one
call that cannot be read gives a `problem` and no calls. What it accepts survives `render_call` unchanged and encodes as
UTF-8.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

from hintsd_jax.envs.base import Action, ToolCall
from hintsd_jax.envs.code_blocks import CODE, NO_CODE, OPEN_BLOCK, TWO_BLOCKS, NoCode, read_block, write_block
from hintsd_jax.envs.other_forms import holds_call
from hintsd_jax.texts import is_encodable

HERMES, BARE, JSON = "hermes", "bare", "json"
STYLES = (HERMES, BARE, JSON)
# Kinds of problems (`Action.problem_kind`): not valid JSON; tags or separators; JSON that is no call; thinking without
# an end; the same of an action that was cut at its limit; a call in another form; in the style CODE no block, two, or
# one without an end.
PROBLEM_KINDS = ("json", "frame", "not_a_call", "thinking", "cut", "other_form", NO_CODE, TWO_BLOCKS, OPEN_BLOCK)
OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# Of an integer. Python has such a limit too, which a library (mpmath) may lift; without one a megabyte takes a minute.
MAX_DIGITS = 4_000
# Of nested arrays and objects: far above real arguments, far below Python's recursion limit.
MAX_DEPTH = 32
# Of objects in one text that cannot be read, style JSON: finding out about each takes time with the text before it.
MAX_BROKEN = 1_000

_ARGUMENTS = {HERMES: ("arguments",), BARE: ("parameters",), JSON: ("arguments", "parameters")}
_EXPECTED = {
    HERMES: 'write each one as <tool_call>{"name": ..., "arguments": {...}}</tool_call>',
    BARE: 'write it as nothing but {"name": ..., "parameters": {...}}',
    JSON: 'write each one as {"name": ..., "arguments": {...}}',
}
_SPACE = re.compile(r"[ \t\r\n]*")
_TAG = re.compile("</?tool_call>")
_SEPARATOR = re.compile(r"[ \t\r]*[;\n][ \t\r\n]*")
_OBJECTS = re.compile(r'(?:\[\s*)?\{\s*"')
_BROKEN_CALL = re.compile(r'(?:\[\s*)?\{\s*"(?:name|arguments|parameters)"\s*:')


class _Problem(ValueError):
    """Why a call cannot be read: one of `PROBLEM_KINDS`, and one line."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def render_call(call: ToolCall, style: str = HERMES) -> str:
    """The text of one call exactly as the chat templates of its style write it; in JSON the object alone, in CODE a
    block with a Python call.

    Raises:
      ValueError: an argument is NaN or infinite.
    """
    if style == CODE:
        return write_block(f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})")
    payload = json.dumps({"name": call.name, _ARGUMENTS[style][0]: call.arguments}, ensure_ascii=False, allow_nan=False)
    return f"{OPEN}\n{payload}\n{CLOSE}" if style == HERMES else payload


def parse_action(text: str, style: str = HERMES, cut_at: int = 0) -> Action:
    """Reads every tool call of a sampled action, or its code; never raises. See the module docstring for what is
    accepted.

    cut_at: the number of tokens at which the action was cut; 0 where it came to its end.
    """
    try:
        if style == CODE:
            return Action(text, code=_read_code(text))
        calls = _READERS[style](text)
        if not calls and holds_call(text[_after_thinking(text) :]):
            raise _Problem("other_form", f"no call could be read: {_EXPECTED[style]}")
        return Action(text, calls=calls)
    except (ValueError, RecursionError) as error:  # RecursionError: the C decoder on thousands of brackets
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        kind = error.kind if isinstance(error, _Problem | NoCode) else "json"
    if cut_at:
        kind, problem = "cut", f"the action was cut at {cut_at} tokens: {problem}"
    return Action(text, problem=problem, problem_kind=kind)


def _read_code(text: str) -> str:
    after = text[_after_thinking(text) :]
    try:
        code = read_block(after)
    except NoCode as error:
        if error.kind == NO_CODE and holds_call(after):
            raise _Problem("other_form", f"a tool call, and {error}") from None
        raise
    if not is_encodable(code):
        raise _Problem(NO_CODE, "the code holds half of a surrogate pair")
    return code


def _read_blocks(text: str) -> tuple[ToolCall, ...]:
    calls = []
    position = _after_thinking(text)
    while tag := _TAG.search(text, position):
        if tag.group() == CLOSE:
            raise _Problem("frame", f"{CLOSE} without {OPEN}")
        payload, end = _read_object(text, tag.end(), len(calls) + 1)
        position = _skip_space(text, end)
        if not text.startswith(CLOSE, position):
            raise _Problem("frame", f"call {len(calls) + 1} does not end with {CLOSE} after its JSON object")
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
            raise _Problem("frame", f'call {len(calls)} is followed by more than ";" or a newline and the next call')
        position = separator.end()


def _read_anywhere(text: str) -> tuple[ToolCall, ...]:
    """Every object with a name and arguments. Other JSON is text; of what cannot be read only the place is known, and
    it is read on behind it.
    """
    calls: list[ToolCall] = []
    position, broken = _after_thinking(text), 0
    while start := _OBJECTS.search(text, position):
        try:
            value, position = _DECODER.raw_decode(text, start.start())
        except json.JSONDecodeError as error:
            if _BROKEN_CALL.match(text, start.start()):
                _read_object(text, start.start(), len(calls) + 1)  # says where it breaks
            position, broken = max(error.pos, start.start() + 1), broken + 1
            if broken > MAX_BROKEN:
                raise _Problem("json", f"more than {MAX_BROKEN:,} objects are not valid JSON") from None
            continue
        values = value if isinstance(value, list) else [value]
        if values and all(_is_like_call(value) for value in values):
            calls += [_to_call(value, len(calls) + number, JSON) for number, value in enumerate(values, 1)]
    return tuple(calls)


def _is_like_call(value: Any) -> bool:
    return isinstance(value, dict) and "name" in value and any(key in value for key in _ARGUMENTS[JSON])


def _read_object(text: str, position: int, number: int) -> tuple[Any, int]:
    """(the JSON value that comes next, where it ends)."""
    start = _skip_space(text, position)
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        # the position counts from the object's first character, where a reader would look
        problem = f"call {number} is not valid JSON: {error.msg} at character {error.pos - start}"
        raise _Problem("json", problem) from None


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _after_thinking(text: str) -> int:
    start = _skip_space(text, 0)
    if not text.startswith(THINK_OPEN, start):
        return 0
    end = text.find(THINK_CLOSE, start)
    if end < 0:
        raise _Problem("thinking", f"{THINK_OPEN} without {THINK_CLOSE}")
    return end + len(THINK_CLOSE)


def _to_call(payload: Any, number: int, style: str) -> ToolCall:
    keys = _ARGUMENTS[style]
    if not isinstance(payload, dict):
        raise _Problem("not_a_call", f"call {number} is not a JSON object")
    arguments_key = next((key for key in keys if key in payload), keys[0])
    for key in ("name", arguments_key):
        if key not in payload:
            raise _Problem("not_a_call", f'call {number} lacks "{key}"')
    # Llama 3 models often write this, as their documentation does.
    if style != HERMES and payload.get("type") == "function":
        payload = {key: value for key, value in payload.items() if key != "type"}
    if unknown := sorted(payload.keys() - {"name", arguments_key}):
        raise _Problem("not_a_call", f"call {number} has the unknown key {unknown[0]!a}")
    name, arguments = payload["name"], payload[arguments_key]
    if not (isinstance(name, str) and name):
        raise _Problem("not_a_call", f'call {number}: "name" must be a non-empty string')
    if not isinstance(arguments, dict):
        raise _Problem("not_a_call", f'call {number}: "{arguments_key}" must be an object')
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
_READERS: dict[str, Callable[[str], tuple[ToolCall, ...]]] = {
    HERMES: _read_blocks,
    BARE: _read_bare,
    JSON: _read_anywhere,
}
