"""The dense decoder of Qwen3, Qwen2.5 and Llama 3. Token ids flow in, final-normed hidden states flow out; `project` turns those into logits.

Four paths run the same `Block` on the same parameters. `forward` (the student), `forward_branches` (the teacher: a trunk and branches
that leave it) and `extend` (prefill) scan it over the stacked layers: 36 layers compile as one. `decode_step` unrolls them: a scan
would copy the cache at every token. There the stacked weights are sliced inside the traced function, never before it, so that a
decoding loop does not hoist a second copy of them.

Parameters are a plain dict; a key "lora" beside the others holds an adapter (see `policy.lora`), which acts as `config.lora` says.

Invariant: all paths give the same hidden state for the same token after the same prefix, whatever stands behind it in its
row, and a row's result does not depend on what the other rows hold.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hintsd_jax.policy import attention, rope
from hintsd_jax.policy.attention import Branches
from hintsd_jax.policy.config import LORA_TARGETS, PolicyConfig
from hintsd_jax.policy.sharding import constrain

Params = dict[str, Any]
Keep = dict[str, jax.Array]  # module -> which of its inputs an adapter's dropout leaves, bool [B, T, in]; {}: all
Cache = list[tuple[jax.Array, jax.Array]]  # per layer: keys and values, each [B, S, K, C]; slot index == position
CACHE_AXES = ("slots", "length", "act_kv_heads", "act_head_dim")


class View(NamedTuple):
    """What all layers of one pass share. One of `last_BT`, `branches` and neither (causal) says what is seen.

    turn: rotary angles. last_BT: int, the last cache slot that a token sees. branches: what the last M tokens of a row see of the
    others, or of the cache. noise_BT2: raw keys (uint32) of each token's dropout.
    """

    turn: rope.Rotation
    last_BT: jax.Array | None = None
    branches: Branches | None = None
    noise_BT2: jax.Array | None = None


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


class Linear(nn.Module):
    """A projection x W (+ bias), and the low-rank adapter of its name where there is one.

    W is [in, out], heads and head dimension as one: with them apart, TPU keeps a second copy of it in another layout while it decodes.
    `residual`: it writes to the residual stream and starts smaller by sqrt(2 N) (GPT-2). `keep`: adapter dropout by module.
    """

    config: PolicyConfig
    features: int
    axes: tuple[str, str]
    bias: bool = False
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, keep: Keep) -> jax.Array:
        cfg = self.config
        init = nn.initializers.variance_scaling(1.0 / (2 * cfg.num_layers) if self.residual else 1.0, "fan_in", "normal")
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape, jnp.float32)
        x = x.astype(cfg.compute_dtype)
        # A bias is added before the product is rounded, as in transformers: logits in bfloat16 are then 1 to 20 % closer to float32.
        y = jnp.matmul(x, kernel.astype(cfg.compute_dtype), preferred_element_type=jnp.float32 if self.bias else cfg.compute_dtype)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
            y = (y + self.param("bias", zeros, (self.features,), jnp.float32)).astype(cfg.compute_dtype)
        if cfg.lora is not None and self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name).astype(cfg.compute_dtype) for name in "ab")
            if self.name in keep:
                x = jnp.where(keep[self.name], x / (1.0 - cfg.lora.dropout), 0).astype(x.dtype)
            y += cfg.lora.scale * (x @ a @ b)
        return y


def dropout_masks(config: PolicyConfig, noise_BT2: jax.Array | None, layer: jax.Array) -> Keep:
    """Which inputs of each adapted module stay, bool [B, T, in]. A token's masks follow from its own key and the layer alone, so they
    are the same whatever row or batch it is scored in. One draw for all modules: each draw costs a second of compiling on CPU."""
    if noise_BT2 is None:
        return {}
    inputs = {"out": config.num_heads * config.head_dim, "down": config.d_ff}
    widths = {LORA_TARGETS[target][1]: inputs.get(LORA_TARGETS[target][1], config.d_model) for target in config.lora.targets}
    draw = lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key), 1.0 - config.lora.dropout, (sum(widths.values()),))
    keep = jax.vmap(jax.vmap(draw))(_fold_in(noise_BT2, layer))
    ends = list(itertools.accumulate(widths.values()))
    return dict(zip(widths, jnp.split(keep, ends[:-1], axis=-1), strict=True))


class Attention(nn.Module):
    """Grouped-query attention; in Qwen3 (arXiv:2505.09388) with q/k RMSNorm per head before the rotation."""

    config: PolicyConfig
    role: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, view: View, keep: Keep, cache):
        cfg = self.config

        def heads(name: str, number: int, axis: str) -> jax.Array:
            x = Linear(cfg, number * cfg.head_dim, ("embed", axis), cfg.qkv_bias, name=name)(x_BTD, keep)
            if view.last_BT is not None:
                # Else the compiler splits W into heads instead of the one token: TPU then keeps a second, transposed copy of it.
                x = jax.lax.optimization_barrier(x)
            x = x.reshape(*x.shape[:2], number, cfg.head_dim)
            return constrain(x, self.role, "batch", "length", f"act_{axis}", "act_head_dim")

        q_BTHC = heads("query", cfg.num_heads, "heads")
        k_BTKC = heads("key", cfg.num_kv_heads, "kv_heads")
        v_BTKC = heads("value", cfg.num_kv_heads, "kv_heads")
        if cfg.qk_norm:
            q_BTHC = RMSNorm(cfg.norm_eps, cfg.compute_dtype, name="query_norm")(q_BTHC)
            k_BTKC = RMSNorm(cfg.norm_eps, cfg.compute_dtype, name="key_norm")(k_BTKC)
        q_BTHC, k_BTKC = rope.rotate(q_BTHC, view.turn), rope.rotate(k_BTKC, view.turn)
        if view.last_BT is not None:  # write, then look at the cache
            rows = jnp.arange(x_BTD.shape[0])[:, None]
            cache = tuple(
                old.at[rows, positions_BT].set(new, mode="drop") for old, new in zip(cache, (k_BTKC, v_BTKC), strict=True)
            )
            mixed_BTHC = attention.attend_cached(q_BTHC, *cache, view.last_BT)
        elif cache is not None:  # look at the cache and at each other; the new keys and values are the caller's to write
            mixed_BTHC = attention.attend_stream(q_BTHC, k_BTKC, v_BTKC, *cache, view.branches)
            cache = (k_BTKC, v_BTKC)
        elif view.branches is not None:
            mixed_BTHC = attention.attend_branches(q_BTHC, k_BTKC, v_BTKC, view.branches)
        else:
            # Causal by index, not by position: rows are contiguous and padded on the right only.
            mixed_BTHC = attention.attend_causal(q_BTHC, k_BTKC, v_BTKC)
        out = Linear(cfg, cfg.d_model, ("heads", "embed"), residual=True, name="out")
        return out(mixed_BTHC.reshape(*x_BTD.shape[:2], -1), keep), cache


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    config: PolicyConfig
    role: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, keep: Keep) -> jax.Array:
        cfg = self.config
        gate_BTF = Linear(cfg, cfg.d_ff, ("embed", "mlp"), name="gate")(x_BTD, keep)
        up_BTF = Linear(cfg, cfg.d_ff, ("embed", "mlp"), name="up")(x_BTD, keep)
        hidden_BTF = constrain(nn.silu(gate_BTF) * up_BTF, self.role, "batch", "length", "act_mlp")
        return Linear(cfg, cfg.d_model, ("mlp", "embed"), residual=True, name="down")(hidden_BTF, keep)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)). `layer`, its number, goes into the dropout of adapters."""

    config: PolicyConfig
    role: str

    @nn.compact
    def __call__(self, x_BTD, positions_BT, view: View, layer, cache=None):
        norm = partial(RMSNorm, self.config.norm_eps, self.config.compute_dtype)
        keep = dropout_masks(self.config, view.noise_BT2, layer)
        mixed_BTD, cache = Attention(self.config, self.role, name="attention")(
            norm(name="attention_norm")(x_BTD), positions_BT, view, keep, cache
        )
        x_BTD = constrain(x_BTD + mixed_BTD, self.role, "batch", "length", "act_embed")
        x_BTD = x_BTD + SwiGLU(self.config, self.role, name="mlp")(norm(name="mlp_norm")(x_BTD), keep)
        return constrain(x_BTD, self.role, "batch", "length", "act_embed"), cache


