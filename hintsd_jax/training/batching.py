# SPDX-License-Identifier: Apache-2.0

"""Examples in, batches of a few fixed shapes out.

Several short examples stand in one row, one behind the other (`packing`). Examples that no teacher reads go into
batches of their own where the loss knows such ones (`BatchShapes.unscored`): without trunk and branches, so that no
teacher pass is paid for them.

Invariants: the batches do not depend on the order of the examples; the shapes of `BatchShapes.all` and no others occur;
what does not fit is dropped whole and counted, never cut.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hintsd_jax.errors import UserError
from hintsd_jax.training.examples import Branch, Example, reading_groups
from hintsd_jax.training.loss_parts import LossPart
from hintsd_jax.training.losses import Loss
from hintsd_jax.training.packing import BatchShapes, packed

DROP_REASONS = ("action_too_long", "student_too_long", "teacher_too_long")


Array = Any  # NumPy where batches are made; jax where they are read


class Batch(NamedTuple):
    """A micro-batch (a pytree of NumPy arrays): B rows, each of some examples, padded on the right with 0.

    student_BT: int32, the examples' tokens, one example behind the other. first_BT: int32, the index in T at which a
    token's example begins (of padding, its own); [B, 0] where no row holds two. dropout_key_BT2: uint32, of the token's
    example. student_at_BA: int32, for each action token the index in T whose hidden state predicts it. trunk_BP: int32,
    what teacher branches share: the same tokens, or P = 0 where none is shared. branch_BM: int32, the branches one
    behind the other, M = 0 where no teacher reads; position_BM: their positions; prefix_start_BM, prefix_stop_BM,
    branch_id_BM: see `models.attention.Branches`. teacher_at_BA: int32, as student_at_BA, in M. The rest: see
    `losses.Spans`; its last letter counts the parts of the loss.
    """

    student_BT: Array
    first_BT: Array
    dropout_key_BT2: Array
    student_at_BA: Array
    trunk_BP: Array
    branch_BM: Array
    position_BM: Array
    prefix_start_BM: Array
    prefix_stop_BM: Array
    branch_id_BM: Array
    teacher_at_BA: Array
    actions_BA: Array
    sampler_logprob_BA: Array
    mask_BA: Array
    scored_BA: Array
    weight_BAP: Array
    advantage_BA: Array


def blank_batch(shapes: BatchShapes, length: int, pair: int) -> Batch:
    """A batch of padding only. It contributes nothing: for filling, and for compiling a shape before it is needed."""
    B, (P, M, A) = shapes.batch_size, shapes.tokens(length, pair)
    ids = lambda *shape: np.zeros(shape, np.int32)
    return Batch(
        student_BT=ids(B, length),
        first_BT=np.tile(np.arange(length if shapes.packed else 0, dtype=np.int32), (B, 1)),
        dropout_key_BT2=np.zeros((B, length, 2), np.uint32),
        student_at_BA=ids(B, A),
        trunk_BP=ids(B, P),
        branch_BM=ids(B, M),
        position_BM=ids(B, M),
        prefix_start_BM=ids(B, M),
        prefix_stop_BM=ids(B, M),
        branch_id_BM=np.full((B, M), -1, np.int32),
        teacher_at_BA=ids(B, A),
        actions_BA=ids(B, A),
        sampler_logprob_BA=np.zeros((B, A), np.float32),
        mask_BA=np.zeros((B, A), bool),
        scored_BA=np.zeros((B, A), bool),
        weight_BAP=np.zeros((B, A, shapes.parts), np.float32),
        advantage_BA=np.zeros((B, A), np.float32),
    )


class SpanLocation(NamedTuple):
    """Where an action stands: its tokens are [row, start:stop] of a batch's arrays of [B, A]. scored: by a teacher."""

    episode: int
    step: int
    batch: int
    row: int
    start: int
    stop: int
    scored: bool


