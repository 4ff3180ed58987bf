# SPDX-License-Identifier: Apache-2.0

"""The parameters of a policy here and in a Hugging Face checkpoint: a policy's shape flows in, its parameters with both
names and shapes flow out.

One list for reading, writing, exporting and adapters. Parameters under "layers" are stacked over layers here, those of
experts over layers and experts, and separate there; kernels are [in, out] here and [out, in] there; everything else is
as it is.
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
from hintsd_jax.models.families import FAMILIES, HF_NAMES, hf_names

_STACKED = ("layers", "experts")  # logical axes along which tensors are separate there, the first ones here
EMBED, HEAD = HF_NAMES["embed/embedding"], HF_NAMES["lm_head/kernel"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its path and shape here, its names and layout there. axes: its logical axes (see
    `models.sharding`). hf_name: of its tensors there, "{n}" the layer, "{e}" the expert.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str

    @property
    def stack(self) -> tuple[int, ...]:
        """Of how many tensors it is made: layers, and experts of a layer; () where it is one."""
        return self.shape[: sum(axis in _STACKED for axis in self.axes)]

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def hf_names(self) -> list[str]:
        """Of its tensors there, layer by layer, and in a layer expert by expert."""
        return stacked_names(self.hf_name, self.stack)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Of each of its tensors there."""
        shape = self.shape[len(self.stack) :]
        return shape[::-1] if self.transposed else shape

    def hf_tensors(self, weight: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Its tensors there by name, from the array here; views of it where it is NumPy's."""
        names = iter(self.hf_names)
        for n in range(self.stack[0] if self.stack else 1):
            layer = np.asarray(weight[n] if self.stack else weight)
            for tensor in layer if self.stack[1:] else (layer,):
                yield next(names), tensor.T if self.transposed else tensor


def stacked_names(name: str, stack: tuple[int, ...]) -> list[str]:
    """A name with "{n}", and "{e}" where there are experts, for every layer and expert of `stack`."""
    return [name.format(**dict(zip("ne", place, strict=False))) for place in np.ndindex(*stack)]


def hf_name(config: PolicyConfig, path: tuple[str, ...]) -> str:
    """Of a parameter's tensors there, "{n}" the layer, "{e}" the expert."""
    return hf_names(FAMILIES[config.family])["/".join(path)]


@functools.cache
def parameters(config: PolicyConfig) -> tuple[Parameter, ...]:
    """Every parameter of a policy without adapter, in the order of the tree."""
    shapes = decoder.abstract_params(config)
    axes = jax.tree.leaves(decoder.logical_axes(config), is_leaf=lambda node: isinstance(node, PartitionSpec))
    listed = jax.tree_util.tree_flatten_with_path(shapes)[0]
    paths = [tuple(key.key for key in path) for path, _ in listed]
    return tuple(
        Parameter(path, array.shape, tuple(names), hf_name(config, path))
        for path, (_, array), names in zip(paths, listed, axes, strict=True)
    )
