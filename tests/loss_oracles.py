"""The loss parts in NumPy's float64: plain loops over single tokens, from the formulas, not the code."""

import numpy as np

from hintsd_jax.models.sampling_distribution import SamplingDistribution
from hintsd_jax.training.loss_parts import CrossEntropy, Divergence, PolicyGradient, ReferenceKL

SOFTMAX = SamplingDistribution()


def log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.log(np.sum(np.exp(logits)))


def divergence(student_logits, teacher_logits, part):
    """One token: logits [V] of both sides -> the divergence of the distributions on the part's support."""
    s, t = log_softmax(student_logits), log_softmax(teacher_logits)
    if part.support != "full" and part.top_k < len(s):
        kept = sorted(range(len(s)), key=lambda v: -(s if part.support == "student_topk" else t)[v])[: part.top_k]
        tail = lambda x: np.log(1 - np.exp(min(np.log(np.sum(np.exp(x[kept]))), -1e-7)))
        s, t = np.append(s[kept], tail(s)), np.append(t[kept], tail(t))
    kl = lambda p, q: sum(np.exp(p[v]) * (p[v] - q[v]) for v in range(len(p)))
    a = part.alpha
    if part.kind == "forward_kl" or (part.kind == "jsd" and a == 0):
        return kl(t, s)
    if part.kind == "reverse_kl" or (part.kind == "jsd" and a == 1):
        return kl(s, t)
    m = np.log((1 - a) * np.exp(s) + a * np.exp(t))
    return (1 - a) * kl(s, m) + a * kl(t, m)


def clipped_surrogate(ratio, advantage, part):
    """PPO's clipped objective by its cases, as a loss; whether the clip cuts the gradient off."""
    if advantage > 0 and ratio > 1 + part.clip_high:
        return -(1 + part.clip_high) * advantage, True
    if advantage < 0 and ratio < 1 - part.clip_low:
        return -(1 - part.clip_low) * advantage, True
    return -ratio * advantage, False


def kept_tokens(logits, sampling):
    """Tokens that may be drawn, by sorting: top-k, then of what is left the shortest beginning that reaches top_p."""
    probs = np.exp(np.float64(logits) / (sampling.temperature or 1.0))
    order = np.argsort(-probs, kind="stable")
    if not sampling.temperature:
        return order
    order = order[: sampling.top_k or None]
    if sampling.top_p == 1:
        return order
    mass = np.cumsum(probs[order]) / np.sum(probs[order])
    return order[: int(np.searchsorted(mass, sampling.top_p - 1e-12)) + 1]


def sampled_logprob(logits, action, sampling, like=None):
    """Of the distribution that the action was drawn from; a teacher's among the tokens that are kept of the student's
    logits, `like`.
    """
    kept = {*kept_tokens(logits if like is None else like, sampling).tolist(), int(action)}
    scaled = np.float64(logits) / (sampling.temperature or 1.0)
    return scaled[action] - np.log(sum(np.exp(scaled[v]) for v in kept))


def token_loss(
    part,
    student_logits,
    teacher_logits,
    action,
    sampler,
    advantage,
    scored,
    sampling=SOFTMAX,
    reference_logits=None,
):
    """One token: what a part minimises there, and what it reports."""
    log_s = log_softmax(student_logits)[action]
    sampled_s = sampled_logprob(student_logits, action, sampling)
    sampled_t = sampled_logprob(teacher_logits, action, sampling, student_logits)
    ratio = np.exp(sampled_s - sampler)
    match part:
        case Divergence():
            value = divergence(student_logits, teacher_logits, part)
            trusted = min(ratio, part.importance_clip) if part.importance_clip else 1.0
            return trusted * value, {"divergence": value}
        case CrossEntropy():
            return -log_s, {"cross_entropy": -log_s}
        case PolicyGradient():
            hinted = part.teacher_advantage * (sampled_t - sampler) if scored else 0.0
            loss, clipped = clipped_surrogate(ratio, advantage + hinted, part)
            return loss, {"clip_fraction": float(clipped)}
        case ReferenceKL():
            s, r = log_softmax(student_logits), log_softmax(reference_logits)
            value = sum(np.exp(s[v]) * (s[v] - r[v]) for v in range(len(s)))
            return value, {"reference_kl": value}
    raise NotImplementedError(f"no oracle of {part}")
