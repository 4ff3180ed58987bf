"""Losses on action spans: hidden states of student and teacher in, sums over the span's tokens out.

`token_divergence` compares two distributions token by token, `surrogate` is the clipped policy gradient; `span_losses`
projects the hidden states of a span to logits and adds up everything the update needs. Invariants: logits exist for
`chunk` tokens at a time only, in the backward pass too (2048 tokens x 151,936 entries are 4.06 GiB at once, 1.25 GiB in
chunks of 128); everything on the teacher's side is behind `stop_gradient`; where the mask is False nothing contributes.

Letters: B rows, A action tokens of a row (of one span or several), X any leading axes, D model, V vocabulary, K entries
of a reduced support.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hintsd_jax.errors import UserError

LOSSES = ("distill", "sft", "policy", "distill+policy", "judged")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
SUPPORTS = ("student_topk", "teacher_topk", "full")

# The log-mass of the top k is cut at this value, so that the tail keeps a mass of at least 1e-7 and a finite logarithm.
MAX_LOG_MASS = -1e-7

MAXIMA = ("mismatch_max",)  # of the reported sums, those that are not sums
PER_TAUGHT = (
    "divergence",
    "teacher_gap",
)  # sums over the tokens that a teacher has scored, of which there are `taught`

Project = Callable[[jax.Array], jax.Array]  # hidden [..., D] -> logits [..., V]
Sums = dict[str, jax.Array]  # scalars
Tokens = dict[str, jax.Array]  # [B, A]


class Spans(NamedTuple):
    """The action tokens of B rows.

    actions_BA: int32 ids. sampled_BA: float32, their log-probabilities as the sampler saw them. mask_BA: bool, True on
    real action tokens. weight_BA: float32, of the divergence or the cross-entropy; 0 where no teacher has scored the
    token. advantage_BA: float32.
    """

    actions_BA: jax.Array
    sampled_BA: jax.Array
    mask_BA: jax.Array
    weight_BA: jax.Array
    advantage_BA: jax.Array


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised on the action spans. Hashable: a static argument of the compiled step.

    loss: "distill": the divergence of teacher and student, times the weight. "sft": -weight log p(action). "policy":
      the `surrogate` of the advantages. "distill+policy": both added (the weights say in which proportion). "judged":
      the surrogate of advantage + weight (log p_teacher(action) - log p_sampler(action)), the token advantage of
      OpenClaw-RL.
    divergence: "reverse_kl" KL(student||teacher), "forward_kl" KL(teacher||student), or "jsd" with `alpha` in [0, 1].
    support: the entries compared: the `top_k` likeliest of one side plus one bucket for the rest, or the full
    vocabulary.
    importance_clip: the divergence of a token is weighed with min(p_student / p_sampler, this), as in SDPO; 0: it is
    not.
    clip_low, clip_high: the probability ratio of a surrogate counts between 1 - clip_low and 1 + clip_high.
    chunk: about how many tokens have logits at the same time (at least one of every row).
    """

    loss: str = "distill"
    divergence: str = "reverse_kl"
    support: str = "student_topk"
    top_k: int = 100
    alpha: float = 0.5
    importance_clip: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    chunk: int = 128

    def __post_init__(self):
        for field, allowed in (("loss", LOSSES), ("divergence", DIVERGENCES), ("support", SUPPORTS)):
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"distill.{field} = {getattr(self, field)!r} is unknown: choose one of {', '.join(allowed)}"
                )
        if self.top_k < 1 or self.chunk < 1:
            raise UserError(f"loss.top_k = {self.top_k} and loss.chunk_tokens = {self.chunk} must both be at least 1")
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"loss.alpha = {self.alpha} must lie between 0 (forward KL) and 1 (reverse KL)")
        if self.importance_clip < 0 or self.clip_high < 0 or not 0.0 <= self.clip_low <= 1.0:
            raise UserError(
                "loss.importance_clip and clip_high must not be negative, and clip_low must lie between 0 and 1"
            )

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.loss not in ("sft", "policy")

    @property
    def reinforced(self) -> bool:
        """Whether there is a policy gradient."""
        return self.loss in ("policy", "distill+policy", "judged")

    @property
    def sum_names(self) -> tuple[str, ...]:
        """The keys of the sums that this loss yields. Those in `MAXIMA` are none; those in `PER_TAUGHT` are meant to be
        divided by "taught", all others by "tokens"."""
        names = ("loss", "tokens", "entropy", "logprob", "mismatch", "mismatch_max")
        return names + (("taught", *PER_TAUGHT) if self.taught else ()) + (("clipped",) if self.reinforced else ())


def _kl(logp_XK: jax.Array, logq_XK: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(logp_XK) * (logp_XK - logq_XK), axis=-1)


