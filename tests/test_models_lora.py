"""Adapters: what they add is A B and nothing else, in every pass; their dropout belongs to a token, and they alone have
gradients.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import LoraConfig, PolicyConfig
from hintsd_jax.models.families import LORA_TARGETS
from hintsd_jax.models.layers import Linear, dropout_masks
from hintsd_jax.models.sharding import RULES

LORA = LoraConfig(rank=3, alpha=5.0, dropout=0.3, targets=tuple(LORA_TARGETS))
CONFIG = PolicyConfig(
    vocab_size=31, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_dim=10, d_ff=44, rope_theta=500.0,
    norm_eps=1e-6, tie_embeddings=True, max_positions=64, lora=LORA,
)  # fmt: skip
BASE = jax.tree.map(
    lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32) * leaf.shape[-1] ** -0.5,
    jax.eval_shape(partial(decoder.init_params, CONFIG), jax.random.key(0)),
)
# As it might be after training: neither matrix is zero, and what it adds is about as large as what the base computes.
ADAPTER = jax.tree.map(
    lambda leaf: 0.3 * np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32),
    jax.eval_shape(partial(lora.init_adapter, CONFIG), jax.random.key(0)),
)
# Nearly all of this file's time is compilation: the tests share rows of [4, 16], XLA does not optimise,
# and dropout acts on two modules.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T, S = 4, 16, 20
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T), dtype=np.int32)
KEYS = np.random.default_rng(1).integers(0, 2**32, (B, 1, 2), dtype=np.uint32)
POSITIONS = np.arange(T)[None]
forward = jit(decoder.forward, static_argnums=1)
init_adapter = jit(lora.init_adapter, static_argnums=0)


def with_lora(**fields):
    return dataclasses.replace(CONFIG, lora=dataclasses.replace(LORA, **fields))


def merge(base, adapter, config):
    """The base with every pair of the adapter merged into its kernel."""
    layers = {part: dict(modules) for part, modules in base["layers"].items()}
    for part, modules in adapter["layers"].items():
        for module, pair in modules.items():
            layers[part][module] = layers[part][module] | {
                "kernel": lora.merge(layers[part][module]["kernel"], pair, config)
            }
    return base | {"layers": layers}


def pick(*modules):
    """The part of ADAPTER on these modules."""
    layers = ADAPTER["layers"]
    return {"layers": {part: {name: pair for name, pair in layers[part].items() if name in modules} for part in layers}}


DROPPING = with_lora(targets=("q_proj", "down_proj"))
DROPPED = lora.attach(BASE, pick("query", "down"))


@pytest.fixture(scope="module")
def base_hidden():
    return np.asarray(forward(BASE, CONFIG, TOKENS))


@pytest.fixture(scope="module")
def hidden():
    """With the adapter, without dropout."""
    return np.asarray(forward(lora.attach(BASE, ADAPTER), CONFIG, TOKENS))


@pytest.fixture(scope="module")
def dropped():
    return np.asarray(forward(DROPPED, DROPPING, TOKENS, POSITIONS, KEYS))


def test_a_new_adapter_changes_no_bit(base_hidden):
    new = init_adapter(CONFIG, jax.random.key(0))
    np.testing.assert_array_equal(forward(lora.attach(BASE, new), CONFIG, TOKENS), base_hidden)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}


def test_a_starts_uniform_and_different_everywhere():
    """Within 1 / sqrt(inputs), as PEFT draws it, for the output projection of attention over heads and head dimensions
    together.
    """
    new, other = (init_adapter(CONFIG, jax.random.key(seed))["layers"] for seed in (0, 1))
    inputs = {"query": 24, "key": 24, "value": 24, "out": 40, "gate": 24, "up": 24, "down": 44}
    for part, module in LORA_TARGETS.values():
        a = np.asarray(new[part][module]["a"])
        bound = inputs[module] ** -0.5
        assert 0.95 * bound < np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.2)
        assert not np.array_equal(a[0], a[1]) and not np.array_equal(a, other[part][module]["a"])
    assert not np.array_equal(new["attention"]["query"]["a"], new["attention"]["key"]["a"])


def test_alpha_0_changes_no_bit(base_hidden, hidden):
    np.testing.assert_array_equal(forward(lora.attach(BASE, ADAPTER), with_lora(alpha=0.0), TOKENS), base_hidden)
    assert np.abs(hidden - base_hidden).max() > 0.5


def test_merged_equals_attached_for_all_targets(hidden):
    merged = merge(BASE, ADAPTER, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)
    np.testing.assert_allclose(forward(merged, CONFIG, TOKENS), hidden, atol=1e-5)
    assert lora.attach(None, BASE) is BASE
    narrow = merge(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE), ADAPTER, LORA)
    assert narrow["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float32


def test_modules_that_are_no_targets_stay():
    config = with_lora(targets=("up_proj", "o_proj"))
    adapter = pick("out", "up")
    assert jax.tree.structure(adapter) == jax.tree.structure(
        jax.eval_shape(partial(lora.init_adapter, config), jax.random.key(0))
    )
    merged = merge(BASE, adapter, config.lora)
    changed = jax.tree_util.tree_map_with_path(lambda path, a, b: (path, not np.array_equal(a, b)), BASE, merged)
    changed = [path for path, differs in jax.tree.leaves(changed, is_leaf=lambda x: isinstance(x, tuple)) if differs]
    assert [[key.key for key in path] for path in changed] == [
        ["layers", "attention", "out", "kernel"],
        ["layers", "mlp", "up", "kernel"],
    ]


def test_prefill_and_decoding_equal_the_full_forward(hidden):
    """The engine's passes: two chunks of the prompt, the second against the first, then token by token."""
    params = lora.attach(BASE, ADAPTER)
    extend, decode_step = (jit(function, static_argnums=1) for function in (decoder.extend, decoder.decode_step))
    cache = decoder.init_cache(CONFIG, B, S)
    for start in (0, 6):
        cache = extend(params, CONFIG, TOKENS[:, start : start + 6], np.full(B, start), np.arange(B), cache)
    for t in range(12, T):
        step, cache = decode_step(params, CONFIG, TOKENS[:, t], np.full(B, t), cache)
        np.testing.assert_allclose(step, hidden[:, t], atol=1e-5)


