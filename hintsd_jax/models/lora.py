# SPDX-License-Identifier: Apache-2.0

"""Low-rank adapters (LoRA): a policy's shape flows in, an adapter tree flows out. Attached to the frozen weights, it
acts in every pass; merged into them, it is a part of them.

An adapter is a tree `{"layers": {"attention": {"query": {"a", "b"}}, ...}}` of float32 arrays stacked over layers like
the weights: `a` [N, in, r], `b` [N, r, out]; of experts [N, E, in, r] and [N, E, r, out]. It is all that LoRA trains:
optimizer state, EMA and checkpoints have nothing else.

Invariant: a new adapter (B = 0) and one with alpha 0 change nothing, and merged weights compute what base and adapter
compute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from hintsd_jax.models import decoder
from hintsd_jax.models.config import LoraConfig, PolicyConfig
from hintsd_jax.models.families import LORA_TARGETS

Adapter = dict[str, Any]


class LoraTarget(NamedTuple):
    """One adapted projection. path: where it stands in a layer. shape: of its stacked kernel, [N, in, out], or of
    experts [N, E, in, out]. axes: the kernel's logical axes.
    """

    hf_name: str
    path: tuple[str, str]
    shape: tuple[int, ...]
    axes: tuple[str, ...]


def settings(config: PolicyConfig) -> LoraConfig:
    """How the policy's adapter acts. Raises ValueError where the policy has none."""
    if config.lora is None:
        raise ValueError("this policy has no adapter: PolicyConfig.lora is None")
    return config.lora


@functools.cache
def targets(config: PolicyConfig) -> tuple[LoraTarget, ...]:
    """The projections that `config.lora` adapts, in the order of `LORA_TARGETS`."""
    adapted = settings(config).targets
    shapes = decoder.abstract_params(config)["layers"]
    axes = decoder.logical_axes(config)["layers"]
    return tuple(
        LoraTarget(name, (part, module), shapes[part][module]["kernel"].shape, tuple(axes[part][module]["kernel"]))
        for name, (part, module) in LORA_TARGETS.items()
        if name in adapted
    )


def build(config: PolicyConfig, make: Callable[[LoraTarget, int], tuple[Any, ...]]) -> Adapter:
    """The adapter tree with `make(target, number of the target)` -> (a, b) at every target."""
    layers: dict[str, dict] = {}
    for number, target in enumerate(targets(config)):
        part, module = target.path
        a, b = make(target, number)
        layers.setdefault(part, {})[module] = {"a": a, "b": b}
    return {"layers": layers}


def init_adapter(config: PolicyConfig, key: jax.Array) -> Adapter:
    """A new adapter: A uniform within 1/sqrt(inputs) (as PEFT draws it), B zero."""
    rank = settings(config).rank

    def make(target: LoraTarget, number: int):
        *stack, inputs, outputs = target.shape
        bound = 1.0 / math.sqrt(inputs)
        a = jax.random.uniform(jax.random.fold_in(key, number), (*stack, inputs, rank), jnp.float32, -bound, bound)
        return a, jnp.zeros((*stack, rank, outputs), jnp.float32)

    return build(config, make)


def logical_axes(config: PolicyConfig) -> Adapter:
    """The tree of `init_adapter` with a PartitionSpec of logical axis names at every leaf (see `sharding`)."""

    def make(target: LoraTarget, _: int):
        *stack, inputs, outputs = target.axes
        if "experts" not in stack:  # those of experts lie as the experts do
            inputs, outputs = ("adapter_embed" if name == "embed" else "adapter_split" for name in (inputs, outputs))
        return PartitionSpec(*stack, inputs, "rank"), PartitionSpec(*stack, "rank", outputs)

    return build(config, make)


def attach(frozen: decoder.Params | None, trained: decoder.Params) -> decoder.Params:
    """What the decoder's functions take: the trained weights alone, or the frozen ones with the trained adapter."""
    return trained if frozen is None else {**frozen, "lora": trained}


def merge(kernel: Any, pair: Any, config: LoraConfig) -> Any:
    """One projection's W + scale * A B in float32; the scale is that of `LoraConfig`.

    kernel: [..., in, out]. pair: `a` [..., in, r] and `b` [..., r, out].
    """
    return kernel.astype(np.float32) + np.float32(config.scale) * (pair["a"] @ pair["b"])
