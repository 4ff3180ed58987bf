"""The sampler against NumPy: which tokens may come, how often, and with what log-prob."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.models.sampling_distribution import SamplingDistribution, lowest_kept
from hintsd_jax.sampling import sampler
from hintsd_jax.sampling.sampler import sample

V = 12
LOWEST = jax.jit(lowest_kept)


def draw(logits_V, *, n=4000, temperature=1.0, top_p=1.0, top_k=0, seed=0):
    """n independent draws from one row of logits."""
    keys_B = jax.random.split(jax.random.key(seed), n)
    rows = [jnp.full(n, value) for value in (temperature, top_p)]
    tokens_B, logprobs_B = jax.jit(sample)(jnp.tile(logits_V, (n, 1)), keys_B, *rows, jnp.full(n, top_k, jnp.int32))
    return np.asarray(tokens_B), np.asarray(logprobs_B)


def kept_by_numpy(logits_V, temperature, top_p, top_k):
    """The support by sorting: top-k, then the shortest prefix that reaches top_p of what is left."""
    probs_V = np.exp(logits_V.astype(np.float64) / temperature)
    order = np.argsort(-probs_V, kind="stable")
    if top_k:
        order = order[:top_k]
    mass = np.cumsum(probs_V[order] / probs_V[order].sum())
    return set(order[: int(np.searchsorted(mass, top_p - 1e-9)) + 1].tolist()) if top_p < 1 else set(order.tolist())


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    st.sampled_from([0, 1, 3, 8]),
)
def test_the_support_is_that_of_a_sort(seed, temperature, top_p, top_k):
    logits_V = np.random.default_rng(seed).normal(size=V).astype(np.float32)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    tokens_B, logprobs_B = draw(jnp.asarray(logits_V), **sampling, seed=seed)
    allowed = kept_by_numpy(logits_V, temperature, top_p, top_k)
    assert set(tokens_B.tolist()) <= allowed
    probs_V = np.exp(logits_V.astype(np.float64) / temperature)
    total = sum(probs_V[v] for v in allowed)
    likely = {v for v in allowed if probs_V[v] / total > 0.01}  # 4,000 draws miss such a token once in 10^17
    assert likely <= set(tokens_B.tolist())
    # the log-prob is that of the distribution which the token was drawn from
    expected_V = np.log(probs_V / total)
    np.testing.assert_allclose(logprobs_B, expected_V[tokens_B], atol=2e-5)
    # the update finds the same of the same logits; a token that could not come counts as one that could: it came
    distribution = SamplingDistribution(**sampling)
    assert distribution.filters == (top_p < 1 or top_k > 0)
    assert distribution.is_softmax == (not distribution.filters and temperature == 1.0)
    every_V, logits_VV = jnp.arange(V), jnp.tile(logits_V, (V, 1))
    lowest_V = LOWEST(logits_VV / temperature, jnp.full(V, top_p), jnp.full(V, top_k, jnp.int32))
    found_V = distribution.logprobs(logits_VV, every_V, logits_VV, lowest_V if distribution.filters else None)
    masses = [total + (0.0 if v in allowed else probs_V[v]) for v in range(V)]
    np.testing.assert_allclose(found_V, np.log(probs_V / masses), atol=2e-5)


def test_frequencies_follow_the_tempered_softmax():
    logits_V = np.linspace(-2, 2, V).astype(np.float32)
    tokens_B, logprobs_B = draw(jnp.asarray(logits_V), n=20_000, temperature=0.7)
    expected_V = np.exp(logits_V / 0.7) / np.exp(logits_V / 0.7).sum()
    counts_V = np.bincount(tokens_B, minlength=V)
    chi2 = np.sum((counts_V - 20_000 * expected_V) ** 2 / (20_000 * expected_V))
    assert chi2 < 31.3  # 99.9 % quantile at 11 degrees of freedom
    np.testing.assert_allclose(logprobs_B, np.log(expected_V)[tokens_B], atol=1e-5)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 2}])
def test_temperature_zero_is_greedy(filters):
    logits_V = np.random.default_rng(1).normal(size=V).astype(np.float32)
    tokens_B, logprobs_B = draw(jnp.asarray(logits_V), n=50, temperature=0.0, **filters)
    assert set(tokens_B.tolist()) == {int(np.argmax(logits_V))}
    # its log-prob is the policy's own
    np.testing.assert_allclose(logprobs_B, logits_V.max() - np.log(np.exp(logits_V).sum()), atol=1e-5)
    greedy = SamplingDistribution(0.0, **filters)
    assert greedy.is_softmax and greedy.lowest_kept(jnp.asarray(logits_V[None])) is None


def test_a_row_does_not_feel_its_neighbours_filters():
    """The filters run for all rows once any row wants one; rows that want none must stay bit-equal."""
    logits_BV = jnp.asarray(np.random.default_rng(2).normal(size=(64, V)).astype(np.float32))
    keys_B = jax.random.split(jax.random.key(3), 64)
    ones, none = jnp.ones(64), jnp.zeros(64, jnp.int32)
    plain, plain_logprobs = sample(logits_BV, keys_B, ones, ones, none)
    mixed, mixed_logprobs = sample(logits_BV, keys_B, ones, ones.at[::2].set(0.4), none)
    np.testing.assert_array_equal(plain[1::2], mixed[1::2])
    np.testing.assert_array_equal(plain_logprobs[1::2], mixed_logprobs[1::2])
    assert (plain[::2] != mixed[::2]).any()


@pytest.mark.parametrize("vocabulary", [1, 127, 129, 1024, 4999, 40_960])
def test_wherever_a_token_stands_it_comes_as_often_as_it_should(vocabulary):
    """First, last and some between, among tokens that cannot come at all."""
    rng = np.random.default_rng(vocabulary)
    tokens = np.unique([0, vocabulary - 1, *rng.integers(0, vocabulary, 6)])
    logits_V = np.full(vocabulary, -1e9, np.float32)
    logits_V[tokens] = rng.normal(size=len(tokens))
    n = 2000
    tokens_B, logprobs_B = draw(jnp.asarray(logits_V), n=n, seed=vocabulary)
    expected = np.exp(logits_V[tokens].astype(np.float64))
    expected /= expected.sum()
    assert set(tokens_B.tolist()) <= set(tokens.tolist())
    counts = np.array([(tokens_B == token).sum() for token in tokens])
    chi2 = np.sum((counts - n * expected) ** 2 / (n * expected))
    assert chi2 < 26.0  # 99.9 % quantile at 8 degrees of freedom; there are at most 7
    np.testing.assert_allclose(logprobs_B, np.log(expected)[np.searchsorted(tokens, tokens_B)], atol=2e-5)
    logits_V[tokens] = 3.0  # the first of those that are alike, as argmax has it
    assert set(draw(jnp.asarray(logits_V), n=3, temperature=0.0)[0].tolist()) == {tokens[0]}


def test_no_draw_is_lost_to_rounding():
    """Random numbers next to 0 and 1, parts without any mass first and last."""
    mass_BN = jnp.array([[0.0, 0.1, 0.2, 0.0, 0.7, 0.0], [0.0, 0.0, 1e-30, 0.0, 0.0, 0.0], [1e-8] * 3 + [0.0] * 3])
    left_BNC, top_B = jnp.log(mass_BN)[..., None], jnp.zeros(3)
    for uniform in (0.0, 2.0**-23, 0.5, 1 - 2.0**-23):
        chosen_B = sampler._drawn(left_BNC, top_B, jnp.full(3, uniform))
        assert (jnp.take_along_axis(mass_BN, chosen_B[:, None], axis=1) > 0).all()
