# SPDX-License-Identifier: Apache-2.0

"""What stands in for the parts that a chat template lacks: messages and tools in, messages that it takes out.

Many templates know no tools, no system message, no tool results, or no two messages of the user in a row (Gemma's).
Then the documentation of the tools is written into the system message, the system message before the first user
message, results into user messages, and user messages that follow each other into one.

Invariant: nothing of the messages or tools is left out, and messages that come later change no earlier one.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.call_reading import (
    BARE,
    CLOSE,
    FENCED,
    JSON,
    LFM2,
    LFM2_END,
    LFM2_START,
    OLMO3,
    OLMO3_END,
    OLMO3_START,
    OPEN,
    PYTHONIC,
    XML,
)

_RESULT = "<tool_response>\n{}\n</tool_response>"


def documentation(tools: Sequence[Mapping[str, Any]], style: str) -> str:
    """The documentation of tools and how to call them, in the usual form of a style of calls (`envs.tool_calls`)."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    if style == BARE:
        objects = "\n\n".join(json.dumps(tool, ensure_ascii=False, indent=4) for tool in tools)
        return (
            "You can call the functions below. To call one, answer with nothing but a JSON object that has its name and"
            ' the values of its parameters: {"name": name of the function, "parameters": object of names and values}.'
            f" Write values, not variables.\n\n{objects}"
        )
    head = "# Tools\n\nYou can call these functions; each line is the JSON documentation of one:"
    head += f"\n<tools>\n{lines}\n</tools>\n\n"
    if style == XML:
        return (
            f"{head}Write each call like this, a value as plain text on lines of its own:\n{OPEN}\n<function=name of"
            f" the function>\n<parameter=name of an argument>\nits value\n</parameter>\n</function>\n{CLOSE}"
        )
    if style in (PYTHONIC, LFM2):
        calls = "[first_function(argument=value, other=value), second_function()]"
        tagged = f"{LFM2_START}{calls}{LFM2_END}" if style == LFM2 else calls
        return f"{head}Write calls as a list of Python calls, with literal values, on a line of its own:\n{tagged}"
    if style == OLMO3:
        calls = f"{OLMO3_START}first_function(argument=value, other=value)\nsecond_function(){OLMO3_END}"
        return f"{head}Write each call as a Python call on a line of its own, with literal values:\n{calls}"
    head += "For each call, write a JSON object with the function's name and arguments"
    call = '{"name": <name of the function>, "arguments": <object of its arguments>}'
    if style == FENCED:
        return f"{head} in a code fence:\n```json\n{call}\n```"
    return f"{head}:\n{call}" if style == JSON else f"{head} between {OPEN} and {CLOSE}:\n{OPEN}\n{call}\n{CLOSE}"


def with_documentation(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    """The messages with `text` at the end of the system message, which is made where there is none."""
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        content = "\n\n".join(filter(None, (first["content"], text)))
        return [{**first, "content": content}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def without_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with the system message before the text of the first user message."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, *others = messages
    if others and others[0]["role"] == "user":
        content = "\n\n".join(filter(None, (system["content"], others[0]["content"])))
        return [{**others[0], "content": content}, *others[1:]]
    return [{"role": "user", "content": system["content"]}, *others]


def without_results(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with tool messages that follow each other as one user message, each in its own block."""
    changed: list[Mapping[str, Any]] = []
    within = False  # a message of results
    for message in messages:
        if message["role"] != "tool":
            changed.append(message)
        elif within:
            changed[-1] = {"role": "user", "content": f"{changed[-1]['content']}\n{_RESULT.format(message['content'])}"}
        else:
            changed.append({"role": "user", "content": _RESULT.format(message["content"])})
        within = message["role"] == "tool"
    return changed


def without_neighbours(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with user messages that follow each other as one, an empty line between their texts."""
    changed: list[Mapping[str, Any]] = []
    for message in messages:
        if changed and message["role"] == changed[-1]["role"] == "user":
            changed[-1] = {"role": "user", "content": f"{changed[-1]['content']}\n\n{message['content']}"}
        else:
            changed.append(message)
    return changed
