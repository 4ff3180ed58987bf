# SPDX-License-Identifier: Apache-2.0

"""The feed-forward part of a mixture of experts: hidden states and what a router makes of them flow in, the weighted
sum of each token's experts flows out.

Tokens are sorted by expert, and every expert takes as many rows at once, so that a layer is three batched products:
about 2 rows for each that is needed, in rounds until all are done. Nothing is dropped: where a router sends more to one
expert, there are more rounds. (JAX's `ragged_dot` needs none, but on CPU and GPU it computes every row for every
expert.) Up to `FEW` tokens, as in decoding, every expert takes each of them, in one round without sorting: the weights
must be read anyway, which takes longer than so few rows.

Over devices the experts are split, and what they are too few for splits their width (`sharding`): weights never move.
Tokens do: each device takes those of all devices that its experts are for, computes what chose its experts, and the
results are summed.

Invariants: a token's result depends on nothing but the token, bit for bit at one shape; the sum over its experts is
float32 and in the router's order; padding is computed by no expert.

Letters: X tokens of a device, E its experts, K choices of a token, M = X x K, C rows of an expert in a round, D the
model's width, F an expert's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hintsd_jax.models.expert_rounds import in_rounds, over_rounds, taken
from hintsd_jax.models.sharding import spec

# Rows that cost an expert no time beside reading its weights: 2 operations for 2 bytes a row, and accelerators do 240
# to 300 for each byte that they read.
FEW = 128
AXES = {
    "gate": ("experts", "expert_embed", "expert_mlp"),
    "up": ("experts", "expert_embed", "expert_mlp"),
    "down": ("experts", "expert_mlp", "expert_embed"),
}
Weights = dict[tuple[str, str], jax.Array]  # (projection, "kernel", "a" or "b") -> [E, in, out]


class Setting(NamedTuple):
    """role: see `sharding`. number: of all experts. scale, dropout: of adapters, see `config.LoraConfig`. few: see
    `FEW`.
    """

    role: str
    number: int
    scale: float = 0.0
    dropout: float = 0.0
    few: int = FEW


def route(logits: jax.Array, per_token: int, renormalised: bool) -> tuple[jax.Array, jax.Array]:
    """Router's logits [..., experts], float32 -> (expert int32, weight float32) [..., K]: the likeliest experts, the
    best first and of equal ones the first; their probabilities, which sum to 1 where `renormalised`.
    """
    weight, expert = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), per_token)
    return expert, weight / jnp.sum(weight, axis=-1, keepdims=True) if renormalised else weight


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mixture(
    setting: Setting,
    x_BTD: jax.Array,
    weight_BTK: jax.Array,
    weights: Weights,
    expert_BTK: jax.Array,
    real_BT: jax.Array | None,
    masks: dict[str, jax.Array],
) -> jax.Array:
    """sum over k of weight x down(silu(gate(x)) * up(x)) of expert k -> [B, T, D] in the dtype of `x`; 0 for padding.

    x in the compute dtype; weight float32, expert int32: of `route`. weights: of all experts, in any floating dtype;
    "a" and "b" where a projection has an adapter. real_BT: bool, False for padding; None: there is none. masks:
    projection -> which inputs of its adapter stay, bool [B, T, in], the same for all experts of a token; {}: all.
    """
    call = partial(_forward, setting)
    return _over_devices(setting, call, _no_sums, x_BTD, weight_BTK, weights, expert_BTK, real_BT, masks)[0]


def _saved(setting: Setting, *args: Any) -> Any:
    """With symbolic zeros: each array says whether it is differentiated by. Weights that are not get no gradient."""
    values = jax.tree.map(lambda one: one.value, args)
    trained = {key: one.value for key, one in args[2].items() if one.perturbed}
    frozen = {key: one.value for key, one in args[2].items() if not one.perturbed}
    x, weight, _, *rest = values
    return mixture(setting, *values), (x, weight, trained, frozen, *rest)


def _pulled(setting: Setting, saved: Any, pull_BTD: Any) -> Any:
    x, weight, trained, frozen, expert, real, masks = saved
    if isinstance(pull_BTD, jax.custom_derivatives.SymbolicZero):
        return (None,) * 6
    call = partial(_backward, setting, tuple(trained))
    weights = trained | frozen
    of_x, of_weight, of_trained = _over_devices(
        setting, call, tuple(trained), x, weight, weights, expert, real, masks, pull_BTD
    )
    return (
        of_x,
        of_weight,
        {key: of_trained.get(key) for key in weights},
        None,
        None,
        jax.tree.map(lambda _: None, masks),
    )


mixture.defvjp(_saved, _pulled, symbolic_zeros=True)

_no_sums: tuple[tuple[str, str], ...] = ()


def _over_devices(
    setting: Setting,
    call: Callable,
    trained: tuple[tuple[str, str], ...],
    x_BTD: jax.Array,
    weight_BTK: jax.Array,
    weights: Weights,
    expert_BTK: jax.Array,
    real_BT: jax.Array | None,
    masks: dict[str, jax.Array],
    *pull: jax.Array,
) -> tuple[Any, ...]:
    """`call(first expert, tokens' arrays [X, ...], weights)` on every device's part -> what it returns, put together:
    arrays of tokens, then, of `_backward`, one dict of gradients (`trained`: its keys).
    """
    mesh = jax.sharding.get_abstract_mesh()
    flat = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), tree)
    if mesh.empty or mesh.size == 1:
        real = None if real_BT is None else real_BT.reshape(-1)
        out = call(0, flat((x_BTD, weight_BTK, expert_BTK, masks, pull)), real, weights)
        shaped = lambda leaf, dtype: leaf.reshape(*x_BTD.shape[:2], -1).astype(dtype)
        dtypes = (x_BTD.dtype, weight_BTK.dtype)
        return *(shaped(leaf, dtype) for leaf, dtype in zip(out, dtypes, strict=False)), *out[2:]
    at = lambda name, kind: _part(mesh, setting.role, weights[name, "kernel"].shape, name, kind)
    layout = {key: at(*key) for key in weights}
    experts, _, width = map(_axes, layout["gate", "kernel"])
    rows = _axes(spec(x_BTD.shape, ("batch", "length", "act_embed"), mesh, setting.role)[0])
    inner = (*experts, *width)
    row = PartitionSpec(rows or None)
    gathered = tuple(axis for axis in rows if axis in inner)
    summed = tuple(axis for axis in inner if axis not in gathered)
    gather = lambda leaf: jax.lax.all_gather(leaf, gathered, axis=0, tiled=True) if gathered else leaf

    def total(leaf: jax.Array) -> jax.Array:
        leaf = jax.lax.psum(leaf, summed) if summed else leaf
        return jax.lax.psum_scatter(leaf, gathered, scatter_dimension=0, tiled=True) if gathered else leaf

    def whole(key: tuple[str, str], grad: jax.Array) -> jax.Array:
        """Over devices that have other tokens, or another part of the expert, and the same of these weights."""
        split = {axis for part in layout[key] for axis in _axes(part)}
        others = tuple(axis for axis in dict.fromkeys((*rows, *inner)) if axis not in split)
        return jax.lax.psum(grad, others) if others else grad

    def local(tokens: Any, real: jax.Array | None, weights: Weights) -> tuple[Any, ...]:
        E = weights["gate", "kernel"].shape[0]
        first = jax.lax.axis_index(experts) * E if experts else 0
        T = tokens[0].shape[1]
        real = None if real is None else gather(real).reshape(-1)
        tokens = jax.tree.map(gather, tokens)
        if width and "down" in tokens[3]:
            size = weights["gate", "kernel"].shape[2]
            mine = jax.lax.dynamic_slice_in_dim(tokens[3]["down"], jax.lax.axis_index(width) * size, size, axis=2)
            tokens = (*tokens[:3], tokens[3] | {"down": mine}, *tokens[4:])
        out = call(first, flat(tokens), real, weights)
        back = lambda leaf, dtype: total(leaf.reshape(-1, T, leaf.shape[-1])).astype(dtype)
        dtypes = (tokens[0].dtype, tokens[1].dtype)
        grads = ({key: whole(key, leaf) for key, leaf in tree.items()} for tree in out[2:])
        return *(back(leaf, dtype) for leaf, dtype in zip(out[:2], dtypes, strict=False)), *grads

    outs = (row, row, {key: layout[key] for key in trained}) if pull else (row,)
    return jax.shard_map(
        local,
        in_specs=(
            (row, row, row, dict.fromkeys(masks, row), (row,) * len(pull)),
            None if real_BT is None else row,
            layout,
        ),
        out_specs=outs,
        check_vma=False,
    )((x_BTD, weight_BTK, expert_BTK, masks, pull), real_BT, weights)


def _axes(part: Any) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _part(mesh: Any, role: str, kernel: tuple[int, ...], name: str, kind: str) -> PartitionSpec:
    """How a kernel lies on the mesh, and the adapter's matrices beside it."""
    experts, inputs, outputs = spec(kernel, AXES[name], mesh, role)
    return {
        "kernel": PartitionSpec(experts, inputs, outputs),
        "a": PartitionSpec(experts, inputs, None),
        "b": PartitionSpec(experts, None, outputs),
    }[kind]


