"""Desk: a small simulated office, the embedded default environment.

Action text -> observation. A step with tool calls carries them out; a step without any closes the user's request: the
next one comes, or the outcome (1 if the final state equals the reference's, else 0). Wrong choices stay silent at their
turn. The report knows the faulty steps and is privileged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hintsd_jax.envs.base import Action, Fault, Report, Start, StepResult
from hintsd_jax.envs.desk import advice, solver
from hintsd_jax.envs.desk.world import CallError, World, tool_docs

SYSTEM = "You run an office. Do each request, then say Done."


class Desk:
    """One office at a time; see `hintsd_jax.envs.base.Environment` for the protocol."""

    @classmethod
    def tasks(cls, split: str, data_dir: str, **options) -> Sequence[Mapping]:
        """The tasks of `train`, `eval` or `test`. Options: `seed`, `length` (requests a task), `difficulty` (decisions
        a task).
        """
        from hintsd_jax.envs.desk.tasks import desk_tasks

        return desk_tasks(split, data_dir, **options)

    def __init__(self, **options):
        del options  # they describe the tasks, which arrive through `reset`

    def reset(self, task: Mapping) -> Start:
        self._task = task
        self.world = World.from_json(task["world"])
        self._steps = 0
        self._hour_faulty = False
        self.faults: list[Fault] = []
        return Start(
            messages=({"role": "system", "content": SYSTEM}, {"role": "user", "content": task["requests"][0]["text"]}),
            tools=tool_docs(),
        )

    def step(self, action: Action) -> StepResult:
        self._steps += 1
        if action.problem:
            return self._observe([f"Error: {action.problem}."])
        if action.calls:
            return self._observe([self._call(call.name, call.arguments) for call in action.calls])
        self._note_fault(closing=True)
        self.world.hour += 1
        self._hour_faulty = False
        if self.world.hour == len(self._task["requests"]):
            success = self.world.final_state() == solver.reference_state(self._task)
            return StepResult(messages=(), reward=float(success), terminated=True)
        return StepResult(messages=({"role": "user", "content": self._task["requests"][self.world.hour]["text"]},))

    def report(self) -> Report:
        """PRIVILEGED. The first fault of every request, in order of steps."""
        faults = list(self.faults)
        open_hour = self.world.hour
        if open_hour < len(self._task["requests"]) and self._steps and not self._hour_faulty:
            missing = solver.possible_calls(self.world, self._task, open_hour)
            if missing:  # the episode was cut: its last step is the last that could have gone on
                faults.append(Fault(self._steps, advice.still_to_do(missing[0])))
        summary = (
            "All requests were carried out."
            if not faults
            else f"{len(faults)} of {len(self._task['requests'])} requests went wrong."
        )
        return Report(summary=summary, faults=tuple(faults))

    def close(self) -> None:
        pass

    def _call(self, tool: str, arguments: dict) -> str:
        try:
            observation = self.world.call(tool, arguments)
        except CallError as error:
            return f"Error: {error}."
        self._note_fault(closing=False)
        return observation

    def _observe(self, observations: list[str]) -> StepResult:
        return StepResult(messages=tuple({"role": "tool", "content": text} for text in observations))

    def _note_fault(self, closing: bool) -> None:
        """Records the first step of an hour after which that hour's request cannot be met any more."""
        if self._hour_faulty:
            return
        hour = self.world.hour
        surplus = solver.surplus_entries(self.world, self._task, hour)
        missing = solver.possible_calls(self.world, self._task, hour) if closing else []
        if surplus:
            self.faults.append(Fault(self._steps, advice.about_surplus(surplus[0], self._task["requests"][hour])))
        elif missing:
            self.faults.append(Fault(self._steps, advice.still_to_do(missing[0])))
        self._hour_faulty = bool(surplus or missing)
