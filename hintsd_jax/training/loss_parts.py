# SPDX-License-Identifier: Apache-2.0

"""The parts that a loss is a sum of: log-probabilities of student and teacher in, one loss per action token out.

A part says what one token costs; which tokens it acts on, and with which weight, stands in the batch (`weight_BAP`), as
the algorithm decided. What a loss needs follows from its parts: a teacher pass where one `needs_teacher`, a pass of the
weights that training began with where one `needs_reference`, a student without adapter dropout where one `uses_ratio`.

A part of one's own is a frozen dataclass with the attributes and the method of `LossPart`, returned by an algorithm's
`loss_parts`. It is a static argument of the compiled step, so it must be hashable.

Letters: X action tokens, V vocabulary.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from hintsd_jax.training import divergences


class TokenInputs(NamedTuple):
    """What is known of X action tokens. All float32, log-probabilities in nats.

    At temperature 1: student_XV, the student's, with its gradient; logprob_X, of the action token; teacher_XV,
    teacher_X and reference_XV the same of teacher and reference, without a gradient.
    Under the distribution that was sampled from (`sampling_distribution`), all of the action token: sampler_X, as the
    sampler saw it; sampled_logprob_X, the student's, with its gradient; sampled_teacher_X. Ratios are taken of these.
    advantage_X: of the algorithm. scored_X, bool: a teacher has scored the token. What is the teacher's is None where
    the loss needs none, and in batches that none reads; the reference's where the loss needs none.
    """

    student_XV: jax.Array
    logprob_X: jax.Array
    sampled_logprob_X: jax.Array
    sampler_X: jax.Array
    advantage_X: jax.Array
    scored_X: jax.Array
    teacher_XV: jax.Array | None = None
    teacher_X: jax.Array | None = None
    sampled_teacher_X: jax.Array | None = None
    reference_XV: jax.Array | None = None

    def teacher(self) -> tuple[jax.Array, jax.Array]:
        """teacher_XV and teacher_X. Raises ValueError where the part did not say that it needs a teacher."""
        if self.teacher_XV is None or self.teacher_X is None:
            raise ValueError("no teacher has scored these tokens: the loss part must say needs_teacher")
        return self.teacher_XV, self.teacher_X

    def reference(self) -> jax.Array:
        """reference_XV. Raises ValueError where the part did not say that it needs a reference."""
        if self.reference_XV is None:
            raise ValueError("no reference has scored these tokens: the loss part must say needs_reference")
        return self.reference_XV


class TokenLosses(NamedTuple):
    """loss_X: what is minimised. reported: further arrays [X], by metric name; their means over the part's tokens are
    metrics.
    """

    loss_X: jax.Array
    reported: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossPart:
    """One part of a loss.

    name: of its metrics and of its weights in `Branch.weights`. coefficient: the loss is the sum over the parts of
    coefficient x (weighted mean over the part's own tokens). mean: "token", over all of them at once; "sequence", over
    the episodes' own means, so that long ones do not weigh more. reports: the keys of `TokenLosses.reported`.
    """

    name: ClassVar[str]
    reports: ClassVar[tuple[str, ...]] = ()
    coefficient: float = 1.0
    mean: str = "token"

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has to score tokens for it."""
        return False

    @property
    def scored_tokens_only(self) -> bool:
        """Whether a token that no teacher has scored cannot have a weight. Where one can, `token_losses` has to do
        without a teacher too: examples that none reads are batches of their own.
        """
        return self.needs_teacher

    @property
    def needs_reference(self) -> bool:
        """Whether the weights that training began with have to score tokens for it."""
        return False

    @property
    def uses_ratio(self) -> bool:
        """Whether it compares the student with the sampler, which has no adapter dropout: then neither has the student,
        and sampling must not be greedy.
        """
        return False

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        """The loss of every token as if it had weight 1; traced inside the compiled step."""
        raise NotImplementedError(f"loss part {type(self).__name__} must give token_losses")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence(LossPart):
    """Distillation: the divergence of the teacher's distribution and the student's, see `divergences.divergence`.

    kind, alpha, support, top_k: as there. importance_clip: the divergence of a token is weighed with
    min(p_student / p_sampler, this) under the distribution that was sampled from, as in SDPO (arXiv 2601.20802); 0: it
    is not. Reported without that weight.
    """

    name: ClassVar[str] = "divergence"
    reports: ClassVar[tuple[str, ...]] = ("divergence",)
    kind: str = "reverse_kl"
    support: str = "student_topk"
    top_k: int = 100
    alpha: float = 0.5
    importance_clip: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def uses_ratio(self) -> bool:
        return self.importance_clip > 0

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        teacher_XV, _ = tokens.teacher()
        student_XK, teacher_XK = divergences.support_log_probs(tokens.student_XV, teacher_XV, self.support, self.top_k)
        divergence_X = divergences.divergence(student_XK, teacher_XK, self.kind, self.alpha)
        loss_X = divergence_X
        if self.importance_clip:
            ratio_X = jnp.exp(jax.lax.stop_gradient(tokens.sampled_logprob_X) - tokens.sampler_X)
            loss_X = jnp.minimum(ratio_X, self.importance_clip) * divergence_X
        return TokenLosses(loss_X, {"divergence": divergence_X})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(LossPart):
    """Supervised learning of the action: -log p_student(action)."""

    name: ClassVar[str] = "cross_entropy"
    reports: ClassVar[tuple[str, ...]] = ("cross_entropy",)

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        return TokenLosses(-tokens.logprob_X, {"cross_entropy": -tokens.logprob_X})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(LossPart):
    """The clipped policy gradient of PPO (arXiv 1707.06347) with an upper clip range of its own (DAPO, 2503.14476).

    r = p_student / p_sampler of the action token under the distribution that was sampled from; the loss is
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    teacher_advantage: on tokens that a teacher has scored, A also has this times (log p_teacher - log p_sampler) of the
    action, the token advantage of OpenClaw-RL, both under that distribution; 0: no teacher is needed. Reported: the
    share of tokens at which the clip cuts the gradient off.
    """

    name: ClassVar[str] = "policy_gradient"
    reports: ClassVar[tuple[str, ...]] = ("clip_fraction",)
    clip_low: float = 0.2
    clip_high: float = 0.28
    teacher_advantage: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        return self.teacher_advantage != 0.0

    @property
    def scored_tokens_only(self) -> bool:
        return False

    @property
    def uses_ratio(self) -> bool:
        return True

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        advantage_X = tokens.advantage_X
        if self.needs_teacher and tokens.sampled_teacher_X is not None:  # else the algorithm's advantage alone
            hinted_X = self.teacher_advantage * (tokens.sampled_teacher_X - tokens.sampler_X)
            advantage_X = advantage_X + jnp.where(tokens.scored_X, hinted_X, 0.0)
        ratio_X = jnp.exp(tokens.sampled_logprob_X - tokens.sampler_X)
        free_X = ratio_X * advantage_X
        clipped_X = jnp.clip(ratio_X, 1.0 - self.clip_low, 1.0 + self.clip_high) * advantage_X
        is_clipped_X = (clipped_X < free_X).astype(free_X.dtype)
        return TokenLosses(-jnp.minimum(free_X, clipped_X), {"clip_fraction": is_clipped_X})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceKL(LossPart):
    """What leaving the policy that training began with costs: KL(student || reference), exact over the vocabulary, at
    temperature 1, both under the student's context. GRPO (arXiv 2402.03300) estimates it from the sampled token.
    """

    name: ClassVar[str] = "reference_kl"
    reports: ClassVar[tuple[str, ...]] = ("reference_kl",)

    @property
    def needs_reference(self) -> bool:
        return True

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        kl_X = divergences.kl(tokens.student_XV, tokens.reference())
        return TokenLosses(kl_X, {"reference_kl": kl_X})
