# SPDX-License-Identifier: Apache-2.0

"""Actions of an episode as branches: what the student read before an action stands in the episode; here is worked out
what the teacher reads before it.

Invariants: the same action ids stand under both contexts, and both contexts end with the generation prompt of the
rollout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from hintsd_jax.envs.base import Message
from hintsd_jax.hindsight.prompts import PromptSet
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode, Step
from hintsd_jax.sampling.prefix import common_prefix_length
from hintsd_jax.training.examples import Branch, Example, reading_groups


def all_steps(episode: Episode) -> range:
    """The numbers of an episode's steps, from 1 on."""
    return range(1, len(episode.steps) + 1)


def with_feedback(
    episode: Episode,
    targets: Sequence[Target],
    position: str,
    prompts: PromptSet,
    chat: ChatFormat,
    weights: Mapping[str, float],
) -> list[Branch]:
    """A branch for each target, under its own feedback alone.

    Args:
      targets: of different steps.
      position: where the teacher reads it, as `hindsight.feedback_position` has it.
      prompts: how the teacher reads it.
      weights: of the parts of the loss, on every branch.
    Raises:
      ValueError: the episode has no such step, or the two contexts do not end with the same generation prompt.
    """
    branches = []
    for target in targets:
        said = {"role": "user", "content": prompts.teacher_feedback(target.feedback)}
        if position == "start":
            messages = (*episode.prompt_messages, said)
            branches += feedback_at_start(episode, [target.step], messages, chat, weights)
            continue
        if position == "last_user":
            prefix_length, context = _last_user_context(episode, target, prompts, chat)
        else:
            prefix_length, context = _target_context(episode, target.step, said["content"], chat)
        branches.append(_branch(episode, target.step, weights, prefix_length, context))
    return branches


def feedback_at_start(
    episode: Episode,
    steps: Iterable[int],
    messages: Sequence[Message],
    chat: ChatFormat,
    weights: Mapping[str, float],
) -> list[Branch]:
    """Branches for these steps where the teacher has begun with `messages` in place of the episode's first ones: one
    reading of the episode by the teacher. Errors as in `with_feedback`, and a ValueError for an episode of several
    streams.
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
            prefix_length, context = _reread(episode, 1, 0, chat.prompt(messages, episode.tools, tags_stand=True).ids)
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


def _target_context(episode: Episode, number: int, text: str, chat: ChatFormat) -> tuple[int, tuple[int, ...]]:
    """The teacher's context before a step with one more user message there: how much of the stream, and the ids after
    it.
    """
    step = _step(episode, number)
    trunk = episode.streams[step.stream].tokens[: step.prompt_start]
    prefix_length, context = chat.teacher_context(episode.dialogue(number), episode.tools_at(number), trunk, text)
    return prefix_length, _checked(episode, number, context)


def _last_user_context(
    episode: Episode, target: Target, prompts: PromptSet, chat: ChatFormat
) -> tuple[int, tuple[int, ...]]:
    """As `_target_context`, with the feedback inside the last user message before the step; where nobody but the
    environment has said anything yet, right before the step.
    """
    step = _step(episode, target.step)
    if chat.follows_template:
        messages = _hinted(episode.dialogue(target.step), target.feedback, prompts)
        if messages is not None:
            return _reread(episode, target.step, 0, chat.prompt(messages, episode.tools_at(target.step)).ids)
        return _target_context(episode, target.step, prompts.teacher_feedback(target.feedback), chat)
    tokens = episode.streams[step.stream].tokens
    for before in range(target.step - 1, -1, -1):  # the step whose observation it is in; 0: the first messages
        acted = episode.steps[before - 1] if before else None
        messages = _hinted(acted.messages if acted else episode.prompt_messages, target.feedback, prompts)
        if messages is not None:
            read = chat.delta(messages, cut=acted.cut) if acted else chat.prompt(messages, episode.tools)
            following = tuple(tokens[episode.steps[before].start : step.start])
            return _reread(episode, target.step, acted.stop if acted else 0, read.ids + following)
    return _target_context(episode, target.step, prompts.teacher_feedback(target.feedback), chat)


def _hinted(messages: Sequence[Message], hint: str, prompts: PromptSet) -> list[Message] | None:
    """Messages with a hint in the last one of a user; None where there is none of a user."""
    place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    if place is None:
        return None
    said = {"role": "user", "content": prompts.teacher_hint(messages[place]["content"], hint)}
    return [*messages[:place], said, *messages[place + 1 :]]


def _reread(episode: Episode, number: int, start: int, ids: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The teacher's context before a step where it reads `ids` in place of all that the student read from `start` on:
    what both have in common stays in the trunk.
    """
    step = _step(episode, number)
    shared = min(len(ids) - (step.start - step.prompt_start), step.prompt_start - start)
    read = episode.streams[step.stream].tokens[start : step.prompt_start]
    common = common_prefix_length(read[:shared], tuple(ids[:shared]))
    return start + common, _checked(episode, number, ids[common:])


def _checked(episode: Episode, number: int, context: Sequence[int]) -> tuple[int, ...]:
    """The teacher's own ids before a step, which must end as the student's do."""
    step = _step(episode, number)
    prompt = tuple(episode.streams[step.stream].tokens[step.prompt_start : step.start])
    if tuple(context[len(context) - len(prompt) :]) != prompt:
        raise ValueError(f"step {number}: the teacher's context does not end with the generation prompt of the rollout")
    return tuple(context)


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
