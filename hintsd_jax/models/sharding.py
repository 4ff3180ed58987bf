# SPDX-License-Identifier: Apache-2.0

"""The one table that says how a logical axis lies on a device mesh, in training and in serving: shapes and axis names
flow in, shardings flow out.

Modules name the axes of their parameters and activations (`"heads"`, `"batch"`); nothing outside this file knows a mesh
axis. The same weights have two layouts. In training they are scattered over `fsdp` and gathered layer by layer, which
pays because a layer then meets thousands of tokens. A decoding step meets one token a slot: gathering would cost more
than the step, so in serving `fsdp` splits heads, ffn and vocabulary as `tensor` does, and only activations cross
devices. Weights that nothing trains have one layout, serving's (`FROZEN`): gathering them from it costs training the
same.

Rollouts and analysis run on the devices of one process, on a mesh of their own (`serving_mesh`) over the same devices.

Invariants: every logical name has exactly one row; a mesh axis that does not divide a dimension is left out of it, so
that any policy lies on any mesh; on one device no layout differs from another.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hintsd_jax.errors import UserError

# data: replicas. fsdp: scattered weights; it also splits the batch. tensor: heads, ffn, vocabulary.
AXES = ("data", "fsdp", "tensor")
ROLES = ("train", "serve")
FROZEN = "serve"  # the role by which training, too, lays out weights under an adapter: they are held once, not twice

# `tensor` first: query heads then lie with the kv head that they read.
_SPLIT = (("tensor",), ("tensor", "fsdp"))
_EVERYWHERE = (("tensor", "fsdp"), ("tensor", "fsdp"))
_WHOLE = ((), ())
# In this order `tensor` has what it has where it splits alone, and the others what they have of a batch.
_SPREAD = ("tensor", "data", "fsdp")

# name -> mesh axes in training, in serving. Parameters and activations have different names for the same letter,
# because a weight may be scattered over an axis along which the activation that it multiplies must be whole.
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # parameters
    "layers": _WHOLE,
    "vocab": _SPLIT,
    "vocab_embed": (("fsdp", "tensor"), ("tensor", "fsdp")),  # of the tables: an odd vocabulary leaves it all axes
    "embed": (("fsdp",), ()),
    "heads": _SPLIT,  # heads x head dimension
    "kv_heads": _SPLIT,
    "mlp": _SPLIT,
    # of experts: they are divided over devices, and where there are too few of them their width is; tokens go to them
    "experts": _EVERYWHERE,
    "expert_embed": _WHOLE,
    "expert_mlp": _EVERYWHERE,
    "router": _WHOLE,
    "norm": _WHOLE,
    "rank": _WHOLE,
    # of an adapter: where it reads or writes the model's width, and elsewhere
    "adapter_embed": (("fsdp", "tensor"), ()),
    "adapter_split": (("tensor", "fsdp"), ("tensor", "fsdp")),
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
_AUTO = (AxisType.Auto,) * len(AXES)
_LAST = ("batch", "slots", "vocab_embed")  # these take the axes that the other dimensions of an array have left


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all the given devices (by default all there are); one size may be -1: whatever is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(data, fsdp, tensor, count=len(devices))
    make = lambda sizes, devices: jax.make_mesh(sizes, AXES, axis_types=_AUTO, devices=devices)
    processes = sorted({device.process_index for device in devices})
    if len(processes) == 1 or sizes[0] % len(processes):
        return make(sizes, devices)
    # Every process has replicas of its own: only gradients cross processes, and what is frozen serves where it lies.
    each = (sizes[0] // len(processes), *sizes[1:])
    parts = [make(each, [device for device in devices if device.process_index == one]) for one in processes]
    return Mesh(np.concatenate([part.devices for part in parts]), AXES, axis_types=_AUTO)


def serving_mesh(mesh: Mesh, kv_heads: int, process: int | None = None) -> Mesh:
    """The mesh on which a process (None: this one) rolls out and analyses: its own devices of a training mesh.

    `tensor` and `fsdp` are divided anew, see `serving_sizes`. Where each process has whole replicas (`data` is a
    multiple of the processes), weights that are split over all of `tensor` and `fsdp` lie there as on `mesh`.
    """
    processes = sorted({device.process_index for device in mesh.devices.flat})
    here = jax.process_index() if process is None else process
    here = here if here in processes else processes[0]  # devices may be described ones
    mine = np.array([device for device in mesh.devices.flat if device.process_index == here])
    data, fsdp, tensor = serving_sizes(mesh, kv_heads, len(processes))
    if mesh.shape["data"] % len(processes) == 0:
        mine = mine.reshape(data, mesh.shape["fsdp"], mesh.shape["tensor"]).swapaxes(1, 2)
    # In this order the parts of a weight are counted on both meshes, `tensor` before `fsdp`.
    return Mesh(mine.reshape(data, tensor, fsdp).swapaxes(1, 2), AXES, axis_types=_AUTO)


def serving_sizes(mesh: Mesh | AbstractMesh, kv_heads: int, processes: int = 1) -> tuple[int, int, int]:
    """The sizes of the axes of `serving_mesh`: `tensor` is as large as the kv heads allow; `fsdp` is the rest, by which
    the cache is split along its slots.
    """
    data = mesh.shape["data"] // processes if mesh.shape["data"] % processes == 0 else 1
    parts = mesh.size // processes // data
    tensor = math.gcd(parts, kv_heads)
    return data, parts // tensor, tensor


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """A mesh of these sizes for shapes and shardings, without devices."""
    return AbstractMesh(sizes, AXES, axis_types=_AUTO)


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


def constrain(x: jax.Array, role: str, *names: str, like: Sequence[int] | None = None) -> jax.Array:
    """Lays an array out by its logical axes, one name per dimension; does nothing on one device or without a mesh.

    like: the shape of another array beside which it shall lie, as that one does; by default its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape if like is None else like, names, mesh, role))


def constrain_tree(tree: Any, axes: Any, role: str) -> Any:
    """`constrain` for every leaf of a tree, with the tree of its logical PartitionSpecs."""
    return jax.tree.map(lambda leaf, names: constrain(leaf, role, *names), tree, axes)


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Host arrays whose first dimension counts the examples of a batch -> device arrays, split as in training. Every
    process has all examples, and puts those of its own devices there.
    """

    def put(leaf):
        names = ("batch",) + ("length",) * (leaf.ndim - 1)
        layout = NamedSharding(mesh, spec(leaf.shape, names, mesh, "train"))
        return jax.make_array_from_callback(leaf.shape, layout, leaf.__getitem__)

    return jax.tree.map(put, tree)