def _fold_in(key_BT2: jax.Array, data_BT: jax.Array) -> jax.Array:
    """`jax.random.fold_in` for raw keys, elementwise."""
    fold = lambda key, data: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), data))
    return jnp.vectorize(fold, signature="(n),()->(n)")(key_BT2, data_BT)


class Embed(nn.Module):
    """Token ids -> their rows of the table, in the compute dtype."""

    config: PolicyConfig
    role: str

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        cfg = self.config
        # 1/sqrt(D): with a tied head the first logits have unit variance.
        init = nn.with_logical_partitioning(nn.initializers.normal(cfg.d_model**-0.5), ("vocab", "embed"))
        table_VD = self.param("embedding", init, (cfg.vocab_size, cfg.d_model), jnp.float32)
        # Whole along D before the look-up: a table that `fsdp` splits gives rows that it splits, and batches are split by it too.
        table_VD = constrain(table_VD.astype(cfg.compute_dtype), self.role, "vocab", "act_embed")
        return constrain(table_VD[tokens_BT], self.role, "batch", "length", "act_embed")


class Decoder(nn.Module):
    """The passes over whole rows, and the only place where parameters come into being."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, view: View) -> jax.Array:
        cfg = self.config
        x_BTD = Embed(cfg, "train", name="embed")(tokens_BT)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if cfg.remat else Block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, _ = layers(cfg, "train", name="layers")(x_BTD, positions_BT, view, jnp.arange(cfg.num_layers))
        if not cfg.tie_embeddings and self.is_initializing():
            # Declared here so that one module owns every parameter; `project` applies it, to the few tokens that need it.
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            kernel_init = nn.with_logical_partitioning(init, ("embed", "vocab"))
            nn.Dense(cfg.vocab_size, use_bias=False, kernel_init=kernel_init, name="lm_head")(x_BTD)
        return RMSNorm(cfg.norm_eps, cfg.compute_dtype, name="final_norm")(x_BTD)


def _init(config: PolicyConfig, key: jax.Array) -> Any:
    """Parameters boxed with their logical axes."""
    one = jnp.zeros((1, 1), jnp.int32)
    view = View(rope.rotation(one, config))
    return Decoder(config).init(key, one, one, view)["params"]


@partial(jax.jit, static_argnums=0)
def init_params(config: PolicyConfig, key: jax.Array) -> Params:
    """Random float32 parameters as a plain nested dict; every leaf under `"layers"` is stacked with leading dimension N."""
    return nn.meta.unbox(_init(config, key))


def logical_axes(config: PolicyConfig) -> Params:
    """The tree of `init_params` with a PartitionSpec of logical axis names at every leaf (see `policy.sharding`)."""
    return nn.get_partition_spec(jax.eval_shape(partial(_init, config), jax.random.key(0)))


def _variables(params: Params) -> dict[str, Any]:
    """The parameters as Linen's collections: the adapter is one of its own."""
    base = {name: tree for name, tree in params.items() if name != "lora"}
    return {"params": base, "lora": params["lora"]} if "lora" in params else {"params": base}


