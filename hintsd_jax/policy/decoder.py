"""The Qwen3 decoder. Token ids flow in, final-normed hidden states flow out; `project` turns those into logits.

Two paths run the same `Block` on the same parameters. `forward` (training) scans it over the stacked layers, under remat.
`forward_cached` (prefill and decoding) unrolls the layers: a scan would copy the cache at every token. The stacked weights
are sliced inside the traced function, never before it, so that a decoding loop does not hoist a second copy of them.

Invariant: both paths give the same hidden state for the same token after the same prefix, whatever stands behind it in its
row, and a row's result does not depend on what the other rows hold.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hintsd_jax.policy import attention
from hintsd_jax.policy.config import PolicyConfig
from hintsd_jax.policy.sharding import constrain

Params = dict[str, Any]
Cache = list[tuple[jax.Array, jax.Array]]  # per layer: keys and values, each [B, S, K, C]; slot index == position


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, in float32; returns `dtype`."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale).astype(self.dtype)


def _dense(config: PolicyConfig, features, axes: tuple[str, ...], *, axis=-1, residual: bool = False, name: str):
    """A projection without bias. Those that write to the residual stream start smaller by sqrt(2 N) (GPT-2)."""
    variance = 1.0 / (2 * config.num_layers) if residual else 1.0
    init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
    return nn.DenseGeneral(
        features, axis=axis, use_bias=False, dtype=config.compute_dtype, param_dtype=jnp.float32, name=name,
        kernel_init=nn.with_logical_partitioning(init, axes),
    )  # fmt: skip


class Attention(nn.Module):
    """Grouped-query attention with q/k RMSNorm per head before the rotation (Qwen3, arXiv:2505.09388)."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, x_BTD, positions_BT, turn: attention.Rotation, cache):
        cfg = self.config
        kv = (cfg.num_kv_heads, cfg.head_dim)
        q_BTHC = _dense(cfg, (cfg.num_heads, cfg.head_dim), ("embed", "heads", "head_dim"), name="query")(x_BTD)
        k_BTKC = _dense(cfg, kv, ("embed", "kv_heads", "head_dim"), name="key")(x_BTD)
        v_BTKC = _dense(cfg, kv, ("embed", "kv_heads", "head_dim"), name="value")(x_BTD)
        q_BTHC = constrain(q_BTHC, "batch", "length", "act_heads", "act_head_dim")
        k_BTKC = constrain(k_BTKC, "batch", "length", "act_kv_heads", "act_head_dim")
        v_BTKC = constrain(v_BTKC, "batch", "length", "act_kv_heads", "act_head_dim")
        q_BTHC = attention.rotate(RMSNorm(cfg.norm_eps, cfg.compute_dtype, name="query_norm")(q_BTHC), turn)
        k_BTKC = attention.rotate(RMSNorm(cfg.norm_eps, cfg.compute_dtype, name="key_norm")(k_BTKC), turn)
        if cache is None:
            # Causal by index, not by position: rows are contiguous and padded on the right only.
            mixed_BTHC = attention.attend_causal(q_BTHC, k_BTKC, v_BTKC)
        else:
            rows = jnp.arange(x_BTD.shape[0])[:, None]
            cache = tuple(
                old.at[rows, positions_BT].set(new, mode="drop") for old, new in zip(cache, (k_BTKC, v_BTKC), strict=True)
            )
            mixed_BTHC = attention.attend(q_BTHC, *cache, positions_BT)
        out = _dense(cfg, cfg.d_model, ("heads", "head_dim", "embed"), axis=(-2, -1), residual=True, name="out")
        return out(mixed_BTHC), cache


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg = self.config
        gate_BTF = _dense(cfg, cfg.d_ff, ("embed", "mlp"), name="gate")(x_BTD)
        up_BTF = _dense(cfg, cfg.d_ff, ("embed", "mlp"), name="up")(x_BTD)
        hidden_BTF = constrain(nn.silu(gate_BTF) * up_BTF, "batch", "length", "act_mlp")
        return _dense(cfg, cfg.d_model, ("mlp", "embed"), residual=True, name="down")(hidden_BTF)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)). `cache` None is the training path."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, x_BTD, positions_BT, turn: attention.Rotation, cache=None):
        norm = partial(RMSNorm, self.config.norm_eps, self.config.compute_dtype)
        mixed_BTD, cache = Attention(self.config, name="attention")(
            norm(name="attention_norm")(x_BTD), positions_BT, turn, cache
        )
        x_BTD = constrain(x_BTD + mixed_BTD, "batch", "length", "act_embed")
        x_BTD = x_BTD + SwiGLU(self.config, name="mlp")(norm(name="mlp_norm")(x_BTD))
        return constrain(x_BTD, "batch", "length", "act_embed"), cache


