"""Layers with a window: each form of attention against NumPy in float64, and all passes of a decoder that has some."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_attention import draw, oracle
from test_models_cached_attention import check
from test_models_cached_attention import draw as draw_cached
from test_models_cached_attention import oracle as cached_oracle
from test_models_decoder import CONFIG, random_tokens

from hintsd_jax.models import attention, cache_kernels, cached_attention, decoder, splash
from hintsd_jax.models.attention import KEY_BLOCK, Branches, Window
from hintsd_jax.models.cached_attention import write_and_attend

# Three layers, all but the second with a window of 5; what else the two families compute.
OLMO3 = dataclasses.replace(
    CONFIG, family="olmo3", num_layers=3, window=5, windowed=(0, 2), window_rope_theta=50.0, norm_eps=1e-5
)
GEMMA3 = dataclasses.replace(OLMO3, family="gemma3", scores_dim=7)


def seen_within(first_BT, window, T):
    at_T = np.arange(T)
    seen_BTS = np.tri(T, dtype=bool)[None] & (at_T >= first_BT[..., None])
    return seen_BTS if window is None else seen_BTS & (at_T > at_T[:, None] - window)


@pytest.mark.parametrize(("keys", "acts"), [(1, True), (65, True), (64, False), (600, True)])
def test_causal_attention_of_two_sequences_and_its_gradient(keys, acts):
    """Also where the layer of a scan has no window. Tiles have 64 tokens."""
    T = 600
    q, k, v = draw(1, T, T)
    first_BT = np.where(np.arange(T) < 250, 0, 250)[None]
    pick = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def run(attend):
        def loss(*qkv):
            out = attend(*qkv)
            return jnp.sum(out * pick), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, grads

    seen_BTS = seen_within(first_BT, keys if acts else None, T)  # 600: as long as the row
    out, grads = run(lambda *qkv: attention.attend_causal(*qkv, jnp.asarray(first_BT), Window(keys, jnp.asarray(acts))))
    np.testing.assert_allclose(out, oracle(q, k, v, seen_BTS), atol=5e-6)
    expected = run(lambda *qkv: attention.attend(*qkv, seen_BTS))[1]
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-3), grads, expected)


@pytest.mark.parametrize("keys", [3, KEY_BLOCK + 100])
def test_branches_see_the_last_of_their_prefix_and_of_themselves(keys):
    P, M = 2 * KEY_BLOCK + 300, 12
    q, k, v = draw(2, P + M, P + M)
    branch_id_BM = np.array([[0] * 5 + [1] * 4 + [2] * 2 + [-1], [0] * 12])
    stop_BM = np.where(branch_id_BM < 0, 0, np.array([[P // 2], [P]]) - np.maximum(branch_id_BM, 0) * (P // 9))
    start_BM = np.where(stop_BM > P // 3, P // 3, 0)
    # how many of its own branch stand before a token
    before_BM = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0], range(12)])
    positions_BT = np.concatenate([np.zeros((2, P), int), stop_BM - start_BM + before_BM], axis=1)
    ranges = Branches(*(jnp.asarray(x) for x in (start_BM, stop_BM, branch_id_BM)))
    window = Window(keys, jnp.asarray(True))
    attend = jax.jit(lambda *qkv: attention.attend_branches(*qkv, ranges, None, jnp.asarray(positions_BT), window))
    own = (branch_id_BM[:, :, None] == branch_id_BM[:, None]) & np.tri(M, dtype=bool)
    own &= before_BM[:, None] > before_BM[..., None] - keys
    at_P = np.arange(P)
    past = (at_P >= start_BM[..., None]) & (at_P < stop_BM[..., None])
    past &= at_P - start_BM[..., None] > positions_BT[:, P:, None] - keys
    out = attend(q, k, v)
    np.testing.assert_allclose(out[:, P:], oracle(q[:, P:], k, v, np.concatenate([past, own], axis=2)), atol=2e-6)


def by_gpu_kernel(monkeypatch):
    """As the cache's form of prefill and decoding, in Python."""
    attend = partial(cache_kernels.attend_gpu, interpret=True)
    for form in ("_listed_blocks", "attend_rows"):
        monkeypatch.setattr(cached_attention, form, attend)


@pytest.mark.parametrize(
    ("form", "window"),
    [("listed blocks", 1), ("listed blocks", 16), ("listed blocks", 33), ("listed blocks", 64), ("all slots", 33)]
    + [("GPU kernel", 5), ("GPU kernel", 63)],
)
def test_decoding_and_prefill_read_the_last_positions(form, window, monkeypatch):
    """Blocks of 16 positions; rows of no slot, and past the end of one."""
    S, B = 64, 4
    for name, size in {"_CPU_BLOCK": 16, "_CPU_BLOCKS": 3, "BLOCK": 16, "_CPU_PREFILL_BLOCK": 16}.items():
        monkeypatch.setattr(cached_attention, name, size)
    if form == "all slots":
        monkeypatch.setattr(cached_attention, "_listed_blocks", cached_attention.attend_all_slots)
    if form == "GPU kernel":
        by_gpu_kernel(monkeypatch)
    attend = jax.jit(lambda *arrays: write_and_attend(*arrays, window=window))
    for start_R in ([0, 5, S - 1, 32], [S, 3, S + 9, 47]):
        q, k, v, cache = draw_cached(B, S, B, 1)
        out = attend(q, k, v, cache, jnp.asarray(start_R), None)
        check(out, cached_oracle(q, k, v, cache, start_R, range(B), window), start_R, 1, S, 2e-6)
    start_R, slot_R = [0, 50, 2, 10, 9], [1, 3, 2, 2, B]
    q, k, v, cache = draw_cached(B, S, 5, 8)
    out = attend(q, k, v, cache, jnp.asarray(start_R), jnp.asarray(slot_R))
    check(out, cached_oracle(q, k, v, cache, start_R, slot_R, window), start_R, 8, S, 2e-6)


