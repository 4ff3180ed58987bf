# SPDX-License-Identifier: Apache-2.0

"""Whether a text holds what looks like a tool call in some form: a text in, a bool out.

It is asked where the expected form was not found, so that a call in another one does not pass for "nothing to call".
Forms: a JSON (or Python) object with a name and arguments, under any of their usual keys, anywhere in the text; the
tags of the known families; ReAct's lines; a text that is nothing but Python calls.

Invariants: it never raises, and takes time proportional to the text. Prose stays prose, also where it names a tool or
holds braces: an object needs both keys, a Python call the whole text.
"""

import json
import re

_QUOTE = r"\\?[\"']"
_NAME = r"(?:name|function|function_name|tool|tool_name|action)"
_ARGUMENTS = (
    r"(?:arguments|parameters|args|params|kwargs|inputs?|tool_input|action_input|function_args|function_arguments)"
)
_NAME_ENTRY = re.compile(rf"{_QUOTE}{_NAME}{_QUOTE}\s*:\s*{_QUOTE}[^\"'\s]")
_ARGUMENTS_ENTRY = re.compile(rf"{_QUOTE}{_ARGUMENTS}{_QUOTE}\s*:")
_UNQUOTED = re.compile(rf"\{{\s*{_NAME}\s*:\s*[\"']?[\w.-]{{1,100}}[\"']?\s*,\s*{_ARGUMENTS}\s*:")
_BEGINNING = re.compile(rf"\s*+(?:```\w*+\s*+)?\[?\s*+(\{{\s*{_QUOTE}{_NAME}{_QUOTE}\s*:\s*{_QUOTE}[^\"'\s])")
_TAGS = re.compile(
    r"</?(?:function|function_?calls?|start_function_call|tool_?calls?|tool_use|tool_code|invoke)"
    r"(?:[= :][^<>\n]{0,200})?>"
    r"|<[|｜](?:python_tag|(?:start_)?(?:tool|function)[s_▁]*calls?[a-z_▁]*)[|｜]>"
    r"|\[/?TOOL_CALLS?\]"
    r"|```tool_(?:code|call)"
    r"|\bto=functions\."
    r"|^[ \t]*Action[ \t]*:.{1,200}\n[ \t]*Action Input[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE = re.compile(r"```\w*+[^\S\n]*+\n")
_PYTHON_CALL = re.compile(r"(?:print\(\s*)?[A-Za-z_][\w.]*\(")
_PYTHON_ARGUMENT = re.compile(r"[A-Za-z_]\w*\s*=|[\"'\[{\d-]|(?:True|False|None)\b")
_PYTHON_SEPARATOR = re.compile(r"\)?[\s,;]*")
_PAIRS = {")": "(", "]": "[", "}": "{"}


def holds_call(text: str) -> bool:
    """Whether the text, without any thinking before it, looks like it was meant to call a tool."""
    return _holds_object(text) or _TAGS.search(text) is not None or _is_python(text)


def _holds_object(text: str) -> bool:
    """Whether there is an object with a name and arguments, or one that begins like it and cannot be read."""
    brace = text.find("{")
    if brace < 0:
        return False
    if _NAME_ENTRY.search(text, brace) and _ARGUMENTS_ENTRY.search(text, brace):
        return True
    if _UNQUOTED.search(text, brace):
        return True
    beginning = _BEGINNING.match(text)
    if beginning is None:
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(text, beginning.start(1))
    except (ValueError, RecursionError):
        return True  # cut or broken before its arguments came
    return len(value) == 1  # a name alone: a call without arguments


def _is_python(text: str) -> bool:
    """Whether the whole text, or the one code block that it is, is Python calls, perhaps as a list."""
    body = text.strip()
    fence = _FENCE.match(body)
    if fence and body.endswith("```") and len(body) >= fence.end() + 3:
        body = body[fence.end() : -3].strip()
    is_list, position = body.startswith("["), 0
    body = body.removeprefix("[").lstrip()
    while start := _PYTHON_CALL.match(body, position):
        end = _closing(body, start.end())
        arguments = body[start.end() : end - 1 if end else None].lstrip()
        if arguments and not _PYTHON_ARGUMENT.match(arguments):
            return False
        if not end:
            return bool(arguments)  # cut within its arguments
        rest = _PYTHON_SEPARATOR.match(body, end)
        position = rest.end() if rest else end
        if position == len(body) or (is_list and body[position:].rstrip() == "]"):
            return True
        if position == end:
            return False  # something is done with the result: an expression, no call
    return False


def _closing(text: str, position: int) -> int:
    """The place after the bracket that closes the one right before `position`; 0 where none does."""
    opened, quote = ["("], ""
    while position < len(text):
        letter = text[position]
        position += 2 if quote and letter == "\\" else 1
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            opened.append(letter)
        elif letter in _PAIRS:
            if opened.pop() != _PAIRS[letter]:
                return 0
            if not opened:
                return position
    return 0
