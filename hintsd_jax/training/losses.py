# SPDX-License-Identifier: Apache-2.0

"""The loss on action spans: hidden states of student, teacher and reference in, sums over the spans' tokens out.

`span_losses` projects the hidden states of a span to logits, asks every part of the loss (`loss_parts`) what the tokens
cost, and adds up everything that the update needs.

Invariants: logits exist for about `chunk_tokens` tokens at a time only, in the backward pass too (2048 tokens x 151,936
entries are 4.06 GiB at once, 1.25 GiB in chunks of 128); teacher and reference are behind `stop_gradient`; where the
mask is False nothing contributes.

Letters: B rows, A action tokens of a row (of one span or several), X tokens of a chunk, P parts, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hintsd_jax.errors import UserError
from hintsd_jax.models.sampling_distribution import SamplingDistribution
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
    row). sampling: what the actions were drawn from. Raises UserError where there is no part, or two sums would have
    one name.
    """

    parts: tuple[LossPart, ...]
    chunk_tokens: int = 128
    sampling: SamplingDistribution = SamplingDistribution()

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
    def needs_reference(self) -> bool:
        """Whether the weights that training began with score tokens."""
        return any(part.needs_reference for part in self.parts)

    @property
    def uses_ratio(self) -> bool:
        """Whether student and sampler are compared: the sampler has no adapter dropout, so the student has none."""
        return any(part.uses_ratio for part in self.parts)

    @property
    def trains_unscored_tokens(self) -> bool:
        """Whether tokens that no teacher has scored are trained on beside such that one has."""
        return self.needs_teacher and any(not part.scored_tokens_only for part in self.parts)

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


class Side(NamedTuple):
    """One policy's view of the action tokens. hidden_BAD: the hidden states that predict them, under the side's own
    context. project: hidden states to logits, with the side's weights.
    """

    hidden_BAD: jax.Array
    project: Project


def span_losses(
    student: Side, spans: Spans, *, loss: Loss, teacher: Side | None = None, reference: Side | None = None
) -> tuple[Sums, Tokens]:
    """The loss of the masked tokens, and what is reported about them.

    Args:
      student, teacher, reference: of the same action tokens. A teacher is looked at where the loss needs one; None in
        batches that none reads: then parts that act on scored tokens alone have no token. A reference must be there
        where the loss needs one.
      spans: the action tokens.
    Returns:
      (sums, tokens). Sums, scalars: loss (what is minimised, weighted); tokens; entropy (of the student, full
      vocabulary, nats), logprob (of the actions under the student), both at temperature 1; logprob_mismatch and
      logprob_mismatch_max (how far the log-probability under the distribution that was sampled from is from the
      sampler's, its sum and its maximum: nats); of each part its own reports and <name>_tokens, the tokens that it acts
      on; with a teacher teacher_gap (teacher's minus student's log-probability of the action) and
      teacher_scored_tokens. Tokens, with a teacher: teacher_gap, float32, teacher_best, int32: the teacher's likeliest
      id, and what a part with a teacher reports. Else empty.
    """
    sides = {"student": student}
    if loss.needs_teacher and teacher is not None:
        sides["teacher"] = teacher
    if loss.needs_reference and reference is not None:
        sides["reference"] = reference

    def of_tokens(hidden: dict[str, jax.Array], spans_X: Spans) -> tuple[Sums, Tokens]:
        mask_X, weight_XP = spans_X.mask_BA, spans_X.weight_BAP
        logits = {name: sides[name].project(hidden_XD) for name, hidden_XD in hidden.items()}
        inputs = _token_inputs(logits, spans_X, loss.sampling)
        sums, tokens = _student_sums(inputs, mask_X), {}
        if loss.needs_teacher:
            gap_X = jnp.zeros_like(inputs.logprob_X)
            counted_X = jnp.zeros_like(mask_X)
            if inputs.teacher_XV is not None and inputs.teacher_X is not None:
                best_X = jnp.argmax(inputs.teacher_XV, axis=-1).astype(jnp.int32)
                gap_X, counted_X = inputs.teacher_X - jax.lax.stop_gradient(inputs.logprob_X), mask_X & inputs.scored_X
                tokens = {"teacher_gap": gap_X, "teacher_best": best_X}
            sums["teacher_gap"] = _masked_sum(gap_X, counted_X)
            sums["teacher_scored_tokens"] = jnp.sum(counted_X, dtype=gap_X.dtype)
        loss_X = jnp.zeros_like(inputs.logprob_X)
        for p, part in enumerate(loss.parts):
            if part.scored_tokens_only and inputs.teacher_XV is None:
                sums |= dict.fromkeys((f"{part.name}_tokens", *part.reports), jnp.zeros((), loss_X.dtype))
                continue
            weight_X, (part_X, reported) = weight_XP[:, p], part.token_losses(inputs)
            loss_X += weight_X * part_X
            acts_X = mask_X & (weight_X != 0)
            sums[f"{part.name}_tokens"] = jnp.sum(acts_X, dtype=loss_X.dtype)
            sums |= {name: _masked_sum(jax.lax.stop_gradient(reported[name]), acts_X) for name in part.reports}
            if part.needs_teacher and tokens:
                tokens |= reported
        sums["loss"] = _masked_sum(loss_X, mask_X)
        return sums, jax.lax.stop_gradient(tokens)

    hidden = {name: side.hidden_BAD for name, side in sides.items()}
    return _over_chunks(of_tokens, (hidden, spans), loss.chunk_tokens)


