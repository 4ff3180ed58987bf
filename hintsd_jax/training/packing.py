# SPDX-License-Identifier: Apache-2.0

"""Which examples share a row, and which rows a batch: examples and the shapes that batches may have in, batches as rows
of whole examples out.

Programs are compiled for a few lengths, so a row of one example is padded by a third and more; several short ones
behind each other leave a tenth. Rows are packed for each shape as if it were the only one (best fit, the longest
first), and the cheapest packing is taken.

Invariants: what is packed does not depend on the order of the examples, if they come sorted by anything of their own;
no example is split; the shapes of `BatchShapes.all` and no others occur.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

from hintsd_jax.training.examples import Branch, Example

# Tokens of a row at which attention to all of it costs as much as everything else: 27,000 with Qwen3-4B, 8,000 with 50M
# weights. Kernels do not skip what lies before a token's own example, so that longer rows have to save padding.
_FAR = 16_384

Row = list[Example]


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The shapes of batches. A row takes the first length that holds its tokens, and the first pair of branch and
    action tokens that holds its branches: `branch_buckets[i]` goes with `action_buckets[i]`, so that the programs are
    lengths x pairs.

    batch_size: B. packed: whether a row may hold several examples. parts: of the loss. trunk: whether branches share a
    trunk (P = T) or stand alone (P = 0). Without a teacher: no trunk, and branch buckets of 0. unscored: examples that
    no teacher reads have batches of their own, with neither; their pairs are (0, `action_buckets[i]`), numbered behind
    the others, the first of equal ones standing for all.
    """

    length_buckets: tuple[int, ...]
    branch_buckets: tuple[int, ...]
    action_buckets: tuple[int, ...]
    batch_size: int
    parts: int = 1
    trunk: bool = True
    unscored: bool = False
    packed: bool = True

    def all(self) -> list[tuple[int, int]]:
        """Every (length, number of the pair) by length, the largest pair last."""
        scored = range(len(self.branch_buckets))
        first = [pair for pair in scored if self.action_buckets[pair] not in self.action_buckets[:pair]]
        unscored = [self.unscored_pair(pair) for pair in first] if self.unscored else []
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

    def pair(self, branches: Sequence[Branch]) -> int:
        """The number of the first branch and action bucket that hold these branches; past the last where none does."""
        actions = sum(branch.action_tokens for branch in branches)
        read = sum(branch.branch_tokens for branch in branches)
        pairs = enumerate(zip(self.branch_buckets, self.action_buckets, strict=True))
        return next((n for n, (M, A) in pairs if read <= M and actions <= A), len(self.branch_buckets))

    def holds(self, branches: Sequence[Branch]) -> bool:
        """Whether a pair of buckets does."""
        return self.pair(branches) < len(self.branch_buckets)


def packed(examples: Sequence[Example], shapes: BatchShapes) -> list[tuple[list[Row], int, int]]:
    """The rows of each batch, its length and its pair. Every example fits the largest length and a pair."""
    result = []
    for unscored in (False, True):
        alike = [example for example in examples if _is_unscored(example, shapes) is unscored]
        if shapes.packed:
            pairs = range(len(shapes.branch_buckets))
            packings = [_best_fit(alike, shapes, length, pair) for length in shapes.length_buckets for pair in pairs]
        else:
            packings = [[[example] for example in alike]]
        batches = [_cut(rows, shapes, unscored) for rows in packings]
        result += min(batches, key=partial(_cost, shapes))  # the first of equals: the shortest rows
    return result


def _is_unscored(example: Example, shapes: BatchShapes) -> bool:
    return shapes.unscored and not any(branch.context for branch in example.branches)


def _best_fit(examples: Sequence[Example], shapes: BatchShapes, length: int, pair: int) -> list[Row]:
    """Rows for batches of one shape: an example goes where the fewest tokens are left beside it. One that is too large
    for the shape has a row of its own.
    """
    rows: list[tuple[int, Row, list[Branch]]] = []  # tokens left
    for example in sorted(examples, key=lambda example: -len(example.tokens)):  # stable
        size = len(example.tokens)
        fitting = (
            n
            for n, (left, _, branches) in enumerate(rows)
            if size <= left and shapes.pair([*branches, *example.branches]) <= pair
        )
        best = min(fitting, key=lambda n: rows[n][0], default=None)
        if best is None:
            rows.append((length - size, [example], [*example.branches]))
        else:
            left, row, branches = rows[best]
            rows[best] = left - size, [*row, example], [*branches, *example.branches]
    return [row for _, row, _ in rows]


def _cut(rows: Sequence[Row], shapes: BatchShapes, unscored: bool) -> list[tuple[list[Row], int, int]]:
    """Rows by size, so many in a batch; it takes the buckets of its largest."""
    pair = lambda row: shapes.pair([branch for example in row for branch in example.branches])
    size = lambda row: sum(len(example.tokens) for example in row)
    ordered, batches = sorted(rows, key=lambda row: (pair(row), size(row))), []  # stable
    for start in range(0, len(ordered), shapes.batch_size):
        members = ordered[start : start + shapes.batch_size]
        length = next(bucket for bucket in shapes.length_buckets if max(map(size, members)) <= bucket)
        largest = max(map(pair, members))
        batches.append((members, length, shapes.unscored_pair(largest) if unscored else largest))
    return batches


def _cost(shapes: BatchShapes, batches: Sequence[tuple[list[Row], int, int]]) -> float:
    """What student and teacher go through, in tokens of short rows."""
    sizes = ((length, *shapes.tokens(length, pair)) for _, length, pair in batches)
    return shapes.batch_size * sum((length + P + M) * (1.0 + length / _FAR) for length, P, M, _ in sizes)
