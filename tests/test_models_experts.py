"""Experts against a NumPy oracle in float64 that computes each token by itself, whatever the router does: experts that
get no token, all tokens, ties, padding, one round and many.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.models import decoder, experts, lora
from hintsd_jax.models.attention import Branches
from hintsd_jax.models.config import ExpertsConfig, LoraConfig, PolicyConfig
from hintsd_jax.models.expert_rounds import in_rounds

B, T, D, F, E, K = 3, 7, 8, 6, 8, 2  # 21 tokens: no multiple of anything
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, D)).astype(np.float32)
WEIGHTS = {
    (name, key): RNG.normal(size=(E, *shape)).astype(np.float32)
    for name, (inputs, outputs) in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items()
    for key, shape in {"kernel": (inputs, outputs), "a": (inputs, 2), "b": (2, outputs)}.items()
}
MASKS = {"up": RNG.random((B, T, D)) < 0.7, "down": RNG.random((B, T, F)) < 0.7}
SETTING = experts.Setting("train", E, scale=0.5, dropout=0.3)
ROUTERS = {
    "random": RNG.permuted(np.tile(np.arange(E), (B * T, 1)), axis=1)[:, :K],
    "the first and the last alone": np.tile([E - 1, 0], (B * T, 1)),
    "one has nearly all": np.stack([np.full(B * T, 5), RNG.integers(0, 5, B * T)], axis=1),
}
PADDED = np.arange(T) < np.array([[7], [4], [0]])
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def oracle(x, weight, weights, expert, real, masks):
    """One token after the other."""
    silu = lambda v: v / (1 + np.exp(-v))

    def projected(e, name, v, mask):
        of = lambda key: weights[name, key][e].astype(np.float64)
        dropped = v if mask is None else np.where(mask, v / 0.7, 0)
        return v @ of("kernel") + 0.5 * (dropped @ of("a") @ of("b"))

    out = np.zeros(x.shape, np.float64)
    for b, t in np.ndindex(B, T):
        for e, w in zip(expert[b, t], weight[b, t], strict=True) if real[b, t] else ():
            v = x[b, t].astype(np.float64)
            hidden = silu(projected(e, "gate", v, None)) * projected(e, "up", v, masks["up"][b, t])
            out[b, t] += w * projected(e, "down", hidden, masks["down"][b, t])
    return out


@pytest.mark.parametrize("few", [0, 128])
@pytest.mark.parametrize("router", ROUTERS)
def test_each_token_is_what_its_experts_make_of_it(router, few):
    expert = ROUTERS[router].reshape(B, T, K).astype(np.int32)
    weight = RNG.random((B, T, K)).astype(np.float32)
    call = jit(partial(experts.mixture, SETTING._replace(few=few)))
    ours = call(X, weight, WEIGHTS, expert, PADDED, MASKS)
    np.testing.assert_allclose(ours, oracle(X, weight, WEIGHTS, expert, PADDED, MASKS), rtol=1e-5, atol=1e-5)
    assert not np.asarray(ours)[~PADDED].any() and np.asarray(ours)[PADDED].all()


@pytest.mark.parametrize("few", [0, 128])
def test_gradients_are_those_of_every_expert_on_every_token(few):
    """Against what JAX makes of the sum over all experts, most of them weighed by 0."""
    expert = jnp.asarray(ROUTERS["one has nearly all"].reshape(B, T, K), jnp.int32)
    masks = jax.tree.map(jnp.asarray, MASKS)
    weight, pull = RNG.random((B, T, K)).astype(np.float32), RNG.normal(size=X.shape).astype(np.float32)

    def ours(x, weight, weights):
        return jnp.sum(pull * experts.mixture(SETTING._replace(few=few), x, weight, weights, expert, PADDED, masks))

    def plain(x, weight, weights):
        def projected(name, v_BTEI, mask_BTI):
            v_BTEI = jnp.broadcast_to(v_BTEI, (B, T, E, v_BTEI.shape[-1]))
            through = lambda key, v: jnp.einsum("btei,eio->bteo", v, weights[name, key])
            dropped = v_BTEI if mask_BTI is None else jnp.where(mask_BTI[:, :, None], v_BTEI / 0.7, 0)
            return through("kernel", v_BTEI) + 0.5 * through("b", through("a", dropped))

        x = x[:, :, None]
        hidden = jax.nn.silu(projected("gate", x, None)) * projected("up", x, MASKS["up"])
        chosen_BTE = jnp.sum(jax.nn.one_hot(expert, E) * weight[..., None], axis=2) * PADDED[..., None]
        return jnp.sum(pull * jnp.einsum("bte,bted->btd", chosen_BTE, projected("down", hidden, MASKS["down"])))

    got, wanted = (jit(jax.grad(f, argnums=(0, 1, 2)))(X, weight, WEIGHTS) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, wanted)
    assert not np.asarray(got[2]["gate", "kernel"])[6:].any()  # of experts that nobody chose


def test_frozen_weights_get_no_gradient_and_no_product():
    expert = jnp.asarray(ROUTERS["random"].reshape(B, T, K), jnp.int32)
    weight = jnp.ones((B, T, K))
    adapter = {key: leaf for key, leaf in WEIGHTS.items() if key[1] != "kernel"}

    def loss(adapter):
        return jnp.sum(experts.mixture(SETTING, X, weight, WEIGHTS | adapter, expert, None, {}))

    text = str(jax.make_jaxpr(jax.grad(loss))(adapter))
    assert f"f32[{E},{F},2]" in text and f"f32[{E},{D},{F}] = add_any" not in text
    shapes = [eqn for eqn in text.splitlines() if "dot_general" in eqn and f":f32[{E},{D},{F}]" in eqn.split("=")[0]]
    assert not shapes


@pytest.mark.parametrize("few", [0, 128])
def test_a_token_depends_on_nothing_but_itself_bit_for_bit(few):
    call = jit(partial(experts.mixture, SETTING._replace(few=few)))
    weight = RNG.random((B, T, K)).astype(np.float32)
    expert = ROUTERS["random"].reshape(B, T, K).astype(np.int32)
    alone = np.asarray(call(X, weight, WEIGHTS, expert, None, MASKS))
    crowd = np.where(np.arange(B)[:, None, None] == 1, expert, expert[1, 3])  # the others all choose as one of its does
    again = np.asarray(call(np.where(np.arange(B)[:, None, None] == 1, X, 2 * X), weight, WEIGHTS, crowd, None, MASKS))
    np.testing.assert_array_equal(again[1], alone[1])
    turned = np.asarray(call(*(np.roll(a, 1, axis=0) for a in (X, weight)), WEIGHTS, np.roll(expert, 1, 0), None, {}))
    plain = np.asarray(call(X, weight, WEIGHTS, expert, None, {}))
    np.testing.assert_array_equal(np.roll(turned, -1, axis=0), plain)


def test_as_many_rounds_as_the_fullest_expert_needs_and_none_for_padding():
    """64 tokens with 2 of 8 experts each: 32 rows of an expert at once."""
    rounds = lambda expert, real=None: in_rounds(jnp.asarray(expert), real, 0, E, number=E, few=8)
    balanced = np.stack([np.arange(64) % 8, (np.arange(64) + 1) % 8], axis=1)
    crowded = np.tile([3, 4], (64, 1))
    half = jnp.arange(64) < 30
    assert (rounds(balanced).C, int(rounds(balanced).number), int(rounds(crowded).number)) == (32, 1, 2)
    assert int(rounds(crowded, half).number) == 1
    assert int(rounds(balanced, jnp.zeros(64, bool)).number) == 0
    choice, valid = rounds(crowded).rows(1)
    assert valid.sum() == 64 and set(np.asarray(choice)[np.asarray(valid)] // 2) == set(range(32, 64))


@pytest.mark.parametrize("renormalised", [False, True])
def test_the_router_takes_the_likeliest_and_of_equal_ones_the_first(renormalised):
    logits = np.array([[0.0, 3, 1, 3, -9], [2, 2, 2, 2, 2]], np.float32)
    expert, weight = experts.route(logits, 3, renormalised)
    assert expert.tolist() == [[1, 3, 2], [0, 1, 2]]
    likely = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    likely = np.take_along_axis(likely, np.asarray(expert), -1)
    np.testing.assert_allclose(weight, likely / likely.sum(-1, keepdims=True) if renormalised else likely, rtol=1e-6)


# The whole decoder. `few` is lower than the tokens of these rows, so that the update's way of computing is taken.
CONFIG = PolicyConfig(
    vocab_size=31, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_dim=10, d_ff=40, rope_theta=500.0,
    norm_eps=1e-6, tie_embeddings=True, max_positions=64, family="qwen3_moe", experts=ExpertsConfig(8, 2, 12, True),
    lora=LoraConfig(3, 5.0, 0.3, ("q_proj", "gate_proj", "up_proj", "down_proj")),
)  # fmt: skip


@pytest.fixture(scope="module")
def policy():
    experts.FEW, few = 8, experts.FEW
    draw = lambda leaf: 0.3 * np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32)
    base = jax.tree.map(draw, jax.eval_shape(partial(decoder.init_params, CONFIG), jax.random.key(0)))
    adapter = jax.tree.map(draw, jax.eval_shape(partial(lora.init_adapter, CONFIG), jax.random.key(0)))
    yield base, adapter
    experts.FEW = few


def test_the_teacher_reads_branches_as_rows_of_their_own(policy):
    """Beside padding in the trunk, between branches and of a row without any."""
    params = lora.attach(*policy)
    tokens = np.random.default_rng(1).integers(0, 31, (2, 14)).astype(np.int32)
    trunk, branch = np.zeros((2, 10), np.int32), np.zeros((2, 8), np.int32)
    trunk[0, :7], branch[0, :5] = tokens[0, :7], tokens[0, 7:12]
    positions = np.zeros((2, 8), np.int32)
    positions[0, :5] = np.arange(7, 12)
    is_branch = np.arange(8) < np.array([[5], [0]])
    branches = Branches(np.zeros((2, 8), np.int32), np.where(is_branch, 7, 0), np.where(is_branch, 0, -1))
    whole = jit(decoder.forward, static_argnums=1)(params, CONFIG, tokens)
    last = np.array([11, 0])
    cut = jit(decoder.forward, static_argnums=1)(params, CONFIG, tokens, last_B=last)
    read = jit(decoder.forward_branches, static_argnums=1)(params, CONFIG, trunk, branch, positions, branches)
    np.testing.assert_allclose(read[0, :5], whole[0, 7:12], atol=1e-5)
    np.testing.assert_array_equal(cut[0, :12], whole[0, :12])
    assert np.isfinite(np.asarray(cut)).all() and np.isfinite(np.asarray(read)).all()


def test_an_adapter_on_experts_adds_what_a_merge_adds(policy):
    base, adapter = policy
    mlp = {
        name: base["layers"]["mlp"][name]
        | {"kernel": lora.merge(base["layers"]["mlp"][name]["kernel"], pair, CONFIG.lora)}
        for name, pair in adapter["layers"]["mlp"].items()
    }
    query = lora.merge(
        base["layers"]["attention"]["query"]["kernel"], adapter["layers"]["attention"]["query"], CONFIG.lora
    )
    attention = base["layers"]["attention"] | {"query": {"kernel": query}}
    merged = base | {"layers": base["layers"] | {"mlp": base["layers"]["mlp"] | mlp, "attention": attention}}
    tokens = np.random.default_rng(2).integers(0, 31, (2, 14)).astype(np.int32)
    forward = jit(decoder.forward, static_argnums=1)
    attached = forward(lora.attach(base, adapter), CONFIG, tokens)
    np.testing.assert_allclose(forward(merged, dataclasses.replace(CONFIG, lora=None), tokens), attached, atol=1e-4)
    assert np.abs(attached - forward(base, CONFIG, tokens)).max() > 0.3
