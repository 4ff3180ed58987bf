"""The kernels of attention to a cache, run as Python on this CPU, against NumPy in float64: ragged lengths, idle slots,
grouped queries, chunks of prompts, parts that do and do not divide; and which shapes go to them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hintsd_jax.models import cache_kernels, cached_attention
from hintsd_jax.tools.planner import topologies

C = 128
# Cards with the least memory that a block of threads may share, 99 KiB: of Ada's kind.
SMALL_CARD = (
    topologies.GPU_TARGETS["a100-40gb"]
    .replace("major: 8 minor: 0", "major: 8 minor: 9")
    .replace("shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912", "shared_memory_per_core: 102400")
    + " shared_memory_per_block_optin: 101376"
)


def draw(slots, kv_heads, group, positions, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    q_BKGTC = normal(slots, kv_heads, group, 1, C) * C**-0.5
    return q_BKGTC, normal(slots, kv_heads, positions, C), normal(slots, kv_heads, positions, C)


def oracle(q_BKGTC, keys_BKSC, values_BKSC, length_B):
    q, keys, values = (np.asarray(x, np.float64) for x in (q_BKGTC, keys_BKSC, values_BKSC))
    mixed = np.zeros_like(q)
    for b, k, g in np.ndindex(*q.shape[:3]):
        n = length_B[b]
        if n:
            scores = keys[b, k, :n] @ q[b, k, g, 0]
            weights = np.exp(scores - scores.max())
            mixed[b, k, g, 0] = weights @ values[b, k, :n] / weights.sum()
    return mixed


def on_tpu(*arrays):
    with pltpu.force_tpu_interpret_mode():
        return jax.jit(lambda *arrays: cache_kernels.attend_tpu(*arrays))(*arrays)


def on_gpu(*arrays):
    return jax.jit(lambda *arrays: cache_kernels.attend_gpu(*arrays, interpret=True))(*arrays)


def length_BT(lengths):
    return jnp.asarray(lengths, jnp.int32)[:, None]


@pytest.mark.parametrize("attend", [on_tpu, on_gpu])
@pytest.mark.parametrize(
    ("kv_heads", "group", "positions", "lengths"),
    [
        (2, 3, 256, (1, 128, 0, 256)),
        (1, 8, 128, (0, 127)),
    ],
)
def test_a_kernel_is_attention_to_each_slots_own_keys(attend, kv_heads, group, positions, lengths, monkeypatch):
    monkeypatch.setattr(cache_kernels, "PAGES", (128,))
    q, keys, values = draw(len(lengths), kv_heads, group, positions)
    slots = jnp.arange(len(lengths))
    mixed = attend(q, keys, values, slots, length_BT(lengths))
    assert mixed.dtype == jnp.float32
    np.testing.assert_allclose(mixed, oracle(q, keys, values, lengths), atol=1e-2)
    plain = cached_attention.attend_all_slots(q, keys, values, slots, length_BT(lengths))
    np.testing.assert_allclose(mixed, plain, atol=1e-2)


@pytest.mark.parametrize("attend", [on_tpu, on_gpu])
def test_neighbours_slots_and_what_lies_beyond_change_no_bit(attend):
    """Invariant 4: of slot 0, whatever the others have, wherever it is, and whatever an earlier owner left."""
    q, keys, values = draw(3, 1, 4, 256)
    slots = jnp.arange(3)
    alone = attend(q, keys, values, slots, length_BT((70, 0, 0)))
    beside = attend(q, keys, values, slots, length_BT((70, 256, 3)))
    np.testing.assert_array_equal(alone[0], beside[0])
    turn = partial(jnp.roll, shift=1, axis=0)
    moved = attend(turn(q), turn(keys), turn(values), slots, length_BT((3, 70, 256)))
    np.testing.assert_array_equal(alone[0], moved[1])
    dirty = attend(q, keys.at[0, :, 70:].set(1e4), values.at[0, :, 70:].set(1e4), slots, length_BT((70, 0, 0)))
    np.testing.assert_array_equal(alone[0], dirty[0])


@pytest.mark.parametrize(
    ("group", "tokens", "positions", "rows"),  # rows: (slot, tokens before)
    [
        (3, 5, 96, ((1, 0), (0, 90), (3, 7))),  # fewer queries than a block of threads takes
        (2, 50, 600, ((2, 0), (1, 549), (0, 511))),  # two tiles of queries, two parts of keys
        (1, 1, 40, ((0, 39),)),
        (2, 3, 9, ((0, 0), (1, 6))),  # fewer keys, too
    ],
)
def test_on_gpu_tokens_of_a_chunk_see_what_was_before_them(group, tokens, positions, rows):
    B, K, T = 4, 2, tokens
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    q_RKGTC = normal(len(rows), K, group, T, C) * C**-0.5
    keys_BKSC, values_BKSC = normal(B, K, positions, C), normal(B, K, positions, C)
    slot_R, start_R = (jnp.asarray(column, jnp.int32) for column in zip(*rows, strict=True))
    length_RT = jnp.where(slot_R[:, None] < B - 1, start_R[:, None] + 1 + jnp.arange(T), 0)  # the last: not here
    mixed_RKGTC = np.asarray(on_gpu(q_RKGTC, keys_BKSC, values_BKSC, slot_R, length_RT))
    for t in range(T):
        of_rows = [np.asarray(x)[np.asarray(slot_R)] for x in (keys_BKSC, values_BKSC)]
        expected = oracle(q_RKGTC[:, :, :, t : t + 1], *of_rows, np.asarray(length_RT)[:, t])
        np.testing.assert_allclose(mixed_RKGTC[:, :, :, t : t + 1], expected, atol=1e-2)
    plain = cached_attention.by_row(64, q_RKGTC, keys_BKSC, values_BKSC, slot_R, length_RT)
    np.testing.assert_allclose(mixed_RKGTC, plain, atol=1e-2)
    alone = on_gpu(q_RKGTC[:1], keys_BKSC, values_BKSC, slot_R[:1], length_RT[:1])
    np.testing.assert_array_equal(mixed_RKGTC[:1], alone)  # whatever is filled beside it


@pytest.mark.parametrize(
    ("positions", "dims", "dtype", "tpu", "gpu"),
    [
        (24576, 128, "bfloat16", True, True),
        (24576, 64, "bfloat16", False, True),  # a TPU's lanes are 128 wide
        (24576, 128, "float32", False, False),
        (24576, 80, "bfloat16", False, False),
        (1000, 128, "bfloat16", False, True),
        (1000, 96, "bfloat16", False, False),
    ],
)
def test_only_shapes_that_they_take_go_to_the_kernels(positions, dims, dtype, tpu, gpu):
    q, keys = (jnp.empty((1, 1, n, dims), dtype) for n in (4, positions))
    assert (cache_kernels.fits_tpu(q, keys), cache_kernels.fits_gpu(q, keys)) == (tpu, gpu)


def test_a_gpu_too_old_for_the_kernel_has_the_plain_form(monkeypatch):
    q, keys = (jnp.empty((1, 1, n, C), "bfloat16") for n in (4, 256))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for is_new in (False, True):
        monkeypatch.setattr(cache_kernels.cudnn, "gpu_is_here", lambda is_new=is_new: is_new)
        assert cache_kernels.fits_gpu(q, keys) == is_new


@pytest.mark.skipif(not topologies.can_compile_for_gpus(), reason="jax's CUDA plugin is not installed")
@pytest.mark.parametrize("kind", ["a100-40gb", "h100", "l40"])
@pytest.mark.parametrize("dims", [64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 16, 256])
@pytest.mark.parametrize("window", [None, 1024])
def test_the_gpu_kernel_fits_the_cards(kind, dims, tokens, window, monkeypatch):
    monkeypatch.setitem(topologies.GPU_TARGETS, "l40", SMALL_CARD)
    mesh = topologies.gpu_mesh(kind, 1, 2**35)
    whole = jax.NamedSharding(mesh, jax.P())
    shape = lambda *dims, dtype="bfloat16": jax.ShapeDtypeStruct(dims, dtype, sharding=whole)
    cache, of_rows = shape(8, 4, 4096, dims), [shape(8, dtype="int32"), shape(8, tokens, dtype="int32")]
    with jax.set_mesh(mesh):
        attend = jax.jit(lambda *arrays: cache_kernels.attend_gpu(*arrays, window))
        lowered = attend.lower(shape(8, 4, 4, tokens, dims), cache, cache, *of_rows)
    assert "triton" in (topologies.compiled(lowered, topologies.GPU_OPTIONS).as_text() or "")
