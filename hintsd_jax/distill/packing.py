"""Targets in, fixed-shape batches out: a row is one token stream of an episode (the trunk) with the branches that the teacher reads.

All targets in a stream share its history; an episode has one stream, unless a chat template's rewriting of earlier turns is followed.
The student goes once through the trunk, cut after the last target. The teacher goes once through the same trunk and, for each target,
through a branch: it leaves the trunk before the target's generation prompt, or where feedback makes the template rewrite what the
student read, and holds the rest of the teacher's context (at least the feedback message and the generation prompt) and the action.
`single` makes the plain form of it, one row per target with no trunk shared: the reference.

Invariants: the same action ids stand under both contexts, and both contexts end with the generation prompt; the student's side is a
prefix of the stream's tokens, so that no feedback can be in it; the batches do not depend on the order of the rows; at most
len(length_buckets) x len(stream_buckets) shapes occur; what does not fit is dropped whole and counted, never cut.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

DROP_REASONS = ("action_too_long", "student_too_long", "teacher_too_long")


@dataclasses.dataclass(frozen=True, order=True)
class Branch:
    """One target. `tokens[start:stop]` of its row is the action; before it the teacher reads `tokens[:seen]` and its own `words`.

    step: 1-based, of the episode. words: what follows, up to the generation prompt (with `seen` = 0 the whole context).
    sampled: log-probabilities of the action's ids when they were sampled.
    """

    step: int
    start: int
    stop: int
    seen: int
    words: tuple[int, ...]
    sampled: tuple[float, ...]

    @property
    def size(self) -> int:
        """Tokens of the action."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """Tokens of an episode's stream up to the end of its last branch's action. Token ids.

    episode: its number in the training step; it orders the rows. micro: the micro-step it belongs to (see `pack`).
    key: raw key (two uint32) of the adapter's dropout. Branches are in the order of their steps.
    """

    episode: int
    tokens: tuple[int, ...]
    branches: tuple[Branch, ...]
    micro: int = 0
    key: tuple[int, int] = (0, 0)

    def __post_init__(self):
        for branch in self.branches:
            if not (0 <= branch.seen <= branch.start < branch.stop <= len(self.tokens) and branch.start >= 1):
                raise ValueError(f"episode {self.episode}, step {branch.step}: a context or an action is empty or out of order")
            if not branch.words:
                raise ValueError(f"episode {self.episode}, step {branch.step}: the teacher's branch has no words before the action")
            if len(branch.sampled) != branch.size:
                raise ValueError(f"episode {self.episode}, step {branch.step}: {len(branch.sampled)} log-probs of {branch.size} tokens")

    def with_branches(self, branches: Sequence[Branch]) -> "Row":
        """The same row for these of its branches, cut after the last."""
        return dataclasses.replace(self, branches=tuple(branches), tokens=self.tokens[: max(branch.stop for branch in branches)])


class Batch(NamedTuple):
    """A micro-batch (a pytree of NumPy arrays): B rows, padded on the right with 0.

    student_BT: int32, the rows' tokens. key_B2: uint32 dropout keys. student_at_BA: int32, for each action token the index in T whose
    hidden state predicts it. trunk_BP: int32, what teacher branches look back on: the same tokens, or P = 0 where no branch does.
    stream_BM: int32, the branches one behind the other; position_BM: their positions; seen_BM, branch_BM: see `policy.attention.Branches`.
    teacher_at_BA: int32, as student_at_BA, in M. actions_BA: int32; sampled_BA: float32 log-probs; mask_BA: bool, True on real
    tokens; weight_BA: float32, a token's weight in the loss.
    """

    student_BT: np.ndarray
    key_B2: np.ndarray
    student_at_BA: np.ndarray
    trunk_BP: np.ndarray
    stream_BM: np.ndarray
    position_BM: np.ndarray
    seen_BM: np.ndarray
    branch_BM: np.ndarray
    teacher_at_BA: np.ndarray
    actions_BA: np.ndarray
    sampled_BA: np.ndarray
    mask_BA: np.ndarray
    weight_BA: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of batches. A row takes the first length that holds its tokens, and the first pair of stream and action tokens that
    holds its branches: `stream_buckets[i]` goes with `action_buckets[i]`, so that the programs are lengths x pairs.

    rows: B. trunk: whether branches look back on a trunk (P = T) or stand alone (P = 0).
    """

    length_buckets: tuple[int, ...]
    stream_buckets: tuple[int, ...]
    action_buckets: tuple[int, ...]
    rows: int
    trunk: bool = True

    def all(self) -> list[tuple[int, int]]:
        """Every (length, number of the pair), in order."""
        return [(length, pair) for length in self.length_buckets for pair in range(len(self.stream_buckets))]


