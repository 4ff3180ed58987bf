# SPDX-License-Identifier: Apache-2.0

"""BFCL v3 multi-turn: user turns, tool calls on simulated backends, and the benchmark's own 0/1 at the end.

In: a task of `bfcl.tasks` and parsed actions. Out: the dialogue in the option `format`: "official" is the benchmark's
for Qwen's function calling: tool documentation as the benchmark writes it, results as "tool" messages, the next user
message after an action without a call, at most 20 steps a user turn. "paper" is HINT-SD's released
environment: results in a user message, 20 steps an episode, and a user turn in which no tool was called fails the
episode.

An action whose call cannot be read ends the user turn in both handlers; here the agent is told by default (the option
`unreadable_calls`), and the step counts like any other.

Where tools are missing at first (multi_turn_miss_func) they come with the user message that announces them. They exist
before: a call of one is carried out, as by the benchmark's executor.

Invariants: results are cut to `max_observation_chars` for the agent, with a note, but always scored whole. Nothing of
the ground truth reaches the agent, and no reward before the end. Needs the wheel that `make bfcl` installs. One tool
depends on the day, in the wheel itself: `verify_traveler_information` reads today's date.
"""

import functools
import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Action, Fault, Message, Report, Start, StepResult
from hintsd_jax.envs.bfcl.actions import OFFICIAL, PAPER, problem_messages, read_calls, result_messages
from hintsd_jax.envs.bfcl.execute import Backends, tool_docs
from hintsd_jax.envs.bfcl.faults import FaultSearch, FaultyStep, PlayedCall, PlayedTurn
from hintsd_jax.envs.bfcl.options import TELL, Options
from hintsd_jax.envs.bfcl.score import FORCE_TERMINATED, Scorer, TurnFailure, force_terminated
from hintsd_jax.envs.bfcl.tasks import WHEEL_VERSION, bfcl_tasks, require_wheel
from hintsd_jax.envs.bfcl.waste import Waste
from hintsd_jax.errors import UserError

# In "official": its handler checks after running a step, so 21 can run.
MAX_TURN_STEPS = 20
# In "paper".
MAX_EPISODE_STEPS = 20
# The ground truth never needs more than 34 in a user turn.
MAX_STEP_CALLS = 100
TOOL_NOTE = " Note that the provided function is in Python 3 syntax."


