# SPDX-License-Identifier: Apache-2.0

"""Actions of an episode as branches: what the student read before an action stands in the episode; here is worked out
what the teacher reads before it.

Invariants: the same action ids stand under both contexts, and both contexts end with the generation prompt of the
rollout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode, Step
from hintsd_jax.training.examples import Branch, Example, reading_groups


def all_steps(episode: Episode) -> range:
    """The numbers of an episode's steps, from 1 on."""
    return range(1, len(episode.steps) + 1)


def feedback_at_target(
    episode: Episode, targets: Iterable[Target], chat: ChatFormat, weights: Mapping[str, float]
) -> list[Branch]:
    """A branch for each target, its feedback right before the step.

    Args:
      targets: of different steps.
      weights: of the parts of the loss, on every branch.
    Raises:
      ValueError: the episode has no such step, or the two contexts do not end with the same generation prompt.
    """
    branches = []
    for target in targets:
        prefix_length, context = _teacher_context(episode, target.step, target.feedback, chat)
        branches.append(_branch(episode, target.step, weights, prefix_length, context))
    return branches


def feedback_at_start(
    episode: Episode, steps: Iterable[int], text: str, chat: ChatFormat, weights: Mapping[str, float]
) -> list[Branch]:
    """Branches for these steps under one message that stands right before the first step: one reading of the episode by
    the teacher. Arguments and errors as in `feedback_at_target`, and a ValueError for an episode of several streams.
    """
    steps = sorted(steps)
    if len(episode.streams) > 1:
        raise ValueError(f"step {min(steps)}: feedback at the start needs an episode of one stream")
    tokens, branches, end, prefix_length = episode.streams[0].tokens, [], 0, 0
    for number in steps:
        step = _step(episode, number)
        if branches:
            context = tuple(tokens[end : step.start])
        else:
            prefix_length, context = _teacher_context(episode, 1, text, chat)
            context += tuple(tokens[episode.steps[0].start : step.start])
        branch = _branch(episode, number, weights, prefix_length, context)
        branches.append(dataclasses.replace(branch, continues=bool(branches)))
        end = step.stop
    return branches


def without_teacher(
    episode: Episode, steps: Iterable[int], weights: Mapping[str, float], advantage: float = 0.0
) -> list[Branch]:
    """Branches of these steps that no teacher reads."""
    return [dataclasses.replace(_branch(episode, step, weights), advantage=advantage) for step in steps]


def examples(
    episode: Episode, branches: Sequence[Branch], number: int = 0, *, micro_step: int = 0, key: tuple[int, int] = (0, 0)
) -> list[Example]:
    """The examples of these branches of an episode: one for each of its streams that has any; `number`: of the episode
    in the training step.
    """
    streams: dict[int, list[Branch]] = {}
    for group in sorted(reading_groups(branches), key=lambda group: group[0].step):
        streams.setdefault(_step(episode, group[0].step).stream, []).extend(group)
    return [
        Example(number, tuple(episode.streams[stream].tokens), tuple(group), micro_step, key).with_branches(group)
        for stream, group in sorted(streams.items())
    ]


def _teacher_context(episode: Episode, number: int, text: str, chat: ChatFormat) -> tuple[int, tuple[int, ...]]:
    """The teacher's context before a step with feedback there: how much of the stream, and the ids after it."""
    step = _step(episode, number)
    tokens = episode.streams[step.stream].tokens
    trunk, prompt = tokens[: step.prompt_start], tuple(tokens[step.prompt_start : step.start])
    prefix_length, context = chat.teacher_context(episode.dialogue(number), episode.tools_at(number), trunk, text)
    if tuple(context[len(context) - len(prompt) :]) != prompt:
        raise ValueError(f"step {number}: the teacher's context does not end with the generation prompt of the rollout")
    return prefix_length, tuple(context)


def _step(episode: Episode, number: int) -> Step:
    if not 1 <= number <= len(episode.steps):
        raise ValueError(f"step {number} of an episode with {len(episode.steps)} steps (they count from 1)")
    return episode.steps[number - 1]


def _branch(
    episode: Episode, number: int, weights: Mapping[str, float], prefix_length: int = 0, context: tuple[int, ...] = ()
) -> Branch:
    step = _step(episode, number)
    before = sum(earlier.stop - earlier.start for earlier in episode.steps[: number - 1])
    logprobs = tuple(episode.logprobs[before : before + step.stop - step.start])
    return Branch(number, step.start, step.stop, prefix_length, context, logprobs, weights)
