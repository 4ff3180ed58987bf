# SPDX-License-Identifier: Apache-2.0

"""The decoder of all families (`families`): token ids flow in, final-normed hidden states flow out; `project` turns
those into logits.

Four passes run the same `Block` on the same parameters. `forward` (the student) and `forward_branches` (the teacher: a
trunk and branches that leave it) scan it over the stacked layers: 36 layers compile as one. `extend` (prefill) and
`decode_step` unroll them: a scan would copy the cache in every call. There stacked weights are sliced inside the traced
function, never before it, so that a decoding loop does not hoist a second copy of them.

Parameters are a plain dict; a key "lora" beside the others is an adapter (see `lora`), which acts as `config.lora`
says.

Invariant: all passes give the same hidden state for the same token after the same prefix, whatever comes after it in
its row, and a row's result does not depend on the other rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from hintsd_jax.models import rope, tiled
from hintsd_jax.models.attention import Branches
from hintsd_jax.models.cached_attention import CACHE_AXES, KeysValues
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.layers import Block, Embed, RMSNorm, SharedInputs, fold_in
from hintsd_jax.models.sampling_distribution import without_unknown
from hintsd_jax.models.sharding import constrain

Params = dict[str, Any]
Cache = list[KeysValues]  # per layer; index in S == position


class Decoder(nn.Module):
    """The passes over whole rows, and the only place where parameters come into being."""

    config: PolicyConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, shared: SharedInputs) -> jax.Array:
        cfg = self.config
        x_BTD = Embed(cfg, "train", name="embed")(tokens_BT)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=tiled.keeping) if cfg.remat else Block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType] - flax's type lacks tuples
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, _ = layers(cfg, "train", name="layers")(x_BTD, positions_BT, shared, jnp.arange(cfg.num_layers))
        if not cfg.tie_embeddings and self.is_initializing():
            # Declared here so that one module owns every parameter; `project` applies it, where it is needed.
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            kernel_init = nn.with_logical_partitioning(init, ("vocab_embed", "vocab"))
            nn.Dense(cfg.vocab_size, use_bias=False, kernel_init=kernel_init, name="lm_head")(x_BTD)
        return RMSNorm(cfg, name="final_norm")(x_BTD)


def _init(config: PolicyConfig, key: jax.Array) -> Any:
    """Parameters boxed with their logical axes."""
    one = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, one, one, SharedInputs(rope.rotations(one, config)))["params"]


@partial(jax.jit, static_argnums=0)
def init_params(config: PolicyConfig, key: jax.Array) -> Params:
    """Random float32 parameters as a plain nested dict; every leaf under `"layers"` is stacked along a first axis N."""
    return nn.meta.unbox(_init(config, key))


@functools.cache
def _boxed_shapes(config: PolicyConfig) -> Any:
    """Shapes of the parameters, boxed with their logical axes. Traced once: loading, placing and adapting all ask."""
    return jax.eval_shape(partial(_init, config), jax.random.key(0))


def abstract_params(config: PolicyConfig) -> Params:
    """The tree of `init_params` with a `jax.ShapeDtypeStruct` at every leaf."""
    return nn.meta.unbox(_boxed_shapes(config))


def logical_axes(config: PolicyConfig) -> Params:
    """The tree of `init_params` with a PartitionSpec of logical axis names at every leaf (see `sharding`)."""
    return nn.get_partition_spec(_boxed_shapes(config))


def _variables(params: Params) -> dict[str, Any]:
    """The parameters as Linen's collections: the adapter is one of its own."""
    base = {name: tree for name, tree in params.items() if name != "lora"}
    return {"params": base, "lora": params["lora"]} if "lora" in params else {"params": base}


def _hidden(params: Params, config: PolicyConfig, tokens_BT, positions_BT, shared: SharedInputs) -> jax.Array:
    return cast(jax.Array, Decoder(config).apply(_variables(params), tokens_BT, positions_BT, shared))


