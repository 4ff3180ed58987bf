# SPDX-License-Identifier: Apache-2.0

"""The parameters of a policy here and in a Hugging Face checkpoint: a policy's shape flows in, its parameters with both
names and shapes flow out.

One list for reading, writing, exporting and adapters. Parameters under "layers" are stacked over layers here and
separate there; kernels are [in, out] here and [out, in] there; everything else is as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.families import HF_NAMES

EMBED, HEAD = HF_NAMES["embed/embedding"], HF_NAMES["lm_head/kernel"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its path and shape here, its names and layout there. axes: its logical axes (see
    `models.sharding`).
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def hf_names(self) -> list[str]:
        """Of its tensors there, layer by layer."""
        name = HF_NAMES["/".join(self.path)]
        return [name.format(n=n) for n in range(self.shape[0] if self.stacked else 1)]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Of each of its tensors there."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def hf_tensors(self, weight: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Its tensors there by name, from the array here; views of it where it is NumPy's."""
        for n, name in enumerate(self.hf_names):
            layer = np.asarray(weight[n] if self.stacked else weight)
            yield name, layer.T if self.transposed else layer


@functools.cache
def parameters(config: PolicyConfig) -> tuple[Parameter, ...]:
    """Every parameter of a policy without adapter, in the order of the tree."""
    shapes = jax.eval_shape(functools.partial(decoder.init_params, config), jax.random.key(0))
    axes = jax.tree.leaves(decoder.logical_axes(config), is_leaf=lambda node: isinstance(node, PartitionSpec))
    return tuple(
        Parameter(tuple(key.key for key in path), array.shape, tuple(names))
        for (path, array), names in zip(jax.tree_util.tree_flatten_with_path(shapes)[0], axes, strict=True)
    )
