# SPDX-License-Identifier: Apache-2.0

"""Tool calls as Python calls, `f(a=1, b="x")`: a text in, its calls out, and back.

Style PYTHONIC (Llama 4): a list of them that begins a line, wherever in the text, with or without `<|python_start|>`
before it. Style LFM2: a list between `<|tool_call_start|>` and `<|tool_call_end|>`. Style OLMO3: a call a line, or with
commas between, between `<function_calls>` and `</function_calls>`, values written as JSON. Arguments have names, and
their values are literals: strings, numbers, True, False, None (also as JSON has them), lists, tuples (read as lists),
dictionaries with strings as keys. Wider than Python in two things that models write and templates render: an argument
may have a reserved word as its name (`from=`), and a string in single quotes may hold a line break. A tool's name may
have dots.

Invariants: nothing is ever evaluated but the escapes of a string, each by `ast.literal_eval`. Reading takes time in
proportion to the text and goes at most MAX_DEPTH deep. What is read survives `write_calls` unchanged.
"""

import ast
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.call_reading import (
    LFM2,
    LFM2_END,
    LFM2_START,
    MAX_DEPTH,
    OLMO3,
    OLMO3_END,
    OLMO3_START,
    CallProblem,
    after_thinking,
    check_value,
    finite,
    integer,
    skip_space,
)
from hintsd_jax.texts import is_encodable

_NAME = r"[^\W\d]\w*+"
_DOTTED = rf"{_NAME}(?:\.{_NAME})*+"
_TOKEN = re.compile(
    r'(?P<string>"""(?:[^\\]|\\.)*?"""'
    r"|'''(?:[^\\]|\\.)*?'''"
    r'|"(?:[^"\\]|\\.)*+"'
    r"|'(?:[^'\\]|\\.)*+')"
    r"|(?P<number>[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?)"
    rf"|(?P<name>{_DOTTED})"
    r"|(?P<mark>[\[\](){},=:])",
    re.DOTALL,
)
# A list whose first call has no argument or one with a name; text such as "[see (above)]" is none.
_LIST = re.compile(
    rf"^[ \t]*+(?:<\|python_(?:start|tag)\|>\s*+)?(?=\[\s*+{_DOTTED}\s*+\(\s*+(?:\)|{_NAME}\s*+=(?!=)|\Z))",
    re.MULTILINE,
)
# Of a style: the tags that begin and end its calls.
_FRAMES = {LFM2: (LFM2_START, LFM2_END), OLMO3: (OLMO3_START, OLMO3_END)}
_TAGS = {style: re.compile("|".join(map(re.escape, frame))) for style, frame in _FRAMES.items()}
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPE = re.compile(
    r"\\(?:[0-3][0-7]{2}|[0-7]{1,2}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^{}]{1,100}\}|.)", re.DOTALL
)
_KNOWN_ESCAPE = re.compile(r"\\(?:[0-7xuU]..*|N\{.*|[0-7\\'\"abfnrtv\n])", re.DOTALL)


def write_calls(calls: Sequence[ToolCall], style: str) -> str:
    """The calls as one list, in OLMO3 a call a line.

    Raises:
      ValueError: an argument is NaN or infinite, or a name is none that Python could have.
    """
    written, of_value = [], _as_json if style == OLMO3 else _written
    for call in calls:
        names = [key for key in call.arguments if re.fullmatch(_NAME, key) and key not in _CONSTANTS]
        if not re.fullmatch(_DOTTED, call.name) or len(names) < len(call.arguments):
            raise ValueError(f"the call of {call.name!a} cannot be written as a Python call")
        arguments = ", ".join(f"{key}={of_value(value)}" for key, value in call.arguments.items())
        written.append(f"{call.name}({arguments})")
    start, end = _FRAMES.get(style, ("", ""))
    text = "\n".join(written) if style == OLMO3 else f"[{', '.join(written)}]"
    return f"{start}{text}{end}"


def read_lists(text: str) -> tuple[ToolCall, ...]:
    """PYTHONIC: the calls of every list that begins a line. Raises ValueError for one that cannot be read."""
    calls: list[ToolCall] = []
    position = after_thinking(text)
    while start := _LIST.search(text, position):
        reader = _Reader(text, start.end(), len(calls))
        calls += reader.calls()
        position = reader.position
    return tuple(calls)


def read_between_tags(text: str, style: str) -> tuple[ToolCall, ...]:
    """LFM2 and OLMO3: the calls between tags. Raises ValueError for one that cannot be read."""
    calls: list[ToolCall] = []
    position, (start, end) = after_thinking(text), _FRAMES[style]
    while tag := _TAGS[style].search(text, position):
        if tag.group() == end:
            raise CallProblem("frame", f"{end} without {start}")
        reader = _Reader(text, tag.end(), len(calls))
        calls += reader.calls() if style == LFM2 else reader.lines(end)
        position = skip_space(text, reader.position)
        if not text.startswith(end, position):
            raise CallProblem("frame", f"call {len(calls)} is not followed by {end} after the end of its list")
        position += len(end)
    return tuple(calls)


def read_literal(text: str) -> Any:
    """The value of a text that is nothing but one literal. Raises ValueError for any other."""
    reader = _Reader(text, 0, 0)
    value = reader.value(1)
    if skip_space(text, reader.position) < len(text):
        raise CallProblem("json", f"more than one literal, from character {reader.position} on")
    return value


