"""BFCL v3 multi-turn: user turns, tool calls on simulated backends, and the benchmark's own 0/1 at the end.

In: a task of `tasks/bfcl.py` and parsed actions. Out: the dialogue in the option `format`: "official" is the
benchmark's for Qwen's function calling: tool documentation in the benchmark's words, results as "tool" messages, the
next user message after an action without a readable call, at most 20 steps a user turn. "paper" is HINT-SD's released
environment: results in a user message, 20 steps an episode, and a user turn in which no tool was called fails the
episode.

Where tools are held out (multi_turn_miss_func) they come with the user message that announces them. They exist before:
a call of one is carried out, as by the benchmark's executor.

Invariants: results are shown cut to `max_observation_chars`, with a note, but always scored whole. The agent hears
nothing of the ground truth, and no reward before the end. Needs the wheel that `make bfcl` installs. One thing is the
wheel's own: `verify_traveler_information` reads today's date.
"""

import functools
import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Action, Fault, Message, Report, Start, StepResult
from hintsd_jax.envs.bfcl.actions import OFFICIAL, PAPER, read_calls, result_messages
from hintsd_jax.envs.bfcl.execute import World, tool_docs
from hintsd_jax.envs.bfcl.faults import Ended, Finding, Made, Search
from hintsd_jax.envs.bfcl.options import Options
from hintsd_jax.envs.bfcl.score import FORCE_TERMINATED, Failure, Judge, force_terminated
from hintsd_jax.envs.bfcl.tasks import WHEEL_VERSION, bfcl_tasks, require_wheel
from hintsd_jax.errors import UserError

