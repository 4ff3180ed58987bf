# SPDX-License-Identifier: Apache-2.0

"""Environments whose tools are Python methods: a subclass says how an episode begins, what its tools do and how it is
judged; the protocol of `envs.base` is what comes out.

Invariant: who is to blame stays apart. A call of an unknown tool, arguments that do not fit and a `CallError` are the
agent's mistakes and answered as such; whatever else a tool raises is a fault of the world and ends the episode.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from hintsd_jax.envs.base import Action, CallError, Fault, Message, Report, Start, StepResult, ToolCall
from hintsd_jax.envs.protocol import ProtocolError, shown
from hintsd_jax.envs.typed_tools import Tool, tool, tools_of
from hintsd_jax.errors import UserError
from hintsd_jax.texts import did_you_mean

__all__ = ["CallError", "Fault", "Report", "ToolEnv", "tool"]

DONE = "Ok."  # what a tool that returns None has to say
MAX_NAME_CHARS = 100  # of a tool's name as a model wrote it, where it is looked for and said back


class ToolEnv(ABC):
    """The base class. Methods marked with `@tool` are the tools: their schemas follow from signature and docstring
    (`envs.typed_tools`), and their text for the agent is what they return: a str, any other JSON value as JSON, or DONE
    for None.

    system: the system message; "" for none. steps: actions so far in this episode, the one that is carried out
    included. over: a tool sets it to True where its call ends the episode.

    Raises, where a subclass is defined:
      UserError: a tool's signature or docstring does not say enough, or its name is one of ToolEnv's own.
    """

    system: str = ""
    tools: ClassVar[Mapping[str, Tool]] = {}
    steps: int = 0
    over: bool = False

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        cls.tools = tools_of(cls)
        if taken := sorted(cls.tools.keys() & vars(ToolEnv).keys()):
            raise UserError(f"tool {cls.__name__}.{taken[0]}: choose another name, ToolEnv has a {taken[0]!r} already")

    def __init__(self, **options: Any):
        self.options = options

    @classmethod
    @abstractmethod
    def tasks(cls, split: str, data_dir: str, /, **options: Any) -> Sequence[Mapping[str, Any]]:
        """See `Environment.tasks`."""

    @abstractmethod
    def begin(self, task: Mapping[str, Any]) -> str:
        """Begins an episode and returns the user's first message. All randomness must come from `task`."""

    @abstractmethod
    def reward(self) -> float:
        """The reward of the episode that has ended; 1 or more is a success."""

    def reply(self, text: str) -> str | None:
        """What the user says to an action that calls no tool; None, as here, ends the episode."""
        del text
        return None

    def report(self) -> Report:
        """See `Environment.report`; here nothing is known."""
        return Report("")

    def close(self) -> None:  # noqa: B027 - a subclass needs none
        """See `Environment.close`; here there is nothing to release."""

    def reset(self, task: Mapping[str, Any]) -> Start:
        """See `Environment.reset`."""
        self.steps, self.over = 0, False
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        said: Any = self.begin(task)
        if not isinstance(said, str):
            raise ProtocolError(f"begin returned {type(said).__name__}: return the user's first message, a text")
        user: Message = {"role": "user", "content": said}
        return Start((*system, user), tuple(tool.schema for tool in self.tools.values()))

    def step(self, action: Action) -> StepResult:
        """See `Environment.step`: carries out the calls in their order, up to one that ends the episode."""
        self.steps += 1
        if action.problem:
            return StepResult((_says(f"Error: {action.problem}."),))
        messages = []
        for call in action.calls:
            messages.append(_says(self._answer(call)))
            if self.over:
                break
        if not action.calls:
            said = self.reply(action.text)
            if said is None:
                self.over = True
            else:
                messages.append({"role": "user", "content": said})
        return StepResult(tuple(messages), self.reward() if self.over else 0.0, terminated=self.over)

    def _answer(self, call: ToolCall) -> str:
        """What the agent reads of a call."""
        try:
            tool = self.tools.get(call.name)
            if tool is None:
                name = call.name[:MAX_NAME_CHARS]
                raise CallError(f"no tool {shown(name)}; {did_you_mean(name, self.tools)}")
            value = getattr(self, tool.name)(**tool.arguments(call.arguments))
        except CallError as error:
            return f"Error: {error}."
        if isinstance(value, str):
            return value
        try:
            return DONE if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            what = f"tool {type(self).__name__}.{tool.name} returned {shown(value)}"
            raise ProtocolError(f"{what}, which is no JSON ({error}): return text, or what JSON can hold") from error


def _says(text: str) -> Message:
    return {"role": "tool", "content": text}