def trunk_rows(
    episode: Any, targets: Sequence[Any], chat: Any, *, index: int = 0, micro: int = 0, key: tuple[int, int] = (0, 0)
) -> list[Row]:
    """The rows of all targets of an episode: one for each of its streams that has any.

    Args:
      episode: has `streams` with `tokens` (ids), `logprobs` of the sampled ones, and `steps` with `stream`, `start`, `stop` (the
        action span) and `branch` (where the generation prompt of the step begins); `dialogue(step)` and `tools_at(step)` are for `chat`.
      targets: have `step`, 1-based, and `feedback`, text; different steps.
      chat: `chat.advised(dialogue, tools, trunk, feedback)` gives the teacher's context: how much of the trunk, and the words after it.
    Raises:
      ValueError: the episode has no such step, or the two contexts do not end with the same generation prompt.
    """
    branches: dict[int, list[Branch]] = {}
    for target in sorted(targets, key=lambda target: target.step):
        step = _step(episode, target.step)
        tokens = episode.streams[step.stream].tokens
        trunk, prompt = tokens[: step.branch], tuple(tokens[step.branch : step.start])
        seen, words = chat.advised(episode.dialogue(target.step), episode.tools_at(target.step), trunk, target.feedback)
        if tuple(words[len(words) - len(prompt) :]) != prompt:
            raise ValueError(f"step {target.step}: the teacher's context does not end with the generation prompt of the rollout")
        branches.setdefault(step.stream, []).append(_branch(episode, target.step, seen=seen, words=tuple(words)))
    return [_row(episode, stream, found, index, micro, key) for stream, found in branches.items()]


def action_row(episode: Any, step: int, *, index: int = 0, micro: int = 0, key: tuple[int, int] = (0, 0)) -> Row:
    """The row of one step (1-based) without feedback: both contexts are the student's."""
    taken = _step(episode, step)
    last = episode.streams[taken.stream].tokens[taken.start - 1]  # a branch begins with a token of its own
    return _row(episode, taken.stream, [_branch(episode, step, seen=taken.start - 1, words=(last,))], index, micro, key)


def single(row: Row) -> list[Row]:
    """The same targets, one row each and no trunk shared: the teacher's branch holds its whole context."""
    return [
        row.with_branches([dataclasses.replace(branch, seen=0, words=row.tokens[: branch.seen] + branch.words)])
        for branch in row.branches
    ]


def _row(episode: Any, stream: int, branches: list[Branch], index: int, micro: int, key: tuple[int, int]) -> Row:
    return Row(index, tuple(episode.streams[stream].tokens), tuple(branches), micro, key).with_branches(branches)


def _step(episode: Any, number: int) -> Any:
    if not 1 <= number <= len(episode.steps):
        raise ValueError(f"step {number} of an episode with {len(episode.steps)} steps (they count from 1)")
    return episode.steps[number - 1]


def _branch(episode: Any, number: int, seen: int, words: tuple[int, ...]) -> Branch:
    step = _step(episode, number)
    before = sum(earlier.stop - earlier.start for earlier in episode.steps[: number - 1])
    sampled = tuple(episode.logprobs[before : before + step.stop - step.start])
    return Branch(number, step.start, step.stop, seen, words, sampled)


def blank_batch(shapes: Shapes, length: int, pair: int) -> Batch:
    """A batch of padding only. It contributes nothing: for filling, and for compiling a shape before it is needed."""
    B, M, A = shapes.rows, shapes.stream_buckets[pair], shapes.action_buckets[pair]
    ids = lambda *shape: np.zeros(shape, np.int32)
    return Batch(
        student_BT=ids(B, length),
        key_B2=np.zeros((B, 2), np.uint32),
        student_at_BA=ids(B, A),
        trunk_BP=ids(B, length if shapes.trunk else 0),
        stream_BM=ids(B, M),
        position_BM=ids(B, M),
        seen_BM=ids(B, M),
        branch_BM=np.full((B, M), -1, np.int32),
        teacher_at_BA=ids(B, A),
        actions_BA=ids(B, A),
        sampled_BA=np.zeros((B, A), np.float32),
        mask_BA=np.zeros((B, A), bool),
        weight_BA=np.zeros((B, A), np.float32),
    )


class Packed(NamedTuple):
    """batches; dropped: targets by reason (every reason of `DROP_REASONS` is a key); passed: tokens, padding included, that student and
    teacher go through; padding: how many of them mean nothing."""

    batches: list[Batch]
    dropped: dict[str, int]
    passed: int
    padding: int


