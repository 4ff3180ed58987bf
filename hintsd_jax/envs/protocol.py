# SPDX-License-Identifier: Apache-2.0

"""The gate between environments and the host loop: what an environment's method returned goes in, a checked copy comes
out.

Invariant: nothing that an environment says gets past here unless it is plain data of the protocol's types, of bounded
size, that a tokenizer, a JSON file and a float can hold: no object that the environment changes later, no text that is
not Unicode, no number that is not finite. What it says in an episode is checked by `checked`; what its class says
before the first one by `checked_tasks` and its neighbours, which refuse it in one line for the user.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hintsd_jax.envs.base import Fault, Message, Report, Start, StepResult
from hintsd_jax.envs.code_blocks import CODE
from hintsd_jax.errors import UserError
from hintsd_jax.texts import described, did_you_mean, encodable, is_encodable

START_ROLES = ("system", "user", "assistant", "tool")
OBSERVATION_ROLES = ("user", "tool")
# No context holds as many characters as one message may have; a longer one is cut, with a note.
MAX_MESSAGE_CHARS = 8_000_000
MAX_MESSAGES, MAX_CHARS = 10_000, 32_000_000  # of one answer, after that
MAX_TOOLS, MAX_TOOL_CHARS, MAX_TOOL_DEPTH = 10_000, 8_000_000, 64
# Of a report; longer texts are cut. It is written into records and read by teachers.
MAX_SUMMARY_CHARS, MAX_FEEDBACK_CHARS = 20_000, 20_000
MAX_FAULTS, MAX_TURNS = 1_000, 10_000
MAX_TASKS_READ = 100_000
MAX_NAME_CHARS = 200  # of a task's id, a category, a version
MAX_REWARD = 1e9  # squares and sums of rewards must stay finite in float32


class ProtocolError(Exception):
    """An environment returned something that the protocol does not allow."""


def checked(method: str, value: Any, steps: int = 0) -> Start | StepResult | Report | None:
    """A copy of what `method` ("reset", "step", "report" or "close") returned.

    steps: that the environment was asked for since its reset; a report knows of no others.

    Raises:
      ProtocolError: the value is not what the protocol says. One line.
    """
    try:
        return _CHECKS[method](value, steps)
    except ProtocolError:
        raise
    except Exception as error:  # reading it may run code of the environment
        raise ProtocolError(f"{method} returned what cannot be read: {described(error)}") from error


class CheckedTasks(Sequence):
    """Tasks that are checked as they are drawn. Slices give lists. Reading one raises UserError where `checked_tasks`
    would.
    """

    def __init__(self, tasks: Any, count: int, where: str):
        self._tasks, self._count, self._where = tasks, count, where
        self._index_of: dict[str, int] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(self._count))]
        position = int(index) + self._count if index < 0 else int(index)
        if not 0 <= position < self._count:
            raise IndexError(f"task {index} of {self._count}")
        where = f"task {position} of {self._where}"
        return _asked(where, lambda: self._checked(self._tasks[position], position, where))

    def _checked(self, task: Any, position: int, where: str) -> Mapping[str, Any]:
        if not isinstance(task, Mapping):
            raise UserError(f"{where} is {type(task).__name__}, not a mapping")
        name: Any = task.get("id")
        category = task.get("category", "")
        if problem := _unusable(name):
            raise UserError(f'{where}: its "id" {problem}')
        if category != "" and (problem := _unusable(category)):
            raise UserError(f'{where}: its "category" {problem}')
        if (first := self._index_of.setdefault(plain(name), position)) != position:
            raise UserError(f"{where} has the id of task {first}, {shown(name)}: give every task an id of its own")
        return task


def checked_tasks(
    env_class: type, split: str, data_dir: str, options: Mapping[str, Any], name: str
) -> Sequence[Mapping[str, Any]]:
    """The tasks of a split, checked: each a mapping with an "id" of its own. All are read at once where there are at
    most MAX_TASKS_READ and the set does not say `unique_ids`; else each is checked as it is drawn.

    name: of the environment, for messages.

    Raises:
      UserError: `tasks` does not take these options, fails, gives no sequence, none at all, or one with a wrong task.
    """
    where = f"environment {shown(name)}, split {shown(split)}"
    make: Any = getattr(env_class, "tasks", None)
    written = inspect.getattr_static(env_class, "tasks", None)
    if inspect.isfunction(written) and next(iter(inspect.signature(written).parameters), "") in ("self", "cls"):
        raise UserError(f"tasks of environment {shown(name)} is a plain method: write @classmethod above it")
    _check_options(make, split, data_dir, options, name)

    def read() -> tuple[Any, int]:
        tasks = make(split, data_dir, **options)
        indexed = hasattr(tasks, "__len__") and hasattr(tasks, "__getitem__") and not isinstance(tasks, Mapping | str)
        if not indexed:
            kind = type(tasks).__name__
            raise UserError(f"tasks() of {where} returned {kind}: return a list, or what is indexed like one")
        return tasks, len(tasks)

    tasks, count = _asked(f"tasks() of {where}", read, options)
    if not count:
        raise UserError(f"environment {shown(name)} has no tasks in split {shown(split)}")
    checked = CheckedTasks(tasks, count, where)
    if count <= MAX_TASKS_READ and getattr(tasks, "unique_ids", False) is not True:
        for position in range(count):
            checked[position]
    return checked


def checked_version(env_class: type, name: str) -> str:
    """The version of an environment's benchmark: its class's `version`, an attribute or a class method; "" for none.

    Raises:
      UserError: it fails, or gives anything but a short line.
    """
    what = f"version of environment {shown(name)}"

    def read() -> str:
        version = getattr(env_class, "version", "")
        version = version() if callable(version) else version
        return _line(what, version) if version != "" else ""

    return _asked(what, read)


def checked_words(env_class: type, name: str) -> tuple[str, tuple[str, ...]]:
    """(benchmark_name, kinds_of_mistake) of an environment's class: what who looks back on an episode is told; ("", ())
    where it says nothing.

    Raises:
      UserError: they are anything but short lines.
    """
    of = f"of environment {shown(name)}"

    def read() -> tuple[str, tuple[str, ...]]:
        given = getattr(env_class, "benchmark_name", "")
        kinds = _bounded("kinds_of_mistake", getattr(env_class, "kinds_of_mistake", ()), 100)
        line = _line(f"benchmark_name {of}", given) if given != "" else ""
        return line, tuple(_line(f"kinds_of_mistake {of}", kind) for kind in kinds)

    return _asked(f"the description {of}", read)


def call_style(env_class: type, name: str, wanted: str) -> str:
    """The style in which actions are read: `wanted` of the config, or CODE for an environment whose class says
    `action_style = "code"`.

    Raises:
      UserError: another `action_style`, or a style of calls wanted of an environment without calls.
    """
    given = getattr(env_class, "action_style", "tools")
    if given not in ("tools", CODE):
        raise UserError(f'action_style of environment {shown(name)} is {shown(given)}: use "tools" or "code"')
    if given == CODE and wanted != "auto":
        raise UserError(f"env.call_style = {wanted}: environment {shown(name)} reads code, no calls: leave it at auto")
    return CODE if given == CODE else wanted


def shown(value: Any, limit: int = 200) -> str:
    """A value for a message: one line of at most `limit` characters; its type where it cannot be written."""
    try:
        text = encodable(repr(value)[: limit + 1])
    except Exception:
        text = f"({type(value).__name__})"
    return " ".join(text.split()) if len(text) <= limit else f"{' '.join(text[:limit].split())}..."


def plain(text: str) -> str:
    """The text as a `str` and nothing more: a subclass may behave otherwise."""
    return text if type(text) is str else str.__getitem__(text, slice(None))


def _check_options(make: Any, split: str, data_dir: str, options: Mapping[str, Any], name: str) -> None:
    """Raises UserError where `tasks` does not take the options, before it runs."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # not written in Python: the call will tell
        return
    try:
        first = signature.bind_partial(split, data_dir).arguments
    except TypeError as error:
        raise UserError(f"tasks() of environment {shown(name)} takes no split and data_dir: {error}") from error
    rest = [each for each in signature.parameters.values() if each.name not in first]
    known = {each.name: each for each in rest if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    takes_any = any(each.kind == each.VAR_KEYWORD for each in rest)
    if unknown := [] if takes_any else [key for key in options if key not in known]:
        hint = did_you_mean(str(unknown[0]), known) if known else "it takes none"
        raise UserError(f"env.options.{unknown[0]}: environment {shown(name)} has no such option; {hint}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise UserError(f"env.options.{key} is missing: environment {shown(name)} needs it")


def _asked(what: str, ask: Callable[[], Any], options: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """What code of an environment gives. Raises UserError for whatever it raises; a Ctrl-C is the user's."""
    try:
        return ask()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too: an environment cannot end the run
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if type(error) is TypeError else None
        if unknown and unknown[1] in options:  # `tasks` takes any option and passes it on
            raise UserError(f"env.options.{unknown[1]}: {what} has no such option") from error
        raise UserError(f"{what} failed: {described(error)}") from error


def _unusable(name: Any) -> str:
    """Why a text cannot name a task or a category; "" where it can."""
    if not isinstance(name, str):
        return f"is {type(name).__name__}, not text"
    if not name or len(name) > MAX_NAME_CHARS:
        return f"has {len(name)} characters: use 1 to {MAX_NAME_CHARS}"
    return "" if is_encodable(name) and name.isprintable() else f"is {shown(name)}: use printable Unicode text"


def _line(what: str, text: Any) -> str:
    if problem := _unusable(text):
        raise UserError(f"{what} {problem}")
    return plain(text)


def _start(value: Any, steps: int) -> Start:
    del steps
    _require(isinstance(value, Start), f"reset returned {type(value).__name__}, not a Start")
    messages = _messages(value.messages, START_ROLES)
    _require(messages, "reset returned no messages")
    _require(all(m["role"] != "system" for m in messages[1:]), "a system message may only come first")
    return Start(messages, _tools(value.tools))


def _step_result(value: Any, steps: int) -> StepResult:
    del steps
    _require(isinstance(value, StepResult), f"step returned {type(value).__name__}, not a StepResult")
    messages = _messages(value.messages, OBSERVATION_ROLES)
    terminated, truncated = _flag("terminated", value.terminated), _flag("truncated", value.truncated)
    _require(messages or terminated or truncated, "a StepResult without messages must end the episode")
    return StepResult(messages, _reward(value.reward), terminated, truncated, _tools(value.tools))


def _report(value: Any, steps: int) -> Report:
    _require(isinstance(value, Report), f"report returned {type(value).__name__}, not a Report")
    _require(isinstance(value.summary, str), "the report's summary is not text")
    valid_turns = _bounded("valid_turns", value.valid_turns, MAX_TURNS)
    bools = all(type(valid) is bool for valid in valid_turns)
    _require(bools, f"the report's valid_turns are {shown(valid_turns)}, not bools")
    faults = None if value.faults is None else _faults(value.faults, steps)
    return Report(_cut(value.summary, MAX_SUMMARY_CHARS), faults, valid_turns)


def _faults(faults: Iterable[Any], steps: int) -> tuple[Fault, ...]:
    copy = []
    for fault in _bounded("faults", faults, MAX_FAULTS):
        valid = isinstance(fault, Fault) and type(fault.step) is int and fault.step >= 1
        valid = valid and isinstance(fault.feedback, str)
        _require(valid, f"the report holds {shown(fault)}, not a Fault with a step from 1 on and text")
        beyond = f"the report names step {shown(fault.step)} of an episode with {steps} steps"
        _require(fault.step <= steps, beyond)
        copy.append(Fault(fault.step, _cut(fault.feedback, MAX_FEEDBACK_CHARS)))
    return tuple(copy)


def _reward(value: Any) -> float:
    problem = f"the reward is {shown(value)}, not a finite number (of at most {MAX_REWARD:g})"
    _require(isinstance(value, numbers.Real), problem)
    try:
        reward = float(value)
    except OverflowError:
        raise ProtocolError(problem) from None
    _require(math.isfinite(reward) and abs(reward) <= MAX_REWARD, problem)
    return reward


def _flag(name: str, value: Any) -> bool:
    number = isinstance(value, numbers.Number) or hasattr(value, "dtype")  # of NumPy or the like
    _require(number, f"{name} is {shown(value)}, not a bool")
    return bool(value)


def _tools(tools: Iterable[Any]) -> tuple[dict[str, Any], ...]:
    copy, chars = [], 0
    for tool in _bounded("tools", tools, MAX_TOOLS):
        try:
            text = json.dumps(tool, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"the tools are not JSON: {error}") from error
        chars += len(text)
        _require(chars <= MAX_TOOL_CHARS, f"the tools have more than {MAX_TOOL_CHARS:,} characters")
        _require(is_encodable(text), "the tools are not Unicode text")
        copy.append(json.loads(text))
        _require(not _is_deep(copy[-1]), f"a tool is nested more than {MAX_TOOL_DEPTH} deep")
    _require(all(isinstance(tool, dict) for tool in copy), "each tool must be a JSON object")
    return tuple(copy)


def _is_deep(value: Any) -> bool:
    """Whether a JSON value is nested more than MAX_TOOL_DEPTH deep. Iterative, so that depth itself cannot hurt."""
    pending = [(value, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, dict | list):
            if depth > MAX_TOOL_DEPTH:
                return True
            pending.extend((child, depth + 1) for child in (value.values() if isinstance(value, dict) else value))
    return False


def _messages(messages: Iterable[Any], roles: tuple[str, ...]) -> tuple[Message, ...]:
    copy, chars = [], 0
    for message in _bounded("messages", messages, MAX_MESSAGES):
        _require(isinstance(message, dict), f"a message is {type(message).__name__}, not a dict")
        role, content = message.get("role"), message.get("content")
        _require(role in roles, f"a message has the role {shown(role)}: use {', '.join(roles)}")
        _require(isinstance(content, str), f"a message's content is {type(content).__name__}, not text")
        content = plain(content)
        if len(content) > MAX_MESSAGE_CHARS:
            note = f"... [cut: the first {MAX_MESSAGE_CHARS} of {len(content)} characters]"
            content = content[:MAX_MESSAGE_CHARS] + note
        chars += len(content)
        _require(chars <= MAX_CHARS, f"the messages have more than {MAX_CHARS:,} characters")
        _require(is_encodable(content), "a message is not Unicode text")
        copy.append({"role": roles[roles.index(role)], "content": content})
    return tuple(copy)


def _bounded(name: str, values: Iterable[Any], limit: int) -> tuple[Any, ...]:
    _require(not isinstance(values, str | bytes | Mapping), f"the {name} are {type(values).__name__}, not a tuple")
    copy = tuple(itertools.islice(values, limit + 1))
    _require(len(copy) <= limit, f"more than {limit:,} {name}")
    return copy


def _cut(text: str, limit: int) -> str:
    """Text for records and teachers, made writable: an environment may quote what a policy wrote."""
    text = plain(text)
    return encodable(text if len(text) <= limit else f"{text[:limit]}... [cut: {limit} of {len(text)} characters]")


def _require(condition: Any, problem: str) -> None:
    if not condition:
        raise ProtocolError(problem)


_CHECKS: dict[str, Callable[[Any, int], Start | StepResult | Report | None]] = {
    "reset": _start,
    "step": _step_result,
    "report": _report,
    "close": lambda value, steps: None,
}
