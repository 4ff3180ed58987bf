"""Rows in, fixed-shape batches out.

Invariants: the batches do not depend on the order of the rows; at most len(length_buckets) x len(stream_buckets) shapes
occur; what does not fit is dropped whole and counted, never cut.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hintsd_jax.training.examples import Branch, Row, groups

DROP_REASONS = ("action_too_long", "student_too_long", "teacher_too_long")


class Batch(NamedTuple):
    """A micro-batch (a pytree of NumPy arrays): B rows, padded on the right with 0.

    student_BT: int32, the rows' tokens. key_B2: uint32 dropout keys. student_at_BA: int32, for each action token the
    index in T whose hidden state predicts it. trunk_BP: int32, what teacher branches look back on: the same tokens, or
    P = 0 where no branch does.
    stream_BM: int32, the branches one behind the other; position_BM: their positions; prefix_length_BM, branch_id_BM:
    see `policy.attention.Branches`.
    teacher_at_BA: int32, as student_at_BA, in M. actions_BA: int32; sampled_BA: float32 log-probs; mask_BA: bool, True
    on real tokens; weight_BA: float32, a token's weight in the divergence or cross-entropy; advantage_BA: float32.
    """

    student_BT: np.ndarray
    key_B2: np.ndarray
    student_at_BA: np.ndarray
    trunk_BP: np.ndarray
    stream_BM: np.ndarray
    position_BM: np.ndarray
    prefix_length_BM: np.ndarray
    branch_id_BM: np.ndarray
    teacher_at_BA: np.ndarray
    actions_BA: np.ndarray
    sampled_BA: np.ndarray
    mask_BA: np.ndarray
    weight_BA: np.ndarray
    advantage_BA: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of batches. A row takes the first length that holds its tokens, and the first pair of stream and
    action tokens that holds its branches: `stream_buckets[i]` goes with `action_buckets[i]`, so that the programs are
    lengths x pairs.

    rows: B. trunk: whether branches look back on a trunk (P = T) or stand alone (P = 0). Without a teacher: no trunk,
    and streams of 0.
    """

    length_buckets: tuple[int, ...]
    stream_buckets: tuple[int, ...]
    action_buckets: tuple[int, ...]
    rows: int
    trunk: bool = True

    def all(self) -> list[tuple[int, int]]:
        """Every (length, number of the pair), in order."""
        return [(length, pair) for length in self.length_buckets for pair in range(len(self.stream_buckets))]


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
        prefix_length_BM=ids(B, M),
        branch_id_BM=np.full((B, M), -1, np.int32),
        teacher_at_BA=ids(B, A),
        actions_BA=ids(B, A),
        sampled_BA=np.zeros((B, A), np.float32),
        mask_BA=np.zeros((B, A), bool),
        weight_BA=np.zeros((B, A), np.float32),
        advantage_BA=np.zeros((B, A), np.float32),
    )


class Place(NamedTuple):
    """Where an action stands: its tokens are [row, first:stop] of a batch's arrays of [B, A]. `taught`: a teacher has
    scored it.
    """

    episode: int
    step: int
    batch: int
    row: int
    first: int
    stop: int
    taught: bool


class Packed(NamedTuple):
    """batches; dropped: actions by reason (every reason of `DROP_REASONS` is a key); student_tokens, teacher_tokens:
    what either goes through, padding included; padding: how many of both mean nothing; places: of the actions, in the
    order of the batches."""

    batches: list[Batch]
    dropped: dict[str, int]
    student_tokens: int
    teacher_tokens: int
    padding: int
    places: list[Place]


def pack(
    rows: Sequence[Row], shapes: Shapes, *, mean_of_micro_means: bool = False, policy_weight: float | None = None
) -> Packed:
    """Sorts rows into batches of a few fixed shapes.

    Rows are sorted by size and cut into batches, and a batch takes the buckets of its largest row: at most one batch is
    not full. A row whose branches together exceed the largest stream becomes several.

    Args:
      rows: in any order; the result is the same.
      mean_of_micro_means: weigh the tokens so that dividing once by all of them gives the mean over micro-steps
        (`Row.micro`, those with tokens) of their token means, as the released HINT-SD code has it. Otherwise every
        token weighs the same.
      policy_weight: for a sum of two losses: weigh the tokens so that dividing once by all of them gives the mean
        divergence over those that a teacher reads plus this times the mean surrogate over those with an advantage.
        None: nothing is weighed.
    """
    dropped = dict.fromkeys(DROP_REASONS, 0)
    fitting: list[Row] = []
    micro_tokens: dict[int, int] = defaultdict(int)
    for row in sorted(rows):
        for part in _fit(row, shapes, dropped):
            fitting.append(part)
            micro_tokens[row.micro] += sum(branch.size for branch in part.branches)

    fitting.sort(
        key=lambda row: (_pair(row.branches, shapes), len(row.tokens))
    )  # stable: ties stay in the order of episodes
    tokens = sum(micro_tokens.values())
    scale = {
        micro: tokens / len(micro_tokens) / own if mean_of_micro_means else 1.0 for micro, own in micro_tokens.items()
    }
    taught, reinforced = _shares(fitting, tokens, policy_weight)
    batches, places, real = [], [], 0
    for first in range(0, len(fitting), shapes.rows):
        members = fitting[first : first + shapes.rows]
        length = max(_bucket(len(row.tokens), shapes.length_buckets) for row in members)
        batch = blank_batch(shapes, length, max(_pair(row.branches, shapes) for row in members))
        for b, row in enumerate(members):
            spans = _write(batch, b, row, scale[row.micro] * taught, scale[row.micro] * reinforced)
            for branch, span in zip(row.branches, spans, strict=True):
                places.append(Place(row.episode, branch.step, len(batches), b, *span, bool(branch.words)))
            real += len(row.tokens) * (2 if shapes.trunk else 1) + sum(branch.read for branch in row.branches)
        batches.append(batch)
    student = sum(batch.student_BT.size for batch in batches)
    teacher = sum(batch.trunk_BP.size + batch.stream_BM.size for batch in batches)
    return Packed(batches, dropped, student, teacher, student + teacher - real, places)