def gathered_rows(kernel: tuple[int, ...], x: tuple[int, ...], mesh: Any, role: str) -> PartitionSpec:
    """How rows of tokens [B, T, D] lie where experts of the shape of `kernel` compute them: along the mesh axes of the
    batch that divide no expert.
    """
    experts, _, width = map(_axes, spec(kernel, AXES["gate"], mesh, role))
    rows = _axes(spec(x, ("batch", "length", "act_embed"), mesh, role)[0])
    return PartitionSpec(tuple(axis for axis in rows if axis not in (*experts, *width)) or None)


def _start(setting: Setting, first: Any, tokens: Any, real_X: jax.Array | None, weights: Weights) -> Any:
    """(rounds, function from a round's choices to the rows of `x` and of masks)."""
    expert_XK = tokens[2]
    E, K = weights["gate", "kernel"].shape[0], expert_XK.shape[1]
    rounds = in_rounds(expert_XK, real_X, first, E, setting.number, setting.few)
    few = isinstance(rounds.number, int)

    def of(leaf: jax.Array, choice_EC: jax.Array) -> jax.Array:
        return jnp.broadcast_to(leaf, (E, *leaf.shape)) if few else leaf[choice_EC // K]

    return rounds, of


def _forward(setting: Setting, first: Any, tokens: Any, real_X: jax.Array | None, weights: Weights) -> tuple[Any, ...]:
    """The sum over the experts that are here, float32 [X, D]."""
    x_XD, weight_XK, _, masks, _ = tokens
    rounds, of = _start(setting, first, tokens, real_X, weights)

    def one(number: Any, mixed_MD: jax.Array) -> jax.Array:
        choice_EC, _ = rounds.rows(number)
        kept = {name: of(mask, choice_EC) for name, mask in masks.items()}
        return taken(rounds, number, _feed_forward(setting, of(x_XD, choice_EC), weights, kept), mixed_MD)

    mixed_MD = over_rounds(rounds, one, jnp.zeros((weight_XK.size, x_XD.shape[1]), x_XD.dtype))
    return (_summed(mixed_MD, weight_XK),)


def _backward(
    setting: Setting,
    trained: tuple[tuple[str, str], ...],
    first: Any,
    tokens: Any,
    real_X: jax.Array | None,
    weights: Weights,
) -> tuple[Any, ...]:
    """Gradients by `x`, by the router's weights and by the weights `trained`, float32; a round is computed again."""
    x_XD, weight_XK, _, masks, (pull_XD,) = tokens
    rounds, of = _start(setting, first, tokens, real_X, weights)
    frozen = {key: leaf for key, leaf in weights.items() if key not in trained}

    def one(number: Any, carry: Any) -> Any:
        of_x_MD, of_weight_M, of_trained = carry
        choice_EC, valid_EC = rounds.rows(number)
        kept = {name: of(mask, choice_EC) for name, mask in masks.items()}
        call = lambda rows_ECD, part: _feed_forward(setting, rows_ECD, part | frozen, kept)
        y_ECD, back = jax.vjp(call, of(x_XD, choice_EC), {key: weights[key] for key in trained})
        pull_ECD = of(pull_XD, choice_EC).astype(jnp.float32)
        weight_EC = jnp.where(valid_EC, weight_XK.reshape(-1)[choice_EC], 0.0)
        of_rows_ECD, of_part = back((weight_EC[..., None] * pull_ECD).astype(y_ECD.dtype))
        of_weight_EC = jnp.sum(y_ECD.astype(jnp.float32) * pull_ECD, axis=-1)
        return (
            taken(rounds, number, of_rows_ECD, of_x_MD),
            taken(rounds, number, of_weight_EC, of_weight_M),
            jax.tree.map(lambda a, b: a + b, of_trained, of_part),
        )

    nothing = (
        jnp.zeros((weight_XK.size, x_XD.shape[1]), x_XD.dtype),
        jnp.zeros(weight_XK.size, jnp.float32),
        {key: jnp.zeros_like(weights[key]) for key in trained},
    )
    of_x_MD, of_weight_M, of_trained = over_rounds(rounds, one, nothing)
    return _summed(of_x_MD, jnp.ones_like(weight_XK)), of_weight_M.reshape(weight_XK.shape), of_trained


def _summed(rows_MD: jax.Array, weight_XK: jax.Array) -> jax.Array:
    """Of each token its choices' rows, weighed; float32, one choice after the other."""
    rows_XKD = rows_MD.reshape(*weight_XK.shape, -1)
    total_XD = jnp.zeros((rows_XKD.shape[0], rows_XKD.shape[2]), jnp.float32)
    for k in range(weight_XK.shape[1]):
        total_XD += weight_XK[:, k, None] * rows_XKD[:, k].astype(jnp.float32)
    return total_XD


def _feed_forward(setting: Setting, x_ECD: jax.Array, weights: Weights, masks: dict[str, jax.Array]) -> jax.Array:
    """Each expert's rows through it, in the dtype of `x`."""
    times = partial(jnp.einsum, "eci,eio->eco")

    def projected(name: str, x: jax.Array) -> jax.Array:
        y = times(x, weights[name, "kernel"].astype(x.dtype))
        if (name, "a") in weights:
            if name in masks:
                x = jnp.where(masks[name], x / (1.0 - setting.dropout), 0).astype(x.dtype)
            y += setting.scale * times(times(x, weights[name, "a"].astype(x.dtype)), weights[name, "b"].astype(x.dtype))
        return y

    return projected("down", jax.nn.silu(projected("gate", x_ECD)) * projected("up", x_ECD))
