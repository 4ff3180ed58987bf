"""Divergences of two distributions: the reduced support, the tail, both ends of the Jensen-Shannon family."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from hintsd_jax.training import divergences

V = 11


def log_probs(seed, dtype):
    rng = np.random.default_rng(seed)
    return (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(6, V)) * 2, dtype)) for _ in range(2))


def test_topk_with_tail_rises_to_the_full_divergence():
    ks = (1, 3, 6, V - 1, V, V + 5)
    pairs = list(itertools.product(("student_topk", "teacher_topk"), ("reverse_kl", "forward_kl", "jsd")))

    @jax.jit
    def values(s, t):
        on = lambda kind, *support: divergences.divergence(
            *divergences.support_log_probs(s, t, *support), kind, alpha=0.3
        )
        return [(on(kind, "full", 1), [on(kind, support, k) for k in ks]) for support, kind in pairs]

    with jax.enable_x64(True):
        for full, by_k in values(*log_probs(4, jnp.float64)):
            assert np.all(np.diff(by_k, axis=0) >= -1e-12)  # a finer partition cannot lower a divergence
            np.testing.assert_allclose(by_k[3], full, rtol=1e-9)  # V - 1: the tail is the one entry left
            np.testing.assert_array_equal(by_k[4], full)
            np.testing.assert_array_equal(by_k[5], full)


def test_jsd_ends_are_the_kls_and_the_middle_is_symmetric():
    s, t = log_probs(5, jnp.float32)
    value = divergences.divergence
    np.testing.assert_array_equal(value(s, t, "jsd", 0.0), value(s, t, "forward_kl"))
    np.testing.assert_array_equal(value(s, t, "jsd", 1.0), value(s, t, "reverse_kl"))
    np.testing.assert_array_equal(value(s, t, "forward_kl"), value(t, s, "reverse_kl"))
    np.testing.assert_allclose(value(s, t, "jsd"), value(t, s, "jsd"), rtol=1e-5)


def test_tail_is_cut_exactly_as_in_the_reference():
    with jax.enable_x64(True):
        logp = jnp.log(jnp.asarray([[0.5, 0.3, 0.2], [1 - 2e-9, 1e-9, 1e-9]], jnp.float64))
        tail = jax.jit(divergences.with_tail)(logp, jnp.asarray([[0, 1], [0, 1]]))[:, -1]
        np.testing.assert_allclose(tail, [np.log(0.2), np.log(1 - np.exp(-1e-7))], rtol=1e-8)