def _shares(rows: Sequence[Row], tokens: int, policy_weight: float | None) -> tuple[float, float]:
    """What weights and advantages are multiplied with, before the whole is divided by `tokens`; see `pack`."""
    if policy_weight is None:
        return 1.0, 1.0
    branches = [branch for row in rows for branch in row.branches]
    taught, reinforced = (
        sum(branch.size for branch in branches if getattr(branch, name)) for name in ("words", "advantage")
    )
    return tokens / max(taught, 1), policy_weight * tokens / max(reinforced, 1)


def _fit(row: Row, shapes: Shapes, dropped: dict[str, int]) -> list[Row]:
    """Rows that fit the buckets, in the order of their steps; branches that fit none are counted in `dropped`."""
    parts: list[list[Branch]] = []
    for group in groups(row.branches):
        if group[0].seen and not shapes.trunk:
            raise ValueError(
                f"episode {row.episode}, step {group[0].step}: a branch looks back on a trunk, and these shapes have none"
            )
        kept: list[Branch] = []
        for branch in group:  # joined ones need those before them
            too_long = (
                branch.size > shapes.action_buckets[-1],
                branch.stop > shapes.length_buckets[-1],
                len(kept) < group.index(branch) or _pair([*kept, branch], shapes) is None,
            )
            if any(too_long):
                dropped[DROP_REASONS[too_long.index(True)]] += 1
            else:
                kept.append(branch)
        if not kept:
            continue
        if parts and _pair([*parts[-1], *kept], shapes) is not None:
            parts[-1] += kept
        else:
            parts.append(kept)
    return [row.with_branches(part) for part in parts]


def _pair(branches: Sequence[Branch], shapes: Shapes) -> int | None:
    """The number of the first stream and action bucket that hold these branches."""
    actions, stream = sum(branch.size for branch in branches), sum(branch.read for branch in branches)
    pairs = enumerate(zip(shapes.stream_buckets, shapes.action_buckets, strict=True))
    return next((n for n, (M, A) in pairs if stream <= M and actions <= A), None)


def _bucket(size: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if size <= bucket)


def _write(batch: Batch, b: int, row: Row, taught: float, reinforced: float) -> list[tuple[int, int]]:
    """Writes a row, weights and advantages multiplied with these; where its actions stand now, in A."""
    batch.student_BT[b, : len(row.tokens)] = row.tokens
    if batch.trunk_BP.shape[1]:
        batch.trunk_BP[b, : len(row.tokens)] = row.tokens
    batch.key_B2[b] = row.key
    m = a = first = 0
    number, spans = -1, []
    for branch in row.branches:
        action = row.tokens[branch.start : branch.stop]
        if not branch.joined:
            number, first = number + 1, m
        stream = slice(m, m + branch.read)
        span = slice(a, a + branch.size)
        if branch.words:
            batch.stream_BM[b, stream] = branch.words + action
            batch.position_BM[b, stream] = branch.seen + np.arange(m - first, stream.stop - first)
            batch.prefix_length_BM[b, stream], batch.branch_id_BM[b, stream] = branch.seen, number
            batch.teacher_at_BA[b, span] = m + len(branch.words) - 1 + np.arange(branch.size)
        batch.student_at_BA[b, span] = np.arange(branch.start - 1, branch.stop - 1)
        batch.actions_BA[b, span], batch.sampled_BA[b, span], batch.mask_BA[b, span] = action, branch.sampled, True
        batch.weight_BA[b, span], batch.advantage_BA[b, span] = branch.weight * taught, branch.advantage * reinforced
        spans.append((span.start, span.stop))
        m, a = stream.stop, span.stop
    return spans
