# SPDX-License-Identifier: Apache-2.0

"""How far two next-token distributions are from each other: log-probabilities in, nats per token out.

Letters: X any leading axes (tokens), V vocabulary, K entries of a reduced support.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The log-mass of the top k is cut at this value, so that the tail keeps a mass of at least 1e-7 and a finite logarithm.
MAX_LOG_MASS = -1e-7

# Name of the small arrays that the backward pass keeps (see `support_log_probs`).
KEPT_FOR_BACKWARD = "support"


def kl(logp_XK: jax.Array, logq_XK: jax.Array) -> jax.Array:
    """KL(p || q) [X] of two normalised log-probability arrays over the same entries."""
    return jnp.sum(jnp.exp(logp_XK) * (logp_XK - logq_XK), axis=-1)


def divergence(student_XK: jax.Array, teacher_XK: jax.Array, kind: str, alpha: float = 0.5) -> jax.Array:
    """Divergence [X], in nats, of two normalised log-probability arrays [X, K] over the same entries.

    Args:
      kind: "reverse_kl" KL(student || teacher), "forward_kl" KL(teacher || student), or "jsd".
      alpha: of "jsd", the generalised Jensen-Shannon divergence of SDPO (arXiv 2601.20802): m = (1-a) s + a t,
        (1-a) KL(s||m) + a KL(t||m). That expression vanishes at both ends, so a = 0 is *defined* as KL(t||s) and
        a = 1 as KL(s||t).
    """
    alpha = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": alpha}[kind]
    if alpha == 0.0:
        return kl(teacher_XK, student_XK)
    if alpha == 1.0:
        return kl(student_XK, teacher_XK)
    mixture_XK = jnp.logaddexp(student_XK + jnp.log1p(-alpha), teacher_XK + jnp.log(alpha))
    return (1.0 - alpha) * kl(student_XK, mixture_XK) + alpha * kl(teacher_XK, mixture_XK)


def with_tail(logp_XV: jax.Array, indices_XK: jax.Array) -> jax.Array:
    """Log-probabilities at `indices` and, last, the log of all the remaining mass: [X, K + 1]."""
    chosen_XK = jnp.take_along_axis(logp_XV, indices_XK, axis=-1)
    mass_X1 = jax.nn.logsumexp(chosen_XK, axis=-1, keepdims=True)
    # log(1 - exp(m)) by expm1: fp32 has only two values between exp(-1e-7) and 1, and the plain form would round.
    tail_X1 = jnp.log(-jnp.expm1(jnp.minimum(mass_X1, MAX_LOG_MASS)))
    return jnp.concatenate([chosen_XK, tail_X1], axis=-1)


def support_log_probs(
    student_XV: jax.Array, teacher_XV: jax.Array, support: str, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """Both sides' log-probabilities on the configured support, student's and teacher's: each [X, top_k + 1] or [X, V].

    Args:
      support: "student_topk" or "teacher_topk": the `top_k` likeliest entries of that side one by one and all others
        as a single entry (the tail); "full", or a `top_k` of V or more: all entries.
    """
    if support == "full" or top_k >= student_XV.shape[-1]:
        return student_XV, teacher_XV
    ranked_XV = student_XV if support == "student_topk" else teacher_XV
    _, indices_XK = jax.lax.top_k(jax.lax.stop_gradient(ranked_XV), top_k)
    # These two are small ([X, K]) and all that the backward pass needs of the teacher: kept, they save it a second
    # projection of the teacher's hidden states and a second sort of the vocabulary.
    indices_XK = checkpoint_name(indices_XK, KEPT_FOR_BACKWARD)
    teacher_XK = checkpoint_name(with_tail(teacher_XV, indices_XK), KEPT_FOR_BACKWARD)
    return with_tail(student_XV, indices_XK), teacher_XK
