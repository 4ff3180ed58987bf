"""The one table that says how a logical axis lies on a device mesh. Axis names flow in, mesh axis names flow out.

Modules name the axes of their parameters and activations (`"heads"`, `"batch"`); nothing outside this file knows a mesh
axis. Parameters and activations have different names for the same letter, because a weight may be scattered over an axis
(`embed` over `fsdp`) along which the activation it multiplies must be whole.

Invariant: every logical name used anywhere in the policy has exactly one row here.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

# Mesh axes: "data" (replicas), "fsdp" (scattered weights, also splits the batch), "tensor" (heads, ffn, vocabulary).
RULES: tuple[tuple[str, Any], ...] = (
    # parameters
    ("layers", None),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("norm", None),
    # activations
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_head_dim", None),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Lays an activation out by its logical axes, one name per dimension; does nothing where no mesh is set."""
    return nn.with_logical_constraint(x, names, rules=RULES)


def mesh_specs(logical_axes: Any) -> Any:
    """A tree of logical PartitionSpecs -> the same tree of PartitionSpecs over mesh axes."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.tree.map(lambda spec: nn.logical_to_mesh_axes(spec, RULES), logical_axes, is_leaf=is_spec)