def divergence(student_XK: jax.Array, teacher_XK: jax.Array, config: LossConfig) -> jax.Array:
    """Divergence [X], in nats, of two normalised log-probability arrays [X, K] over the same entries.

    The generalised Jensen-Shannon divergence is SDPO's (arXiv 2601.20802): m = (1-a) s + a t, (1-a) KL(s||m) + a
    KL(t||m). That expression vanishes at both ends, so a = 0 is *defined* as KL(t||s) and a = 1 as KL(s||t).
    """
    alpha = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": config.alpha}[config.divergence]
    if alpha == 0.0:
        return _kl(teacher_XK, student_XK)
    if alpha == 1.0:
        return _kl(student_XK, teacher_XK)
    mixture_XK = jnp.logaddexp(student_XK + jnp.log1p(-alpha), teacher_XK + jnp.log(alpha))
    return (1.0 - alpha) * _kl(student_XK, mixture_XK) + alpha * _kl(teacher_XK, mixture_XK)


def with_tail(logp_XV: jax.Array, indices_XK: jax.Array) -> jax.Array:
    """Log-probabilities at `indices` and, last, the log of all the remaining mass: [X, K + 1]."""
    chosen_XK = jnp.take_along_axis(logp_XV, indices_XK, axis=-1)
    mass_X1 = jax.nn.logsumexp(chosen_XK, axis=-1, keepdims=True)
    # log(1 - exp(m)) by expm1: fp32 has only two values between exp(-1e-7) and 1, and the plain form would round to
    # them.
    tail_X1 = jnp.log(-jnp.expm1(jnp.minimum(mass_X1, MAX_LOG_MASS)))
    return jnp.concatenate([chosen_XK, tail_X1], axis=-1)


def token_divergence(student_XV: jax.Array, teacher_XV: jax.Array, config: LossConfig) -> jax.Array:
    """Divergence [X] of full log-probability arrays [X, V] on the configured support.

    The `top_k` entries of the student (or teacher) are compared one by one and all others as a single bucket; `top_k`
    of V or more is the full support.
    """
    if config.support == "full" or config.top_k >= student_XV.shape[-1]:
        return divergence(student_XV, teacher_XV, config)
    ranked_XV = student_XV if config.support == "student_topk" else teacher_XV
    _, indices_XK = jax.lax.top_k(jax.lax.stop_gradient(ranked_XV), config.top_k)
    # These two are small ([X, K]) and all that the backward pass needs of the teacher: kept, they save it a second
    # projection of the teacher's hidden states and a second sort of the vocabulary.
    indices_XK = checkpoint_name(indices_XK, "support")
    teacher_XK = checkpoint_name(with_tail(teacher_XV, indices_XK), "support")
    return divergence(with_tail(student_XV, indices_XK), teacher_XK, config)


