# SPDX-License-Identifier: Apache-2.0

"""The one table that says how a logical axis lies on a device mesh, in training and in serving: shapes and axis names
flow in, shardings flow out.

Modules name the axes of their parameters and activations (`"heads"`, `"batch"`); nothing outside this file knows a mesh
axis. The same weights have two layouts. In training they are scattered over `fsdp` and gathered layer by layer, which
pays because a layer then meets thousands of tokens. A decoding step meets one token a slot: gathering would cost more
than the step, so in serving `fsdp` splits heads, ffn and vocabulary as `tensor` does, and only activations cross
devices.

Invariants: every logical name has exactly one row; a mesh axis that does not divide a dimension is left out of it, so
that any policy lies on any mesh; on one device no layout differs from another.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hintsd_jax.errors import UserError

# data: replicas. fsdp: scattered weights; it also splits the batch. tensor: heads, ffn, vocabulary.
AXES = ("data", "fsdp", "tensor")
ROLES = ("train", "serve")

_SPLIT = (("tensor",), ("fsdp", "tensor"))
_WHOLE = ((), ())
# In this order `tensor` has what it has where it splits alone, and the others what they have of a batch.
_SPREAD = ("tensor", "data", "fsdp")

# name -> mesh axes in training, in serving. Parameters and activations have different names for the same letter,
# because a weight may be scattered over an axis along which the activation that it multiplies must be whole.
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # parameters
    "layers": _WHOLE,
    "vocab": _SPLIT,
    "embed": (("fsdp",), ()),
    "heads": _SPLIT,  # heads x head dimension
    "kv_heads": _SPLIT,
    "mlp": _SPLIT,
    "norm": _WHOLE,
    "rank": _WHOLE,
    # activations
    "batch": (("data", "fsdp"), ("data",)),
    # rows of a cache also take the axes that the heads leave
    "slots": (("data", "fsdp"), ("data", "fsdp", "tensor")),
    "length": _WHOLE,
    "act_embed": _WHOLE,
    "act_heads": _SPLIT,
    "act_kv_heads": _SPLIT,
    "act_head_dim": _WHOLE,
    "act_mlp": _SPLIT,
    "act_vocab": _SPLIT,
    # weights and logits of the loss's projection
    "split_vocab": (_SPREAD, _SPREAD),
}
_LAST = ("batch", "slots")  # these take the axes that the other dimensions of an array have left


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all the given devices (by default all there are); one size may be -1: whatever is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(data, fsdp, tensor, count=len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(data: int = 1, fsdp: int = -1, tensor: int = 1, *, count: int) -> tuple[int, int, int]:
    """The sizes of the axes over `count` devices, as in `make_mesh`; raises what it raises."""
    sizes = (data, fsdp, tensor)
    wanted = f"mesh.data = {data}, mesh.fsdp = {fsdp}, mesh.tensor = {tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{wanted}: sizes are at least 1, and one of them may be -1 (all devices that are left)")
    rest = count // math.prod(size for size in sizes if size != -1)
    data, fsdp, tensor = (rest if size == -1 else size for size in sizes)
    if data * fsdp * tensor != count:
        raise UserError(f"{wanted} do not multiply to the {count} devices here: change them, or use -1 for one")
    return data, fsdp, tensor


def spec(shape: Sequence[int], names: Sequence[str], mesh: Mesh | AbstractMesh, role: str) -> PartitionSpec:
    """How an array of `shape` with one logical name per dimension lies on `mesh`."""
    column, free = ROLES.index(role), set(AXES)
    parts: list[tuple[str, ...]] = [()] * len(shape)
    for i in sorted(range(len(shape)), key=lambda i: names[i] in _LAST):
        for axis in RULES[names[i]][column]:
            ways = math.prod(mesh.shape[a] for a in (*parts[i], axis))
            if axis in free and mesh.shape[axis] > 1 and shape[i] % ways == 0:
                parts[i] += (axis,)
                free.remove(axis)
    return PartitionSpec(*(part or None for part in parts))


def shardings(abstract: Any, axes: Any, mesh: Mesh | AbstractMesh, role: str) -> Any:
    """The tree of NamedShardings for a tree of arrays (or their shapes) and one of their logical PartitionSpecs."""
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, spec(leaf.shape, names, mesh, role)), abstract, axes)


def constrain(x: jax.Array, role: str, *names: str) -> jax.Array:
    """Lays an array out by its logical axes, one name per dimension; does nothing on one device or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, names, mesh, role))


def constrain_tree(tree: Any, axes: Any, role: str) -> Any:
    """`constrain` for every leaf of a tree, with the tree of its logical PartitionSpecs."""
    return jax.tree.map(lambda leaf, names: constrain(leaf, role, *names), tree, axes)


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Host arrays whose first dimension counts the examples of a batch -> device arrays, split as in training."""

    def put(leaf):
        names = ("batch",) + ("length",) * (leaf.ndim - 1)
        return jax.device_put(leaf, NamedSharding(mesh, spec(leaf.shape, names, mesh, "train")))

    return jax.tree.map(put, tree)
