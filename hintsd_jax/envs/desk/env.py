# SPDX-License-Identifier: Apache-2.0

"""Desk: a small simulated office, the embedded default environment.

An action goes in, an observation comes out. A step with tool calls carries them out; a step without any closes the
user's request: the next one comes, or the outcome (1 if the final state equals the reference's, else 0). A wrong choice
is not noticed when it is made. The report knows the faulty steps and is PRIVILEGED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Action, Fault, Report, Start, StepResult
from hintsd_jax.envs.desk import feedback, reference
from hintsd_jax.envs.desk.office import CallError, Office, tool_docs
from hintsd_jax.envs.desk.tasks import desk_tasks

SYSTEM = "You run an office. Do each request, then say Done."


class Desk:
    """One office at a time; see `hintsd_jax.envs.base.Environment` for the protocol."""

    @classmethod
    def tasks(cls, split: str, data_dir: str, **options: Any) -> Sequence[Mapping[str, Any]]:
        """The tasks of `train`, `eval` or `test`.

        Options: `seed`, `length` (requests a task), `difficulty` (decisions a task). Raises UserError as `desk_tasks`.
        """
        return desk_tasks(split, data_dir, **options)

    def __init__(self, **options: Any):
        del options  # they describe the tasks, which arrive through `reset`

    def reset(self, task: Mapping[str, Any]) -> Start:
        """Opens the task's office with its first request."""
        self._task = task
        self.office = Office.from_json(task["world"])
        self._steps = 0
        self._hour_faulty = False
        self.faults: list[Fault] = []
        return Start(
            messages=({"role": "system", "content": SYSTEM}, {"role": "user", "content": task["requests"][0]["text"]}),
            tools=tool_docs(),
        )

    def step(self, action: Action) -> StepResult:
        """Carries out the action's calls; an action without a call closes the user's request."""
        self._steps += 1
        if action.problem:
            return _observation([f"Error: {action.problem}."])
        if action.calls:
            return _observation([self._call(call.name, call.arguments) for call in action.calls])
        self._note_fault(closing=True)
        self.office.hour += 1
        self._hour_faulty = False
        if self.office.hour == len(self._task["requests"]):
            success = self.office.final_state() == reference.goal_state(self._task)
            return StepResult(messages=(), reward=float(success), terminated=True)
        return StepResult(messages=({"role": "user", "content": self._task["requests"][self.office.hour]["text"]},))

    def report(self) -> Report:
        """PRIVILEGED. The first fault of every request, in order of steps."""
        faults = list(self.faults)
        open_hour = self.office.hour
        if open_hour < len(self._task["requests"]) and self._steps and not self._hour_faulty:
            missing = reference.possible_calls(self.office, self._task, open_hour)
            if missing:  # the episode was cut: its last step is the last that could have gone on
                faults.append(Fault(self._steps, feedback.make_call(missing[0])))
        summary = "All requests were carried out."
        if faults:
            summary = f"{len(faults)} of {len(self._task['requests'])} requests went wrong."
        return Report(summary=summary, faults=tuple(faults))

    def close(self) -> None:
        """There is nothing to release."""

    def _call(self, tool: str, arguments: dict[str, Any]) -> str:
        try:
            observation = self.office.call(tool, arguments)
        except CallError as error:
            return f"Error: {error}."
        self._note_fault(closing=False)
        return observation

    def _note_fault(self, closing: bool) -> None:
        """Notes the first step of an hour after which that hour's request cannot be met any more."""
        if self._hour_faulty:
            return
        hour = self.office.hour
        surplus = reference.surplus_calls(self.office, self._task, hour)
        missing = reference.possible_calls(self.office, self._task, hour) if closing else []
        if surplus:
            self.faults.append(Fault(self._steps, feedback.instead_of(surplus[0], self._task["requests"][hour])))
        elif missing:
            self.faults.append(Fault(self._steps, feedback.make_call(missing[0])))
        self._hour_faulty = bool(surplus or missing)


def _observation(texts: list[str]) -> StepResult:
    return StepResult(messages=tuple({"role": "tool", "content": text} for text in texts))