class Bfcl:
    """One BFCL episode at a time; see the module docstring. Options: `Options`.

    benchmark_name, kinds_of_mistake: for who looks back on an episode.
    """

    isolation = "process"  # some of the benchmark's tools work for hours, or fill the memory, on what a model may write
    benchmark_name = "BFCL v3 multi-turn"
    kinds_of_mistake = ("a wrong tool", "wrong arguments", "a required call that is missing")

    def __init__(self, **options: Any):
        self._options = Options.parse(options)
        require_wheel()

    @classmethod
    def tasks(cls, split: str, data_dir: str, /, **options: Any) -> Sequence[Mapping[str, Any]]:
        """The tasks of "train", "eval" or "test", divided as the option `split` says.

        Raises:
          UserError: as `bfcl_tasks`; or no task fits into `max_prompt_chars`.
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
                f"bfcl: no {split} task fits into max_prompt_chars={parsed.max_prompt_chars};"
                f" the smallest needs {least}"
            )
        logging.getLogger(__name__).warning(
            "bfcl %s: %d of %d tasks kept, %d dropped: their prompts are over max_prompt_chars=%d",
            split, len(kept), len(sizes), len(sizes) - len(kept), parsed.max_prompt_chars,
        )  # fmt: skip
        return kept

    @classmethod
    def version(cls) -> str:
        """The benchmark's version, with which every result is labelled."""
        require_wheel()
        return f"bfcl-eval {WHEEL_VERSION}"

    def reset(self, task: Mapping[str, Any]) -> Start:
        """Builds new backends for the task: no two episodes share state."""
        entry, ground_truth = json.loads(task["entry"]), json.loads(task["ground_truth"])
        self._task_id = task["id"]
        # Ground truth in a report is for training only, whoever asks.
        self._show_ground_truth = self._options.ground_truth_in_report and task["split"] == "train"
        self._questions: list[list[Message]] = entry["question"]
        self._tools, self._later_tools = _tools(entry, self._options.format)
        self._new_backends = functools.partial(_backends, entry)
        self._ground_truth = ground_truth
        self._backends = self._new_backends()
        self._scorer = Scorer(self._new_backends(), ground_truth)
        self._calls: list[PlayedCall] = []  # in the current user turn
        self._turn_steps = 0  # that did not end it, in the current user turn
        self._waste = Waste()
        self._step = 0
        self._played: list[PlayedTurn] = []
        self._failure: TurnFailure | None = None
        self._finished = False
        return Start(tuple(self._questions[0]), self._tools)

    def step(self, action: Action) -> StepResult:
        """Runs the action's calls; an action without a call ends the user turn, as in the official handler."""
        self._step += 1
        calls = read_calls(action, self._options.format)
        if not calls and self._options.unreadable_calls == TELL:
            calls = action.calls
            if action.problem:
                self._waste.note_unreadable(self._step)
                return self._go_on(problem_messages(action.problem, self._options.format))
        if not calls:
            return self._end_turn()
        results = [self._backends.call(call.name, call.arguments) for call in calls[:MAX_STEP_CALLS]]
        too_many = f"Error during execution: more than {MAX_STEP_CALLS} calls in one step"
        results += [too_many] * (len(calls) - len(results))
        played = [PlayedCall(self._step, call, result) for call, result in zip(calls, results, strict=True)]
        self._waste.note_calls(self._step, played)
        self._calls += played
        return self._go_on(result_messages(calls, [self._shown(result) for result in results], self._options.format))

    def _go_on(self, messages: tuple[Message, ...]) -> StepResult:
        """A step that does not end the user turn, unless it is one too many."""
        self._turn_steps += 1
        if self._options.format == PAPER or self._turn_steps <= MAX_TURN_STEPS:
            return self._within_limit(StepResult(messages))
        if self._turn + 1 == len(self._questions):  # in the last turn the limit only ends it: it is scored
            return self._end_turn(messages, cut=True)
        self._close_turn(cut=True)
        self._failure = force_terminated(self._turn - 1, f"more than {MAX_TURN_STEPS} steps in one user turn")
        self._finished = True
        return StepResult(messages, truncated=True)

    def report(self) -> Report:
        """PRIVILEGED. What went wrong, and the steps that broke the episode (see `faults`)."""
        turns, failure, valid = len(self._questions), self._failure, tuple(self._scorer.valid_turns)
        if failure is None:
            if self._finished:
                return Report(f"{self._task_id}: valid, all {turns} user turns.", (), valid)
            where = f"stopped in user turn {self._turn + 1} of {turns}; no earlier turn failed."
            expected = tuple(self._ground_truth[self._turn])
            cut = FaultyStep(self._step + 1, "The episode ended before this user turn was done.", expected)
            faults = self._placed([cut])
            lines = [f"{self._task_id}: not finished, {where}", *_fault_lines(faults)]
            return Report("\n".join(lines), faults if self._step else None, valid)
        faults = self._faults(failure)
        lines = [f"{self._task_id}: failed at user turn {failure.turn + 1} of {turns} ({failure.error_type})."]
        lines += [f"- {difference}" for difference in failure.differences]
        lines += _fault_lines(faults)
        if self._show_ground_truth:
            lines += [f"- expected: {value}" for value in failure.expected]
        lines.append(f"- user turns: {', '.join('right' if right else 'wrong' for right in valid)}")
        return Report("\n".join(lines), faults, valid)

    def _faults(self, failure: TurnFailure) -> tuple[Fault, ...]:
        first, faulty_steps = self._scorer.failure, []
        if first is not None:
            search = FaultSearch(self._new_backends, self._played, self._ground_truth, first.turn)
            faulty_steps = search.faulty_steps()
        if not faulty_steps:  # nothing is wrong with the calls, so it is how the turn ended
            faulty_steps = [FaultyStep(self._played[failure.turn].step, " ".join(failure.differences))]
        return self._placed(faulty_steps)

    def _placed(self, faulty_steps: Sequence[FaultyStep]) -> tuple[Fault, ...]:
        """The faults in order of steps. What should have come after the last step, which a limit made the last, should
        have come instead of the first step that was wasted; where none was, at the last.
        """
        texts: dict[int, list[str]] = {}
        for faulty in faulty_steps:
            step, text = faulty.step, self._feedback(faulty)
            if step > self._step:
                wasted = self._waste.first
                step, text = (wasted.step, f"{wasted.reason} {text}") if wasted else (self._step, text)
            texts.setdefault(step, []).append(text)
        return tuple(Fault(step, " ".join(texts[step])) for step in sorted(texts))

    def _feedback(self, faulty: FaultyStep) -> str:
        if not (self._show_ground_truth and faulty.expected):
            return faulty.description
        return f"{faulty.description} Expected: {'; '.join(faulty.expected)}."

    @property
    def failure(self) -> TurnFailure | None:
        """PRIVILEGED. Why the episode since `reset` does not count as solved; None while nothing is wrong."""
        return self._failure

    def close(self) -> None:
        """Nothing is held outside the object."""

    @property
    def _turn(self) -> int:
        return len(self._played)

    def _end_turn(self, messages: tuple[Message, ...] = (), cut: bool = False) -> StepResult:
        self._close_turn(cut)
        if self._turn == len(self._questions):
            self._finished = True
            return StepResult(messages, reward=float(self._failure is None), terminated=True)
        if str(self._turn) not in self._later_tools:
            return self._within_limit(StepResult(tuple(self._questions[self._turn])))
        prompts = importlib.import_module("bfcl_eval.constants.default_prompts")
        announcement = {"role": "user", "content": prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC}
        # The paper's environment adds them too, but never shows the longer list.
        tools = self._later_tools[str(self._turn)] if self._options.format == OFFICIAL else ()
        return self._within_limit(StepResult((announcement,), tools=tools))

    def _within_limit(self, result: StepResult) -> StepResult:
        if self._options.format == PAPER and self._step == MAX_EPISODE_STEPS:
            return StepResult(result.messages, truncated=True)
        return result

    def _close_turn(self, cut: bool = False) -> None:
        """`cut`: a limit has ended the user turn, so the episode ends with it."""
        without_calls = self._options.format == PAPER and not self._calls
        failure = self._scorer.end_turn(self._backends, [played.result for played in self._calls])
        if without_calls and (self._failure is None or self._failure.error_type != FORCE_TERMINATED):
            # The paper's checker gets only the turns with calls, so there are too few, and it looks no further.
            reason = "no tool was called in this user turn, and this format counts only turns with calls"
            self._failure = force_terminated(self._turn, reason)
        self._failure = self._failure or failure
        self._played.append(PlayedTurn(tuple(self._calls), self._step + cut))
        self._calls, self._turn_steps = [], 0
        if not cut:
            self._waste.end_turn()

    def _shown(self, result: str) -> str:
        limit = self._options.max_observation_chars
        if len(result) <= limit:
            return result
        return f"{result[:limit]}... [cut: the first {limit} of {len(result)} characters]"


