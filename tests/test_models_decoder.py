"""The decoder against NumPy, and its training path against its cached path."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import RULES

CONFIG = PolicyConfig(
    vocab_size=31, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_dim=10, d_ff=40, rope_theta=500.0,
    norm_eps=1e-6, tie_embeddings=True, max_positions=64,
)  # fmt: skip
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)

# Nearly all of this file's time is compilation, so the tests share a few shapes: rows [4, 16], chunks [4, 4] and [4,
# 1].
B, T, S = 4, 16, 20
forward = jax.jit(decoder.forward, static_argnums=1)
decode_step = jax.jit(decoder.decode_step, static_argnums=1)


_extend = jax.jit(decoder.extend, static_argnums=1)


def extend(params, config, tokens_BT, start_B, cache):
    """`decoder.extend` of row b in slot b."""
    return _extend(params, config, tokens_BT, start_B, np.arange(len(tokens_BT)), cache)


@pytest.fixture(scope="module")
def params():
    """Random parameters with random norm weights: at 1 they would hide a norm that is skipped."""
    params = decoder.init_params(CONFIG, jax.random.key(0))
    noise = lambda leaf: leaf * (1 + 0.3 * np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32))
    return jax.tree.map(lambda leaf: jnp.asarray(noise(np.asarray(leaf))), params)


def random_tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape, dtype=np.int32)


def test_only_relative_positions_matter(params):
    tokens = random_tokens(1, B, T)
    shifted = forward(params, CONFIG, tokens, np.arange(17, 17 + T)[None])
    np.testing.assert_allclose(forward(params, CONFIG, tokens), shifted, atol=2e-5)


def test_prefill_and_decode_equal_the_full_forward(params):
    """Ragged rows, prefilled in padded chunks and continued token by token, in a cache that held something else."""
    tokens, prompts = random_tokens(2, B, T), np.array([6, 3, 8, 1])
    expected = np.asarray(forward(params, CONFIG, tokens))
    rng = np.random.default_rng(0)
    dirty = lambda leaf: jnp.asarray(50 * rng.normal(size=leaf.shape), leaf.dtype)
    cache = jax.tree.map(dirty, decoder.init_cache(CONFIG, B, S))
    for start in (0, 4):
        real = (
            np.arange(start, start + 4) < prompts[:, None] - 1
        )  # the last token of a prompt is the first that is decoded
        chunk = np.where(real, tokens[:, start : start + 4], random_tokens(start, B, 4))
        cache = extend(params, CONFIG, chunk, np.full(B, start), cache)
    for step in range(8):
        at = prompts - 1 + step
        hidden, cache = decode_step(params, CONFIG, tokens[np.arange(B), at], at, cache)
        np.testing.assert_allclose(hidden, expected[np.arange(B), at], atol=1e-5)


def test_a_position_past_the_cache_is_dropped(params):
    cache = jax.tree.map(lambda leaf: leaf + 1.0, decoder.init_cache(CONFIG, B, S))
    at = np.array([S, 2, S + 7, S - 1])
    _, updated = decode_step(params, CONFIG, random_tokens(3, B), at, cache)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(updated), strict=True):
        rows, slots = np.nonzero((np.asarray(old) != np.asarray(new)).any(axis=(1, 3)))
        assert list(zip(rows, slots, strict=True)) == [(1, 2), (3, S - 1)]


def test_later_tokens_have_no_influence(params):
    tokens = random_tokens(4, 2, 90)
    changed = tokens.copy()
    changed[:, 70:] = (changed[:, 70:] + 1) % CONFIG.vocab_size
    before, after = forward(params, CONFIG, tokens), forward(params, CONFIG, changed)
    np.testing.assert_array_equal(before[:, :70], after[:, :70])
    assert (np.asarray(before[:, 70:]) != np.asarray(after[:, 70:])).any(axis=-1).all()


@pytest.mark.parametrize("slot", [0, B - 1])
def test_a_row_is_bit_equal_among_other_neighbours_and_in_another_slot(params, slot):
    """DESIGN's invariant 4 rests on this: a rollout may not depend on what runs beside it."""
    row = random_tokens(5, 1, T)
    alone, moved = (np.insert(random_tokens(seed, B - 1, T), at, row, axis=0) for seed, at in ((6, 0), (7, slot)))

    def cached(tokens):
        cache = extend(params, CONFIG, tokens[:, :4], np.zeros(B, int), decoder.init_cache(CONFIG, B, S))
        return decode_step(params, CONFIG, tokens[:, 4], np.full(B, 4), cache)[0]

    for path in (partial(forward, params, CONFIG), cached):
        np.testing.assert_array_equal(path(alone)[0], path(moved)[slot])


