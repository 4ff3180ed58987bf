"""Attention in tiles against NumPy's whole square in float64: values and gradients, at seams, odd sizes and any groups;
several sequences in a row; what a later token may change; what memory it takes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.models import attention, tiled

LARGEST = 16


def draw(T, heads, kv_heads, C=8, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, T, n, C)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)]


def oracle(q, k, v, pull):
    """Mixed values, and the gradients of their product with `pull`; head h reads kv head h // G."""
    q, k, v, pull = map(np.float64, (q, k, v, pull))
    T, (H, K), C = q.shape[1], (q.shape[2], k.shape[2]), q.shape[3]
    wide_k, wide_v = (np.repeat(x, H // K, axis=2) for x in (k, v))
    scores = np.where(np.tri(T, dtype=bool), np.einsum("bthc,bshc->bhts", q, wide_k) / np.sqrt(C), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    of_weights = np.einsum("bthc,bshc->bhts", pull, wide_v)
    of_scores = weights * (of_weights - (weights * of_weights).sum(axis=-1, keepdims=True)) / np.sqrt(C)
    grouped = lambda x: x.reshape(*x.shape[:2], K, H // K, C).sum(axis=3)
    return (
        np.einsum("bhts,bshc->bthc", weights, wide_v),
        np.einsum("bhts,bshc->bthc", of_scores, wide_k),
        grouped(np.einsum("bhts,bthc->bshc", of_scores, q)),
        grouped(np.einsum("bhts,bthc->bshc", weights, pull)),
    )


@partial(jax.jit, static_argnames="largest")
def run(q, k, v, pull, first_BT=None, largest=LARGEST):
    mixed, back = jax.vjp(lambda *qkv: tiled.attend_causal(*qkv, first_BT, largest), q, k, v)
    return mixed, *back(pull)


def firsts(lengths, T):
    """Where the sequences of these lengths begin, for each token; padding is its own."""
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    return np.array(
        [start for start, n in zip(starts, lengths, strict=True) for _ in range(n)] + [*range(sum(lengths), T)]
    )


@given(st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=2, max_size=2), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_sequences_in_a_row_are_sequences_alone(rows, seed):
    """Values and gradients of each by the oracle of it alone; padding has those of a token alone."""
    T = 91
    rows = [[n for k, n in enumerate(row) if sum(row[: k + 1]) <= T] for row in rows]
    inputs, first_BT = draw(T, 4, 2, seed=seed), np.stack([firsts(row, T) for row in rows])
    got = run(*inputs, jnp.asarray(first_BT, jnp.int32))
    for b, first_T in enumerate(first_BT):
        for first in np.unique(first_T):
            own = slice(int(first), int(np.flatnonzero(first_T == first)[-1]) + 1)
            for part, expected in zip(got, oracle(*(x[b : b + 1, own] for x in inputs)), strict=True):
                np.testing.assert_allclose(part[b, own], expected[0], atol=5e-6)


def test_other_sequences_of_a_row_change_no_bit():
    """Nor does another row, though what is skipped depends on both."""
    q, k, v, pull = draw(90, 4, 2)
    own, packed = slice(20, 61), np.stack([firsts([20, 41, 29], 90), firsts([90], 90)])
    changed = [np.array(x) for x in (q, k, v, pull)]
    for x in changed:
        x[0, :20], x[0, 61:], x[1] = 1e3, -1e3, 7.0
    apart = np.stack([packed[0], firsts([50, 40], 90)])
    for x, y in zip(run(q, k, v, pull, packed), run(*changed, apart), strict=True):
        np.testing.assert_array_equal(x[0, own], y[0, own])


@pytest.mark.parametrize("T", [1, 7, LARGEST, LARGEST + 1, 2 * LARGEST, 5 * LARGEST - 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
def test_values_and_gradients_are_those_of_the_whole_square(T, heads, kv_heads):
    inputs = draw(T, heads, kv_heads)
    for got, expected in zip(run(*inputs), oracle(*inputs), strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6)


@pytest.mark.parametrize("largest", [8, 24, 512])
def test_the_size_of_a_tile_changes_nothing_but_rounding(largest):
    inputs = draw(70, 4, 2)
    for got, expected in zip(run(*inputs, largest=largest), oracle(*inputs), strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6)


@pytest.mark.parametrize(("T", "tile"), [(385, 128), (769, 256)])
def test_longer_rows_take_larger_tiles_on_a_cpu(T, tile):
    """As long as their scores stay in its caches; values and gradients are the same."""
    inputs = draw(T, 2, 1, batch=1)
    mixed, back = jax.vjp(attention.attend_causal, *inputs[:3])
    for got, expected in zip((mixed, *back(inputs[3])), oracle(*inputs), strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6)
    assert attention._cpu_tile(1, T, 2) == tile > attention._cpu_tile(1, T - 1, 2)
    assert attention._cpu_tile(999, T, 2) == 64


def test_scores_far_from_zero_are_safe():
    """exp of these scores is infinite in float32, and that of their opposites zero."""
    q, k, v, pull = draw(50, 2, 1)
    for scale in (60.0, -60.0):
        expected = oracle(scale * q, k, v, pull)
        for got, wanted in zip(run(scale * q, k, v, pull), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-3 * max(1.0, np.abs(wanted).max()))


def test_bfloat16_is_as_close_as_its_own_rounding():
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in draw(90, 4, 2)]
    expected = oracle(*(np.asarray(x, np.float32) for x in inputs))
    for got, wanted in zip(run(*inputs), expected, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float32), wanted, atol=0.02 * np.abs(wanted).max())


def test_what_comes_later_changes_no_bit():
    q, k, v, _ = draw(80, 4, 2)
    cut = 3 * LARGEST + 5
    attend = jax.jit(lambda *qkv: tiled.attend_causal(*qkv, None, LARGEST))
    other = [np.concatenate([x[:, :cut], np.full_like(x[:, cut:], 1e3)], axis=1) for x in (q, k, v)]
    np.testing.assert_array_equal(attend(q, k, v)[:, :cut], attend(*other)[:, :cut])


def test_a_row_is_bit_equal_beside_another():
    q, k, v, pull = draw(70, 4, 2)
    alone = run(*(np.stack([x[0], np.zeros_like(x[0])]) for x in (q, k, v, pull)))
    for both, one in zip(run(q, k, v, pull), alone, strict=True):
        np.testing.assert_array_equal(both[0], one[0])


def test_no_square_of_scores_exists():
    """Forward and backward keep to a few copies of queries, keys and values; one head's square alone is 64 MiB."""
    T = 4096
    shapes = [jax.ShapeDtypeStruct((1, T, n, 8), jnp.float32) for n in (2, 1, 1)]
    gradient = jax.jit(jax.grad(lambda *qkv: jnp.sum(attention.attend_causal(*qkv)), argnums=(0, 1, 2)))
    needed = gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert needed < 4 * T * T / 16


def test_remat_does_not_attend_again_to_what_it_keeps():
    """2 products over a tile's scores in the forward pass, 5 in the backward, each for tiles below and on the
    diagonal; the gradient is the same to the bit.
    """
    q, k, v, _ = draw(70, 4, 2)

    def gradient(keep):
        attend = jax.checkpoint(lambda *qkv: tiled.attend_causal(*qkv, None, LARGEST, keep), policy=tiled.keeping)
        return jax.grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv))), argnums=(0, 1, 2))

    products = [str(jax.make_jaxpr(gradient(keep))(q, k, v)).count("dot_general") for keep in (False, True)]
    assert products[0] - products[1] == 2 * 2
    again, kept = (jax.jit(gradient(keep))(q, k, v) for keep in (False, True))
    jax.tree.map(np.testing.assert_array_equal, again, kept)
