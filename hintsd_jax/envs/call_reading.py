# SPDX-License-Identifier: Apache-2.0

"""What the readers of all styles of tool calls share: the names of styles and tags, problems, and JSON values that are
safe to keep.

Invariant: a value that comes from here is finite, not too deep, and encodes as UTF-8; everything else is a `ValueError`
of one line, a `CallProblem` where its kind is not "json".
"""

import json
import math
import re
from typing import Any

from hintsd_jax.texts import is_encodable

HERMES, BARE, JSON, FENCED, XML = "hermes", "bare", "json", "fenced", "xml"
PYTHONIC, LFM2, OLMO3 = "pythonic", "lfm2", "olmo3"
STYLES = (HERMES, BARE, JSON, FENCED, XML, PYTHONIC, LFM2, OLMO3)
OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"  # Llama 3
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"  # Llama 4
LFM2_START, LFM2_END = "<|tool_call_start|>", "<|tool_call_end|>"
OLMO3_START, OLMO3_END = "<function_calls>", "</function_calls>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# Of an integer. Python has such a limit too, which a library (mpmath) may lift; without one a megabyte takes a minute.
MAX_DIGITS = 4_000
# Of nested arrays and objects: far above real arguments, far below Python's recursion limit.
MAX_DEPTH = 32

_SPACE = re.compile(r"[ \t\r\n]*")


class CallProblem(ValueError):
    """Why a call cannot be read: one of `tool_calls.PROBLEM_KINDS`, and one line."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def skip_space(text: str, position: int) -> int:
    """The place of the next character that is not whitespace."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def after_thinking(text: str) -> int:
    """Where the text after a leading `<think>` block begins. Raises CallProblem where the block has no end."""
    start = skip_space(text, 0)
    if not text.startswith(THINK_OPEN, start):
        return 0
    end = text.find(THINK_CLOSE, start)
    if end < 0:
        raise CallProblem("thinking", f"{THINK_OPEN} without {THINK_CLOSE}")
    return end + len(THINK_CLOSE)


def read_json(text: str, position: int, what: str) -> tuple[Any, int]:
    """(the JSON value that comes next, where it ends).

    what: it is, for the message. Raises ValueError where it is not valid JSON.
    """
    start = skip_space(text, position)
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        # the position counts from the value's first character, where a reader would look
        raise CallProblem("json", f"{what} is not valid JSON: {error.msg} at character {error.pos - start}") from None


def check_value(value: Any, number: int) -> None:
    """Raises ValueError for deep nesting and text that is not Unicode. Iterative, so that depth itself cannot hurt.

    number: of the call, for the message.
    """
    pending = [(value, 1)]
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


def finite(literal: str) -> float:
    """A number with a fraction or an exponent. Raises ValueError where no float holds it."""
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"the number {literal[:20]} is too large")
    return value


def integer(literal: str) -> int:
    """A whole number. Raises ValueError where it has too many digits."""
    if len(literal) > MAX_DIGITS:
        raise ValueError(f"the number {literal[:20]} has {len(literal)} digits")
    return int(literal)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return result


def _no_constant(literal: str) -> None:
    raise ValueError(f"{literal} is not JSON")


DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_float=finite, parse_int=integer, parse_constant=_no_constant
)
