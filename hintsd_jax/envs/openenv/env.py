# SPDX-License-Identifier: Apache-2.0

"""An environment of OpenEnv as ours: resets, actions, rewards and the end are the package's, over its own client.

What the agent writes becomes an action (`actions`), what the environment answers becomes text (`words`). The state of
the environment at the end is in the report alone (PRIVILEGED).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Action, Message, Report, Start, StepResult, ToolCall
from hintsd_jax.envs.call_reading import THINK_CLOSE
from hintsd_jax.envs.openenv import options, tasks
from hintsd_jax.envs.openenv.actions import TEXT, TOOLS, Form, form_of
from hintsd_jax.envs.openenv.served import Place
from hintsd_jax.envs.openenv.session import Refused, Session, action_schema, begun
from hintsd_jax.envs.openenv.words import plain, text_of
from hintsd_jax.envs.options import read

NOTHING, DONE = "Your turn.", "Ok."  # where the environment, or a tool, says nothing


class OpenEnv:
    """An environment of OpenEnv; see `options.Options`."""

    benchmark_name = "an environment of OpenEnv"
    kinds_of_mistake = (
        "an action in another form than the environment takes",
        "an action that what the environment has said rules out",
        "a wrong tool, or a wrong argument",
        "an end before everything that was asked for was done",
    )

    def __init__(self, **given: Any):
        self._options = read(options.Options, "openenv", given)
        self._place: Place | None = None
        self._session: Session | None = None
        self._form = Form(TEXT, {})
        self._rewards: list[tuple[int, float]] = []  # (step, reward) where a step brought one
        self._steps, self._end = 0, ""

    @classmethod
    def version(cls) -> str:
        return f"openenv {options.PACKAGE.version()}"

    @classmethod
    def tasks(cls, split: str, data_dir: str, /, **given: Any) -> Sequence[Mapping[str, Any]]:
        return tasks.tasks(split, read(options.Options, "openenv", given))

    def reset(self, task: Mapping[str, Any]) -> Start:
        self._place = Place(self._options)
        self._form = form_of(action_schema(self._place.url), self._options.field)
        arguments = {**self._options.reset, "seed": task["seed"]}
        self._session, tools, result = begun(self._place.url, self._form.kind == TOOLS, arguments)
        if result.done:
            raise RuntimeError("the environment was over when it had been reset")
        system = [{"role": "system", "content": self._options.system}] if self._options.system else []
        first = _says("user", self._text(result) or NOTHING)
        return Start((*system, first), self._form.tools(tools))

    def step(self, action: Action) -> StepResult:
        self._steps += 1
        if self._form.kind == TEXT:
            text = action.text.rpartition(THINK_CLOSE)[2].strip()
            messages = [_says("user", self._acted(self._form.said(text), NOTHING))]
        elif action.problem:
            messages = [_says("tool", f"Error: {action.problem}.")]
        else:
            messages = []
            for call in action.calls:
                messages.append(_says("tool", self._called(call)))
                if self._end:
                    break
            if not messages:  # as in the package's own runner
                self._end = "The agent ended it: it called nothing."
        return StepResult(tuple(messages), self._reward(), terminated=bool(self._end))

    def report(self) -> Report:
        assert self._session is not None
        rewards = [f"reward {reward:g} at step {step}" for step, reward in self._rewards]
        state = f"State: {plain(self._session.state())}"
        return Report("\n".join([*rewards, self._end or "The episode had not ended.", state]))

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        if self._place is not None:
            self._place.close()

    def _called(self, call: ToolCall) -> str:
        action = self._form.called(call)
        if action is None:
            return f"Error: there is no tool {call.name[:100]!r}; there is {self._form.name}."
        return self._acted(action, DONE)

    def _acted(self, action: Mapping[str, Any], nothing: str) -> str:
        """What the agent reads of an action that is carried out."""
        assert self._session is not None
        try:
            result = self._session.step(action)
        except Refused as error:
            mistake = self._form.mistake(action)
            if mistake is None:  # what failed to validate was not the action
                raise RuntimeError(f"the environment refuses an action that fits its schema: {error}") from error
            return f"Error: {mistake}."
        if result.reward is not None:
            self._rewards.append((self._steps, float(result.reward)))
        if result.done:
            if not self._rewards:
                raise RuntimeError("the environment ended the episode and gave no reward")
            self._end = "The environment ended it."
        return self._text(result) or nothing

    def _text(self, result: Any) -> str:
        return text_of(result.observation, self._options.text).strip()

    def _reward(self) -> float:
        """Of the episode so far."""
        rewards = [reward for _, reward in self._rewards] or [0.0]
        return sum(rewards) if self._options.reward == options.SUM else rewards[-1]


def _says(role: str, text: str) -> Message:
    return {"role": role, "content": text}
