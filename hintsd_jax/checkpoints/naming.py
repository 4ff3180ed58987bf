"""Our parameters and Hugging Face's names for them. A policy's shape flows in, its parameters with both names and
shapes flow out.

One table for reading, writing, exporting and adapters. Parameters under "layers" are stacked over layers here and
separate there; kernels are [in, out] here and [out, in] there; everything else is as it is.
"""

import dataclasses
from functools import partial

import jax

from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Path in our tree -> Hugging Face name, for all families. "{n}" is the layer.
NAMES = {
    "embed/embedding": EMBED,
    "layers/attention_norm/scale": "model.layers.{n}.input_layernorm.weight",
    "layers/attention/query/kernel": "model.layers.{n}.self_attn.q_proj.weight",
    "layers/attention/query/bias": "model.layers.{n}.self_attn.q_proj.bias",
    "layers/attention/key/kernel": "model.layers.{n}.self_attn.k_proj.weight",
    "layers/attention/key/bias": "model.layers.{n}.self_attn.k_proj.bias",
    "layers/attention/value/kernel": "model.layers.{n}.self_attn.v_proj.weight",
    "layers/attention/value/bias": "model.layers.{n}.self_attn.v_proj.bias",
    "layers/attention/query_norm/scale": "model.layers.{n}.self_attn.q_norm.weight",
    "layers/attention/key_norm/scale": "model.layers.{n}.self_attn.k_norm.weight",
    "layers/attention/out/kernel": "model.layers.{n}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{n}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{n}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{n}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{n}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": HEAD,
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter: its path and shape here, its names and layout there. axes: its logical axes (see
    `policy.sharding`).
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
    def names(self) -> list[str]:
        """Of its tensors there, layer by layer."""
        return [NAMES["/".join(self.path)].format(n=n) for n in range(self.shape[0] if self.stacked else 1)]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Of each of its tensors there."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def leaves(config: PolicyConfig) -> list[Leaf]:
    """Every parameter of a policy without adapter, in the order of the tree."""
    shapes = jax.eval_shape(partial(decoder.init_params, config), jax.random.key(0))
    axes = jax.tree.leaves(
        decoder.logical_axes(config), is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec)
    )
    found = jax.tree_util.tree_flatten_with_path(shapes)[0]
    return [
        Leaf(tuple(key.key for key in path), leaf.shape, tuple(names))
        for (path, leaf), names in zip(found, axes, strict=True)
    ]
