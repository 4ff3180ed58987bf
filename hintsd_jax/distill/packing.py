"""Targets in, fixed-shape batches out: rows of (student context, teacher context, action), sorted, padded, bucketed.

Invariants: the same action ids stand under both contexts, and both contexts end with the generation prompt; a student context
is a prefix of its episode's tokens, so that no feedback can be in it; the batches do not depend on the order of the rows; at
most len(length_buckets) x len(action_buckets) shapes occur; what does not fit is dropped whole and counted, never cut.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hintsd_jax.errors import UserError

DROP_REASONS = ("action_too_long", "student_too_long", "teacher_too_long")


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """One action span to train on, as token ids.

    episode, step: where it comes from; they order the rows. micro: the micro-step it belongs to (see `pack`).
    student, teacher: the two contexts, generation prompt included. action: the ids as sampled, stop token included.
    """

    episode: int
    step: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    action: tuple[int, ...]
    micro: int = 0

    def __post_init__(self):
        if not (self.student and self.teacher and self.action):
            raise ValueError(f"episode {self.episode}, step {self.step}: a row needs two contexts and an action, none empty")


class Batch(NamedTuple):
    """A micro-batch (a pytree of NumPy arrays): B rows, contexts and action in one sequence, padded on the right with 0.

    student_BT, teacher_BT: int32, context then action; the two lengths T may differ.
    student_start_B, teacher_start_B: int32 position of the first action token in them, at least 1.
    actions_BA: int32; mask_BA: bool, True on real tokens; weight_B: float32, a row's weight in the loss.
    """

    student_BT: np.ndarray
    student_start_B: np.ndarray
    teacher_BT: np.ndarray
    teacher_start_B: np.ndarray
    actions_BA: np.ndarray
    mask_BA: np.ndarray
    weight_B: np.ndarray


def target_row(episode: Any, target: Any, chat: Any, *, index: int = 0, micro: int = 0) -> Row:
    """The row of one target.

    Args:
      episode: has `tokens` (ids) and `steps` with `start`, `stop` (the action span) and `branch` (where the generation
        prompt of the step begins).
      target: has `step`, 1-indexed, and `feedback`, text.
      chat: `chat.feedback(text)` gives the ids of a user message with the text and the generation prompt after it.
      index, micro: the number of the episode in this training step, and its micro-step.
    Raises:
      ValueError: the episode has no such step, or the two contexts do not end with the same generation prompt.
    """
    step = _step(episode, target.step)
    teacher = (*episode.tokens[: step.branch], *chat.feedback(target.feedback))
    prompt = tuple(episode.tokens[step.branch : step.start])
    if teacher[len(teacher) - len(prompt) :] != prompt:
        raise ValueError(f"step {target.step}: the teacher's context does not end with the generation prompt of the rollout")
    return dataclasses.replace(action_row(episode, target.step, index=index, micro=micro), teacher=teacher)


def action_row(episode: Any, step: int, *, index: int = 0, micro: int = 0) -> Row:
    """The row of one step (1-indexed) without feedback: both contexts are the student's. For losses without a teacher."""
    span = _step(episode, step)
    context = tuple(episode.tokens[: span.start])
    action = tuple(episode.tokens[span.start : span.stop])
    return Row(episode=index, step=step, student=context, teacher=context, action=action, micro=micro)


def _step(episode: Any, number: int) -> Any:
    if not 1 <= number <= len(episode.steps):
        raise ValueError(f"step {number} of an episode with {len(episode.steps)} steps (they count from 1)")
    return episode.steps[number - 1]


def blank_batch(rows: int, length: int, action_length: int, teacher_extra: int = 0) -> Batch:
    """A batch of padding only. It contributes nothing: for filling, and for compiling a shape before it is needed."""
    return Batch(
        student_BT=np.zeros((rows, length), np.int32),
        student_start_B=np.ones(rows, np.int32),
        teacher_BT=np.zeros((rows, length + teacher_extra), np.int32),
        teacher_start_B=np.ones(rows, np.int32),
        actions_BA=np.zeros((rows, action_length), np.int32),
        mask_BA=np.zeros((rows, action_length), bool),
        weight_B=np.zeros(rows, np.float32),
    )