def test_remat_changes_no_gradient(params):
    def gradient(remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        loss = lambda p: jnp.square(
            decoder.project(p, config, decoder.forward(p, config, random_tokens(8, 2, 9)))
        ).mean()
        return jax.jit(jax.grad(loss))(params)

    gradients = gradient(True)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4), gradients, gradient(False))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("config", [CONFIG, UNTIED, dataclasses.replace(CONFIG, family="qwen2")])
def test_every_parameter_is_float32_and_every_axis_has_a_rule(config):
    params = jax.eval_shape(partial(decoder.init_params, config), jax.random.key(0))
    axes = decoder.logical_axes(config)
    assert set(params) == {"embed", "layers", "final_norm"} | (set() if config.tie_embeddings else {"lm_head"})

    def check(leaf, spec):
        assert leaf.dtype == jnp.float32
        assert len(spec) == leaf.ndim and set(spec) <= set(RULES)

    jax.tree.map(check, params, axes)
    for leaf, spec in zip(jax.tree.leaves(params["layers"]), jax.tree.leaves(axes["layers"]), strict=True):
        assert leaf.shape[0] == config.num_layers and spec[0] == "layers"
    assert axes["layers"]["attention"]["query"]["kernel"] == jax.P("layers", "embed", "heads")


def test_layers_start_different_and_the_key_decides():
    first, again, other = (decoder.init_params(CONFIG, jax.random.key(seed)) for seed in (3, 3, 4))
    kernel = lambda params: params["layers"]["mlp"]["up"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(kernel(first), kernel(other))
    assert not np.array_equal(kernel(first)[0], kernel(first)[1])


def test_bfloat16_compute_keeps_float32_where_the_policy_says_so(params):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    tokens = random_tokens(9, B, T)
    hidden = forward(params, config, tokens)
    logits = decoder.project(params, config, hidden)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder.init_cache(config, 1, 2))} == {jnp.dtype("bfloat16")}
    exact = decoder.project(params, CONFIG, forward(params, CONFIG, tokens))
    assert 0 < np.abs(logits - exact).max() < 0.03 * np.abs(exact).max()


def test_a_decoding_loop_updates_its_cache_in_place():
    """What the compiled loop needs besides its arguments stays below one layer's keys: no copy of a cache."""
    config = dataclasses.replace(CONFIG, num_kv_heads=1)
    params = jax.eval_shape(partial(decoder.init_params, config), jax.random.key(0))
    cache = decoder.init_cache(config, B, 4096)

    def decode(params, token_B, cache):
        def body(i, carry):
            token_B, cache = carry
            hidden_BD, cache = decoder.decode_step(params, config, token_B, jnp.full(B, i), cache)
            return decoder.project(params, config, hidden_BD).argmax(-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 8, body, (token_B, cache))

    compiled = jax.jit(decode, donate_argnums=2).lower(params, jnp.zeros(B, jnp.int32), cache).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        pytest.skip("this backend reports no memory analysis")
    assert memory.temp_size_in_bytes < cache[0][0].nbytes


def test_weights_by_layer_are_the_same_and_no_program_copies_them(params):
    """XLA's CPU compiler copies slices of stacked weights; the loop with those apart has no room for one of a layer."""
    from hintsd_jax.models import lora
    from hintsd_jax.models.config import LoraConfig

    config = dataclasses.replace(CONFIG, lora=LoraConfig(2, 4.0))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, lora.init_adapter(config, jax.random.key(1)))
    served, cache = lora.attach(params, adapter), decoder.init_cache(config, B, S)
    tokens, at = random_tokens(10, B), np.array([0, 3, 5, S])
    same, other = (decode_step(one, config, tokens, at, cache)[0] for one in (served, decoder.by_layer(served)))
    np.testing.assert_allclose(same, other, atol=1e-6)

    config = dataclasses.replace(CONFIG, d_model=256, d_ff=1024)
    shapes = jax.eval_shape(lambda key: decoder.by_layer(decoder.init_params(config, key)), jax.random.key(0))
    memory = decode_step.lower(shapes, config, tokens, at, cache).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend reports no memory analysis")
    assert memory.temp_size_in_bytes - memory.output_size_in_bytes < 4 * config.d_model * config.d_ff