class Batches(NamedTuple):
    """dropped: actions by reason (every reason of `DROP_REASONS` is a key). student_tokens, teacher_tokens: what either
    goes through, padding included; padding_tokens: those of both that mean nothing. spans: of the actions, in the order
    of the batches.
    """

    batches: list[Batch]
    dropped: dict[str, int]
    student_tokens: int
    teacher_tokens: int
    padding_tokens: int
    spans: list[SpanLocation]


def make_batches(examples: Sequence[Example], shapes: BatchShapes, loss: Loss, *, micro_steps: int = 0) -> Batches:
    """Sorts examples into batches of a few fixed shapes.

    Examples are packed into rows, rows sorted by size and cut into batches, and a batch takes the buckets of its
    largest row: at most one batch (of each kind, see `BatchShapes.unscored`) is not full. An example whose branches
    together exceed the largest branch bucket becomes several.

    The update divides the summed loss once, by all action tokens. Weights are scaled here so that this gives, for each
    part of the loss, its coefficient x its mean over its own tokens, or over the episodes' means (`LossPart.mean`).

    Args:
      examples: in any order; the result is the same.
      micro_steps: of the training step, as the released HINT-SD code has it: each part is then the mean over so many
        micro-steps (`Example.micro_step`) of its mean within each, those without a token counting as 0. 0: one mean
        over the whole training step, so that all tokens weigh the same.
    Raises:
      UserError: an algorithm gave a weight to a part that the loss lacks, or that has to read what no teacher scored.
      ValueError: an example belongs to a micro-step beyond `micro_steps`.
    """
    _check_weights(examples, loss)
    dropped: dict[str, int] = dict.fromkeys(DROP_REASONS, 0)
    fitting: list[Example] = []
    for example in sorted((example for example in examples if example.branches), key=_order):
        fitting += _fit(example, shapes, dropped)
    scale = _scales(fitting, loss, micro_steps)
    batches, spans, real = [], [], 0
    for rows, length, pair in packed(fitting, shapes):
        batch = blank_batch(shapes, length, pair)
        for b, row in enumerate(rows):
            end = _End()
            for example in row:
                for branch, span in _write(batch, b, end, example, scale[_group(example)]):
                    where = (example.episode, branch.step, len(batches), b, *span)
                    spans.append(SpanLocation(*where, scored=bool(branch.context)))
                passes = 2 if batch.trunk_BP.shape[1] else 1
                real += len(example.tokens) * passes + sum(branch.branch_tokens for branch in example.branches)
        batches.append(batch)
    student = sum(batch.student_BT.size for batch in batches)
    teacher = sum(batch.trunk_BP.size + batch.branch_BM.size for batch in batches)
    return Batches(batches, dropped, student, teacher, student + teacher - real, spans)


def _order(example: Example) -> tuple[int, int]:
    return example.episode, example.branches[0].step


def _check_weights(examples: Sequence[Example], loss: Loss) -> None:
    parts = {part.name: part for part in loss.parts}
    for example in examples:
        for branch in example.branches:
            where = f"episode {example.episode}, step {branch.step}"
            for name in branch.weights:
                if name not in parts:
                    raise UserError(f"{where}: a weight for {name!r}, but the loss has the parts {', '.join(parts)}")
                if branch.weights[name] and parts[name].scored_tokens_only and not branch.context:
                    raise UserError(f"{where}: a weight for {name!r}, but no teacher reads the action")


def _scales(examples: Sequence[Example], loss: Loss, micro_steps: int) -> dict[tuple[int, int], dict[str, float]]:
    """(micro-step, episode) -> part, in the order of the loss -> what its tokens' weights are multiplied with.

    Coefficient x all action tokens / micro-steps / the tokens that the part acts on in the micro-step; with a mean over
    episodes, the episodes of the micro-step that it acts on x its tokens in this one. Without micro-steps, all is one.
    """
    tokens: dict[LossPart | None, Counter[tuple[int, int]]] = {part: Counter() for part in (None, *loss.parts)}
    for example in examples:
        for part, counts in tokens.items():
            acts = lambda branch, part=part: part is None or branch.weights.get(part.name)
            counts[_group(example)] += sum(branch.action_tokens for branch in example.branches if acts(branch))
    if micro_steps and any(micro >= micro_steps for micro, _ in tokens[None]):
        raise ValueError(f"an example of micro-step {max(tokens[None])[0]}, of {micro_steps} (they count from 0)")
    total = tokens[None].total()
    scales: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for part in loss.parts:
        of_micro: dict[int, list[int]] = defaultdict(list)
        for (micro, _), count in tokens[part].items():
            of_micro[micro if micro_steps else 0].append(count)
        for group, count in tokens[part].items():
            own = of_micro[group[0] if micro_steps else 0]
            divisor = sum(n > 0 for n in own) * count if part.mean == "sequence" else sum(own)
            scales[group][part.name] = part.coefficient * (total / max(divisor, 1)) / max(micro_steps, 1)
    return scales