def forward(
    params: Params,
    config: PolicyConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    dropout_B2: jax.Array | None = None,
) -> jax.Array:
    """Causal pass over whole rows -> final-normed hidden_BTD, differentiable.

    tokens int [B, T]; positions int [B, T] or [1, T], by default 0..T-1. Padding may stand on the right only: a token sees
    those before it in its row, so none that counts ever sees padding and no mask is needed. `dropout_B2`, uint32, are raw keys
    of the rows' adapter dropout; the mask of a token follows from its row's key, its position and the module. None: no dropout.
    """
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    noise_BT2 = None
    if dropout_B2 is not None and config.lora is not None and config.lora.dropout > 0:
        noise_BT2 = _fold_in(dropout_B2[:, None], jnp.broadcast_to(positions_BT, tokens_BT.shape))
    view = View(rope.rotation(positions_BT, config), noise_BT2=noise_BT2)
    return Decoder(config).apply(_variables(params), tokens_BT, positions_BT, view)


def forward_branches(
    params: Params, config: PolicyConfig, trunk_BP: jax.Array, stream_BM: jax.Array, positions_BM: jax.Array, branches: Branches
) -> jax.Array:
    """One pass over trunks and the branches that leave them -> final-normed hidden_BMD of the branch tokens. Not differentiable.

    trunk int [B, P], positions 0..P-1; P may be 0. stream int [B, M]: the branches of a row one behind the other, at `positions_BM`;
    `branches` says what they see. A token's hidden state is that of a row of its own: the trunk's prefix, then its branch.
    """
    P = trunk_BP.shape[1]
    positions_BT = jnp.concatenate([jnp.broadcast_to(jnp.arange(P), trunk_BP.shape), positions_BM], axis=1)
    view = View(rope.rotation(positions_BT, config), branches=branches)
    return Decoder(config).apply(_variables(params), jnp.concatenate([trunk_BP, stream_BM], axis=1), positions_BT, view)[:, P:]


