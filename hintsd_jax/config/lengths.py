# SPDX-License-Identifier: Apache-2.0

"""Lengths in tokens that follow from others, and those with which nothing could be trained. A config with every key
decided goes in; the same config with its open lengths filled in, or one line for each impossible one, comes out.

With C = rollout.context, A = rollout.max_action_tokens, F = hindsight.max_tokens, K = hindsight.max_targets, and 64
tokens for the messages around feedback, an open length becomes

    batch.length_buckets         C, its half and its quarter where they have 1024 tokens
    batch.branch_buckets         F + K (A + 64), what the teacher reads of all targets, and a quarter of it
    batch.action_buckets         K A, or C where that is less, and a quarter of it
                                 (batch.layout = separate: C + F + 64 and A, and quarters)
    batch.whole_episode_buckets  2 C, a whole episode after a sibling's; C / 2, its actions
    hindsight.context            C + F + 512, a whole episode with its question and answer

each but C itself rounded up to whole 64. No jax here.
"""

from __future__ import annotations

from typing import Protocol

from hintsd_jax.config.schema import Config

STEP = 64
MESSAGE = 64  # tokens of the user's turn around feedback, in the wordiest prompt set
QUESTION = 512  # tokens of an analyser's instructions
SHORTEST = 1024  # tokens; below it a further bucket saves less than its program costs to compile
LEAST_FEEDBACK = 32  # tokens with the message around it; less is no feedback
CHARS = 4  # that a token of an episode's text holds at most, in the mean


class Shapes(Protocol):
    """What is asked of `training.batching.BatchShapes`."""

    @property
    def length_buckets(self) -> tuple[int, ...]: ...
    @property
    def branch_buckets(self) -> tuple[int, ...]: ...
    @property
    def action_buckets(self) -> tuple[int, ...]: ...
    @property
    def trunk(self) -> bool: ...


def derived(config: Config) -> Config:
    """The config with a number for every length that it leaves open (0 or an empty list)."""
    batch, context, action = config.batch, config.rollout.context, config.rollout.max_action_tokens
    answer, targets = config.hindsight.max_tokens, config.hindsight.max_targets
    changes: dict[str, int | tuple[int, ...]] = {}
    if not batch.length_buckets:
        parts = [rounded(context / part) for part in (4, 2) if context / part >= SHORTEST]
        changes["batch.length_buckets"] = (*parts, context)
    if not batch.branch_buckets and not batch.action_buckets:
        branches, actions = answer + targets * (action + MESSAGE), targets * action
        if batch.layout == "separate":  # one target alone, with all of the teacher's context
            branches, actions = context + answer + MESSAGE, action
        fitting = max((context - 1) // STEP * STEP, action)  # an episode holds no more
        pairs = [(rounded(branches / part), min(rounded(actions / part), fitting)) for part in (4, 1)]
        (short, few), (long, many) = pairs
        if not (few < short < long and few < many):
            pairs = pairs[1:]
        changes["batch.branch_buckets"], changes["batch.action_buckets"] = (tuple(part) for part in zip(*pairs))
    if not batch.whole_episode_buckets:
        actions = rounded(max(context / 2, action))
        changes["batch.whole_episode_buckets"] = rounded(max(2 * context, actions + 1)), actions
    if not config.hindsight.context:
        changes["hindsight.context"] = rounded(context + answer + QUESTION)
    return config.replaced(changes)


def rounded(size: float) -> int:
    """Up to whole 64 tokens."""
    return -int(-size // STEP) * STEP


def problems(config: Config, shapes: Shapes) -> list[str]:
    """Lengths with which an episode, an action or feedback that the config allows could never be trained on.

    shapes: of the algorithm's batches.
    """
    rollout, hindsight = config.rollout, config.hindsight
    context, action = rollout.context, rollout.max_action_tokens
    whole = shapes.action_buckets == config.batch.whole_episode_buckets[1:]
    branch_key = "batch.whole_episode_buckets[0]" if whole else "the last of batch.branch_buckets"
    action_key = "batch.whole_episode_buckets[1]" if whole else "the last of batch.action_buckets"
    length, branch, longest_action = shapes.length_buckets[-1], shapes.branch_buckets[-1], shapes.action_buckets[-1]
    found = []
    if context > length:
        found.append(
            f"rollout.context = {context} exceeds the last of batch.length_buckets = {length}: no bucket holds so long"
            f" an episode; end the list with {context}, or give () to have it derived"
        )
    if action > longest_action:
        found.append(
            f"rollout.max_action_tokens = {action} exceeds {action_key} = {longest_action}: no bucket holds so long an"
            f" action; give at least {action}, or () to have it derived"
        )
    reads, needed = f"an action of rollout.max_action_tokens = {action}", action + LEAST_FEEDBACK
    if not shapes.trunk:
        reads, needed = f"an episode of rollout.context = {context}, which the teacher reads whole", context
        needed += LEAST_FEEDBACK
    if 0 < branch < needed:
        found.append(
            f"{branch_key} = {branch} has no room for feedback beside {reads}: give at least {needed}, or () to have it"
            " derived"
        )
    episode = min(context, hindsight.max_trajectory_chars // CHARS)
    asks_policy = hindsight.analyser not in ("endpoint", "environment")
    if asks_policy and hindsight.max_tokens < hindsight.context < hindsight.max_tokens + episode:
        found.append(
            f"hindsight.context = {hindsight.context} cannot hold an episode of {episode} tokens (rollout.context ="
            f" {context}, hindsight.max_trajectory_chars = {hindsight.max_trajectory_chars}) and an answer of"
            f" hindsight.max_tokens = {hindsight.max_tokens}: give at least {hindsight.max_tokens + episode}, or 0 to"
            " have it derived"
        )
    return found
