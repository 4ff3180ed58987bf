# SPDX-License-Identifier: Apache-2.0

"""Whether numbers are numbers: a tree of arrays flows in, the names of the leaves that hold a NaN or an infinity out.

One compiled reduction for the whole tree and one fetch of a bool a leaf: nothing is gathered or copied, and a tree that
is split over devices stays split.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def non_finite(tree: Any) -> list[str]:
    """Dotted names (`layers.mlp.up.kernel`), in the tree's order, of the leaves that hold a NaN or an infinity. Leaves
    are arrays or numbers; one without floats is always finite.
    """
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0] if _has_floats(leaf)]
    if not leaves:
        return []
    finite = np.asarray(_sums_finite([leaf for _, leaf in leaves]))
    suspects = [each for each, is_finite in zip(leaves, finite, strict=True) if not is_finite]
    return [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, leaf in suspects if not bool(_all_finite(leaf))
    ]


def _has_floats(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


@jax.jit
def _sums_finite(leaves: list[Any]) -> jax.Array:
    """Bool, one a leaf. A sum misses no NaN and no infinity, and needs no further array of the leaf's size even where
    nothing is fused; that of very large numbers may overflow, so a leaf whose sum does is looked at again. (A maximum
    drops NaN on CPUs.)
    """
    return jnp.stack([jnp.isfinite(jnp.sum(leaf, dtype=jnp.float32)) for leaf in leaves])


@jax.jit
def _all_finite(leaf: Any) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))
