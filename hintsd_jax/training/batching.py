# SPDX-License-Identifier: Apache-2.0

"""Examples in, batches of a few fixed shapes out.

Examples that no teacher reads go into batches of their own where the loss knows such ones (`BatchShapes.unscored`):
without trunk and branches, so that no teacher pass is paid for them.

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

DROP_REASONS = ("action_too_long", "student_too_long", "teacher_too_long")


Array = Any  # NumPy where batches are made; jax where they are read


class Batch(NamedTuple):
    """A micro-batch (a pytree of NumPy arrays): B examples, padded on the right with 0.

    student_BT: int32, the examples' tokens. dropout_key_B2: uint32. student_at_BA: int32, for each action token the
    index in T whose hidden state predicts it. trunk_BP: int32, the prefix that teacher branches share: the same tokens,
    or P = 0 where none is shared. branch_BM: int32, the branches one behind the other, M = 0 where no teacher reads;
    position_BM: their positions;
    prefix_length_BM, branch_id_BM: see `models.attention.Branches`. teacher_at_BA: int32, as student_at_BA, in M.
    The rest: see `losses.Spans`; its last letter counts the parts of the loss.
    """

    student_BT: Array
    dropout_key_B2: Array
    student_at_BA: Array
    trunk_BP: Array
    branch_BM: Array
    position_BM: Array
    prefix_length_BM: Array
    branch_id_BM: Array
    teacher_at_BA: Array
    actions_BA: Array
    sampler_logprob_BA: Array
    mask_BA: Array
    scored_BA: Array
    weight_BAP: Array
    advantage_BA: Array


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The shapes of batches. An example takes the first length that holds its tokens, and the first pair of branch and
    action tokens that holds its branches: `branch_buckets[i]` goes with `action_buckets[i]`, so that the programs are
    lengths x pairs.

    batch_size: B. parts: of the loss. trunk: whether branches share a trunk (P = T) or stand alone (P = 0). Without a
    teacher: no trunk, and branch buckets of 0. unscored: examples that no teacher reads have batches of their own, with
    neither; their pairs are (0, `action_buckets[i]`), numbered behind the others.
    """

    length_buckets: tuple[int, ...]
    branch_buckets: tuple[int, ...]
    action_buckets: tuple[int, ...]
    batch_size: int
    parts: int = 1
    trunk: bool = True
    unscored: bool = False

    def all(self) -> list[tuple[int, int]]:
        """Every (length, number of the pair) by length, the largest pair last."""
        scored = range(len(self.branch_buckets))
        unscored = [self.unscored_pair(pair) for pair in scored] if self.unscored else []
        return [(length, pair) for length in self.length_buckets for pair in (*unscored, *scored)]

    def unscored_pair(self, pair: int) -> int:
        """The number of the pair with the same action tokens and no branch tokens."""
        return pair + len(self.branch_buckets)

    def tokens(self, length: int, pair: int) -> tuple[int, int, int]:
        """(P, M, A) of a shape: tokens of trunk, branches and actions."""
        scored = pair < len(self.branch_buckets)
        number = pair if scored else pair - len(self.branch_buckets)
        trunk = length if self.trunk and scored else 0
        return trunk, self.branch_buckets[number] if scored else 0, self.action_buckets[number]