class _Reader:
    """Reads from a place on, token by token. position: behind the last one. before: calls that were read already."""

    def __init__(self, text: str, position: int, before: int):
        self.position = position
        self._text, self._start, self._before = text, skip_space(text, position), before
        self._number = before + 1

    def calls(self) -> list[ToolCall]:
        """The calls of a list, its brackets included."""
        found: list[ToolCall] = []
        self._expect("[", "a list of calls")
        while not (found and self._take("]")):
            self._number = self._before + len(found) + 1
            found.append(self._call())
            if not self._take(","):
                self._expect("]", '"," or "]"')
                break
        return found

    def lines(self, end: str) -> list[ToolCall]:
        """Calls up to what ends them, or to the text's end."""
        found: list[ToolCall] = []
        while not found or not self._text.startswith(end, at := skip_space(self._text, self.position)):
            if found and at == len(self._text):
                break
            self._number = self._before + len(found) + 1
            found.append(self._call())
            self._take(",")
        return found

    def value(self, depth: int) -> Any:
        """A literal, `depth` levels deep."""
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        kind, token = self._next()
        if kind == "string":
            texts = [_text(token)]
            while self._peek()[0] == "string":  # Python joins strings that follow each other
                texts.append(_text(self._next()[1]))
            return "".join(texts)
        if kind == "number":
            return integer(token) if token.lstrip("+-").isdecimal() else finite(token)
        if kind == "name" and token in _CONSTANTS:
            return _CONSTANTS[token]
        if token == "[":
            return self._items("]", depth)[0]
        if token == "(":
            items, comma = self._items(")", depth)
            return items[0] if len(items) == 1 and not comma else items
        if token == "{":
            return self._entries(depth)
        raise self._wrong("a literal")

    def _call(self) -> ToolCall:
        kind, name = self._next()
        if kind != "name":
            raise self._wrong("the name of a tool")
        self._expect("(", '"("')
        arguments: dict[str, Any] = {}
        while not self._take(")"):
            kind, key = self._peek()
            if kind in ("string", "number") or key in _CONSTANTS or self._take("*"):
                raise CallProblem("not_a_call", f"call {self._number} has an argument without a name")
            if kind != "name" or "." in key:
                raise self._wrong("the name of an argument")
            self._next()
            self._expect("=", '"="')
            if key in arguments:
                raise CallProblem("not_a_call", f"call {self._number} has the argument {key!a} twice")
            arguments[key] = self.value(1)
            if not self._take(","):
                self._expect(")", '"," or ")"')
                break
        check_value({"name": name, "arguments": arguments}, self._number)
        return ToolCall(name, arguments)

    def _items(self, end: str, depth: int) -> tuple[list[Any], bool]:
        """(the values up to the closing bracket, whether a comma stands after the last)."""
        items: list[Any] = []
        while not self._take(end):
            items.append(self.value(depth + 1))
            if not self._take(","):
                self._expect(end, f'"," or "{end}"')
                return items, False
        return items, bool(items)

    def _entries(self, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not self._take("}"):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise self._wrong("a string as key")
            if key in entries:
                raise ValueError("a key stands twice in one dictionary")
            self._expect(":", '":"')
            entries[key] = self.value(depth + 1)
            if not self._take(","):
                self._expect("}", '"," or "}"')
                break
        return entries

    def _peek(self) -> tuple[str, str]:
        """(the kind of the next token, its text); ("", "") where there is none."""
        token = _TOKEN.match(self._text, skip_space(self._text, self.position))
        return (token.lastgroup or "", token.group()) if token else ("", "")

    def _next(self) -> tuple[str, str]:
        kind, token = self._peek()
        self.position = skip_space(self._text, self.position) + len(token)
        return kind, token

    def _take(self, mark: str) -> bool:
        """Whether the mark comes next, which is then read."""
        start = skip_space(self._text, self.position)
        if not self._text.startswith(mark, start):
            return False
        self.position = start + len(mark)
        return True

    def _expect(self, mark: str, what: str) -> None:
        if not self._take(mark):
            raise self._wrong(what)

    def _wrong(self, expected: str) -> CallProblem:
        at = self.position - self._start
        return CallProblem("json", f"call {self._number} is not a Python call: expected {expected} at character {at}")


def _text(token: str) -> str:
    """What a string literal stands for."""
    quotes = 3 if len(token) >= 6 and token[:3] in ('"""', "'''") else 1
    body = token[quotes:-quotes]
    if "\\" not in body:
        return body
    text = _ESCAPE.sub(lambda match: _unescaped(match.group()), body)
    # A letter may be written as the two halves of its surrogate pair, as in JSON.
    return text if is_encodable(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@functools.lru_cache(4096)
def _unescaped(escape: str) -> str:
    """What an escape stands for; one that Python does not know stands for itself."""
    if not _KNOWN_ESCAPE.fullmatch(escape):
        return escape
    try:
        return ast.literal_eval(f'"{escape}"')
    except (SyntaxError, ValueError):  # a letter beyond Unicode, or one with a name that there is not
        return escape


def _written(value: Any) -> str:
    match value:
        case bool() | None:
            return repr(value)
        case list():
            return f"[{', '.join(map(_written, value))}]"
        case dict():
            return f"{{{', '.join(f'{_written(key)}: {_written(entry)}' for key, entry in value.items())}}}"
    return _as_json(value)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
