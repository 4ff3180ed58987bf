"""Attention to a cache against a NumPy loop: ragged lengths, ends of slots, rows that go nowhere, both forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.models import cached_attention
from hintsd_jax.models.cached_attention import write_and_attend

HEADS, KV_HEADS, C, B = 6, 2, 10, 4
run = jax.jit(write_and_attend)


def draw(slots, positions, rows, tokens, dtype="float32"):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    cache = normal(slots, KV_HEADS, positions, C), normal(slots, KV_HEADS, positions, C)
    return *(normal(rows, tokens, n, C) for n in (HEADS, KV_HEADS, KV_HEADS)), cache


def oracle(q, k, v, cache, start_R, slot_R, window=None):
    """Token by token in float64 -> (mixed, keys, values)."""
    q, k, v, keys, values = (np.array(x, np.float64) for x in (q, k, v, *cache))
    slots, _, positions, _ = keys.shape
    mixed = np.zeros_like(q)
    here = [r for r in range(len(q)) if slot_R[r] < slots and start_R[r] < positions]
    places = [(r, t, slot_R[r], start_R[r] + t) for r in here for t in range(q.shape[1])]
    for r, t, slot, at in places:
        if at < positions:
            keys[slot, :, at], values[slot, :, at] = k[r, t], v[r, t]
    for r, t, slot, at in places:
        seen = slice(0 if window is None else max(0, at + 1 - window), at + 1)
        for h in range(HEADS):
            n = h // (HEADS // KV_HEADS)
            scores = keys[slot, n, seen] @ q[r, t, h] / np.sqrt(C)
            weights = np.exp(scores - scores.max())
            mixed[r, t, h] = weights @ values[slot, n, seen] / weights.sum()
    return mixed, keys, values


def check(out, expected, start_R, tokens, positions, atol):
    mixed, keys, values = out[0], *out[1]
    real_RT = np.asarray(start_R)[:, None] + np.arange(tokens) < positions  # what is past the end is padding
    np.testing.assert_allclose(np.float64(mixed)[real_RT], expected[0][real_RT], atol=atol)
    np.testing.assert_allclose(np.float64(keys), expected[1])  # exactly what was written, and nothing else
    np.testing.assert_allclose(np.float64(values), expected[2])


@pytest.fixture(params=["listed blocks", "all slots"])
def form(request, monkeypatch):
    """Both forms of decoding on this platform, with blocks that do not divide the slots."""
    monkeypatch.setattr(cached_attention, "_CPU_BLOCK", 16)
    monkeypatch.setattr(cached_attention, "_CPU_BLOCKS", 3)
    monkeypatch.setattr(cached_attention, "BLOCK", 16)
    if request.param == "all slots":
        monkeypatch.setattr(cached_attention, "_listed_blocks", cached_attention.attend_all_slots)
    return jax.jit(lambda *arrays: write_and_attend(*arrays))


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("positions", [11, 40, 64])
def test_decoding(form, positions, dtype, atol):
    for start_R in ([0, 5, positions - 1, positions // 2], [positions, 3, positions + 9, 7]):
        q, k, v, cache = draw(B, positions, B, 1, dtype)
        out = form(q, k, v, cache, jnp.asarray(start_R))
        check(out, oracle(q, k, v, cache, start_R, range(B)), start_R, 1, positions, atol)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("tokens", [1, 8, 50], ids=["one token", "some", "more than a slot has"])
def test_prefill(tokens, dtype, atol, monkeypatch):
    """Rows past the end of a slot, rows of no slot, and one that goes on where another one of its slot ends."""
    monkeypatch.setattr(cached_attention, "_CPU_PREFILL_BLOCK", 16)
    start_R, slot_R = [0, 35, 2, 2 + tokens, 9], [1, 3, 2, 2, B]
    q, k, v, cache = draw(B, 40, 5, tokens, dtype)
    out = jax.jit(lambda *arrays: write_and_attend(*arrays))(q, k, v, cache, jnp.asarray(start_R), jnp.asarray(slot_R))
    check(out, oracle(q, k, v, cache, start_R, slot_R), start_R, tokens, 40, atol)


def test_neighbours_slots_and_what_lies_beyond_change_no_bit():
    """Another slot's length, one's own slot and what an earlier owner left behind decide nothing: invariant 4."""
    q, k, v, cache = draw(B, 700, B, 1)
    start = jnp.array([130, 0, 0, 0])
    alone, _ = run(q, k, v, cache, start)
    beside, _ = run(q, k, v, cache, start.at[1].set(699))
    np.testing.assert_array_equal(alone[0], beside[0])
    assert (np.asarray(alone[1]) != np.asarray(beside[1])).any()
    turn = partial(jnp.roll, shift=1, axis=0)
    moved, _ = run(*jax.tree.map(turn, (q, k, v, cache, start)))
    np.testing.assert_array_equal(alone[0], moved[1])
    dirty, _ = run(q, k, v, jax.tree.map(lambda x: x.at[0, :, 131:].set(1e4), cache), start)
    np.testing.assert_array_equal(alone[0], dirty[0])


def test_the_order_of_a_slots_blocks_alone_decides_its_bits(form):
    """In which round of the loop a block is read, and beside which, is up to the neighbours."""
    q, k, v, cache = draw(B, 200, B, 1)
    rows = [form(q, k, v, cache, jnp.array([n, 150, 200, 3]))[0][1] for n in (0, 17, 33, 49, 199, 200)]
    assert all((row == rows[0]).all() for row in rows)


def test_blocks_beyond_a_slots_own_length_are_not_read():
    q, k, v, cache = draw(B, 700, B, 1)
    cache = jax.tree.map(lambda x: x.at[:2, :, 256:].set(jnp.nan), cache)
    mixed, _ = run(q, k, v, cache, jnp.array([100, 255, 600, 699]))
    assert np.isfinite(mixed).all()


@pytest.mark.parametrize("tokens", [1, 64])
def test_memory_does_not_grow_with_the_slots(tokens):
    """The cache is read and written where it lies. A decoding step keeps what each block of keys has mixed."""

    def temporary(positions):
        q, k, v, cache = jax.eval_shape(lambda: draw(B, positions, B, tokens))
        rows = jax.ShapeDtypeStruct((B,), jnp.int32)
        arrays = (q, k, v, cache, rows) if tokens == 1 else (q, k, v, cache, rows, rows)
        memory = jax.jit(write_and_attend, donate_argnums=3).lower(*arrays).compile().memory_analysis()
        return pytest.skip("this backend reports no memory analysis") if memory is None else memory.temp_size_in_bytes

    block = HEADS * (C + 2) * 4 + 3 * 4  # what is mixed, its two numbers, and its place in the list
    blocks = B * 15 * 1024 // 128 if tokens == 1 else 0
    assert temporary(16 * 1024) - temporary(1024) <= 2 * blocks * block