def add_sums(a: Sums, b: Sums) -> Sums:
    """The sums of both, and the larger of what is a maximum."""
    return {name: jnp.maximum(a[name], b[name]) if name in MAXIMA else a[name] + b[name] for name in a}


def _token_inputs(logits: Mapping[str, jax.Array], spans_X: Spans, sampling: SamplingDistribution) -> TokenInputs:
    """Log-probabilities from the logits [X, V] of each side that is there."""
    constant_XV = jax.lax.stop_gradient(logits["student"])
    lowest_X = sampling.lowest_kept(constant_XV)
    if lowest_X is not None:
        lowest_X = checkpoint_name(lowest_X, KEPT_FOR_BACKWARD)  # found once: it takes many passes over the vocabulary

    def at_action(name: str, logp_XV: jax.Array) -> tuple[jax.Array, jax.Array]:
        """At temperature 1, and under the distribution that was sampled from."""
        logprob_X = _at(logp_XV, spans_X.actions_BA)
        if sampling.is_softmax:
            return logprob_X, logprob_X
        return logprob_X, sampling.logprobs(logits[name], spans_X.actions_BA, constant_XV, lowest_X)

    logp_XV = {name: jax.nn.log_softmax(logits_XV, axis=-1) for name, logits_XV in logits.items()}
    inputs = TokenInputs(
        logp_XV["student"],
        *at_action("student", logp_XV["student"]),
        sampler_X=spans_X.sampler_logprob_BA,
        advantage_X=spans_X.advantage_BA,
        scored_X=spans_X.scored_BA,
    )
    if "teacher" in logits:
        teacher_XV = logp_XV["teacher"]
        values = jax.lax.stop_gradient((teacher_XV, *at_action("teacher", teacher_XV)))
        inputs = inputs._replace(**dict(zip(("teacher_XV", "teacher_X", "sampled_teacher_X"), values, strict=True)))
    if "reference" in logits:
        inputs = inputs._replace(reference_XV=jax.lax.stop_gradient(logp_XV["reference"]))
    return inputs


def _at(logp_XV: jax.Array, tokens_X: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logp_XV, tokens_X[:, None], axis=-1)[:, 0]


def _masked_sum(values_X: jax.Array, mask_X: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask_X, values_X, 0.0))


def _student_sums(inputs: TokenInputs, mask_X: jax.Array) -> Sums:
    """What is reported about the student whatever the loss."""
    constants = (inputs.student_XV, inputs.logprob_X, inputs.sampled_logprob_X)
    logp_XV, logprob_X, sampled_X = jax.lax.stop_gradient(constants)
    mismatch_X = jnp.where(mask_X, jnp.abs(sampled_X - inputs.sampler_X), 0.0)
    return {
        "tokens": jnp.sum(mask_X, dtype=logp_XV.dtype),
        "entropy": _masked_sum(-jnp.sum(jnp.exp(logp_XV) * logp_XV, axis=-1), mask_X),
        "logprob": _masked_sum(logprob_X, mask_X),
        "logprob_mismatch": jnp.sum(mismatch_X),
        "logprob_mismatch_max": jnp.max(mismatch_X),
    }


def _over_chunks(
    of_tokens: Callable[..., tuple[Sums, Tokens]], arrays_BA: Any, chunk_tokens: int
) -> tuple[Sums, Tokens]:
    """Adds up and lines up `of_tokens(*arrays of [X, ...])` over all positions, a few columns of all rows at a time:
    about `chunk_tokens` tokens, and rows that are split over devices stay split. `arrays_BA`: a tuple of pytrees.
    Padding is False or zero.
    """
    rows, span = jax.tree.leaves(arrays_BA)[0].shape[:2]
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
    _, (sums, tokens) = jax.lax.scan(lambda carry, arrays: (carry, body(arrays)), None, jax.tree.map(split, arrays_BA))
    sums = {name: jnp.max(values) if name in MAXIMA else jnp.sum(values) for name, values in sums.items()}
    return sums, jax.tree.map(joined, tokens)
