"""The two ways to look, against a NumPy loop, across block and chunk boundaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.models import attention
from hintsd_jax.models.attention import KEY_BLOCK, Branches

HEADS, KV_HEADS, C = 4, 2, 8


def draw(batch, queries, keys, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, queries, HEADS, C), (batch, keys, KV_HEADS, C), (batch, keys, KV_HEADS, C))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def oracle(q, k, v, seen_BTS):
    """Query head h reads kv head h // 2; float64."""
    k, v = (np.repeat(np.float64(x), HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = np.einsum("bthc,bshc->bhts", np.float64(q), k) / np.sqrt(C)
    weights = np.where(seen_BTS[:, None], np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    return np.einsum("bhts,bshc->bthc", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("length", [40, 600, 4300], ids=["one tile", "ten", "many"])
def test_causal(length):
    q, k, v = draw(1, length, length)
    out = np.asarray(jax.jit(attention.attend_causal)(q, k, v))
    some = np.unique(np.linspace(0, length - 1, 200).astype(int))  # rows at the seams and between
    expected = oracle(q[:, some], k, v, (np.arange(length) <= some[:, None])[None])
    np.testing.assert_allclose(out[:, some], expected, atol=5e-6)


@pytest.mark.parametrize("trunk", [0, 30, 2 * KEY_BLOCK + 300], ids=["no trunk", "short", "by blocks"])
def test_branches_see_their_prefix_of_the_trunk_and_themselves(trunk):
    M = 12
    q, k, v = draw(2, trunk + M, trunk + M)
    branch_id_BM = np.array([[0] * 5 + [1] * 4 + [2] * 2 + [-1], [0] * 12])
    stop_BM = np.where(
        branch_id_BM < 0, 0, np.array([[trunk // 2], [trunk]]) - np.maximum(branch_id_BM, 0) * (trunk // 9)
    )
    # two sequences in the trunk of the second row; the branches of the first leave the only one
    begins = 2 * trunk // 3
    start_BM = np.where(stop_BM > begins, begins, 0)
    first_BP = np.stack([np.zeros(trunk, int), np.where(np.arange(trunk) < begins, 0, begins)])
    ranges = Branches(*(jnp.asarray(x) for x in (start_BM, stop_BM, branch_id_BM)))
    out = jax.jit(attention.attend_branches)(q, k, v, ranges, jnp.asarray(first_BP))
    own = (branch_id_BM[:, :, None] == branch_id_BM[:, None]) & np.tri(M, dtype=bool)
    past = (np.arange(trunk) >= start_BM[..., None]) & (np.arange(trunk) < stop_BM[..., None])
    seen_BMS = np.concatenate([past, own], axis=2)
    expected = oracle(q[:, trunk:], k, v, seen_BMS)
    np.testing.assert_allclose(out[:, trunk:], expected, atol=2e-6)
    if trunk:
        causal = jax.jit(attention.attend_causal)(q[:, :trunk], k[:, :trunk], v[:, :trunk], jnp.asarray(first_BP))
        np.testing.assert_allclose(out[:, :trunk], causal, atol=1e-6)
