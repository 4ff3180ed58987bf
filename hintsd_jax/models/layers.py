# SPDX-License-Identifier: Apache-2.0

"""The modules of a decoder layer, and the table of embeddings: hidden states and what a pass shares flow in, hidden
states flow out.

Written once for every pass of `decoder`: what differs between passes (what a token attends to, where keys and values
come from) is in `SharedInputs` and in whether a cache is given. Matrix products are in `config.compute_dtype`, norms in
float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hintsd_jax.models import attention, experts, rope
from hintsd_jax.models.attention import Branches, Window
from hintsd_jax.models.cached_attention import KeysValues, write_and_attend
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.families import LORA_TARGETS
from hintsd_jax.models.product import product
from hintsd_jax.models.sharding import constrain

DropoutMasks = dict[str, jax.Array]  # module -> which of its adapter's inputs stay, bool [B, T, in]; {}: all


class SharedInputs(NamedTuple):
    """What all layers of one pass share. Rows are causal where neither a cache nor `branches` says otherwise.

    rotations: rotary angles. start_B, slot_B: where rows stand in the cache, see `cached_attention`. branches: what the
    last M tokens of a row attend to among the others. first_BT: where the sequences of a row begin, see `attention`; of
    its trunk where there are branches. dropout_key_BT2: raw keys (uint32) of each token's dropout. real_BT: False for
    tokens that nobody looks at, of policies with experts; None: all are looked at.
    """

    rotations: rope.Rotations
    start_B: jax.Array | None = None
    slot_B: jax.Array | None = None
    branches: Branches | None = None
    first_BT: jax.Array | None = None
    dropout_key_BT2: jax.Array | None = None
    real_BT: jax.Array | None = None


def _param(module: nn.Module, name: str, init: Callable, axes: tuple[str, ...], shape: tuple[int, ...]) -> Any:
    """A float32 parameter with one logical axis per dimension."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, or * (1 + scale), in float32; returns the compute dtype."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        adds_one = self.config.switches.norm_adds_one
        scale = _param(self, "scale", nn.initializers.constant(0.0 if adds_one else 1.0), ("norm",), (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x * (1.0 + scale if adds_one else scale)).astype(self.config.compute_dtype)


def _one_by_one(role: str, y: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The product `y`, and its input for the next product: in serving it is there only after `y` is.

    Two products with one input may be computed at once, and XLA's GPU compiler then writes their weights one behind the
    other first, in every step: 30 MiB a layer of Qwen3-4B's queries, keys and values.
    """
    return jax.lax.optimization_barrier((y, x)) if role == "serve" else (y, x)


class Linear(nn.Module):
    """A projection x W (+ bias), and the low-rank adapter of its name where there is one.

    W is [in, out], heads and head dimension as one: with them apart, TPU keeps a second copy of it in another layout
    while it decodes. `residual`: it writes to the residual stream and starts smaller by sqrt(2 N) (GPT-2).
    """

    config: PolicyConfig
    role: str
    features: int
    axes: tuple[str, str]
    bias: bool = False
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, masks: DropoutMasks) -> jax.Array:
        cfg = self.config
        scale = 1.0 / (2 * cfg.num_layers) if self.residual else 1.0
        init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
        kernel = _param(self, "kernel", init, self.axes, (x.shape[-1], self.features))
        x = x.astype(cfg.compute_dtype)
        # A bias is added before the product is rounded, as in transformers: logits in bfloat16 are then 1 to 20 %
        # closer to float32.
        product_dtype = jnp.float32 if self.bias else cfg.compute_dtype
        y: Any = product(x, kernel.astype(cfg.compute_dtype), product_dtype)
        if self.bias:
            bias = _param(self, "bias", nn.initializers.zeros_init(), self.axes[1:], (self.features,))
            y = (y + bias).astype(cfg.compute_dtype)
        if cfg.lora is not None and self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name).astype(cfg.compute_dtype) for name in "ab")
            y, x = _one_by_one(self.role, y, x)
            if self.name in masks:
                x = jnp.where(masks[self.name], x / (1.0 - cfg.lora.dropout), 0).astype(x.dtype)
            y += cfg.lora.scale * (x @ a @ b)
        return y


def dropout_masks(config: PolicyConfig, dropout_key_BT2: jax.Array | None, layer: int | jax.Array) -> DropoutMasks:
    """Which inputs of each adapted module stay, bool [B, T, in].

    A token's masks follow from its own key and the layer alone, so they are the same whatever row or batch it is scored
    in. One draw for all modules: each draw costs a second of compiling on CPU.
    """
    if dropout_key_BT2 is None or config.lora is None:
        return {}
    d_ff = config.d_ff if config.experts is None else config.experts.d_ff
    inputs = {"out": config.num_heads * config.head_dim, "down": d_ff}
    modules = [LORA_TARGETS[target][1] for target in config.lora.targets]
    widths = {module: inputs.get(module, config.d_model) for module in modules}
    share, shape = 1.0 - config.lora.dropout, (sum(widths.values()),)
    draw = lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key), share, shape)
    mask = jax.vmap(jax.vmap(draw))(fold_in(dropout_key_BT2, layer))
    stops = list(itertools.accumulate(widths.values()))
    return dict(zip(widths, jnp.split(mask, stops[:-1], axis=-1), strict=True))


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normed before the rotation per head as in Qwen3 (arXiv:2505.09388)
    or as a whole as in OLMo 2 (arXiv:2501.00656), where a family does it.
    """

    config: PolicyConfig
    role: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        shared: SharedInputs,
        layer: int | jax.Array,
        masks: DropoutMasks,
        cache: KeysValues | None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """Returns what is mixed, and the updated cache where there is one."""
        cfg, switches = self.config, self.config.switches

        def heads(name: str, number: int, axis: str, normed: str = "none") -> jax.Array:
            nonlocal x_BTD
            features, axes = number * cfg.head_dim, ("embed", axis)
            x = Linear(cfg, self.role, features, axes, switches.qkv_bias, name=name)(x_BTD, masks)
            # The barrier has another use: else the compiler splits W into heads instead of the few tokens, and TPU
            # keeps a second, transposed copy of it.
            x, x_BTD = _one_by_one(self.role, x, x_BTD)
            norm = RMSNorm(cfg, name=f"{name}_norm")
            if normed == "all_heads":
                x = norm(x)
            x = x.reshape(*x.shape[:2], number, cfg.head_dim)
            x = constrain(x, self.role, "batch", "length", f"act_{axis}", "act_head_dim")
            return norm(x) if normed == "each_head" else x

        q_BTHC = heads("query", cfg.num_heads, "heads", switches.qk_norm)
        k_BTKC = heads("key", cfg.num_kv_heads, "kv_heads", switches.qk_norm)
        v_BTKC = heads("value", cfg.num_kv_heads, "kv_heads")
        rotation = rope.of_layer(shared.rotations, cfg, layer)
        q_BTHC, k_BTKC = rope.rotate(q_BTHC, rotation), rope.rotate(k_BTKC, rotation)
        if cfg.scores_dim not in (None, cfg.head_dim):
            q_BTHC *= (cfg.head_dim / cfg.scores_dim) ** 0.5  # all forms divide by sqrt(C)
        if cache is not None and shared.start_B is not None:
            assert isinstance(layer, int)  # layers with a cache are unrolled
            window = cfg.window if layer in cfg.windowed else None
            mixed_BTHC, cache = write_and_attend(q_BTHC, k_BTKC, v_BTKC, cache, shared.start_B, shared.slot_B, window)
            mixed_BTHC = constrain(mixed_BTHC, self.role, "batch", "length", "act_heads", "act_head_dim")
        else:
            window = Window(cfg.window, rope.among(cfg.windowed, cfg, layer)) if cfg.window and cfg.windowed else None
            qkv = (q_BTHC, k_BTKC, v_BTKC)
            if shared.branches is not None:
                mixed_BTHC = attention.attend_branches(*qkv, shared.branches, shared.first_BT, positions_BT, window)
            else:
                # Causal by index, not by position: sequences are contiguous and padded on the right only.
                mixed_BTHC = attention.attend_causal(*qkv, shared.first_BT, window)
        out = Linear(cfg, self.role, cfg.d_model, ("heads", "embed"), residual=True, name="out")
        return out(mixed_BTHC.reshape(*x_BTD.shape[:2], -1), masks), cache


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202): SwiGLU, or GeGLU with the tanh form of GELU."""

    config: PolicyConfig
    role: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, masks: DropoutMasks) -> jax.Array:
        cfg = self.config
        gate_BTF = Linear(cfg, self.role, cfg.d_ff, ("embed", "mlp"), name="gate")(x_BTD, masks)
        gate_BTF, x_BTD = _one_by_one(self.role, gate_BTF, x_BTD)
        up_BTF = Linear(cfg, self.role, cfg.d_ff, ("embed", "mlp"), name="up")(x_BTD, masks)
        activation = {"silu": nn.silu, "gelu_tanh": nn.gelu}[cfg.switches.activation]
        hidden_BTF = constrain(activation(gate_BTF) * up_BTF, self.role, "batch", "length", "act_mlp")
        return Linear(cfg, self.role, cfg.d_model, ("mlp", "embed"), residual=True, name="down")(hidden_BTF, masks)


class _Kernel(nn.Module):
    """A weight by itself, of a router or of all experts, [..., in, out], and the adapter of its name where there is
    one.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        batch = tuple(range(len(self.shape) - 2))
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "normal", batch_axis=batch)
        kernel = _param(self, "kernel", init, self.axes, self.shape)
        return {"kernel": kernel} | {
            key: self.get_variable("lora", key) for key in "ab" if self.has_variable("lora", key)
        }


