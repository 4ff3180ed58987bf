"""BFCL v3 multi-turn: user turns, tool calls on simulated backends, and the benchmark's own 0/1 at the end.

In: a task of `tasks/bfcl.py` and parsed actions. Out: the official Qwen function-calling dialogue: tool documentation in the
benchmark's words, results as "tool" messages, the next user message after an action without a readable call.

Invariants: results are shown cut to `max_observation_chars`, with a note, but always scored whole. The agent hears nothing of
the ground truth, and no reward before the end. Needs the wheel that `make bfcl` installs. One thing is the wheel's own:
`verify_traveler_information` reads today's date.
"""

import dataclasses
import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Action, Fault, Message, Report, Start, Turn
from hintsd_jax.envs.bfcl.execute import World, tool_docs
from hintsd_jax.envs.bfcl.score import Failure, Judge, force_terminated
from hintsd_jax.errors import UserError
from hintsd_jax.tasks.bfcl import WHEEL_VERSION, bfcl_tasks, require_wheel

MAX_TURN_STEPS = 20  # the official handler checks after running a step, so 21 can run
MAX_STEP_CALLS = 100  # the ground truth never needs more than 34 in a turn
TOOL_NOTE = " Note that the provided function is in Python 3 syntax."


@dataclasses.dataclass(frozen=True)
class Options:
    """What `env` options a config can set.

    Attributes:
      split: which way the tasks are divided: "clean" or "paper", see `tasks.bfcl`.
      categories: those of the benchmark's that are played; () for all that the division has.
      max_prompt_chars: keep only tasks whose tool documentation and first message fit into this many characters; 0 keeps all.
      max_observation_chars: longer results are cut, with a note.
      ground_truth_in_report: the privileged report also tells the ground truth's calls and values. Train split only.
    """

    split: str = "clean"
    categories: tuple[str, ...] = ()
    max_prompt_chars: int = 0
    max_observation_chars: int = 4000
    ground_truth_in_report: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "Options":
        """Raises UserError for an unknown option (with the nearest name), or a size out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1) or known
                raise UserError(f"bfcl has no option {name!r}; did you mean {' or '.join(near)}?")
        parsed = cls(**options)
        if parsed.max_prompt_chars < 0 or parsed.max_observation_chars < 1:
            raise UserError("bfcl: max_prompt_chars must be 0 or more, and max_observation_chars 1 or more")
        return parsed


class Bfcl:
    """One BFCL episode at a time; see the module docstring. Options: `Options`."""

    def __init__(self, **options: Any):
        self._options = Options.parse(options)
        require_wheel()

    @classmethod
    def tasks(cls, split: str, data_dir: str, /, **options: Any) -> Sequence[Mapping[str, Any]]:
        """The tasks of "train", "eval" or "test", divided as the option `split` says.

        Raises:
          UserError: see `tasks.bfcl.bfcl_tasks`; or no task fits into `max_prompt_chars`.
        """
        parsed = Options.parse(options)
        tasks = bfcl_tasks(split, data_dir, parsed.split, parsed.categories)
        if not parsed.max_prompt_chars:
            return tasks
        sizes = [(_prompt_chars(task), task) for task in tasks]
        kept = [task for size, task in sizes if size <= parsed.max_prompt_chars]
        if not kept:
            least = min(size for size, _ in sizes)
            raise UserError(f"bfcl: no {split} task fits into max_prompt_chars={parsed.max_prompt_chars}; the smallest needs {least}")
        logging.getLogger(__name__).warning(
            "bfcl %s: %d of %d tasks kept, %d dropped: their prompts are over max_prompt_chars=%d",
            split, len(kept), len(sizes), len(sizes) - len(kept), parsed.max_prompt_chars,
        )  # fmt: skip
        return kept

    @classmethod
    def version(cls) -> str:
        """What every result is labelled with."""
        require_wheel()
        return f"bfcl-eval {WHEEL_VERSION}"

    def reset(self, task: Mapping[str, Any]) -> Start:
        """Builds fresh backends for the task: no two episodes share state."""
        entry, ground_truth = json.loads(task["entry"]), json.loads(task["ground_truth"])
        self._task_id = task["id"]
        # Ground truth in a report is for training only, whoever asks.
        self._tell_ground_truth = self._options.ground_truth_in_report and task["split"] == "train"
        self._questions: list[list[Message]] = entry["question"]
        self._world = _world(entry)
        self._judge = Judge(_world(entry), ground_truth)
        self._results: list[str] = []  # of the current user turn
        self._turn_steps = 0  # with calls, in the current user turn
        self._step = 0
        self._last_steps: list[int] = []  # the last step of each user turn that has ended
        self._failure: Failure | None = None
        self._over = False
        return Start(tuple(self._questions[0]), _tools(entry))

    def step(self, action: Action) -> Turn:
        """Runs the action's calls; an action without a readable call ends the user turn, as in the official handler."""
        self._step += 1
        if not action.calls:
            return self._end_turn()
        results = [self._world.call(call.name, call.arguments) for call in action.calls[:MAX_STEP_CALLS]]
        results += [f"Error during execution: more than {MAX_STEP_CALLS} calls in one step"] * (len(action.calls) - len(results))
        self._results += results
        self._turn_steps += 1
        messages = tuple({"role": "tool", "content": self._cut(result)} for result in results)
        if self._turn_steps <= MAX_TURN_STEPS:
            return Turn(messages)
        if self._turn + 1 == len(self._questions):  # in the last turn the limit only ends it: it is scored
            return self._end_turn(messages)
        self._close_turn()
        self._failure = force_terminated(self._turn - 1, MAX_TURN_STEPS)
        self._over = True
        return Turn(messages, truncated=True)

    def report(self) -> Report:
        """What went wrong, in words. The fault is the step that closed the first failing user turn: the last chance to mend it."""
        turns = len(self._questions)
        if self._failure is None:
            if self._over:
                return Report(f"{self._task_id}: valid, all {turns} user turns.", ())
            return Report(f"{self._task_id}: not finished, stopped in user turn {self._turn + 1} of {turns}; no earlier turn failed.")
        failure = self._failure
        lines = [f"{self._task_id}: failed at user turn {failure.turn + 1} of {turns} ({failure.error_type})."]
        lines += [f"- {difference}" for difference in failure.differences]
        if self._tell_ground_truth:
            lines += [f"- expected: {value}" for value in failure.expected]
        fault = Fault(self._last_steps[failure.turn], " ".join(line.removeprefix("- ") for line in lines[1:]))
        return Report("\n".join(lines), (fault,))

    def close(self) -> None:
        """Nothing is held outside the object."""

    @property
    def _turn(self) -> int:
        return len(self._last_steps)

    def _end_turn(self, messages: tuple[Message, ...] = ()) -> Turn:
        self._close_turn()
        if self._turn < len(self._questions):
            return Turn(tuple(self._questions[self._turn]))
        self._over = True
        return Turn(messages, reward=float(self._failure is None), terminated=True)

    def _close_turn(self) -> None:
        self._failure = self._judge.end_turn(self._world, self._results)
        self._last_steps.append(self._step)
        self._results, self._turn_steps = [], 0

    def _cut(self, result: str) -> str:
        limit = self._options.max_observation_chars
        return result if len(result) <= limit else f"{result[:limit]}... [cut: the first {limit} of {len(result)} characters]"


def _world(entry: Mapping[str, Any]) -> World:
    return World(entry["initial_config"], entry["involved_classes"], long_context="long_context" in entry["id"])


def _tools(entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    docs = (doc for name in entry["involved_classes"] for doc in tool_docs(name))
    return tuple(doc | {"description": doc["description"] + TOOL_NOTE} for doc in docs)


def _prompt_chars(task: Mapping[str, Any]) -> int:
    entry = json.loads(task["entry"])
    return sum(len(json.dumps(tool)) for tool in _tools(entry)) + sum(len(message["content"]) for message in entry["question"][0])
