"""The environment protocol: what the host loop says to an environment and what it hears back.

Flows: `tasks(split)` gives task mappings; `reset(task)` gives the first messages and the tool
documentation; each sampled `Action` goes into `step` and comes back as a `StepResult`; after the end
`report()` tells what the ground truth knows.

Invariant: everything an agent may see travels in `Start` and `StepResult`. The `Report` is privileged and never
enters a prompt of the student (design invariant 2). Environments never count steps: the cap is the host
loop's.

An environment is named in the config either by a registered name ("desk") or by "package.module:Class".
"""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hintsd_jax.errors import UserError

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant" | "tool", "content": str}"""


@dataclass(frozen=True)
class ToolCall:
    """One call that was read from an action. `arguments` holds plain JSON values."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Action:
    """What the policy did in one step.

    `calls` are in written order. `problem` says why a tool call could not be read; then `calls` is
    empty, because half of an action is not what the policy meant. Neither calls nor problem: plain text to the user.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Start:
    """How an episode begins: at least one message, and the tools in the form the chat template expects."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class StepResult:
    """The answer to one action. `messages` may be empty only when the episode ended with it. `tools` are further ones,
    which may be called from now on; `messages` announce them."""

    messages: tuple[Message, ...]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Fault:
    """A step that broke the outcome: its 1-based index and how it should have gone."""

    step: int
    feedback: str


@dataclass(frozen=True)
class Report:
    """Privileged: written with the ground truth in hand. `faults` is None where the environment does not know.
    `valid_turns`: for each user turn that has ended, whether all was well after it; empty where the environment does
    not judge them."""

    summary: str
    faults: tuple[Fault, ...] | None = None
    valid_turns: tuple[bool, ...] = ()


class CallTimeout(Exception):
    """For an environment to raise when something outside it did not answer in time: the call counts as a time-out, not
    an error.
    """


@runtime_checkable
class Environment(Protocol):
    """One simulated world, used for one episode at a time; constructed as `cls(**options)`.

    Any exception from any method ends the episode as "env_error" (`CallTimeout`: "env_timeout"); the object is then
    never used again.
    """

    @classmethod
    def tasks(cls, split: str, data_dir: str, **options: Any) -> Sequence[Mapping[str, Any]]:
        """The tasks of a split, cheap to index; each mapping has a str "id", unique in the split."""

    def reset(self, task: Mapping[str, Any]) -> Start:
        """Begins an episode. All randomness must come from `task`."""

    def step(self, action: Action) -> StepResult:
        """Applies one action. A malformed action is the agent's mistake: answer it, do not raise."""

    def report(self) -> Report:
        """Looks back over the episode since `reset`, with the ground truth."""

    def close(self) -> None:
        """Releases what the environment holds; called once."""


_METHODS = ("tasks", "reset", "step", "report", "close")

_REGISTRY = {
    "desk": "hintsd_jax.envs.desk:Desk",
    "bfcl": "hintsd_jax.envs.bfcl:Bfcl",
}


def register(name: str, path: str) -> None:
    """Makes `path` ("package.module:Class") known as `name`. It is imported only when resolved.

    Raises UserError when the path has another form, or the name already stands for another path.
    """
    _split(path)
    if ":" in name or not name:
        raise UserError(f"environment name {name!r}: use a plain word without a colon")
    if _REGISTRY.get(name, path) != path:
        raise UserError(f"environment name {name!r} already stands for {_REGISTRY[name]!r}: choose another name")
    _REGISTRY[name] = path


def resolve(name_or_path: str) -> type[Environment]:
    """The environment class behind a registered name or a "package.module:Class" path.

    Raises UserError for an unknown name (with the nearest known one), a module that cannot be imported, a
    missing class, or a class that lacks a method of the protocol.
    """
    path = name_or_path
    if ":" not in path:
        if path not in _REGISTRY:
            near = difflib.get_close_matches(path, _REGISTRY, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_REGISTRY))}"
            raise UserError(f"unknown environment {path!r}: {hint} Or give it as 'package.module:Class'")
        path = _REGISTRY[path]
    module_name, class_name = _split(path)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way at import
        raise UserError(
            f"environment {name_or_path!r}: cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(f"environment {name_or_path!r}: module {module_name!r} has no class {class_name!r}")
    missing = [method for method in _METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise UserError(f"environment {name_or_path!r}: class {class_name!r} lacks {', '.join(missing)}")
    return found


def _split(path: str) -> tuple[str, str]:
    module_name, colon, class_name = path.partition(":")
    if not (colon and class_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise UserError(f"environment {path!r}: write it as 'package.module:Class'")
    return module_name, class_name
