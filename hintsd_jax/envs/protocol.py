# SPDX-License-Identifier: Apache-2.0

"""The gate between environments and the host loop: what an environment's method returned goes in, a checked copy comes
out.

Invariant: neither a wrong type nor an object that the environment changes later gets past `checked`; text that no
tokenizer takes and numbers that are not finite do not either.
"""

import json
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from hintsd_jax.envs.base import Fault, Message, Report, Start, StepResult
from hintsd_jax.texts import is_encodable

START_ROLES = ("system", "user", "assistant", "tool")
OBSERVATION_ROLES = ("user", "tool")


class ProtocolError(Exception):
    """An environment returned something that the protocol does not allow."""


def checked(method: str, value: Any) -> Start | StepResult | Report | None:
    """A copy of what `method` ("reset", "step", "report" or "close") returned.

    Raises:
      ProtocolError: the value is not what the protocol says. One line.
    """
    return _CHECKS[method](value)


def _start(value: Any) -> Start:
    _require(isinstance(value, Start), f"reset returned {type(value).__name__}, not a Start")
    messages = _messages(value.messages, START_ROLES)
    _require(messages, "reset returned no messages")
    _require(all(m["role"] != "system" for m in messages[1:]), "a system message may only come first")
    return Start(messages, _tools(value.tools))


def _step_result(value: Any) -> StepResult:
    _require(isinstance(value, StepResult), f"step returned {type(value).__name__}, not a StepResult")
    messages = _messages(value.messages, OBSERVATION_ROLES)
    finite = isinstance(value.reward, numbers.Real) and math.isfinite(value.reward)
    _require(finite, f"the reward is {value.reward!r}, not a finite number")
    terminated, truncated = bool(value.terminated), bool(value.truncated)
    _require(messages or terminated or truncated, "a StepResult without messages must end the episode")
    return StepResult(messages, float(value.reward), terminated, truncated, _tools(value.tools))


def _report(value: Any) -> Report:
    _require(isinstance(value, Report), f"report returned {type(value).__name__}, not a Report")
    _require(isinstance(value.summary, str), "the report's summary is not text")
    valid_turns = tuple(value.valid_turns)
    bools = all(type(valid) is bool for valid in valid_turns)
    _require(bools, f"the report's valid_turns are {valid_turns!r}, not bools")
    return Report(value.summary, None if value.faults is None else _faults(value.faults), valid_turns)


def _faults(faults: Iterable[Any]) -> tuple[Fault, ...]:
    copy = tuple(faults)
    for fault in copy:
        valid = isinstance(fault, Fault) and type(fault.step) is int and fault.step >= 1
        valid = valid and isinstance(fault.feedback, str)
        _require(valid, f"the report holds {fault!r}, not a Fault with a step from 1 on and text")
    return copy


def _tools(tools: Iterable[Any]) -> tuple[dict[str, Any], ...]:
    try:
        copy = tuple(json.loads(json.dumps(tool, allow_nan=False)) for tool in tools)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"the tools are not JSON: {error}") from error
    _require(all(isinstance(tool, dict) for tool in copy), "each tool must be a JSON object")
    return copy


def _messages(messages: Iterable[Any], roles: tuple[str, ...]) -> tuple[Message, ...]:
    copy = []
    for message in messages:
        _require(isinstance(message, dict), f"a message is {type(message).__name__}, not a dict")
        role, content = message.get("role"), message.get("content")
        _require(role in roles, f"a message has the role {role!r}: use {', '.join(roles)}")
        _require(isinstance(content, str), f"a message's content is {type(content).__name__}, not text")
        _require(is_encodable(content), "a message is not Unicode text")
        copy.append({"role": role, "content": content})
    return tuple(copy)


def _require(condition: Any, problem: str) -> None:
    if not condition:
        raise ProtocolError(problem)


_CHECKS: dict[str, Callable[[Any], Start | StepResult | Report | None]] = {
    "reset": _start,
    "step": _step_result,
    "report": _report,
    "close": lambda value: None,
}
