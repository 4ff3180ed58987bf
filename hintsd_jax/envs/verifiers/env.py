# SPDX-License-Identifier: Apache-2.0

"""An environment of verifiers as ours: the policy takes the place of the model that the package asks.

What the package tells its model is what the agent reads, message for message; what the agent writes is the model's
answer, its calls read in the policy's style. The package's runner plays, scores and says when it is over. Rewards by
name and metrics are in the report alone (PRIVILEGED).
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Action, CallTimeout, Message, Report, Start, StepResult
from hintsd_jax.envs.call_reading import HERMES, LFM2, LFM2_START, OLMO3, OLMO3_START, THINK_CLOSE, XML
from hintsd_jax.envs.options import read
from hintsd_jax.envs.verifiers import tasksets
from hintsd_jax.envs.verifiers.play import Play
from hintsd_jax.errors import UserError

_CALL_STARTS = {HERMES: "<tool_call>", XML: "<tool_call>", LFM2: LFM2_START, OLMO3: OLMO3_START}


class Verifiers:
    """A taskset of the package verifiers, with its tools and rewards; see `tasksets.Options`."""

    benchmark_name = "an environment of the package verifiers"
    kinds_of_mistake = (
        "a wrong or incomplete answer",
        "an answer in another form than the task asks for",
        "a wrong tool, or a wrong argument",
        "an answer before everything that it needs was found out",
    )

    def __init__(self, **options: Any):
        self._options = read(tasksets.Options, "verifiers", options)
        self._play: Play | None = None
        self._said: list[Mapping[str, Any]] = []
        self._tools: list[Mapping[str, Any]] = []
        self._summary = ""
        self._calls = 0

    @classmethod
    def version(cls) -> str:
        return f"verifiers {tasksets.PACKAGE.version()}"

    @classmethod
    def tasks(cls, split: str, data_dir: str, /, **options: Any) -> Sequence[Mapping[str, Any]]:
        return tasksets.tasks(split, read(tasksets.Options, "verifiers", options))

    def reset(self, task: Mapping[str, Any]) -> Start:
        if threading.current_thread() is not threading.main_thread():
            raise UserError("environment verifiers runs in processes alone: leave env.isolation at auto")
        random.seed(f"{task['split']} {task['id']}")  # for what draws without a seed of its own
        self._play = Play(tasksets.config_of(self._options, task["split"]), task["task"])
        asked = self._play.next()
        if not isinstance(asked, dict):
            _trace(asked)  # raises what stopped it
            raise RuntimeError("the environment ended before it asked its model anything")
        self._said, self._tools = asked["messages"], asked.get("tools") or []
        return Start(tuple(map(_message, self._said)), tuple(self._tools))

    def step(self, action: Action) -> StepResult:
        assert self._play is not None
        answer = self._answer(action)
        self._play.answer(answer)
        asked = self._play.next()
        if not isinstance(asked, dict):
            return self._over(asked)
        new = _new(self._said, asked["messages"])
        tools = [tool for tool in asked.get("tools") or [] if tool not in self._tools]
        self._said, self._tools = asked["messages"], [*self._tools, *tools]
        return StepResult(tuple(map(_message, new)), tools=tuple(tools))

    def report(self) -> Report:
        return Report(self._summary or "The episode had not ended.")

    def close(self) -> None:
        if self._play is not None:
            self._play.close()

    def _answer(self, action: Action) -> dict[str, Any]:
        """An action as a server of models gives it: without its reasoning, its calls apart from its text. A call that
        could not be read is text, as there.
        """
        text = action.text.rpartition(THINK_CLOSE)[2].strip()
        if not action.calls:
            return {"role": "assistant", "content": text}
        start = _CALL_STARTS.get(action.style)
        calls = []
        for call in action.calls:
            self._calls += 1
            function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
            calls.append({"id": f"call-{self._calls}", "type": "function", "function": function})
        return {"role": "assistant", "content": text.partition(start)[0].strip() if start else "", "tool_calls": calls}

    def _over(self, episode: Any) -> StepResult:
        trace = _trace(episode)
        rewards = [f"reward {name}: {reward.score:g} x {reward.weight:g}" for name, reward in trace.rewards.items()]
        metrics = [f"metric {name}: {value:g}" for name, value in trace.metrics.items()]
        self._summary = "\n".join([*rewards, *metrics, f"It ended with {trace.stop_condition}."])
        truncated = trace.is_truncated
        return StepResult((), float(trace.reward), terminated=not truncated, truncated=truncated)


def _trace(episode: Any) -> Any:
    """The one trace of an episode. Raises what stopped it: an error of the package or of the taskset is a fault of the
    world, as mistakes of an agent come back to it as messages.
    """
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if episode.is_timeout or any(trace.is_timeout for trace in episode.traces):
        raise CallTimeout(f"a time limit of the environment's config ended it: {_named(errors)}")
    if errors:
        raise RuntimeError(_named(errors))
    if len(episode.traces) != 1:
        raise RuntimeError(f"the environment played {len(episode.traces)} conversations: only one is supported")
    return episode.traces[0]


def _named(errors: Sequence[Any]) -> str:
    return f"{errors[0].type}: {errors[0].message}" if errors else "no error"


def _new(before: Sequence[Any], now: Sequence[Any]) -> Sequence[Any]:
    """The messages since the model's last answer."""
    count, told = len(before), [(message["role"], _text(message)) for message in now]
    grows = told[:count] == [(message["role"], _text(message)) for message in before]
    if not grows or len(now) < count + 2 or now[count]["role"] != "assistant":
        raise RuntimeError(
            "the environment changed what it had said before: only one growing conversation is supported"
        )
    return now[count + 1 :]


def _message(message: Mapping[str, Any]) -> Message:
    if message.get("tool_calls"):
        raise RuntimeError("the environment begins with calls of its own, which is not supported")
    return {"role": message["role"], "content": _text(message)}


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" for part in content):
        raise RuntimeError("the environment shows its model more than text, which is not supported")
    return "\n".join(part["text"] for part in content)
