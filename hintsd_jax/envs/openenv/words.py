# SPDX-License-Identifier: Apache-2.0

"""What an agent reads: an observation of the package in, text out.

An observation of one text field is that text, the answer of a tool is its text, and any other is JSON. Reward, the end
and the metadata, which may hold what only the environment knows, are no part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.base import CallTimeout

_HIDDEN = ("reward", "done", "metadata")
_OF_A_TOOL = ("tool_name", "result", "error")


def text_of(observation: Mapping[str, Any], path: str = "") -> str:
    """The text of an observation; "" where it says nothing. path: "field" or "field.within" to show instead, where the
    observation has it.

    Raises:
      CallTimeout: a tool did not answer in time.
      RuntimeError: a tool could not be reached, or its answer is more than text.
    """
    found = _at(observation, path) if path else None
    if found is not None:
        return _of_messages(found) or plain(found)
    shown = {name: value for name, value in observation.items() if name not in _HIDDEN and value is not None}
    if "tool_name" not in observation or not observation.keys() & {"result", "error"}:
        values = list(shown.values())
        return values[0] if len(values) == 1 and isinstance(values[0], str) else plain(shown or None)
    rest = {name: value for name, value in shown.items() if name not in _OF_A_TOOL}
    return "\n".join(filter(None, (_of_a_tool(observation), plain(rest or None))))


def plain(value: Any) -> str:
    """Text as it is, nothing for None, any other value as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _of_a_tool(observation: Mapping[str, Any]) -> str:
    error = observation.get("error")
    if error:
        kind, message = error["error_type"], error["message"]
        if kind == "timeout":
            raise CallTimeout(message)
        if kind == "transport_error":
            raise RuntimeError(f"the tool {observation['tool_name']} cannot be reached: {message}")
        return f"Error: {message}"
    result = observation.get("result")
    parts = result.get("content") if isinstance(result, Mapping) else None
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) and "type" in part for part in parts):
        return plain(result)
    if any(part["type"] != "text" for part in parts):
        raise RuntimeError(f"the tool {observation['tool_name']} answers with more than text, which is not supported")
    return "\n".join(part["text"] for part in parts)


def _of_messages(value: Any) -> str:
    """The contents of a list of messages; "" where it is none."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return ""
    contents = [message.get("content") for message in value]
    return "\n".join(contents) if all(isinstance(content, str) for content in contents) else ""


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