class Experts(nn.Module):
    """A router and the experts that it chooses for each token, each a SwiGLU (Qwen3 MoE, arXiv:2505.09388).

    The router's product, softmax and choice are float32, of hidden states and weights in the compute dtype: so sampler
    and update choose from the same numbers.
    """

    config: PolicyConfig
    role: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, masks: DropoutMasks, real_BT: jax.Array | None) -> jax.Array:
        cfg, one = self.config, self.config.experts
        assert one is not None
        widths = {"expert_embed": cfg.d_model, "expert_mlp": one.d_ff, "experts": one.number}
        router = _Kernel(("embed", "router"), (cfg.d_model, one.number), name="router")()["kernel"]
        weights = {}
        for name, axes in experts.AXES.items():
            shape, scale = tuple(widths[axis] for axis in axes), 1.0 / (2 * cfg.num_layers) if name == "down" else 1.0
            weights |= {(name, key): leaf for key, leaf in _Kernel(axes, shape, scale, name=name)().items()}
        logits_BTE: Any = product(x_BTD, router.astype(cfg.compute_dtype), jnp.float32)
        expert_BTK, weight_BTK = experts.route(logits_BTE, one.per_token, one.renormalised)
        adapter = (cfg.lora.scale, cfg.lora.dropout) if cfg.lora else (0.0, 0.0)
        setting = experts.Setting(self.role, one.number, *adapter, few=experts.FEW)
        masks = {name: mask for name, mask in masks.items() if (name, "a") in weights}
        mixed_BTD: Any = experts.mixture(setting, x_BTD, weight_BTK, weights, expert_BTK, real_BT, masks)
        return mixed_BTD


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), or with norms of what flows out, alone or as well
    (`Family.norms`). `layer`: its number.
    """

    config: PolicyConfig
    role: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        shared: SharedInputs,
        layer: int | jax.Array,
        cache: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """Returns the hidden states and what `Attention` returns beside them."""
        norms = self.config.switches.norms
        normed = lambda name, x_BTD: x_BTD if norms == "after" else RMSNorm(self.config, name=f"{name}_norm")(x_BTD)
        masks = dropout_masks(self.config, shared.dropout_key_BT2, layer)

        def added(name: str, x_BTD: jax.Array, new_BTD: jax.Array) -> jax.Array:
            if norms != "before":
                new_BTD = RMSNorm(self.config, name=f"{name}_after_norm")(new_BTD)
            return constrain(x_BTD + new_BTD, self.role, "batch", "length", "act_embed")

        mixed_BTD, cache = Attention(self.config, self.role, name="attention")(
            normed("attention", x_BTD), positions_BT, shared, layer, masks, cache
        )
        x_BTD = added("attention", x_BTD, mixed_BTD)
        normed_BTD = normed("mlp", x_BTD)
        if self.config.experts is None:
            new_BTD = GatedMLP(self.config, self.role, name="mlp")(normed_BTD, masks)
        else:
            new_BTD = Experts(self.config, self.role, name="mlp")(normed_BTD, masks, shared.real_BT)
        return added("mlp", x_BTD, new_BTD), cache


def fold_in(key_BT2: jax.Array, data_BT: int | jax.Array) -> jax.Array:
    """`jax.random.fold_in` for raw keys, elementwise."""
    fold = lambda key, data: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), data))
    return jnp.vectorize(fold, signature="(n),()->(n)")(key_BT2, data_BT)


class Embed(nn.Module):
    """Token ids -> their rows of the table, in the compute dtype; times sqrt(D) in families that do it."""

    config: PolicyConfig
    role: str

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        cfg = self.config
        # 1/sqrt(D): with a tied head the first logits have unit variance.
        init = nn.initializers.normal(cfg.d_model**-0.5)
        table_VD = _param(self, "embedding", init, ("vocab", "vocab_embed"), (cfg.vocab_size, cfg.d_model))
        table_VD = table_VD.astype(cfg.compute_dtype)
        if self.role == "train":
            # Whole along D before the look-up: a table that `fsdp` splits gives rows that it splits, and batches are
            # split by it too. Few rows are served at once: where an odd vocabulary leaves D split, these are gathered,
            # and not the table (OLMo 3: 783 MiB in every decoding step).
            table_VD = constrain(table_VD, self.role, "vocab", "act_embed")
        x_BTD = constrain(table_VD[tokens_BT], self.role, "batch", "length", "act_embed")
        return x_BTD * jnp.asarray(cfg.d_model**0.5, x_BTD.dtype) if cfg.switches.scales_embed else x_BTD