@partial(jit, static_argnames="name")
def mask(key_BT2, name="query"):
    """What dropout leaves of ones at a module: its adapter is the identity and its kernel zero."""
    config = with_lora(rank=24, alpha=24.0, targets=("q_proj", "up_proj"))
    module = Linear(config, "train", 24, ("embed", "mlp"), name=name)
    variables = {"params": {"kernel": jnp.zeros((24, 24))}, "lora": {"a": jnp.eye(24), "b": jnp.eye(24)}}
    return module.apply(variables, jnp.ones((*key_BT2.shape[:2], 24)), dropout_masks(config, key_BT2, 0))


def test_dropout_has_its_rate_and_no_bias():
    keys = np.random.default_rng(2).integers(0, 2**32, (64, 64, 2), dtype=np.uint32)
    kept = np.asarray(mask(keys))  # 98,304 draws: three standard deviations are 0.0044 of the share dropped
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs((kept == 0).mean() - 0.3) < 0.0044
    assert abs(kept.mean() - 1) < 0.0044 / 0.7
    assert np.abs(kept.mean(axis=(0, 1)) - 1).max() < 0.05  # every feature is drawn for itself: 4,096 draws each
    assert np.abs(np.corrcoef(kept.reshape(-1, 24), rowvar=False) - np.eye(24)).max() < 0.08
    np.testing.assert_array_equal(mask(keys[:1, :3]), kept[:1, :3])  # whatever the batch's shape
    assert 0.41 < (np.asarray(mask(keys, name="up")) != kept).mean() < 0.43  # 2 * 0.3 * 0.7: modules are independent


