# SPDX-License-Identifier: Apache-2.0

"""What a prompt set is: all the wording between hindsight and a language model. Episodes and steps go in; the messages
that ask an analyser or a judge, and the messages that a teacher reads, come out.

Invariant 2 from its other side: no report, no ground truth and no other rollout is read in a question, so an answer can
only come from the episode itself (`teacher_reprompt` is no question: it is what SDPO's teacher reads of a sibling).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from hintsd_jax.envs.base import Message
from hintsd_jax.envs.call_reading import THINK_CLOSE
from hintsd_jax.envs.protocol import checked_words
from hintsd_jax.hindsight.parse import parse_hint, parse_verdict
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.episode import Episode, Step

# The two questions of OpenClaw-RL's judges.
VERDICT, HINT = "verdict", "hint"
SHORTEST_HINT = 11  # characters; OpenClaw-RL drops shorter ones as empty talk


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What the analyser is told of the environment: its name, and the kinds of mistake that are usual there."""

    name: str = ""
    kinds_of_mistake: tuple[str, ...] = ()

    @classmethod
    def of(cls, env_class: type, name: str) -> Benchmark:
        """Of an environment's class, which may have `benchmark_name` and `kinds_of_mistake`; `name`: of the config.
        Raises UserError for anything but short lines of text.
        """
        given, kinds = checked_words(env_class, name)
        return cls(given or name.rpartition(":")[2], kinds)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What one answer of a judge says of a step. verdict: 1, -1 or 0; None where this answer has none. hint: how the
    step should have gone; None where there is none. problem: why the answer could not be read.
    """

    verdict: float | None = None
    hint: str | None = None
    problem: str | None = None


class PromptSet(Protocol):
    """The wording of a run. One of your own is an object with these methods, named in the config as
    "package.module:object".
    """

    def review(self, episode: Episode, benchmark: Benchmark, max_targets: int, max_chars: int) -> list[Message]:
        """Asks which steps broke a whole episode, at most `max_targets`; with 1 for the first mistake alone. The answer
        is read by `parse.parse_failures`. max_chars: of the list of steps; the last ones are kept.
        """
        ...

    def step_feedback(self, episode: Episode, benchmark: Benchmark, step: int, max_chars: int) -> list[Message]:
        """Asks how a given step (1-based) should have gone; the answer has the form of a review's. Raises ValueError
        for a step that the episode does not have.
        """
        ...

    def judge(self, step: Step) -> Mapping[str, list[Message]]:
        """The questions, by name, about one step from nothing but its action and its observation: no reward, no
        outcome, no other step.
        """
        ...

    def read_judgement(self, question: str, answer: str) -> Judgement:
        """What an answer to one of `judge`'s questions says. Never raises."""
        ...

    def teacher_feedback(self, feedback: str) -> str:
        """The user message with which the teacher reads the feedback on a step."""
        ...

    def teacher_hint(self, message: str, hint: str) -> str:
        """A user message of the dialogue as the teacher reads it, with a hint in it."""
        ...

    def teacher_reprompt(
        self, messages: Sequence[Message], *, solution: Sequence[str] = (), targets: Sequence[Target] = ()
    ) -> tuple[Message, ...]:
        """An episode's first messages as a teacher reads them that knows a sibling's solution (the texts of its
        actions) or, without one, what a review says of the episode.
        """
        ...


def read_judgement(question: str, answer: str) -> Judgement:
    """An answer to the question `VERDICT` or `HINT`, in JSON with that key; see `PromptSet.read_judgement`."""
    if question == VERDICT:
        verdict = parse_verdict(answer)
        return Judgement(verdict) if verdict is not None else Judgement(problem="no verdict in the answer")
    readable, hint = parse_hint(answer)
    if not readable:
        return Judgement(problem="no hint in the answer")
    return Judgement(hint=hint if hint and len(hint) >= SHORTEST_HINT else None)


def without_reasoning(text: str) -> str:
    """An action without the reasoning before it."""
    return text.rpartition(THINK_CLOSE)[2].strip()


def clipped_steps(steps: Sequence[str], max_chars: int, omission: str) -> str:
    """The joined texts of an episode's steps, of too many characters the last `max_chars`, after the mark `omission`.

    Raises ValueError for `max_chars` below 1.
    """
    if max_chars < 1:
        raise ValueError(f"max_chars {max_chars}: must be at least 1")
    text = "".join(steps)
    return text if len(text) <= max_chars else omission + text[-max_chars:]


def checked_step(episode: Episode, step: int) -> int:
    """The number of a step that the episode has; raises ValueError for any other."""
    if not 1 <= step <= len(episode.steps):
        raise ValueError(f"step {step} of an episode of {len(episode.steps)} steps")
    return step