def forward(
    params: Params,
    config: PolicyConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    dropout_BT2: jax.Array | None = None,
    first_BT: jax.Array | None = None,
    last_B: jax.Array | None = None,
) -> jax.Array:
    """Causal pass over whole rows -> final-normed hidden_BTD, differentiable.

    tokens int [B, T]; positions int [B, T] or [1, T], by default counted from 0 in every sequence. first_BT, int32: the
    index at which a token's sequence begins, where a row holds several; None: each row is one. Padding may stand on the
    right only: a token attends to those before it in its sequence, so none that counts ever attends to padding and no
    mask is needed. `dropout_BT2`, uint32, are raw keys of the sequences' adapter dropout, the same for all tokens of
    one; the mask of a token follows from that key, its position and the module. None: no dropout. `last_B`, int32: the
    last index of each row whose hidden state is looked at; experts compute no token behind it.
    """
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None] - (0 if first_BT is None else first_BT)
    key_BT2 = None
    if dropout_BT2 is not None and config.lora is not None and config.lora.dropout > 0:
        key_BT2 = fold_in(dropout_BT2, jnp.broadcast_to(positions_BT, tokens_BT.shape))
    real_BT = None
    if config.experts is not None and last_B is not None:
        real_BT = jnp.arange(tokens_BT.shape[1]) <= last_B[:, None]
    rotations = rope.rotations(positions_BT, config)
    shared = SharedInputs(rotations, first_BT=first_BT, dropout_key_BT2=key_BT2, real_BT=real_BT)
    return _hidden(params, config, tokens_BT, positions_BT, shared)


def forward_branches(
    params: Params,
    config: PolicyConfig,
    trunk_BP: jax.Array,
    branch_BM: jax.Array,
    positions_BM: jax.Array,
    branches: Branches,
    first_BP: jax.Array | None = None,
) -> jax.Array:
    """One pass over trunks and the branches that leave them -> final-normed hidden_BMD of the branch tokens. Not
    differentiable.

    trunk int [B, P], one sequence or several (`first_BP`), see `forward`; P may be 0. branch int [B, M]: the branches
    of a row one behind the other, at `positions_BM`; `branches` says what they attend to. A token's hidden state is
    that of a row of its own: the range of the trunk, then its branch.
    """
    P = trunk_BP.shape[1]
    positions_BP = jnp.broadcast_to(jnp.arange(P), trunk_BP.shape) - (0 if first_BP is None else first_BP)
    positions_BT = jnp.concatenate([positions_BP, positions_BM], axis=1)
    real_BT = None
    if config.experts is not None:
        is_branch_BM = branches.branch_id_BM >= 0
        stop_B = jnp.max(jnp.where(is_branch_BM, branches.prefix_stop_BM, 0), axis=1, initial=0)
        real_BT = jnp.concatenate([jnp.arange(P) < stop_B[:, None], is_branch_BM], axis=1)
    shared = SharedInputs(rope.rotations(positions_BT, config), branches=branches, first_BT=first_BP, real_BT=real_BT)
    tokens_BT = jnp.concatenate([trunk_BP, branch_BM], axis=1)
    return _hidden(params, config, tokens_BT, positions_BT, shared)[:, P:]