MAX_TURN_STEPS = 20  # "official": its handler checks after running a step, so 21 can run
MAX_EPISODE_STEPS = 20  # "paper"
MAX_STEP_CALLS = 100  # the ground truth never needs more than 34 in a turn
TOOL_NOTE = " Note that the provided function is in Python 3 syntax."


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
        sizes = [(_prompt_chars(task, parsed.format), task) for task in tasks]
        kept = [task for size, task in sizes if size <= parsed.max_prompt_chars]
        if not kept:
            least = min(size for size, _ in sizes)
            raise UserError(
                f"bfcl: no {split} task fits into max_prompt_chars={parsed.max_prompt_chars}; the smallest needs {least}"
            )
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
        self._tools, self._held_out = _tools(entry, self._options.format)
        self._new_world = functools.partial(_world, entry)
        self._ground_truth = ground_truth
        self._world = self._new_world()
        self._judge = Judge(self._new_world(), ground_truth)
        self._made: list[Made] = []  # in the current user turn
        self._turn_steps = 0  # with calls, in the current user turn
        self._step = 0
        self._ended: list[Ended] = []
        self._failure: Failure | None = None
        self._over = False
        return Start(tuple(self._questions[0]), self._tools)

    def step(self, action: Action) -> StepResult:
        """Runs the action's calls; an action without a readable call ends the user turn, as in the official handler."""
        self._step += 1
        calls = read_calls(action, self._options.format)
        if not calls:
            return self._end_turn()
        results = [self._world.call(call.name, call.arguments) for call in calls[:MAX_STEP_CALLS]]
        results += [f"Error during execution: more than {MAX_STEP_CALLS} calls in one step"] * (
            len(calls) - len(results)
        )
        self._made += [Made(self._step, call, result) for call, result in zip(calls, results, strict=True)]
        self._turn_steps += 1
        messages = result_messages(calls, [self._shown(result) for result in results], self._options.format)
        if self._options.format == PAPER or self._turn_steps <= MAX_TURN_STEPS:
            return self._within_limit(StepResult(messages))
        if self._turn + 1 == len(self._questions):  # in the last turn the limit only ends it: it is scored
            return self._end_turn(messages)
        self._close_turn()
        self._failure = force_terminated(self._turn - 1, f"more than {MAX_TURN_STEPS} steps in one user turn")
        self._over = True
        return StepResult(messages, truncated=True)

    def report(self) -> Report:
        """What went wrong, in words, and the steps that broke it (see `faults`)."""
        turns, failure, valid = len(self._questions), self._failure, tuple(self._judge.valid_turns)
        if failure is None:
            if self._over:
                return Report(f"{self._task_id}: valid, all {turns} user turns.", (), valid)
            words = f"{self._task_id}: not finished, stopped in user turn {self._turn + 1} of {turns}; no earlier turn failed."
            return Report(words, None, valid)
        faults = self._faults(failure)
        lines = [f"{self._task_id}: failed at user turn {failure.turn + 1} of {turns} ({failure.error_type})."]
        lines += [f"- {difference}" for difference in failure.differences]
        lines += [f"- step {fault.step}: {fault.feedback}" for fault in faults]
        if self._tell_ground_truth:
            lines += [f"- expected: {value}" for value in failure.expected]
        lines.append(f"- user turns: {', '.join('right' if right else 'wrong' for right in valid)}")
        return Report("\n".join(lines), faults, valid)

    def _faults(self, failure: Failure) -> tuple[Fault, ...]:
        first = self._judge.failure
        findings = (
            [] if first is None else Search(self._new_world, self._ended, self._ground_truth, first.turn).findings()
        )
        if not findings:  # nothing is wrong with the calls, so it is how the turn ended
            findings = [Finding(self._ended[failure.turn].step, " ".join(failure.differences))]
        expected = lambda finding: (
            f" Expected: {'; '.join(finding.expected)}." if self._tell_ground_truth and finding.expected else ""
        )
        return tuple(Fault(finding.step, finding.what + expected(finding)) for finding in findings)

    @property
    def failure(self) -> Failure | None:
        """PRIVILEGED. Why the episode since `reset` does not count as solved; None while nothing is wrong."""
        return self._failure

    def close(self) -> None:
        """Nothing is held outside the object."""

    @property
    def _turn(self) -> int:
        return len(self._ended)

    def _end_turn(self, messages: tuple[Message, ...] = ()) -> StepResult:
        self._close_turn()
        if self._turn == len(self._questions):
            self._over = True
            return StepResult(messages, reward=float(self._failure is None), terminated=True)
        if str(self._turn) not in self._held_out:
            return self._within_limit(StepResult(tuple(self._questions[self._turn])))
        prompts = importlib.import_module("bfcl_eval.constants.default_prompts")
        announcement = {"role": "user", "content": prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC}
        # The paper's environment adds them too, but never shows the longer list.
        tools = self._held_out[str(self._turn)] if self._options.format == OFFICIAL else ()
        return self._within_limit(StepResult((announcement,), tools=tools))

    def _within_limit(self, turn: StepResult) -> StepResult:
        if self._options.format == PAPER and self._step == MAX_EPISODE_STEPS:
            return StepResult(turn.messages, truncated=True)
        return turn

    def _close_turn(self) -> None:
        silent = self._options.format == PAPER and not self._made
        failure = self._judge.end_turn(self._world, [made.result for made in self._made])
        if silent and (self._failure is None or self._failure.error_type != FORCE_TERMINATED):
            # Its checker gets only the turns with calls, finds them too few, and looks no further.
            reason = "no tool was called in this user turn, and this format counts only turns with calls"
            self._failure = force_terminated(self._turn, reason)
        self._failure = self._failure or failure
        self._ended.append(Ended(tuple(self._made), self._step))
        self._made, self._turn_steps = [], 0

    def _shown(self, result: str) -> str:
        limit = self._options.max_observation_chars
        return (
            result
            if len(result) <= limit
            else f"{result[:limit]}... [cut: the first {limit} of {len(result)} characters]"
        )


def _world(entry: Mapping[str, Any]) -> World:
    return World(entry["initial_config"], entry["involved_classes"], long_context="long_context" in entry["id"])


def _tools(
    entry: Mapping[str, Any], form: str
) -> tuple[tuple[Mapping[str, Any], ...], Mapping[str, tuple[Mapping[str, Any], ...]]]:
    """The documentation of the first tools, and of those that come with a later user turn, by its index."""
    docs = {doc["name"]: doc for name in entry["involved_classes"] for doc in tool_docs(name)}
    held_out = {
        turn: tuple(docs.pop(name) for name in names) for turn, names in entry.get("missed_function", {}).items()
    }
    note = (
        TOOL_NOTE if form == OFFICIAL else ""
    )  # the benchmark writes it before the held-out tools come back; the paper never
    return tuple(doc | {"description": doc["description"] + note} for doc in docs.values()), held_out


def _prompt_chars(task: Mapping[str, Any], form: str) -> int:
    entry = json.loads(task["entry"])
    return sum(len(json.dumps(tool)) for tool in _tools(entry, form)[0]) + sum(
        len(message["content"]) for message in entry["question"][0]
    )