class Embed(nn.Module):
    """Token ids -> their rows of the table, in the compute dtype."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        cfg = self.config
        # 1/sqrt(D): with a tied head the first logits have unit variance.
        init = nn.with_logical_partitioning(nn.initializers.normal(cfg.d_model**-0.5), ("vocab", "embed"))
        table_VD = self.param("embedding", init, (cfg.vocab_size, cfg.d_model), jnp.float32)
        return constrain(table_VD[tokens_BT].astype(cfg.compute_dtype), "batch", "length", "act_embed")


class Decoder(nn.Module):
    """The training forward pass, and the only place where parameters come into being."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        cfg = self.config
        x_BTD = Embed(cfg, name="embed")(tokens_BT)
        turn = attention.rotation(positions_BT, cfg.head_dim, cfg.rope_theta)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if cfg.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, _ = layers(cfg, name="layers")(x_BTD, positions_BT, turn)
        if not cfg.tie_embeddings and self.is_initializing():
            # Declared here so that one module owns every parameter; `project` applies it, to the few tokens that need it.
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            kernel_init = nn.with_logical_partitioning(init, ("embed", "vocab"))
            nn.Dense(cfg.vocab_size, use_bias=False, kernel_init=kernel_init, name="lm_head")(x_BTD)
        return RMSNorm(cfg.norm_eps, cfg.compute_dtype, name="final_norm")(x_BTD)


def _init(config: PolicyConfig, key: jax.Array) -> Any:
    """Parameters boxed with their logical axes."""
    one = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, one, one)["params"]


@partial(jax.jit, static_argnums=0)
def init_params(config: PolicyConfig, key: jax.Array) -> Params:
    """Random float32 parameters as a plain nested dict; every leaf under `"layers"` is stacked with leading dimension N."""
    return nn.meta.unbox(_init(config, key))


def logical_axes(config: PolicyConfig) -> Params:
    """The tree of `init_params` with a PartitionSpec of logical axis names at every leaf (see `policy.sharding`)."""
    return nn.get_partition_spec(jax.eval_shape(partial(_init, config), jax.random.key(0)))


def forward(
    params: Params, config: PolicyConfig, tokens_BT: jax.Array, positions_BT: jax.Array | None = None
) -> jax.Array:
    """Causal pass over whole rows -> final-normed hidden_BTD, differentiable.

    tokens int [B, T]; positions int [B, T] or [1, T], by default 0..T-1. Padding may stand on the right only: a token sees
    those before it in its row, so none that counts ever sees padding and no mask is needed.
    """
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    return Decoder(config).apply({"params": params}, tokens_BT, positions_BT)


def init_cache(config: PolicyConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of `length` positions, in the compute dtype."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    empty = lambda: constrain(jnp.zeros(shape, config.compute_dtype), "batch", "length", "act_kv_heads", "act_head_dim")
    return [(empty(), empty()) for _ in range(config.num_layers)]


def forward_cached(
    params: Params, config: PolicyConfig, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs T new tokens of each row at `positions_BT` (int, >= 0) against the cache -> (final-normed hidden_BTD, cache).

    Writes each token's key and value into slot `position` of its row, drops those at positions >= S, then attends to slots
    0..position. So garbage past a row's length, from padding or from an earlier owner of the slot, does no harm: it is
    overwritten by the token of that position before any query may see it. Donate the cache to update it in place.
    """
    embed, block = Embed(config), Block(config)
    norm = RMSNorm(config.norm_eps, config.compute_dtype)
    x_BTD = embed.apply({"params": params["embed"]}, tokens_BT)
    turn = attention.rotation(positions_BT, config.head_dim, config.rope_theta)
    updated = []
    for n, layer_cache in enumerate(cache):
        weights = jax.tree.map(lambda stacked: stacked[n], params["layers"])
        x_BTD, layer_cache = block.apply({"params": weights}, x_BTD, positions_BT, turn, layer_cache)
        updated.append(layer_cache)
    return norm.apply({"params": params["final_norm"]}, x_BTD), updated


def project(params: Params, config: PolicyConfig, hidden: jax.Array) -> jax.Array:
    """Final-normed hidden [..., D] -> logits [..., V] in float32. Project only the tokens you need: V may be 151,936."""
    if config.tie_embeddings:
        kernel, equation = params["embed"]["embedding"], "...d,vd->...v"
    else:
        kernel, equation = params["lm_head"]["kernel"], "...d,dv->...v"
    kernel = kernel.astype(config.compute_dtype)
    return jnp.einsum(equation, hidden.astype(config.compute_dtype), kernel, preferred_element_type=jnp.float32)