def init_cache(config: PolicyConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of `length` positions, in the compute dtype, laid out for serving."""
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    empty = lambda: constrain(jnp.zeros(shape, config.compute_dtype), "serve", *CACHE_AXES)
    return [(empty(), empty()) for _ in range(config.num_layers)]


def extend(
    params: Params,
    config: PolicyConfig,
    tokens_RL: jax.Array,
    start_R: jax.Array,
    slot_R: jax.Array,
    cache: Cache,
    length_R: jax.Array | None = None,
) -> Cache:
    """Runs L new tokens of each row at positions start, start + 1, ... of its slot (int32) -> the cache with their keys
    and values.

    All rows of a layer are written before any of them attends: a row may go on where another one of its slot ends. A
    row of a slot >= B goes nowhere. length_R, int32: how many tokens of each row are no padding; experts compute only
    these. Donate the cache to update it in place.
    """
    positions_RL = start_R[:, None] + jnp.arange(tokens_RL.shape[1])
    real_RL = None
    if config.experts is not None and length_R is not None:
        real_RL = jnp.arange(tokens_RL.shape[1]) < length_R[:, None]
    return _cached(params, config, tokens_RL, positions_RL, (start_R, slot_R), cache, real_RL)[1]


def decode_step(
    params: Params, config: PolicyConfig, token_B: jax.Array, position_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs one new token of each row at `position_B` (int, >= 0) against the cache -> (final-normed hidden_BD, cache).

    Writes the token's key and value at `position` of its slot, then attends to positions 0..position; does neither
    where position >= S. So garbage past a row's length, from padding or from an earlier owner of the slot, does no
    harm: it is overwritten by the token of that position before any query may attend to it. Donate the cache to update
    it in place.
    """
    # What all layers share is whole though keys may be split by slot: else it would be gathered in each layer.
    positions_B1 = constrain(position_B[:, None], "serve", "batch", "length")
    x_B1D, cache = _cached(params, config, token_B[:, None], positions_B1, (positions_B1[:, 0], None), cache)
    norm = RMSNorm(config)
    return cast(jax.Array, norm.apply({"params": params["final_norm"]}, x_B1D))[:, 0], cache


def _cached(
    params: Params, config: PolicyConfig, tokens_RT, positions_RT, rows: Any, cache: Cache, real_RT: Any = None
) -> Any:
    """(hidden states before the final norm, cache); rows: (start_R, slot_R) of `cached_attention`."""
    variables, block = _variables(params), Block(config, "serve")
    whole = lambda angles: constrain(angles, "serve", "batch", "length", "act_head_dim")
    rotations = jax.tree.map(whole, rope.rotations(positions_RT, config))
    shared, updated = SharedInputs(rotations, *rows, real_BT=real_RT), []
    x_RTD: Any = Embed(config, "serve").apply({"params": params["embed"]}, tokens_RT)
    for n, layer_cache in enumerate(cache):
        weights = {name: _layer(tree["layers"], n) for name, tree in variables.items()}
        x_RTD, layer_cache = block.apply(weights, x_RTD, positions_RT, shared, n, layer_cache)
        updated.append(cast(KeysValues, layer_cache))
    return x_RTD, updated


def _layer(layers: Any, n: int) -> Any:
    """The weights of layer `n` of stacked ones or of those that stand `by_layer`."""
    return layers[n] if isinstance(layers, list) else jax.tree.map(lambda leaf: leaf[n], layers)


@jax.jit
def unstacked(leaf_N: jax.Array) -> list[jax.Array]:
    """A stacked weight as one array a layer; see `by_layer`."""
    return list(leaf_N)


def by_layer(params: Params, unstack: Callable[[Any], list[Any]] = unstacked) -> Params:
    """The same weights, those of the layers copied out as a list of trees, for `extend` and `decode_step` alone.

    XLA's compilers for CPU and GPU copy a slice of a stacked weight before every product with it: on two cores a
    decoding step of 16 rows with 50M weights took 1.6 times as long; for an H100 9 of 10 bytes of Qwen3-4B's
    layers were copied in every step. TPU's reads a slice where it is.
    """

    def layers(tree: Any) -> list[Any]:
        leaves, structure = jax.tree.flatten(tree)
        return [jax.tree.unflatten(structure, layer) for layer in zip(*map(unstack, leaves), strict=True)]

    params = {**params, "layers": layers(params["layers"])}
    if "lora" in params:
        params["lora"] = {**params["lora"], "layers": layers(params["lora"]["layers"])}
    return params


def project(params: Params, config: PolicyConfig, hidden: jax.Array) -> jax.Array:
    """Final-normed hidden [..., D] -> logits [..., V], float32. Project few tokens at once: V may be 151,936.

    Those of `config.unknown_ids` are so low that their probability is 0, to sampler, student, teacher and reference.
    """
    if config.tie_embeddings:
        kernel, equation = params["embed"]["embedding"], "...d,vd->...v"
    else:
        kernel, equation = params["lm_head"]["kernel"], "...d,dv->...v"
    kernel = kernel.astype(config.compute_dtype)
    logits = jnp.einsum(equation, hidden.astype(config.compute_dtype), kernel, preferred_element_type=jnp.float32)
    return without_unknown(logits, config.unknown_ids)


def split_head(params: Params, config: PolicyConfig) -> Params:
    """The same weights, those of `project` split along the vocabulary, for many `project_split` of few rows."""
    if config.tie_embeddings:
        table_VD = constrain(params["embed"]["embedding"], "train", "split_vocab", "act_embed")
        return {**params, "embed": {"embedding": table_VD}}
    kernel_DV = constrain(params["lm_head"]["kernel"], "train", "act_embed", "split_vocab")
    return {**params, "lm_head": {"kernel": kernel_DV}}


def project_split(params: Params, config: PolicyConfig, hidden_XD: jax.Array) -> jax.Array:
    """`project` of rows that are split over devices, by the weights of `split_head`: rows and logits cross devices
    instead of weights.

    With Qwen3-4B on 8 chips, weights scattered along D were gathered (742 MiB) and their gradient summed (1.4 GiB) in
    every chunk of the loss; now 10 MiB of logits go each way.
    """
    logits_XV = constrain(project(params, config, hidden_XD), "train", "batch", "split_vocab")
    return constrain(logits_XV, "train", "batch", "act_vocab")