def _fault_lines(faults: Sequence[Fault]) -> list[str]:
    return [f"- step {fault.step}: {fault.feedback}" for fault in faults]


def _backends(entry: Mapping[str, Any]) -> Backends:
    return Backends(entry["initial_config"], entry["involved_classes"], long_context="long_context" in entry["id"])


def _tools(
    entry: Mapping[str, Any], form: str
) -> tuple[tuple[Mapping[str, Any], ...], Mapping[str, tuple[Mapping[str, Any], ...]]]:
    """The documentation of the first tools, and of those that come with a later user turn, by its index."""
    docs = {doc["name"]: doc for name in entry["involved_classes"] for doc in tool_docs(name)}
    later = {turn: tuple(docs.pop(name) for name in names) for turn, names in entry.get("missed_function", {}).items()}
    # The benchmark writes the note before the later tools come back; the paper never does.
    note = TOOL_NOTE if form == OFFICIAL else ""
    return tuple({**doc, "description": doc["description"] + note} for doc in docs.values()), later


def _prompt_chars(task: Mapping[str, Any], form: str) -> int:
    entry = json.loads(task["entry"])
    tools, _ = _tools(entry, form)
    messages = entry["question"][0]
    return sum(len(json.dumps(tool)) for tool in tools) + sum(len(message["content"]) for message in messages)