def pack(
    rows: Sequence[Row],
    *,
    length_buckets: Sequence[int],
    action_buckets: Sequence[int],
    rows_per_batch: int,
    teacher_extra: int = 0,
    mean_of_micro_means: bool = False,
) -> tuple[list[Batch], dict[str, int]]:
    """Sorts the rows into batches of a few fixed shapes.

    Args:
      rows: in any order; the result is the same.
      length_buckets: lengths of the student's sequence (context and action), ascending.
      action_buckets: lengths of an action, ascending.
      rows_per_batch: B; the last batch of a shape is filled up with empty rows.
      teacher_extra: how much longer than the student's the teacher's sequence may be: room for the feedback message. A row
        whose teacher needs more goes to a longer bucket.
      mean_of_micro_means: weigh the rows so that dividing once by all tokens gives the mean over micro-steps (`Row.micro`,
        those with tokens) of their token means, as the released HINT-SD code has it. Otherwise every token weighs the same.
    Returns:
      the batches, and the number of dropped rows by reason (every reason of `DROP_REASONS` is a key).
    Raises:
      UserError: buckets that are not ascending positive lengths, or a size that is not positive.
    """
    for name, buckets in (("length_buckets", length_buckets), ("action_buckets", action_buckets)):
        if not buckets or buckets[0] < 1 or any(a >= b for a, b in zip(buckets, buckets[1:])):
            raise UserError(f"distill.{name} = {tuple(buckets)} must be ascending positive lengths")
    if rows_per_batch < 1:
        raise UserError(f"distill.rows_per_batch = {rows_per_batch} must be at least 1")
    if teacher_extra < 0:
        raise UserError(f"distill.teacher_extra = {teacher_extra} must be at least 0")

    dropped = dict.fromkeys(DROP_REASONS, 0)
    groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
    micro_tokens: dict[int, int] = defaultdict(int)
    for row in sorted(rows):
        size = len(row.action)
        action_bucket = _bucket(size, action_buckets)
        student_bucket = _bucket(len(row.student) + size, length_buckets)
        teacher_bucket = _bucket(len(row.teacher) + size - teacher_extra, length_buckets)
        needed = (action_bucket, student_bucket, teacher_bucket)
        if None in needed:
            dropped[DROP_REASONS[needed.index(None)]] += 1
            continue
        groups[max(student_bucket, teacher_bucket), action_bucket].append(row)
        micro_tokens[row.micro] += size

    mean_tokens = sum(micro_tokens.values()) / max(len(micro_tokens), 1)
    batches = []
    for (length, action_length), members in sorted(groups.items()):
        for first in range(0, len(members), rows_per_batch):
            batch = blank_batch(rows_per_batch, length, action_length, teacher_extra)
            for b, row in enumerate(members[first : first + rows_per_batch]):
                weight = mean_tokens / micro_tokens[row.micro] if mean_of_micro_means else 1.0
                _write(batch, b, row, weight)
            batches.append(batch)
    return batches, dropped


def _bucket(size: int, buckets: Sequence[int]) -> int | None:
    return next((bucket for bucket in buckets if size <= bucket), None)


def _write(batch: Batch, b: int, row: Row, weight: float) -> None:
    for tokens_BT, start_B, context in (
        (batch.student_BT, batch.student_start_B, row.student),
        (batch.teacher_BT, batch.teacher_start_B, row.teacher),
    ):
        tokens_BT[b, : len(context) + len(row.action)] = context + row.action
        start_B[b] = len(context)
    batch.actions_BA[b, : len(row.action)] = row.action
    batch.mask_BA[b, : len(row.action)] = True
    batch.weight_B[b] = weight