def surrogate(
    logprob_X: jax.Array, sampled_X: jax.Array, advantage_X: jax.Array, config: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """The clipped policy gradient of PPO (arXiv 1707.06347) with a clip range of its own upwards (DAPO, arXiv
    2503.14476), to be minimised.

    r = p_student / p_sampler of the action token; the loss is -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    Returns:
      (loss [X], clipped [X]: 1.0 where the clip holds the gradient back).
    """
    ratio_X = jnp.exp(logprob_X - sampled_X)
    free_X = ratio_X * advantage_X
    held_X = jnp.clip(ratio_X, 1.0 - config.clip_low, 1.0 + config.clip_high) * advantage_X
    return -jnp.minimum(free_X, held_X), (held_X < free_X).astype(free_X.dtype)


def _log_probs(project: Project, hidden_XD: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(project(hidden_XD), axis=-1)


def _at(logp_XV: jax.Array, tokens_X: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logp_XV, tokens_X[:, None], axis=-1)[:, 0]


def _masked_sum(values_X: jax.Array, mask_X: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask_X, values_X, 0.0))


def _student_sums(logp_XV: jax.Array, actions_X: jax.Array, sampled_X: jax.Array, mask_X: jax.Array) -> Sums:
    """What is reported about the student whatever the loss."""
    logp_XV = jax.lax.stop_gradient(logp_XV)
    logprob_X = _at(logp_XV, actions_X)
    mismatch_X = jnp.where(mask_X, jnp.abs(logprob_X - sampled_X), 0.0)
    return {
        "tokens": jnp.sum(mask_X, dtype=logp_XV.dtype),
        "entropy": _masked_sum(-jnp.sum(jnp.exp(logp_XV) * logp_XV, axis=-1), mask_X),
        "logprob": _masked_sum(logprob_X, mask_X),
        "mismatch": jnp.sum(mismatch_X),
        "mismatch_max": jnp.max(mismatch_X),
    }


def add_sums(a: Sums, b: Sums) -> Sums:
    """The sums of both, and the larger of what is a maximum."""
    return {name: jnp.maximum(a[name], b[name]) if name in MAXIMA else a[name] + b[name] for name in a}


def _over_chunks(
    of_tokens: Callable[..., tuple[Sums, Tokens]], arrays_BA: tuple[jax.Array, ...], chunk: int
) -> tuple[Sums, Tokens]:
    """Adds up and lines up `of_tokens(*arrays of [X, ...])` over all positions, a few columns of all rows at a time:
    about `chunk` tokens, and rows that are split over devices stay split. Padding is False or zero."""
    rows, span = arrays_BA[0].shape[:2]
    columns = min(span, max(1, chunk // rows))
    padding = -span % columns

    def split(array: Any) -> jax.Array:
        padded = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
        parts = padded.reshape((rows, -1, columns, *array.shape[2:])).swapaxes(0, 1)
        return parts.reshape((-1, rows * columns, *array.shape[2:]))

    def joined(parts: jax.Array) -> jax.Array:
        return parts.reshape((-1, rows, columns)).swapaxes(0, 1).reshape((rows, -1))[:, :span]

    # Logits are made again in the backward pass instead of kept; inside a scan CSE cannot undo that, so no barrier is
    # needed.
    policy = jax.checkpoint_policies.save_only_these_names("support")
    body = jax.checkpoint(lambda arrays: of_tokens(*arrays), prevent_cse=False, policy=policy)
    _, (sums, tokens) = jax.lax.scan(lambda carry, arrays: (carry, body(arrays)), None, tuple(map(split, arrays_BA)))
    sums = {name: jnp.max(values) if name in MAXIMA else jnp.sum(values) for name, values in sums.items()}
    return sums, jax.tree.map(joined, tokens)


def span_losses(
    student_BAD: jax.Array,
    spans: Spans,
    *,
    student: Project,
    config: LossConfig,
    teacher_BAD: jax.Array | None = None,
    teacher: Project | None = None,
) -> tuple[Sums, Tokens]:
    """The loss of the masked tokens, and what is reported about them.

    Args:
      student_BAD, teacher_BAD: hidden states that predict the action tokens, each side under its own context.
      spans: the action tokens, the same under both contexts.
      student, teacher: hidden states to logits, with each side's weights. Without a teacher in the loss, neither of its
        two is looked at.
    Returns:
      (sums, tokens). Sums, scalars, of `LossConfig.sum_names`: loss (what is minimised); tokens; entropy (of the
      student, full vocabulary, nats), logprob (of the actions under the student), mismatch and mismatch_max (how far
      that is from `sampled`, its sum and its maximum: nats); with a teacher: taught (tokens of a weight above 0), and
      over those divergence (unweighted, nats) and teacher_gap (teacher's minus student's log-probability of the
      action); with a policy gradient: clipped (tokens held by the clip). Tokens, with a teacher: divergence and
      teacher_gap, float32, and teacher_best, int32: the teacher's likeliest id. Else empty.
    """

    def of_tokens(student_XD, actions_X, sampled_X, mask_X, weight_X, advantage_X, *teachers):
        student_XV = _log_probs(student, student_XD)
        logprob_X = _at(student_XV, actions_X)
        sums, tokens = _student_sums(student_XV, actions_X, sampled_X, mask_X), {}
        loss_X = jnp.zeros_like(logprob_X)
        if teachers:
            teacher_XV = jax.lax.stop_gradient(_log_probs(teacher, teachers[0]))
            teacher_X = _at(teacher_XV, actions_X)
            divergence_X = token_divergence(student_XV, teacher_XV, config)
            gap_X, taught_X = teacher_X - jax.lax.stop_gradient(logprob_X), mask_X & (weight_X > 0)
            tokens = {
                "divergence": divergence_X,
                "teacher_gap": gap_X,
                "teacher_best": jnp.argmax(teacher_XV, axis=-1).astype(jnp.int32),
            }
            sums["taught"] = jnp.sum(taught_X, dtype=loss_X.dtype)
            sums |= {name: _masked_sum(jax.lax.stop_gradient(tokens[name]), taught_X) for name in PER_TAUGHT}
        if config.loss in ("distill", "distill+policy"):
            trusted_X = weight_X
            if config.importance_clip:
                trusted_X *= jnp.minimum(jnp.exp(jax.lax.stop_gradient(logprob_X) - sampled_X), config.importance_clip)
            loss_X += trusted_X * divergence_X
        if config.loss == "sft":
            loss_X -= weight_X * logprob_X
        if config.reinforced:
            if config.loss == "judged":
                advantage_X += weight_X * (teacher_X - sampled_X)
            reinforced_X, clipped_X = surrogate(logprob_X, sampled_X, advantage_X, config)
            loss_X += reinforced_X
            sums["clipped"] = _masked_sum(jax.lax.stop_gradient(clipped_X), mask_X)
        sums["loss"] = _masked_sum(loss_X, mask_X)
        return sums, jax.lax.stop_gradient(tokens)

    return _over_chunks(of_tokens, (student_BAD, *spans, *((teacher_BAD,) if config.taught else ())), config.chunk)