def test_dropout_differs_between_layers_positions_and_rows():
    """The same input in all that counts; only the mask's coordinates differ."""

    def one_layer(n, b):
        """The first layer's weights as the only ones that do anything, at place `n`; the adapter's B times `b`."""
        place = lambda leaf: np.stack([leaf[0] if n == m else np.zeros_like(leaf[0]) for m in range(2)])
        params = jax.tree.map(
            place, {name: DROPPED[name]["layers"] if name == "lora" else DROPPED[name] for name in ("layers", "lora")}
        )
        adapter = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * b if path[-1].key == "b" else leaf, params["lora"]
        )
        params = BASE | {"layers": params["layers"], "lora": {"layers": adapter}}
        return np.asarray(forward(params, DROPPING, TOKENS, POSITIONS, KEYS))

    np.testing.assert_array_equal(one_layer(0, 0), one_layer(1, 0))
    assert (np.abs(one_layer(0, 1) - one_layer(1, 1)).max(axis=-1) > 1e-3).all()

    # The first token of a row sees only itself, so it tells rows and positions apart: rotation does not change it.
    first = np.broadcast_to(TOKENS[:1], (B, T))
    at = lambda keys, position: np.asarray(forward(DROPPED, DROPPING, first, POSITIONS + position, keys))[:, 0]
    rows, moved = at(KEYS, 0), at(KEYS, 1)
    assert len({row.tobytes() for row in (*rows, *moved)}) == 2 * B
    np.testing.assert_array_equal(rows[:1], np.unique(at(KEYS[[0] * B], 0), axis=0))


def test_dropout_follows_its_row_whatever_stands_beside_and_behind(dropped):
    """DESIGN: the loss of a target does not depend on the batch that it is scored in."""
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(forward(DROPPED, DROPPING, TOKENS[order], POSITIONS, KEYS[order]), dropped[order])
    other = TOKENS.copy()
    other[1:] = (other[1:] + 1) % CONFIG.vocab_size
    other[0, 9:] = 0
    again = forward(DROPPED, DROPPING, other, POSITIONS, np.concatenate([KEYS[:1], KEYS[1:] + 1]))
    np.testing.assert_array_equal(again[0, :9], dropped[0, :9])


def products(jaxpr):
    """Sorted shapes of all matrix products of a program, those of its loops and inner functions too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(sorted(equation.outvars[0].aval.shape))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from products(getattr(inner, "jaxpr", inner))


def test_only_the_adapter_has_gradients():
    """Not only are the base's not returned: no product of its kernels' shapes is computed, as it is where all weights
    are trained.
    """
    loss = lambda params: jnp.square(decoder.forward(params, CONFIG, TOKENS, POSITIONS, KEYS)).mean()
    adapter_only = jax.make_jaxpr(jax.grad(lambda adapter: loss(lora.attach(BASE, adapter))))(ADAPTER)
    everything = jax.make_jaxpr(jax.grad(loss))(lora.attach(BASE, ADAPTER))
    assert [aval.shape for aval in adapter_only.out_avals] == [leaf.shape for leaf in jax.tree.leaves(ADAPTER)]
    kernels = {
        tuple(sorted(BASE["layers"][part][module]["kernel"].shape[1:])) for part, module in LORA_TARGETS.values()
    }
    assert not kernels & set(products(adapter_only.jaxpr))
    assert kernels <= set(products(everything.jaxpr))


def test_every_axis_has_a_rule():
    axes = lora.logical_axes(CONFIG)
    jax.tree.map(
        lambda leaf, spec: None if len(spec) == leaf.ndim and set(spec) <= set(RULES) else pytest.fail(str(spec)),
        ADAPTER,
        axes,
    )
    assert axes["layers"]["attention"]["out"]["a"] == jax.P("layers", "adapter_split", "rank")
    assert axes["layers"]["attention"]["query"]["b"] == jax.P("layers", "rank", "adapter_split")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"alpha": -1.0}, "alpha -1.0 not negative"),
        ({"dropout": 1.0}, r"dropout 1.0 in \[0, 1\)"),
        ({"targets": ()}, "lora.targets"),
        ({"targets": ("q_proj", "lm_head")}, "name different ones of q_proj, k_proj"),
        ({"targets": ("q_proj", "q_proj")}, "name different ones"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LORA, **fields)