def _group(example: Example) -> tuple[int, int]:
    return example.micro_step, example.episode


def _fit(example: Example, shapes: BatchShapes, dropped: dict[str, int]) -> list[Example]:
    """Examples that fit the buckets, in the order of their steps; branches that fit none are counted in `dropped`."""
    parts: list[list[Branch]] = []
    for group in reading_groups(example.branches):
        if group[0].prefix_length and not shapes.trunk:
            where = f"episode {example.episode}, step {group[0].step}"
            raise ValueError(f"{where}: a branch leaves a trunk, and these shapes have none")
        kept: list[Branch] = []
        for branch in group:  # those that read on need those before them
            too_long = (
                branch.action_tokens > shapes.action_buckets[-1],
                branch.stop > shapes.length_buckets[-1],
                len(kept) < group.index(branch) or not shapes.holds([*kept, branch]),
            )
            if any(too_long):
                dropped[DROP_REASONS[too_long.index(True)]] += 1
            else:
                kept.append(branch)
        if not kept:
            continue
        if parts and shapes.holds([*parts[-1], *kept]):
            parts[-1] += kept
        else:
            parts.append(kept)
    return [example.with_branches(part) for part in parts]


@dataclasses.dataclass
class _End:
    """Where a row ends so far: in T, M and A, and how many branches it holds."""

    t: int = 0
    m: int = 0
    a: int = 0
    branches: int = 0


def _write(
    batch: Batch, b: int, end: _End, example: Example, scale: Mapping[str, float]
) -> Iterator[tuple[Branch, tuple[int, int]]]:
    """Writes an example at the end of a row, the weights of each part times its `scale`; its branches, and where their
    actions stand now, in A.
    """
    first = end.t
    end.t += len(example.tokens)
    own = slice(first, end.t)
    batch.student_BT[b, own], batch.dropout_key_BT2[b, own] = example.tokens, example.key
    for whole, value in ((batch.trunk_BP, example.tokens), (batch.first_BT, first)):
        if whole.shape[1]:
            whole[b, own] = value
    begin = end.m
    for branch in example.branches:
        action = example.tokens[branch.start : branch.stop]
        if not branch.continues:
            begin, end.branches = end.m, end.branches + 1
        read, span = slice(end.m, end.m + branch.branch_tokens), slice(end.a, end.a + branch.action_tokens)
        if branch.context:
            batch.branch_BM[b, read] = branch.context + action
            batch.position_BM[b, read] = branch.prefix_length + np.arange(read.start - begin, read.stop - begin)
            batch.prefix_start_BM[b, read], batch.prefix_stop_BM[b, read] = first, first + branch.prefix_length
            batch.branch_id_BM[b, read] = end.branches - 1
            batch.teacher_at_BA[b, span] = read.start + len(branch.context) - 1 + np.arange(branch.action_tokens)
            batch.scored_BA[b, span] = True
        batch.student_at_BA[b, span] = first + np.arange(branch.start - 1, branch.stop - 1)
        batch.actions_BA[b, span], batch.sampler_logprob_BA[b, span] = action, branch.logprobs
        batch.mask_BA[b, span], batch.advantage_BA[b, span] = True, branch.advantage
        batch.weight_BAP[b, span] = [branch.weights.get(name, 0.0) * value for name, value in scale.items()]
        end.m, end.a = read.stop, span.stop
        yield branch, (span.start, span.stop)
