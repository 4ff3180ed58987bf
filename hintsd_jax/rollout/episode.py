# SPDX-License-Identifier: Apache-2.0

"""One episode: its append-only token streams with their action spans.

`Episode.begin` takes the tokenised prompt; then, one after the other, `append_action` takes what was sampled and
`append_observation` the tokenised observation. Everything later (hindsight, algorithms, records) only reads.

There is one stream, but where the chat template's rewriting of earlier turns is followed (history="template"): then
each rewrite begins a new one, and a step's spans index into the stream that it was sampled in.

Invariant 1: tokens once written never change, sampled ids stand as sampled, and the mask comes from the spans
that sampling wrote. A running checksum is compared before each growth and in `verify`, so that tokens that anybody else
has changed raise an error instead of being trained on.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hintsd_jax.envs.base import Message, Report
from hintsd_jax.rollout.chat import Delta


@dataclass
class Step:
    """One assistant generation and the observation that follows it.

    start, stop: `streams[stream].tokens[start:stop]` is the action span, its stop token included. prompt_start: where
    the generation prompt of this step begins; the teacher's feedback message goes in there. text: of the action,
    without the stop token. reward: of the environment's step. messages: the observation. tools: those that came with
    it. announced: those whose documentation stands in its messages instead, as with history="keep". cut: the action was
    cut at its token limit, so no stop token was sampled; the one that the template writes follows the span. calls: how
    many tool calls (or blocks of code) were read in the text. problem: the kind of `Action.problem`, "" where there is
    none.
    """

    start: int
    stop: int
    prompt_start: int
    text: str
    reward: float = 0.0
    stream: int = 0
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    announced: tuple[Mapping[str, Any], ...] = ()
    cut: bool = False
    calls: int = 0
    problem: str = ""

    @property
    def observation(self) -> str:
        """The observation as text, for people and the analyser."""
        return observation_text(self.messages)


@dataclass
class Stream:
    """Token ids that only grow, through `grow`; `unchanged` says whether nothing else wrote to them."""

    tokens: list[int] = field(default_factory=list)
    checksum: int = 0

    def grow(self, ids: Iterable[int]) -> None:
        added = [int(token) for token in ids]
        self.tokens.extend(added)
        self.checksum = _crc(added, self.checksum)

    def unchanged(self) -> bool:
        return _crc(self.tokens) == self.checksum


@dataclass
class Episode:
    """A rollout of one task, built with `begin`.

    Attributes:
      task_id, rollout: the task, and which of its rollouts this is, from 0 on.
      group: the number of the task among those that were played together, from 0 on. occurrence: how often the same
        task stands before it among them.
      prompt_messages, tools: what it began with. prompt_length: tokens of its prompt.
      logprobs: one for each sampled token, in the order of the steps.
      reward, terminated: of the last step.
      ended: why it ended, such as "terminated", "truncated", "max_steps", "context" or "env_error"; "" while it
        runs.
      report: of the environment; PRIVILEGED.
      detail: one line for people, e.g. the environment's exception.
      prompt_start: where the open generation prompt begins; None while no action may follow.
      given: the numbers of steps that are only read, never trained on (of dialogues from a file).
    """

    task_id: str
    rollout: int
    prompt_messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt_length: int = 0
    streams: list[Stream] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    reward: float = 0.0
    terminated: bool = False
    ended: str = ""
    report: Report | None = None
    detail: str = ""
    prompt_start: int | None = None
    group: int = 0
    occurrence: int = 0
    given: frozenset[int] = frozenset()

    @classmethod
    def begin(
        cls,
        task_id: str,
        rollout: int,
        messages: Iterable[Message],
        prompt: Delta,
        tools: Iterable[Mapping[str, Any]] = (),
        group: int = 0,
        occurrence: int = 0,
    ) -> "Episode":
        """An episode that awaits its first action. `prompt` is `ChatFormat.prompt(messages, tools)`."""
        first = tuple(dict(m) for m in messages)
        episode = cls(
            task_id, rollout, first, tuple(tools), len(prompt.ids), [Stream()], group=group, occurrence=occurrence
        )
        episode._read(prompt)
        return episode

    @property
    def tokens(self) -> list[int]:
        """The current stream."""
        return self.streams[-1].tokens

    def append_action(self, ids: Sequence[int], logprobs: Sequence[float], text: str, cut: bool = False) -> Step:
        """Adds one sampled action span, its stop token included; with `cut` none was sampled.

        Raises:
          ValueError: no generation prompt is open, the span is empty, or the lengths differ.
        """
        if self.prompt_start is None:
            raise ValueError("an action must follow a generation prompt")
        if not len(ids) or len(ids) != len(logprobs):
            raise ValueError(f"an action of {len(ids)} tokens with {len(logprobs)} log-probs")
        start = len(self.tokens)
        self._grow(ids)
        self.logprobs.extend(float(value) for value in logprobs)
        stream = len(self.streams) - 1
        self.steps.append(Step(start, len(self.tokens), self.prompt_start, text, stream=stream, cut=cut))
        self.prompt_start = None
        return self.steps[-1]

    def append_observation(
        self,
        delta: Delta | None,
        messages: Iterable[Message] = (),
        reward: float = 0.0,
        tools: Iterable[Mapping[str, Any]] = (),
        announced: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Adds what follows the last action.

        Args:
          delta: `ChatFormat.observation(...)`; None when the episode ends here, for then nothing more is tokenised.
          messages, reward, tools, announced: what the environment's step gave; see `Step`.

        Raises:
          ValueError: the last action has its observation already.
        """
        if self.prompt_start is not None or not self.steps:
            raise ValueError("an observation must follow an action")
        step = self.steps[-1]
        step.messages, step.reward = tuple(dict(m) for m in messages), float(reward)
        step.tools, step.announced = tuple(tools), tuple(announced)
        if delta is not None:
            self._read(delta)

    @property
    def success(self) -> bool:
        """The sparse outcome: `terminated and reward >= 1`."""
        return self.terminated and self.reward >= 1

    def action_mask(self, stream: int = -1) -> np.ndarray:
        """mask_T, bool, for the T tokens of a stream (by default the current one): True exactly on the ids that were
        sampled in it.
        """
        stream %= len(self.streams)
        mask_T = np.zeros(len(self.streams[stream].tokens), dtype=bool)
        for step in self.steps:
            if step.stream == stream:
                mask_T[step.start : step.stop] = True
        return mask_T

    def dialogue(self, number: int) -> list[Message]:
        """The messages before step `number` (from 1 on)."""
        messages = list(self.prompt_messages)
        for step in self.steps[: number - 1]:
            messages += [{"role": "assistant", "content": step.text}, *step.messages]
        return messages

    def tools_at(self, number: int) -> tuple[Mapping[str, Any], ...]:
        """The tools that stood in the tool list before step `number` (from 1 on)."""
        return self.tools + tuple(tool for step in self.steps[: number - 1] for tool in step.tools)

    def callable_at(self, number: int) -> tuple[Mapping[str, Any], ...]:
        """All tools that could be called in step `number` (from 1 on), wherever their documentation stood."""
        earlier = self.steps[: number - 1]
        return self.tools + tuple(tool for step in earlier for tool in (*step.tools, *step.announced))

    def verify(self) -> None:
        """Checks the invariant over the whole episode.

        Raises:
          RuntimeError: anything but `append_action` and `append_observation` wrote to it.
        """
        for stream in range(len(self.streams)):
            self._check(stream)
        end, current = 0, 0  # of the step before
        for number, step in enumerate(self.steps, 1):
            end = end if step.stream == current else 0
            in_order = current <= step.stream < len(self.streams) and end <= step.prompt_start < step.start < step.stop
            if not in_order or step.stop > len(self.streams[step.stream].tokens):
                raise RuntimeError(f"episode {self.task_id}/{self.rollout}: the span of step {number} is out of order")
            end, current = step.stop, step.stream
        if sum(step.stop - step.start for step in self.steps) != len(self.logprobs):
            raise RuntimeError(f"episode {self.task_id}/{self.rollout}: spans and log-probs differ in length")

    def to_json(self) -> dict[str, Any]:
        """The episode with its token streams and spans, as plain JSON values; the tools stand in the prompt's tokens
        only.
        """
        names = ("task_id", "group", "occurrence", "rollout", "prompt_length")
        names += ("reward", "terminated", "ended", "detail")
        return {name: getattr(self, name) for name in names} | {
            "prompt_messages": list(self.prompt_messages),
            "streams": [list(stream.tokens) for stream in self.streams],
            "logprobs": list(self.logprobs),
            "steps": [_step_json(step) for step in self.steps],
            "report": None if self.report is None else dataclasses.asdict(self.report),
            "success": self.success,
        }

    def _read(self, delta: Delta) -> None:
        """What the student reads before its next action."""
        if not 0 <= delta.prompt_start < len(delta.ids):
            raise ValueError(f"prompt_start {delta.prompt_start} lies outside the {len(delta.ids)} tokens to read")
        if delta.new_stream:
            self._check(-1)
            self.streams.append(Stream())
        self.prompt_start = len(self.tokens) + delta.prompt_start
        self._grow(delta.ids)

    def _grow(self, ids: Sequence[int]) -> None:
        self._check(-1)
        self.streams[-1].grow(ids)

    def _check(self, stream: int) -> None:
        if not self.streams[stream].unchanged():
            raise RuntimeError(f"episode {self.task_id}/{self.rollout}: its tokens were changed outside append_*")


def observation_text(messages: Iterable[Message]) -> str:
    """Messages as the analyser reads them: contents line by line, "user: " before what a user said."""
    return "\n".join(("user: " if m["role"] == "user" else "") + m["content"] for m in messages)


def _step_json(step: Step) -> dict[str, Any]:
    # The observation has the messages, the tokens have the tools.
    names = [field.name for field in dataclasses.fields(step) if field.name not in ("messages", "tools", "announced")]
    return {name: getattr(step, name) for name in names} | {"observation": step.observation}


def _crc(ids: Sequence[int], before: int = 0) -> int:
    return zlib.crc32(np.asarray(ids, dtype="<i8").tobytes(), before)