@pytest.mark.parametrize("form", ["CPU", "GPU kernel"])
def test_what_lies_before_the_window_changes_no_bit(form, monkeypatch):
    """Nor is a block of it read: what is no number there would spread."""
    if form == "GPU kernel":
        by_gpu_kernel(monkeypatch)
    attend = jax.jit(lambda *arrays: write_and_attend(*arrays, window=100)[0])
    q, k, v, cache = draw_cached(4, 700, 4, 1)
    start_B = jnp.array([650, 90, 500, 1])
    lowest = 512 if form == "CPU" else 551  # blocks of 128 begin at whole ones, those of the kernel at the window
    dirty = jax.tree.map(lambda x: x.at[0, :, :lowest].set(jnp.nan).at[0, :, lowest:551].set(1e4), cache)
    np.testing.assert_array_equal(attend(q, k, v, cache, start_B), attend(q, k, v, dirty, start_B))


@pytest.mark.parametrize("window", [130])
def test_the_tpu_kernel_has_the_window(window):
    T = 384
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, T, heads, 128)).astype(np.float32) for heads in (2, 1, 1))
    first_BT = np.where(np.arange(T) < 100, 0, 100)[None]
    run = lambda attend: jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv) ** 2), argnums=(0, 1, 2)))(
        q, k, v
    )
    kernel = lambda *qkv: splash.attend_causal(*qkv, jnp.asarray(first_BT, jnp.int32), window, interpret=True)
    expected = run(lambda *qkv: attention.attend(*qkv, seen_within(first_BT, window, T)))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-4), run(kernel), expected)


@pytest.fixture(scope="module", params=[OLMO3, GEMMA3], ids=["olmo3", "gemma3"])
def policy(request):
    """Norms whose weights are not what they begin with."""
    params = decoder.init_params(request.param, jax.random.key(0))
    shift = lambda leaf: leaf + 0.3 * np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32)
    norms = lambda path, leaf: shift(leaf) if path[-1].key == "scale" else leaf
    return request.param, jax.tree_util.tree_map_with_path(norms, params)


def test_a_token_sees_through_its_windows_and_no_further(policy):
    """Layers 0 and 2 reach back 4 tokens each, layer 1 everywhere: without it no token reaches further than 8."""
    config, params = policy
    tokens = random_tokens(1, 1, 16)
    changed = tokens.copy()
    changed[0, 0] = (changed[0, 0] + 1) % config.vocab_size
    for windowed, reached in (((0, 2), range(16)), ((0, 1, 2), range(13))):
        one = dataclasses.replace(config, windowed=windowed)
        before, after = (np.asarray(decoder.forward(params, one, ids))[0] for ids in (tokens, changed))
        assert np.flatnonzero((before != after).any(axis=-1)).tolist() == list(reached)


def test_prefill_decoding_and_branches_equal_the_whole_row(policy):
    config, params = policy
    B, T, M = 2, 16, 6
    tokens = random_tokens(2, B, T)
    expected = np.asarray(jax.jit(decoder.forward, static_argnums=1)(params, config, tokens))
    cache = decoder.init_cache(config, B, 20)
    extend, step = (jax.jit(run, static_argnums=1) for run in (decoder.extend, decoder.decode_step))
    for start in (0, 4):
        cache = extend(params, config, tokens[:, start : start + 4], np.full(B, start), np.arange(B), cache)
    for at in range(8, T):
        hidden, cache = step(params, config, tokens[:, at], np.full(B, at), cache)
        np.testing.assert_allclose(hidden, expected[:, at], atol=2e-5)
    # Each row's first 10 tokens as a trunk, 6 of them as a branch; the second beside another sequence.
    trunk = np.concatenate([random_tokens(3, B, 7), tokens[:, :10]], axis=1)
    first_BP = np.broadcast_to(np.where(np.arange(17) < 7, 0, 7), trunk.shape)
    whole = np.full((B, M), 7)
    branches = Branches(whole, whole + 10, whole * 0)
    positions = np.broadcast_to(np.arange(10, 10 + M), (B, M))
    read = jax.jit(decoder.forward_branches, static_argnums=1)(
        params, config, trunk, tokens[:, 10:], positions, branches, first_BP
    )
    np.testing.assert_allclose(read, expected[:, 10:], atol=2e-5)
