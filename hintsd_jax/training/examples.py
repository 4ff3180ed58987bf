# SPDX-License-Identifier: Apache-2.0

"""What an update learns from, as token ids: an example is a trunk, one token stream of an episode, with its
branches, the actions that are trained on.

All branches of a stream share its history. The student goes once through the trunk, cut after the last branch. The
teacher goes once through the same trunk and, for each target, through a branch: it leaves the trunk before the target's
generation prompt, or where feedback makes the template rewrite what the student read, or, with feedback at the start,
before the first generation prompt; and it holds the rest of the teacher's context and the action. What is learnt
without a teacher is a branch without a context of its own.

        student   task ── action 1 ── observation ── ACTION 2 ── observation ── ACTION 3
        teacher                            └─ feedback ── ACTION 2       └─ feedback ── ACTION 3

Invariants: the same action ids stand under both contexts; the student's side is a prefix of the stream's tokens, so
that no feedback can be in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Branch:
    """One action. `tokens[start:stop]` of its example is the action; before it the teacher reads
    `tokens[:prefix_length]` and its own `context`.

    step: 1-based, of the episode. context: the ids after that prefix, up to the action (with prefix_length 0 the whole
    context); () where no teacher reads it. logprobs: of the action's ids when they were sampled. weights: of the parts
    of the loss that act on it, by name; a part that is not named does not act. advantage: of its tokens in a policy
    gradient. continues: the teacher reads on where the branch before it ends, instead of `tokens[:prefix_length]`;
    prefix_length is the same then.
    """

    step: int
    start: int
    stop: int
    prefix_length: int
    context: tuple[int, ...]
    logprobs: tuple[float, ...]
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    advantage: float = 0.0
    continues: bool = False

    @property
    def action_tokens(self) -> int:
        """Tokens of the action."""
        return self.stop - self.start

    @property
    def branch_tokens(self) -> int:
        """Tokens that the teacher reads beyond the trunk."""
        return len(self.context) + self.action_tokens if self.context else 0


@dataclasses.dataclass(frozen=True)
class Example:
    """Tokens of an episode's stream up to the end of its last branch's action. Token ids.

    episode: its number in the training step; it orders the examples. micro_step: the one it belongs to (see
    `batching.make_batches`). key: raw key (two uint32) of the adapter's dropout. Branches are in the order of their
    steps. Raises ValueError where a branch does not lie in the tokens.
    """

    episode: int
    tokens: tuple[int, ...]
    branches: tuple[Branch, ...]
    micro_step: int = 0
    key: tuple[int, int] = (0, 0)

    def __post_init__(self):
        before = None
        for branch in self.branches:
            where = f"episode {self.episode}, step {branch.step}"
            if not (0 <= branch.prefix_length <= branch.start < branch.stop <= len(self.tokens) and branch.start >= 1):
                raise ValueError(f"{where}: a context or an action is empty or out of order")
            if branch.prefix_length and not branch.context:
                raise ValueError(f"{where}: the teacher's branch has no context before the action")
            if branch.continues and not _can_continue(before, branch):
                raise ValueError(f"{where}: there is no branch before it to read on from")
            if len(branch.logprobs) != branch.action_tokens:
                raise ValueError(f"{where}: {len(branch.logprobs)} log-probs of {branch.action_tokens} tokens")
            before = branch

    def with_branches(self, branches: Sequence[Branch]) -> Example:
        """The same example for these of its branches, cut after the last."""
        tokens = self.tokens[: max(branch.stop for branch in branches)]
        return dataclasses.replace(self, branches=tuple(branches), tokens=tokens)

    def without_trunk(self) -> Example:
        """The same branches, each holding the teacher's whole context."""

        def whole(branch: Branch) -> Branch:
            if not branch.context:
                return branch
            prefix = () if branch.continues else self.tokens[: branch.prefix_length]
            return dataclasses.replace(branch, prefix_length=0, context=prefix + branch.context)

        return dataclasses.replace(self, branches=tuple(map(whole, self.branches)))

    def separated(self) -> list[Example]:
        """One example for each branch, without a trunk; those that read on stay with the branch that they read on from.

        The plain reference for trunk and branches: it costs a pass over the history for every target.
        """
        return [self.with_branches(group) for group in reading_groups(self.without_trunk().branches)]


def reading_groups(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Each branch with those that read on from it."""
    groups: list[list[Branch]] = []
    for branch in branches:
        if branch.continues:
            groups[-1].append(branch)
        else:
            groups.append([branch])
    return groups


def _can_continue(before: Branch | None, branch: Branch) -> bool:
    if before is None or not before.context or not branch.context:
        return False
    return before.prefix_length == branch.prefix_length
