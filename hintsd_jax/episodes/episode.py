"""One episode: an append-only token stream with its action spans.

Flows: `Episode.begin` takes the tokenised prompt; then, in turn, `append_action` takes what was sampled and
`append_observation` the tokenised answer. Everything later (packing, hindsight, records) only reads.

Invariant 1: tokens once written never change, sampled ids stand as sampled, and the mask comes from the spans
that sampling wrote. A running checksum is compared before each growth and in `verify`, so that a caller that
touches `tokens` is found out instead of trained on.
"""

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hintsd_jax.envs.base import Message, Report
from hintsd_jax.episodes.chat import Delta


@dataclass
class Step:
    """One assistant generation and the environment's answer.

    `tokens[start:stop]` is the action span, its stop token included. `branch` is where the generation prompt of
    this step begins: the teacher's feedback message goes in there. `observation` is for people and the analyser.
    """

    start: int
    stop: int
    branch: int
    text: str
    observation: str = ""
    reward: float = 0.0


@dataclass
class Episode:
    """A rollout of one task. Build it with `begin`; `logprobs` has one entry per sampled token, in order."""

    task_id: str
    rollout: int
    prompt_messages: tuple[Message, ...]
    prompt_length: int
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    reward: float = 0.0
    terminated: bool = False
    ended: str = ""  # why it ended: "terminated", "truncated", "max_steps", "context", "action_length", "env_error", ...
    report: Report | None = None  # privileged
    detail: str = ""  # one line for people, e.g. the environment's exception
    branch: int | None = None  # start of the open generation prompt; None while no action may follow
    checksum: int = 0

    @classmethod
    def begin(cls, task_id: str, rollout: int, messages: Iterable[Message], prompt: Delta) -> "Episode":
        """An episode that awaits its first action. `prompt` is `ChatFormat.prompt(messages, tools)`."""
        ids = [int(token) for token in prompt.ids]
        if not 0 <= prompt.branch < len(ids):
            raise ValueError(f"branch {prompt.branch} lies outside the prompt of {len(ids)} tokens")
        return cls(task_id, rollout, tuple(dict(m) for m in messages), len(ids), ids, branch=prompt.branch, checksum=_crc(ids))

    def append_action(self, ids: Sequence[int], logprobs: Sequence[float], text: str) -> Step:
        """Adds one sampled action span, its stop token included where one was sampled.

        Raises ValueError when no generation prompt is open, the span is empty, or the lengths differ.
        """
        if self.branch is None:
            raise ValueError("an action must follow a generation prompt")
        if not len(ids) or len(ids) != len(logprobs):
            raise ValueError(f"an action of {len(ids)} tokens with {len(logprobs)} log-probs")
        start = len(self.tokens)
        self._grow(ids)
        self.logprobs.extend(float(value) for value in logprobs)
        self.steps.append(Step(start, len(self.tokens), self.branch, text))
        self.branch = None
        return self.steps[-1]

    def append_observation(self, delta: Delta | None, observation: str = "", reward: float = 0.0) -> None:
        """Adds the answer to the last action: `ChatFormat.delta(turn.messages)`, or None when the episode ends with
        it, for then nothing more is tokenised and only the record is kept.

        Raises ValueError when the last action was already answered.
        """
        if self.branch is not None or not self.steps:
            raise ValueError("an observation must follow an action")
        step = self.steps[-1]
        step.observation, step.reward = observation, float(reward)
        if delta is not None:
            if not 0 <= delta.branch < len(delta.ids):
                raise ValueError(f"branch {delta.branch} lies outside the observation of {len(delta.ids)} tokens")
            self.branch = len(self.tokens) + delta.branch
            self._grow(delta.ids)

    @property
    def success(self) -> bool:
        """The sparse outcome of the method: `terminated and reward >= 1`."""
        return self.terminated and self.reward >= 1

    def action_mask(self) -> np.ndarray:
        """bool [len(tokens)], True exactly on the sampled ids."""
        mask = np.zeros(len(self.tokens), dtype=bool)
        for step in self.steps:
            mask[step.start : step.stop] = True
        return mask

    def verify(self) -> None:
        """Checks the invariant over the whole episode. Raises RuntimeError when anything but append_* wrote to it."""
        self._check_unchanged()
        edge = 0
        for number, step in enumerate(self.steps, 1):
            if not edge <= step.branch < step.start < step.stop <= len(self.tokens):
                raise RuntimeError(f"episode {self.task_id}/{self.rollout}: the span of step {number} is out of order")
            edge = step.stop
        if sum(step.stop - step.start for step in self.steps) != len(self.logprobs):
            raise RuntimeError(f"episode {self.task_id}/{self.rollout}: spans and log-probs differ in length")

    def to_json(self) -> dict[str, Any]:
        """Everything, token spans included, as plain JSON values."""
        record = dataclasses.asdict(self)
        del record["branch"], record["checksum"]  # bookkeeping of growth, meaningless once written
        return record | {"prompt_messages": list(record["prompt_messages"]), "success": self.success}

    def _grow(self, ids: Sequence[int]) -> None:
        self._check_unchanged()
        added = [int(token) for token in ids]
        self.tokens.extend(added)
        self.checksum = _crc(added, self.checksum)

    def _check_unchanged(self) -> None:
        if _crc(self.tokens) != self.checksum:
            raise RuntimeError(f"episode {self.task_id}/{self.rollout}: its tokens were changed outside append_*")


def observation_text(messages: Iterable[Message]) -> str:
    """Messages as the analyser reads them: contents line by line, "user: " before what a user said."""
    return "\n".join(("user: " if m["role"] == "user" else "") + m["content"] for m in messages)


def _crc(ids: Sequence[int], before: int = 0) -> int:
    return zlib.crc32(np.asarray(ids, dtype="<i8").tobytes(), before)
