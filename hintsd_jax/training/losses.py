# SPDX-License-Identifier: Apache-2.0

"""The loss on action spans: hidden states of student and teacher in, sums over the spans' tokens out.

`span_losses` projects the hidden states of a span to logits, asks every part of the loss (`loss_parts`) what the tokens
cost, and adds up everything that the update needs.

Invariants: logits exist for about `chunk_tokens` tokens at a time only, in the backward pass too (2048 tokens x 151,936
entries are 4.06 GiB at once, 1.25 GiB in chunks of 128); everything on the teacher's side is behind `stop_gradient`;
where the mask is False nothing contributes.

Letters: B rows, A action tokens of a row (of one span or several), X tokens of a chunk, P parts, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hintsd_jax.errors import UserError
from hintsd_jax.training.divergences import KEPT_FOR_BACKWARD
from hintsd_jax.training.loss_parts import LossPart, TokenInputs

MAXIMA = ("logprob_mismatch_max",)  # of the reported sums, those that are maxima
_COUNTED_BY_TOKENS = ("loss", "entropy", "logprob", "logprob_mismatch")  # reported as means over all action tokens
_TAKEN = (  # names that no part may report under: the sums of every loss, and what the update and its batches add
    *(*_COUNTED_BY_TOKENS, *MAXIMA, "tokens", "teacher_gap", "teacher_scored_tokens"),
    *("grad_norm", "lr", "skipped", "student_tokens", "teacher_tokens", "padding_fraction"),
)

Project = Callable[[jax.Array], jax.Array]  # hidden [..., D] -> logits [..., V]
Sums = dict[str, jax.Array]  # scalars
Tokens = dict[str, jax.Array]  # [B, A]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A sum of parts. Hashable: a static argument of the compiled step.

    parts: with different names. chunk_tokens: about how many tokens have logits at the same time (at least one of every
    row). Raises UserError where there is no part, or two sums would have one name.
    """

    parts: tuple[LossPart, ...]
    chunk_tokens: int = 128

    def __post_init__(self):
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise UserError(f"a loss needs parts with different names, got {names}: see the algorithm's loss_parts")
        taken = list(_TAKEN)
        for part in self.parts:
            for name in (*part.reports, f"{part.name}_tokens"):
                if name in taken:
                    raise UserError(f"loss part {part.name!r} reports {name!r}, which is taken: give it another name")
                taken.append(name)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher scores tokens."""
        return any(part.needs_teacher for part in self.parts)

    @property
    def mean_over(self) -> dict[str, str]:
        """Every sum that is reported as a mean -> the sum that counts its tokens."""
        counts = dict.fromkeys(_COUNTED_BY_TOKENS, "tokens")
        for part in self.parts:
            counts |= dict.fromkeys(part.reports, f"{part.name}_tokens")
        return counts | ({"teacher_gap": "teacher_scored_tokens"} if self.needs_teacher else {})

    @property
    def sum_names(self) -> tuple[str, ...]:
        """The keys of the sums that this loss yields, see `span_losses`."""
        return tuple(dict.fromkeys((*self.mean_over, *self.mean_over.values(), *MAXIMA)))


class Spans(NamedTuple):
    """The action tokens of B rows.

    actions_BA: int32 ids. sampler_logprob_BA: float32, their log-probabilities as the sampler saw them. mask_BA: bool,
    True on real action tokens. scored_BA: bool, True where a teacher reads the token. weight_BAP: float32, of each part
    of the loss; 0 where the part does not act. advantage_BA: float32.
    """

    actions_BA: jax.Array
    sampler_logprob_BA: jax.Array
    mask_BA: jax.Array
    scored_BA: jax.Array
    weight_BAP: jax.Array
    advantage_BA: jax.Array


def span_losses(
    student_BAD: jax.Array,
    spans: Spans,
    *,
    student: Project,
    loss: Loss,
    teacher_BAD: jax.Array | None = None,
    teacher: Project | None = None,
) -> tuple[Sums, Tokens]:
    """The loss of the masked tokens, and what is reported about them.

    Args:
      student_BAD, teacher_BAD: hidden states that predict the action tokens, each side under its own context.
      spans: the action tokens, the same under both contexts.
      student, teacher: hidden states to logits, with each side's weights. Where the loss needs no teacher, neither of
        its two is looked at.
    Returns:
      (sums, tokens). Sums, scalars: loss (what is minimised, weighted); tokens; entropy (of the student, full
      vocabulary, nats), logprob (of the actions under the student), logprob_mismatch and logprob_mismatch_max (how far
      that is from the sampler's, its sum and its maximum: nats); of each part its own reports and <name>_tokens, the
      tokens that it acts on; with a teacher teacher_gap (teacher's minus student's log-probability of the action) and
      teacher_scored_tokens. Tokens, with a teacher: teacher_gap, float32, teacher_best, int32: the teacher's likeliest
      id, and what a part with a teacher reports. Else empty.
    """

    def of_tokens(student_XD, actions_X, sampler_X, mask_X, scored_X, weight_XP, advantage_X, *teachers):
        student_XV = _log_probs(student, student_XD)
        logprob_X = _at(student_XV, actions_X)
        inputs = TokenInputs(student_XV, logprob_X, sampler_X, advantage_X, scored_X)
        sums, tokens = _student_sums(student_XV, logprob_X, sampler_X, mask_X), {}
        if teacher is not None and teachers:
            teacher_XV = jax.lax.stop_gradient(_log_probs(teacher, teachers[0]))
            teacher_X = _at(teacher_XV, actions_X)
            inputs = inputs._replace(teacher_XV=teacher_XV, teacher_X=teacher_X)
            gap_X, counted_X = teacher_X - jax.lax.stop_gradient(logprob_X), mask_X & scored_X
            tokens = {"teacher_gap": gap_X, "teacher_best": jnp.argmax(teacher_XV, axis=-1).astype(jnp.int32)}
            sums["teacher_gap"] = _masked_sum(gap_X, counted_X)
            sums["teacher_scored_tokens"] = jnp.sum(counted_X, dtype=logprob_X.dtype)
        loss_X = jnp.zeros_like(logprob_X)
        for p, part in enumerate(loss.parts):
            weight_X, (part_X, reported) = weight_XP[:, p], part.token_losses(inputs)
            loss_X += weight_X * part_X
            acts_X = mask_X & (weight_X != 0)
            sums[f"{part.name}_tokens"] = jnp.sum(acts_X, dtype=loss_X.dtype)
            sums |= {name: _masked_sum(jax.lax.stop_gradient(reported[name]), acts_X) for name in part.reports}
            if part.needs_teacher:
                tokens |= reported
        sums["loss"] = _masked_sum(loss_X, mask_X)
        return sums, jax.lax.stop_gradient(tokens)

    teachers = (teacher_BAD,) if loss.needs_teacher and teacher_BAD is not None else ()
    return _over_chunks(of_tokens, (student_BAD, *spans, *teachers), loss.chunk_tokens)


def add_sums(a: Sums, b: Sums) -> Sums:
    """The sums of both, and the larger of what is a maximum."""
    return {name: jnp.maximum(a[name], b[name]) if name in MAXIMA else a[name] + b[name] for name in a}


def _log_probs(project: Project, hidden_XD: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(project(hidden_XD), axis=-1)


def _at(logp_XV: jax.Array, tokens_X: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logp_XV, tokens_X[:, None], axis=-1)[:, 0]


def _masked_sum(values_X: jax.Array, mask_X: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask_X, values_X, 0.0))


def _student_sums(logp_XV: jax.Array, logprob_X: jax.Array, sampler_X: jax.Array, mask_X: jax.Array) -> Sums:
    """What is reported about the student whatever the loss."""
    logp_XV, logprob_X = jax.lax.stop_gradient((logp_XV, logprob_X))
    mismatch_X = jnp.where(mask_X, jnp.abs(logprob_X - sampler_X), 0.0)
    return {
        "tokens": jnp.sum(mask_X, dtype=logp_XV.dtype),
        "entropy": _masked_sum(-jnp.sum(jnp.exp(logp_XV) * logp_XV, axis=-1), mask_X),
        "logprob": _masked_sum(logprob_X, mask_X),
        "logprob_mismatch": jnp.sum(mismatch_X),
        "logprob_mismatch_max": jnp.max(mismatch_X),
    }


def _over_chunks(
    of_tokens: Callable[..., tuple[Sums, Tokens]], arrays_BA: tuple[jax.Array, ...], chunk_tokens: int
) -> tuple[Sums, Tokens]:
    """Adds up and lines up `of_tokens(*arrays of [X, ...])` over all positions, a few columns of all rows at a time:
    about `chunk_tokens` tokens, and rows that are split over devices stay split. Padding is False or zero.
    """
    rows, span = arrays_BA[0].shape[:2]
    columns = min(span, max(1, chunk_tokens // rows))
    padding = -span % columns

    def split(array: Any) -> jax.Array:
        padded = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
        parts = padded.reshape((rows, -1, columns, *array.shape[2:])).swapaxes(0, 1)
        return parts.reshape((-1, rows * columns, *array.shape[2:]))

    def joined(parts: jax.Array) -> jax.Array:
        return parts.reshape((-1, rows, columns)).swapaxes(0, 1).reshape((rows, -1))[:, :span]

    # Logits are made again in the backward pass instead of kept; inside a scan CSE cannot undo that, so no barrier is
    # needed.
    policy = jax.checkpoint_policies.save_only_these_names(KEPT_FOR_BACKWARD)
    body = jax.checkpoint(lambda arrays: of_tokens(*arrays), prevent_cse=False, policy=policy)
    _, (sums, tokens) = jax.lax.scan(lambda carry, arrays: (carry, body(arrays)), None, tuple(map(split, arrays_BA)))
    sums = {name: jnp.max(values) if name in MAXIMA else jnp.sum(values) for name, values in sums.items()}
    return sums, jax.tree.map(joined, tokens)
