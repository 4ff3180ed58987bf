# SPDX-License-Identifier: Apache-2.0

"""Tool calls in the style XML (Qwen3-Coder, Qwen3.5): a text and the documentation of tools in, calls out, and back.

`<tool_call>`, `<function=NAME>`, for each argument `<parameter=NAME>`, its value, `</parameter>`, then `</function>`
and `</tool_call>`; text may stand around the blocks. A value is plain text without quotes or escapes; one line break
after the first tag and one before the last are not part of it. It ends at the first `</parameter>` that another
parameter or `</function>` follows, so that other tags in it are only text.

What a value is, its tool's JSON schema decides: text where it says string or nothing, also for a tool or a parameter
that it does not have; else the number, bool, null, array or object that the text writes. A text that writes none of
what the schema allows stays text, and the environment says that it is wrong.

Invariants: reading takes time in proportion to the text. What is read with some tools survives `write_calls` and
reading with the same tools unchanged.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.call_reading import (
    CLOSE,
    OPEN,
    CallProblem,
    after_thinking,
    check_value,
    finite,
    integer,
    read_json,
    skip_space,
)
from hintsd_jax.envs.pythonic_calls import read_literal

_TAG = re.compile("</?tool_call>")
_NAME = r"[^<>\r\n]+"
_FUNCTION = re.compile(rf"<function=({_NAME})>")
_PARAMETER = re.compile(rf"<parameter=({_NAME})>")
_VALUE_END = re.compile(r"</parameter>(?=\s*+(?:<parameter=|</function>))")
_FUNCTION_END = re.compile(r"</function>\s*+</tool_call>")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")

# Names of types that documentations use beside those of JSON schema, BFCL's among them. Any other type may be anything.
_TYPES = {
    **dict.fromkeys(("string", "str", "text", "varchar", "char", "enum"), "string"),
    **dict.fromkeys(("integer", "int", "long", "short"), "integer"),
    **dict.fromkeys(("number", "float", "double"), "number"),
    **dict.fromkeys(("boolean", "bool"), "boolean"),
    **dict.fromkeys(("array", "list", "tuple"), "array"),
    **dict.fromkeys(("object", "dict"), "object"),
    **dict.fromkeys(("null", "none"), "null"),
}
_ANY = "any"
_OF_PYTHON = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
_MAX_SCHEMA_DEPTH = 8


def write_calls(calls: Sequence[ToolCall]) -> str:
    """The calls, one block each; values that are not text as JSON.

    Raises:
      ValueError: an argument is NaN or infinite, a name has "<", ">" or a line break, or a text holds what would end a
        parameter.
    """
    return "\n".join(_written(call) for call in calls)


def read_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """The calls of a text. Raises ValueError for one that cannot be read."""
    calls: list[ToolCall] = []
    position = after_thinking(text)
    while tag := _TAG.search(text, position):
        number = len(calls) + 1
        if tag.group() == CLOSE:
            raise CallProblem("frame", f"{CLOSE} without {OPEN}")
        function = _FUNCTION.match(text, skip_space(text, tag.end()))
        if function is None:
            raise CallProblem("frame", f"call {number} does not begin with <function=NAME> after {OPEN}")
        schemas, arguments = _schemas(tools, function[1]), {}
        position = skip_space(text, function.end())
        while parameter := _PARAMETER.match(text, position):
            key, end = parameter[1], _VALUE_END.search(text, parameter.end())
            if end is None:
                raise CallProblem(
                    "frame", f"call {number}: <parameter={key}> has no </parameter> before the next one or </function>"
                )
            if key in arguments:
                raise CallProblem("not_a_call", f"call {number} has the parameter {key!a} twice")
            value = text[parameter.end() : end.start()].removeprefix("\n").removesuffix("\n")
            arguments[key] = _converted(value, schemas.get(key), f"call {number}: parameter {key!a}")
            position = skip_space(text, end.end())
        closing = _FUNCTION_END.match(text, position)
        if closing is None:
            raise CallProblem(
                "frame", f"call {number} does not end with </function> and {CLOSE} after its last </parameter>"
            )
        position = closing.end()
        check_value({"name": function[1], "arguments": arguments}, number)
        calls.append(ToolCall(function[1], arguments))
    return tuple(calls)


def _written(call: ToolCall) -> str:
    for name in (call.name, *call.arguments):
        if not re.fullmatch(_NAME, name):
            raise ValueError(f"the name {name!a} cannot stand in a tag")
    lines = [OPEN, f"<function={call.name}>"]
    for key, value in call.arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        if _VALUE_END.search(text):
            if isinstance(value, str):
                raise ValueError(f"the argument {key!a} holds what would end a parameter")
            text = text.replace("<", "\\u003c")  # of JSON, where it can only stand in a string
        lines += [f"<parameter={key}>", text, "</parameter>"]
    return "\n".join([*lines, "</function>", CLOSE])


def _schemas(tools: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The schema of each parameter of a tool, as its documentation has it; none where it has no such tool."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return properties if isinstance(properties, Mapping) else {}
    return {}


def _converted(text: str, schema: Any, what: str) -> Any:
    """The value that a text writes. Raises ValueError for a broken array or object, and a number that is too large."""
    types, word = frozenset(_types(schema, 0)), text.strip()
    if "null" in types and word in ("null", "None"):
        return None
    if not types or "string" in types:
        return text
    if types & {"boolean", _ANY} and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if types & {"integer", "number", _ANY} and _INTEGER.fullmatch(word):
        return integer(word)
    if types & {"number", _ANY} and _NUMBER.fullmatch(word):
        return finite(word)
    if types & {"array", "object", _ANY} and word.startswith(("[", "{")):
        return _container(word, text, types, what)
    return None if word.lower() == "null" else text


def _container(word: str, text: str, types: frozenset[str], what: str) -> Any:
    """The array or object that a word writes, in JSON or, as models also do, as a Python literal."""
    try:
        value, end = read_json(word, 0, what)
        if end < len(word):
            raise CallProblem("json", f"{what} is not valid JSON: more than one value, from character {end} on")
    except ValueError:
        try:
            value = read_literal(word)
        except ValueError:
            if _ANY in types:
                return text
            value = None
        if value is None:
            raise
    fits = _ANY in types or _OF_PYTHON[type(value)] in types if isinstance(value, list | dict) else False
    return value if fits else text


def _types(schema: Any, depth: int) -> Iterator[str]:
    """The types that a schema allows, by JSON schema's names; none where it names none, `_ANY` for what it leaves
    open.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_SCHEMA_DEPTH:
        return
    named = schema.get("type")
    if named is not None:
        for each in named if isinstance(named, list | tuple) else [named]:
            yield _TYPES.get(str(each).strip().lower(), _ANY)
    for key in ("anyOf", "oneOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list | tuple) else ():
            yield from _types(part, depth + 1)
    if named is None:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        for value in values if isinstance(values, list | tuple) else ():
            yield _OF_PYTHON.get(type(value), "null")
        if "$ref" in schema or "allOf" in schema:
            yield _ANY
    if schema.get("nullable") is True:
        yield "null"
