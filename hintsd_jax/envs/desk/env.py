# SPDX-License-Identifier: Apache-2.0

"""Desk: a small simulated office, the embedded default environment.

An action goes in, an observation comes out. A step with tool calls carries them out; a step without any closes the
user's request: the next one comes, or the outcome (1 if the final state equals the reference's, else 0). A wrong choice
is not noticed when it is made. The report knows the faulty steps and is PRIVILEGED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Action, CallError, Fault, Message, Report, Start, StepResult
from hintsd_jax.envs.desk import feedback, reference
from hintsd_jax.envs.desk.instructions import INSTRUCTIONS, check, documented_tools
from hintsd_jax.envs.desk.office import LOOKUPS, Office
from hintsd_jax.envs.desk.tasks import desk_tasks


class Desk:
    """One office at a time; see `hintsd_jax.envs.base.Environment` for the protocol.

    Args:
      instructions: "short", which the embedded policy knows, or "full", which explains look-ups and labels.
      tools: "all", or the "relevant" ones, those that the task's requests need.
      **options: describe the tasks, which arrive through `reset`.

    Raises:
      UserError: other instructions or tools than these.
    """

    isolation = "thread"  # plain Python of ours, whose calls take microseconds
    benchmark_name = "Desk, a simulated office with files, mail, calendar and contacts"
    kinds_of_mistake = (
        "the wrong one of two candidates was taken",
        "a tool call has wrong arguments",
        "the wrong tool was called",
        "a call that the request needs was left out",
        "calls were repeated that could bring nothing new",
    )

    @classmethod
    def tasks(
        cls,
        split: str,
        data_dir: str,
        *,
        seed: int = 0,
        length: int = 8,
        difficulty: int = 6,
        instructions: str = "short",
        tools: str = "all",
    ) -> Sequence[Mapping[str, Any]]:
        """The tasks of `train`, `eval` or `test`.

        Options: `seed`, `length` (requests a task), `difficulty` (decisions a task), and
        those of the constructor, on which the tasks do not depend. Raises UserError as the constructor and
        `desk_tasks`.
        """
        cls(instructions=instructions, tools=tools)
        return desk_tasks(split, data_dir, seed, length, difficulty)

    def __init__(self, *, instructions: str = "short", tools: str = "all", **options: Any):
        del options
        check(instructions, tools)
        self._system, self._tools = INSTRUCTIONS[instructions], tools

    def reset(self, task: Mapping[str, Any]) -> Start:
        """Opens the task's office with its first request."""
        self._task = task
        self.office = Office.from_json(task["world"])
        self._steps = 0
        self._hour_faulty = False
        self.faults: list[Fault] = []
        self._wasted: list[tuple[int, Fault]] = []  # (hour, what should have been done instead)
        self._seen: set[str] = set()  # look-ups of the open request with their observations
        return Start(
            messages=({"role": "system", "content": self._system}, _user(task["requests"][0])),
            tools=documented_tools(task, self._tools),
        )

    def step(self, action: Action) -> StepResult:
        """Carries out the action's calls; an action without a call closes the user's request."""
        self._steps += 1
        if action.problem:
            self._note_waste()
            return _observation([f"Error: {action.problem}."])
        if action.calls:
            answers = [self._call(call.name, call.arguments) for call in action.calls]
            if not any(useful for _, useful in answers):
                self._note_waste()
            return _observation([text for text, _ in answers])
        self._note_fault(closing=True)
        self.office.hour += 1
        self._hour_faulty = False
        self._seen.clear()
        if self.office.hour == len(self._task["requests"]):
            success = self.office.final_state() == reference.goal_state(self._task)
            return StepResult(messages=(), reward=float(success), terminated=True)
        return StepResult(messages=(_user(self._task["requests"][self.office.hour]),))

    def report(self) -> Report:
        """PRIVILEGED. The first fault of every request, in order of steps. Of an episode that a limit has cut: what its
        open request lacks, at the first step that was wasted (see `_note_waste`) in that request, else in the episode,
        else at the last step.
        """
        faults = list(self.faults)
        open_hour = self.office.hour
        if open_hour < len(self._task["requests"]) and self._steps and not self._hour_faulty:
            missing = reference.possible_calls(self.office, self._task, open_hour)
            if missing:
                wasted = [fault for hour, fault in self._wasted if hour == open_hour] or [
                    fault for _, fault in self._wasted
                ]
                faults.append(wasted[0] if wasted else Fault(self._steps, feedback.make_call(missing[0])))
                faults.sort(key=lambda fault: fault.step)
        summary = "All requests were carried out."
        if faults:
            summary = f"{len(faults)} of {len(self._task['requests'])} requests went wrong."
        return Report(summary=summary, faults=tuple(faults))

    def close(self) -> None:
        """There is nothing to release."""

    def _call(self, tool: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """(observation, whether it was of use: an effect, or a look-up that has not been answered so before)."""
        try:
            observation = self.office.call(tool, arguments)
        except CallError as error:
            return f"Error: {error}.", False
        self._note_fault(closing=False)
        if tool not in LOOKUPS:
            return observation, True
        known, self._seen = self._seen, self._seen | {repr((tool, sorted(arguments.items()), observation))}
        return observation, len(known) < len(self._seen)

    def _note_waste(self) -> None:
        """Notes a step that brought nothing: it could not be read, it was answered with errors, or it repeated look-ups
        of its request that had the same answer before. No outcome breaks by one; enough of them use up the limits.
        """
        missing = reference.possible_calls(self.office, self._task, self.office.hour)
        text = feedback.make_call(missing[0]) if missing else feedback.CLOSE
        self._wasted.append((self.office.hour, Fault(self._steps, text)))

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


def _user(request: Mapping[str, Any]) -> Message:
    return {"role": "user", "content": request["text"]}


def _observation(texts: list[str]) -> StepResult:
    return StepResult(messages=tuple({"role": "tool", "content": text} for text in texts))
