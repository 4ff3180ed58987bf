"""Episodes and what is to be learnt from them in, rows out: a row is one token stream of an episode (the trunk) with
the branches that the teacher reads.

All branches of a stream share its history; an episode has one stream, unless a chat template's rewriting of earlier
turns is followed. The student goes once through the trunk, cut after the last branch. The teacher goes once through the
same trunk and, for each target, through a branch: it leaves the trunk before the target's generation prompt, or where
feedback makes the template rewrite what the student read, or, with feedback at the start, before the first generation
prompt; and it holds the rest of the teacher's context and the action. What is learnt without a teacher is a branch
without words.

Invariants: the same action ids stand under both contexts, and both contexts end with the generation prompt; the
student's side is a prefix of the stream's tokens, so that no feedback can be in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, order=True)
class Branch:
    """One action. `tokens[start:stop]` of its row is the action; before it the teacher reads `tokens[:seen]` and its
    own `words`.

    step: 1-based, of the episode. words: what follows, up to the generation prompt (with `seen` = 0 the whole context);
    () where no teacher reads it. sampled: log-probabilities of the action's ids when they were sampled. weight: of the
    divergence, or of the cross-entropy. advantage: of its tokens in a policy gradient. joined: the teacher reads on
    where the branch before it ends, instead of `tokens[:seen]`; `seen` is the same then.
    """

    step: int
    start: int
    stop: int
    seen: int
    words: tuple[int, ...]
    sampled: tuple[float, ...]
    weight: float = 1.0
    advantage: float = 0.0
    joined: bool = False

    @property
    def size(self) -> int:
        """Tokens of the action."""
        return self.stop - self.start

    @property
    def read(self) -> int:
        """Tokens that the teacher reads in it."""
        return len(self.words) + self.size if self.words else 0


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """Tokens of an episode's stream up to the end of its last branch's action. Token ids.

    episode: its number in the training step; it orders the rows. micro: the micro-step it belongs to (see
    `packing.pack`).
    key: raw key (two uint32) of the adapter's dropout. Branches are in the order of their steps.
    """

    episode: int
    tokens: tuple[int, ...]
    branches: tuple[Branch, ...]
    micro: int = 0
    key: tuple[int, int] = (0, 0)

    def __post_init__(self):
        before = None
        for branch in self.branches:
            where = f"episode {self.episode}, step {branch.step}"
            if not (0 <= branch.seen <= branch.start < branch.stop <= len(self.tokens) and branch.start >= 1):
                raise ValueError(f"{where}: a context or an action is empty or out of order")
            if branch.seen and not branch.words:
                raise ValueError(f"{where}: the teacher's branch has no words before the action")
            if branch.joined and (before is None or not before.words or before.seen != branch.seen or not branch.words):
                raise ValueError(f"{where}: there is no branch before it to read on from")
            if len(branch.sampled) != branch.size:
                raise ValueError(f"{where}: {len(branch.sampled)} log-probs of {branch.size} tokens")
            before = branch

    def with_branches(self, branches: Sequence[Branch]) -> Row:
        """The same row for these of its branches, cut after the last."""
        return dataclasses.replace(
            self, branches=tuple(branches), tokens=self.tokens[: max(branch.stop for branch in branches)]
        )


def target_branches(episode: Any, targets: Sequence[Any], chat: Any) -> list[Branch]:
    """A branch for each target, its feedback right before the step.

    Args:
      episode: has `streams` with `tokens` (ids), `logprobs` of the sampled ones, and `steps` with `stream`, `start`,
        `stop` (the action span) and `branch` (where the generation prompt of the step begins); `dialogue(step)` and
        `tools_at(step)` are for `chat`.
      targets: have `step`, 1-based, and `feedback`, text; different steps.
      chat: `chat.teacher_context(dialogue, tools, trunk, feedback)` gives the teacher's context: how much of the trunk,
        and the words after it.
    Raises:
      ValueError: the episode has no such step, or the two contexts do not end with the same generation prompt.
    """
    return [_branch(episode, target.step, *_advised(episode, target.step, target.feedback, chat)) for target in targets]


def start_branches(episode: Any, steps: Sequence[int], text: str, chat: Any) -> list[Branch]:
    """Branches for these steps under one advice that stands at the start, right before the first step: one reading of
    the episode by the teacher. Arguments and errors as in `target_branches`, and a ValueError for an episode of several
    streams."""
    if len(episode.streams) > 1:
        raise ValueError(f"step {min(steps)}: advice at the start needs an episode of one stream")
    tokens, found, end = episode.streams[0].tokens, [], 0
    for step in sorted(steps):
        action = _step(episode, step)
        if found:
            words = tuple(tokens[end : action.start])
        else:
            seen, words = _advised(episode, 1, text, chat)
            words += tuple(tokens[episode.steps[0].start : action.start])
        found.append(dataclasses.replace(_branch(episode, step, seen, words), joined=bool(found)))
        end = action.stop
    return found


def plain_branches(episode: Any, steps: Sequence[int]) -> list[Branch]:
    """Branches that no teacher reads."""
    return [_branch(episode, step, 0, ()) for step in steps]


def rows(
    episode: Any, branches: Sequence[Branch], *, index: int = 0, micro: int = 0, key: tuple[int, int] = (0, 0)
) -> list[Row]:
    """The rows of these branches of an episode: one for each of its streams that has any."""
    streams: dict[int, list[Branch]] = {}
    for group in sorted(groups(branches)):
        streams.setdefault(_step(episode, group[0].step).stream, []).extend(group)
    whole = lambda stream, found: Row(index, tuple(episode.streams[stream].tokens), tuple(found), micro, key)
    return [whole(stream, found).with_branches(found) for stream, found in sorted(streams.items())]


def alone(row: Row) -> Row:
    """The same branches without a trunk: each holds the teacher's whole context."""

    def whole(branch: Branch) -> Branch:
        if not branch.words:
            return branch
        return dataclasses.replace(
            branch, seen=0, words=branch.words if branch.joined else row.tokens[: branch.seen] + branch.words
        )

    return dataclasses.replace(row, branches=tuple(map(whole, row.branches)))