def blank_batch(shapes: BatchShapes, length: int, pair: int) -> Batch:
    """A batch of padding only. It contributes nothing: for filling, and for compiling a shape before it is needed."""
    B, (P, M, A) = shapes.batch_size, shapes.tokens(length, pair)
    ids = lambda *shape: np.zeros(shape, np.int32)
    return Batch(
        student_BT=ids(B, length),
        dropout_key_B2=np.zeros((B, 2), np.uint32),
        student_at_BA=ids(B, A),
        trunk_BP=ids(B, P),
        branch_BM=ids(B, M),
        position_BM=ids(B, M),
        prefix_length_BM=ids(B, M),
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

    Examples are sorted by size and cut into batches, and a batch takes the buckets of its largest example: at most one
    batch (of each kind, see `BatchShapes.unscored`) is not full. An example whose branches together exceed the largest
    branch bucket becomes several.

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
    for members, length, pair in _grouped(fitting, shapes):
        batch = blank_batch(shapes, length, pair)
        for b, example in enumerate(members):
            for branch, span in zip(example.branches, _write(batch, b, example, scale[_group(example)]), strict=True):
                spans.append(
                    SpanLocation(example.episode, branch.step, len(batches), b, *span, scored=bool(branch.context))
                )
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


def _grouped(examples: Sequence[Example], shapes: BatchShapes) -> Iterator[tuple[list[Example], int, int]]:
    """The examples of each batch, its length and its pair."""
    unscored = [shapes.unscored and not any(branch.context for branch in example.branches) for example in examples]
    for kind in (False, True):
        alike = [example for example, own in zip(examples, unscored, strict=True) if own is kind]
        alike.sort(key=lambda example: (_pair(example.branches, shapes), len(example.tokens)))  # stable
        for start in range(0, len(alike), shapes.batch_size):
            members = alike[start : start + shapes.batch_size]
            length = max(_bucket(len(example.tokens), shapes.length_buckets) for example in members)
            pair = max(_pair(example.branches, shapes) for example in members)
            yield members, length, shapes.unscored_pair(pair) if kind else pair


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
                len(kept) < group.index(branch) or not _holds(shapes, [*kept, branch]),
            )
            if any(too_long):
                dropped[DROP_REASONS[too_long.index(True)]] += 1
            else:
                kept.append(branch)
        if not kept:
            continue
        if parts and _holds(shapes, [*parts[-1], *kept]):
            parts[-1] += kept
        else:
            parts.append(kept)
    return [example.with_branches(part) for part in parts]


def _pair(branches: Sequence[Branch], shapes: BatchShapes) -> int:
    """The number of the first branch and action bucket that hold these branches; past the last where none does."""
    actions = sum(branch.action_tokens for branch in branches)
    read = sum(branch.branch_tokens for branch in branches)
    pairs = enumerate(zip(shapes.branch_buckets, shapes.action_buckets, strict=True))
    return next((n for n, (M, A) in pairs if read <= M and actions <= A), len(shapes.branch_buckets))


def _holds(shapes: BatchShapes, branches: Sequence[Branch]) -> bool:
    return _pair(branches, shapes) < len(shapes.branch_buckets)


def _bucket(size: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if size <= bucket)


def _write(batch: Batch, b: int, example: Example, scale: Mapping[str, float]) -> list[tuple[int, int]]:
    """Writes an example, the weights of each part times its `scale`; where its actions stand now, in A."""
    batch.student_BT[b, : len(example.tokens)] = example.tokens
    if batch.trunk_BP.shape[1]:
        batch.trunk_BP[b, : len(example.tokens)] = example.tokens
    batch.dropout_key_B2[b] = example.key
    m = a = first = 0
    number, spans = -1, []
    for branch in example.branches:
        action = example.tokens[branch.start : branch.stop]
        if not branch.continues:
            number, first = number + 1, m
        read = slice(m, m + branch.branch_tokens)
        span = slice(a, a + branch.action_tokens)
        if branch.context:
            batch.branch_BM[b, read] = branch.context + action
            batch.position_BM[b, read] = branch.prefix_length + np.arange(m - first, read.stop - first)
            batch.prefix_length_BM[b, read], batch.branch_id_BM[b, read] = branch.prefix_length, number
            batch.teacher_at_BA[b, span] = m + len(branch.context) - 1 + np.arange(branch.action_tokens)
            batch.scored_BA[b, span] = True
        batch.student_at_BA[b, span] = np.arange(branch.start - 1, branch.stop - 1)
        batch.actions_BA[b, span], batch.sampler_logprob_BA[b, span] = action, branch.logprobs
        batch.mask_BA[b, span], batch.advantage_BA[b, span] = True, branch.advantage
        batch.weight_BAP[b, span] = [branch.weights.get(name, 0.0) * value for name, value in scale.items()]
        spans.append((span.start, span.stop))
        m, a = read.stop, span.stop
    return spans
