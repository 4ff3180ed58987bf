"""Scores of given actions: the same as one row at a time, and what sampling itself reports."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.sampling import Engine, EngineConfig, Sampling, scoring

POLICY = PolicyConfig(
    vocab_size=97, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
    rope_theta=500.0, norm_eps=1e-6, tie_embeddings=True, max_positions=512, remat=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return decoder.init_params(POLICY, jax.random.key(3))


def test_rows_of_many_lengths_score_as_each_alone(params, monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS", 128)  # several batches of a shape
    rng = np.random.default_rng(0)
    rows = [(rng.integers(1, 97, c).tolist(), rng.integers(1, 97, a).tolist()) for c in (1, 9, 30, 55) for a in (1, 10)]
    logits_of = jax.jit(lambda tokens: decoder.project(params, POLICY, decoder.forward(params, POLICY, tokens)))
    for (context, action), scores in zip(rows, scoring.span_logprobs(params, POLICY, rows), strict=True):
        size = len(context) + len(action)
        logits = np.asarray(logits_of(np.array([context + action + [0] * (80 - size)])))[0]
        logits = logits[len(context) - 1 : size - 1].astype(np.float64)
        wanted = logits[np.arange(len(action)), action] - np.log(np.exp(logits).sum(axis=-1))
        np.testing.assert_allclose(scores, wanted, atol=2e-5)
        assert scores.shape == (len(action),) and scores.dtype == np.float32


class Once:
    """One generation, kept with the log-probs that the sampler saw."""

    context, sampling = 80, Sampling(1.0, 1.0, 0, 12)

    def __init__(self, prompt, key):
        self.prompt, self.key = prompt, key

    def begin(self, slot):
        return self.prompt

    def submit(self, ids, logprobs, stopped):
        self.ids, self.logprobs = ids, logprobs

    def collect(self):
        return None


def test_it_agrees_with_the_sampler(params):
    engine = Engine(POLICY, EngineConfig(slots=2, context=80, max_tokens=12, prefill_buckets=(16, 64)), stop_ids=(7,))
    jobs = [Once([5 + n, *range(20 + n)], np.array([1, n], np.uint32)) for n in range(3)]
    engine.run(params, jobs)
    spans = [(job.prompt, job.ids) for job in jobs]
    for job, scores in zip(jobs, scoring.span_logprobs(params, POLICY, spans), strict=True):
        np.testing.assert_allclose(scores, job.logprobs, atol=2e-5)


def test_nothing_to_score(params):
    assert scoring.span_logprobs(params, POLICY, []) == []
    for row in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="without"):
            scoring.span_logprobs(params, POLICY, [row])


@given(st.integers(1, 40_000), st.sampled_from([16, 64]))
def test_buckets_hold_and_do_not_waste(size, smallest):
    bucket = scoring._bucket(size, smallest)
    assert bucket >= size and (bucket == smallest or bucket <= 1.5 * size)


@given(st.integers(64, 40_000), st.integers(16, 1024), st.sampled_from([1024, 151_936]))
def test_batches_keep_to_the_limits(T, A, V):
    B = scoring._batch(T, A, V)
    assert B & (B - 1) == 0 and B >= 1
    assert B == 1 or (B * T <= scoring.TOKENS and B * A * V <= scoring.LOGITS)
