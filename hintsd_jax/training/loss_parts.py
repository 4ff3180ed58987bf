# SPDX-License-Identifier: Apache-2.0

"""The parts that a loss is a sum of: log-probabilities of student and teacher in, one loss per action token out.

A part says what one token costs; which tokens it acts on, and with which weight, stands in the batch (`weight_BAP`), as
the algorithm decided. What a loss needs follows from its parts: a teacher pass where one `needs_teacher`.

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
    """What is known of X action tokens. All float32, log-probabilities in nats at temperature 1.

    student_XV: the student's, with its gradient; logprob_X: of the action token. sampler_X: of the action token as the
    sampler saw it. advantage_X: of the algorithm. scored_X, bool: a teacher has scored the token. teacher_XV and
    teacher_X, as the student's but without a gradient: None where the loss needs no teacher.
    """

    student_XV: jax.Array
    logprob_X: jax.Array
    sampler_X: jax.Array
    advantage_X: jax.Array
    scored_X: jax.Array
    teacher_XV: jax.Array | None = None
    teacher_X: jax.Array | None = None

    def teacher(self) -> tuple[jax.Array, jax.Array]:
        """teacher_XV and teacher_X. Raises ValueError where the part did not say that it needs a teacher."""
        if self.teacher_XV is None or self.teacher_X is None:
            raise ValueError("no teacher has scored these tokens: the loss part must say needs_teacher")
        return self.teacher_XV, self.teacher_X


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
    coefficient x (weighted mean over the part's own tokens). reports: the keys of `TokenLosses.reported`.
    """

    name: ClassVar[str]
    reports: ClassVar[tuple[str, ...]] = ()
    coefficient: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher has to score tokens for it."""
        return False

    @property
    def scored_tokens_only(self) -> bool:
        """Whether a token that no teacher has scored cannot have a weight."""
        return self.needs_teacher

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        """The loss of every token as if it had weight 1; traced inside the compiled step."""
        raise NotImplementedError(f"loss part {type(self).__name__} must give token_losses")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence(LossPart):
    """Distillation: the divergence of the teacher's distribution and the student's, see `divergences.divergence`.

    kind, alpha, support, top_k: as there. importance_clip: the divergence of a token is weighed with
    min(p_student / p_sampler, this), as in SDPO (arXiv 2601.20802); 0: it is not. Reported without that weight.
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

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        teacher_XV, _ = tokens.teacher()
        student_XK, teacher_XK = divergences.support_log_probs(tokens.student_XV, teacher_XV, self.support, self.top_k)
        divergence_X = divergences.divergence(student_XK, teacher_XK, self.kind, self.alpha)
        loss_X = divergence_X
        if self.importance_clip:
            ratio_X = jnp.exp(jax.lax.stop_gradient(tokens.logprob_X) - tokens.sampler_X)
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

    r = p_student / p_sampler of the action token; the loss is -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    teacher_advantage: on tokens that a teacher has scored, A also has this times (log p_teacher - log p_sampler) of the
    action, the token advantage of OpenClaw-RL; 0: no teacher is needed. Reported: the share of tokens at which the clip
    cuts the gradient off.
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

    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        advantage_X = tokens.advantage_X
        if self.needs_teacher:
            _, teacher_X = tokens.teacher()
            hinted_X = self.teacher_advantage * (teacher_X - tokens.sampler_X)
            advantage_X = advantage_X + jnp.where(tokens.scored_X, hinted_X, 0.0)
        ratio_X = jnp.exp(tokens.logprob_X - tokens.sampler_X)
        free_X = ratio_X * advantage_X
        clipped_X = jnp.clip(ratio_X, 1.0 - self.clip_low, 1.0 + self.clip_high) * advantage_X
        is_clipped_X = (clipped_X < free_X).astype(free_X.dtype)
        return TokenLosses(-jnp.minimum(free_X, clipped_X), {"clip_fraction": is_clipped_X})