def pack(rows: Sequence[Row], shapes: Shapes, *, mean_of_micro_means: bool = False) -> Packed:
    """Sorts rows into batches of a few fixed shapes.

    Rows are sorted by size and cut into batches, and a batch takes the buckets of its largest row: at most one batch is not full.
    A row whose branches together exceed the largest stream becomes several.

    Args:
      rows: in any order; the result is the same.
      mean_of_micro_means: weigh the tokens so that dividing once by all of them gives the mean over micro-steps (`Row.micro`,
        those with tokens) of their token means, as the released HINT-SD code has it. Otherwise every token weighs the same.
    """
    dropped = dict.fromkeys(DROP_REASONS, 0)
    fitting: list[Row] = []
    micro_tokens: dict[int, int] = defaultdict(int)
    for row in sorted(rows):
        for part in _fit(row, shapes, dropped):
            fitting.append(part)
            micro_tokens[row.micro] += sum(branch.size for branch in part.branches)

    fitting.sort(key=lambda row: (_pair(row.branches, shapes), len(row.tokens)))  # stable: ties stay in the order of episodes
    mean_tokens = sum(micro_tokens.values()) / max(len(micro_tokens), 1)
    batches, real = [], 0
    for first in range(0, len(fitting), shapes.rows):
        members = fitting[first : first + shapes.rows]
        length = max(_bucket(len(row.tokens), shapes.length_buckets) for row in members)
        batch = blank_batch(shapes, length, max(_pair(row.branches, shapes) for row in members))
        for b, row in enumerate(members):
            _write(batch, b, row, mean_tokens / micro_tokens[row.micro] if mean_of_micro_means else 1.0)
            real += len(row.tokens) * (2 if shapes.trunk else 1) + sum(len(branch.words) + branch.size for branch in row.branches)
        batches.append(batch)
    passed = sum(batch.student_BT.size + batch.trunk_BP.size + batch.stream_BM.size for batch in batches)
    return Packed(batches, dropped, passed, passed - real)


def _fit(row: Row, shapes: Shapes, dropped: dict[str, int]) -> list[Row]:
    """Rows that fit the buckets, in the order of their steps; targets that fit none are counted in `dropped`."""
    parts: list[list[Branch]] = []
    for branch in row.branches:
        if branch.seen and not shapes.trunk:
            raise ValueError(f"episode {row.episode}, step {branch.step}: a branch looks back on a trunk, and these shapes have none")
        too_long = (
            branch.size > shapes.action_buckets[-1],
            branch.stop > shapes.length_buckets[-1],
            _pair([branch], shapes) is None,
        )
        if any(too_long):
            dropped[DROP_REASONS[too_long.index(True)]] += 1
        elif parts and _pair([*parts[-1], branch], shapes) is not None:
            parts[-1].append(branch)
        else:
            parts.append([branch])
    return [row.with_branches(part) for part in parts]


def _pair(branches: Sequence[Branch], shapes: Shapes) -> int | None:
    """The number of the first stream and action bucket that hold these branches."""
    actions = sum(branch.size for branch in branches)
    stream = sum(len(branch.words) + branch.size for branch in branches)
    pairs = enumerate(zip(shapes.stream_buckets, shapes.action_buckets, strict=True))
    return next((n for n, (M, A) in pairs if stream <= M and actions <= A), None)


def _bucket(size: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if size <= bucket)


def _write(batch: Batch, b: int, row: Row, weight: float) -> None:
    batch.student_BT[b, : len(row.tokens)] = row.tokens
    if batch.trunk_BP.shape[1]:
        batch.trunk_BP[b, : len(row.tokens)] = row.tokens
    batch.key_B2[b] = row.key
    m = a = 0
    for number, branch in enumerate(row.branches):
        action = row.tokens[branch.start : branch.stop]
        stream = slice(m, m + len(branch.words) + branch.size)
        batch.stream_BM[b, stream] = branch.words + action
        batch.position_BM[b, stream] = branch.seen + np.arange(stream.stop - m)
        batch.seen_BM[b, stream], batch.branch_BM[b, stream] = branch.seen, number
        span = slice(a, a + branch.size)
        batch.student_at_BA[b, span] = np.arange(branch.start - 1, branch.stop - 1)
        batch.teacher_at_BA[b, span] = m + len(branch.words) - 1 + np.arange(branch.size)
        batch.actions_BA[b, span], batch.sampled_BA[b, span] = action, branch.sampled
        batch.mask_BA[b, span], batch.weight_BA[b, span] = True, weight
        m, a = stream.stop, span.stop