def init_cache(config: PolicyConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of `length` positions, in the compute dtype, laid out for serving."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    empty = lambda: constrain(jnp.zeros(shape, config.compute_dtype), "serve", *CACHE_AXES)
    return [(empty(), empty()) for _ in range(config.num_layers)]



def extend(
    params: Params, config: PolicyConfig, tokens_RL: jax.Array, start_R: jax.Array, rows: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Runs L new tokens of each row at positions start, start + 1, ... -> their keys and values, each [N, R, L, K, C].

    `rows`: keys and values of the rows' caches, [N, R, S, K, C]; of these only the first `start` positions are looked at.
    """
    variables = _variables(params)
    positions_RL = start_R[:, None] + jnp.arange(tokens_RL.shape[1])
    branches = Branches(jnp.broadcast_to(start_R[:, None], tokens_RL.shape), jnp.zeros(tokens_RL.shape, jnp.int32))
    view = View(rope.rotation(positions_RL, config), branches=branches)

    def layer(x_RLD, inputs):
        weights, n, cache = inputs
        return Block(config, "serve").apply(weights, x_RLD, positions_RL, view, n, cache)

    layers = {name: tree["layers"] for name, tree in variables.items()}
    x_RLD = Embed(config, "serve").apply({"params": params["embed"]}, tokens_RL)
    return jax.lax.scan(layer, x_RLD, (layers, jnp.arange(config.num_layers), rows))[1]


def decode_step(
    params: Params, config: PolicyConfig, token_B: jax.Array, position_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs one new token of each row at `position_B` (int, >= 0) against the cache -> (final-normed hidden_BD, cache).

    Writes the token's key and value into slot `position` of its row, or nowhere if position >= S, then attends to slots 0..position.
    So garbage past a row's length, from padding or from an earlier owner of the slot, does no harm: it is overwritten by the
    token of that position before any query may see it. Donate the cache to update it in place.
    """
    variables, block = _variables(params), Block(config, "serve")
    positions_B1 = position_B[:, None]
    # A row past the end of its slot is an empty one: it must not make the others' keys be read to the end.
    last_B1 = jnp.where(positions_B1 < cache[0][0].shape[1], positions_B1, 0)
    view = View(rope.rotation(positions_B1, config), last_B1)
    x_B1D, updated = Embed(config, "serve").apply({"params": params["embed"]}, token_B[:, None]), []
    for n, layer_cache in enumerate(cache):
        weights = {name: jax.tree.map(lambda stacked: stacked[n], tree["layers"]) for name, tree in variables.items()}
        x_B1D, layer_cache = block.apply(weights, x_B1D, positions_B1, view, n, layer_cache)
        updated.append(layer_cache)
    norm = RMSNorm(config.norm_eps, config.compute_dtype)
    return norm.apply({"params": params["final_norm"]}, x_B1D)[:, 0], updated


def project(params: Params, config: PolicyConfig, hidden: jax.Array) -> jax.Array:
    """Final-normed hidden [..., D] -> logits [..., V] in float32. Project only the tokens you need: V may be 151,936."""
    if config.tie_embeddings:
        kernel, equation = params["embed"]["embedding"], "...d,vd->...v"
    else:
        kernel, equation = params["lm_head"]["kernel"], "...d,dv->...v"
    kernel = kernel.astype(config.compute_dtype)
    return jnp.einsum(equation, hidden.astype(config.compute_dtype), kernel, preferred_element_type=jnp.float32)


def split_head(params: Params, config: PolicyConfig) -> Params:
    """The same weights, those of `project` split along the vocabulary, for calling it many times with few rows (`project_split`)."""
    if config.tie_embeddings:
        return {**params, "embed": {"embedding": constrain(params["embed"]["embedding"], "train", "split_vocab", "act_embed")}}
    return {**params, "lm_head": {"kernel": constrain(params["lm_head"]["kernel"], "train", "act_embed", "split_vocab")}}


def project_split(params: Params, config: PolicyConfig, hidden_XD: jax.Array) -> jax.Array:
    """`project` of rows that are split over devices, by the weights of `split_head`: rows and logits cross devices instead of weights.

    With Qwen3-4B on 8 chips, weights scattered along D were gathered (742 MiB) and their gradient summed (1.4 GiB) in every chunk of
    the loss; now 10 MiB of logits go each way.
    """
    logits_XV = constrain(project(params, config, hidden_XD), "train", "batch", "split_vocab")
    return constrain(logits_XV, "train", "batch", "act_vocab")