def single(row: Row) -> list[Row]:
    """One row for each branch, without a trunk; joined branches stay with those that they read on from."""
    return [row.with_branches(group) for group in groups(alone(row).branches)]


def groups(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Each branch with those that are joined to it."""
    found: list[list[Branch]] = []
    for branch in branches:
        if branch.joined:
            found[-1].append(branch)
        else:
            found.append([branch])
    return found


def _advised(episode: Any, number: int, text: str, chat: Any) -> tuple[int, tuple[int, ...]]:
    """The teacher's context before a step with advice there: how much of the stream, and the words after it."""
    step = _step(episode, number)
    tokens = episode.streams[step.stream].tokens
    trunk, prompt = tokens[: step.prompt_start], tuple(tokens[step.prompt_start : step.start])
    seen, words = chat.teacher_context(episode.dialogue(number), episode.tools_at(number), trunk, text)
    if tuple(words[len(words) - len(prompt) :]) != prompt:
        raise ValueError(f"step {number}: the teacher's context does not end with the generation prompt of the rollout")
    return seen, tuple(words)


def _step(episode: Any, number: int) -> Any:
    if not 1 <= number <= len(episode.steps):
        raise ValueError(f"step {number} of an episode with {len(episode.steps)} steps (they count from 1)")
    return episode.steps[number - 1]


def _branch(episode: Any, number: int, seen: int, words: tuple[int, ...]) -> Branch:
    step = _step(episode, number)
    before = sum(earlier.stop - earlier.start for earlier in episode.steps[: number - 1])
    sampled = tuple(episode.logprobs[before : before + step.stop - step.start])
    return Branch(number, step.start, step.stop, seen, words, sampled)
