# SPDX-License-Identifier: Apache-2.0

"""The environment protocol: a task goes in, messages and rewards come out, and a privileged report at the end.

`tasks(split)` gives task mappings; `reset(task)` gives the first messages and the tool documentation; each sampled
`Action` goes into `step`, which gives a `StepResult`; after the end `report()` says what the ground truth knows.

Invariant: everything that an agent may read travels in `Start` and `StepResult`. The `Report` is privileged and never
enters a context of the student (design invariant 2). The limit on steps is the host loop's, not the environment's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant" | "tool", "content": str}"""


@dataclass(frozen=True)
class ToolCall:
    """One call, as read from an action. `arguments` holds plain JSON values."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Action:
    """What the policy did in one step.

    calls: in the order in which they are written. problem: why a tool call could not be read, for the agent; then
    `calls` is empty, because half of an action is not what the policy meant. problem_kind: the same as one word, for
    metrics; "" where there is none. Neither calls nor problem: plain text to the user. code: of an environment whose
    `action_style` is "code", what the action's one Python block holds; None where there is a problem, and elsewhere.
    style: in which the calls were looked for (`envs.tool_calls`); "" of such an environment.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    problem: str | None = None
    problem_kind: str = ""
    code: str | None = None
    style: str = ""

    @property
    def size(self) -> int:
        """Tool calls, or blocks of code, that were read."""
        return len(self.calls) + (self.code is not None)


@dataclass(frozen=True)
class Start:
    """How an episode begins: at least one message, and the tools in the form that the chat template expects."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What one action leads to.

    messages: the observation; empty only where the episode ends with it. reward: of the episode so far; the last one
    counts. terminated: the environment has ended the episode. truncated: a limit of the environment has. tools: further
    ones, which may be called from now on; `messages` announce them.
    """

    messages: tuple[Message, ...]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Fault:
    """A step that broke the outcome: its number, from 1 on, and how it should have gone."""

    step: int
    feedback: str


@dataclass(frozen=True)
class Report:
    """PRIVILEGED: what the ground truth says about an episode.

    summary: text for people. faults: None where the environment does not know them. valid_turns: for each user turn
    that has ended, whether it was right; empty where the environment does not check user turns.
    """

    summary: str
    faults: tuple[Fault, ...] | None = None
    valid_turns: tuple[bool, ...] = ()


class CallTimeout(Exception):
    """For an environment to raise when something outside it did not answer in time: the call then counts as a time-out,
    not as an error.
    """


class CallError(Exception):
    """A tool call that cannot be carried out as the agent wrote it: nothing has changed, and the text is what the agent
    reads. A mistake of the agent, unlike every other exception, which is a fault of the world.
    """


@runtime_checkable
class Environment(Protocol):
    """A simulated world, used for one episode at a time; constructed as `cls(**options)`. `envs.tool_env.ToolEnv` is
    the base class of those whose tools are Python methods.

    Any exception from any method ends the episode as "env_error" (`CallTimeout`: as "env_timeout"); the object is then
    never used again. Every episode has an object of its own.

    A class may also have `version`, a string or a class method that gives one: the version of its benchmark, which
    stands in every result. `isolation`, "thread" or "process": where it runs if the config does not say.
    `action_style`, "tools" (tool calls, the default) or "code" (one Python block an action). `benchmark_name`, a
    string, with `kinds_of_mistake`, short noun phrases: what who looks back on an episode is told.
    """

    @classmethod
    def tasks(cls, split: str, data_dir: str, /, **options: Any) -> Sequence[Mapping[str, Any]]:
        """The tasks of a split, cheap to index; each mapping has a str "id", unique in the split."""
        ...

    def reset(self, task: Mapping[str, Any]) -> Start:
        """Begins an episode. All randomness must come from `task`."""
        ...

    def step(self, action: Action) -> StepResult:
        """Applies one action. A malformed action is the agent's mistake: answer it with a message, do not raise."""
        ...

    def report(self) -> Report:
        """What the ground truth says about the episode since `reset`."""
        ...

    def close(self) -> None:
        """Releases what the environment holds; called once."""
