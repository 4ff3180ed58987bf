"""Hugging Face directories in and out. config.json + safetensors + tokenizer.json <-> (PolicyConfig, Params, tokenizer).

One table gives every parameter its Hugging Face name. Reading and writing walk the same list, so what is written is read back
bit for bit: kernels are only transposed. Nothing is guessed: a tensor too few, too many, of another shape
or cut short ends in a UserError that names file and tensor.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hintsd_jax.errors import UserError
from hintsd_jax.policy import decoder
from hintsd_jax.policy.config import PolicyConfig
from hintsd_jax.policy.files import Tensors, read_json, replacing, write_json, write_tensors
from hintsd_jax.policy.sharding import spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Path in our tree -> Hugging Face name. "{n}" is the layer: such leaves are stacked here and separate there.
NAMES = {
    "embed/embedding": _EMBED,
    "layers/attention_norm/scale": "model.layers.{n}.input_layernorm.weight",
    "layers/attention/query/kernel": "model.layers.{n}.self_attn.q_proj.weight",
    "layers/attention/key/kernel": "model.layers.{n}.self_attn.k_proj.weight",
    "layers/attention/value/kernel": "model.layers.{n}.self_attn.v_proj.weight",
    "layers/attention/query_norm/scale": "model.layers.{n}.self_attn.q_norm.weight",
    "layers/attention/key_norm/scale": "model.layers.{n}.self_attn.k_norm.weight",
    "layers/attention/out/kernel": "model.layers.{n}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{n}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{n}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{n}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{n}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": _HEAD,
}


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One parameter: its path and shape here, its name and layout there."""

    path: str
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    def name(self, n: int) -> str:
        return NAMES[self.path].format(n=n)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def is_kernel(self) -> bool:
        return self.path.endswith("/kernel")

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Kernels are [out, in] there and [in, out] here."""
        return self.layer_shape[::-1] if self.is_kernel else self.layer_shape

    def transposed(self, weight: np.ndarray) -> np.ndarray:
        """From our layout to theirs, and back."""
        return np.ascontiguousarray(weight.T) if self.is_kernel else weight


def _leaves(config: PolicyConfig) -> Iterator[_Leaf]:
    shapes = jax.eval_shape(partial(decoder.init_params, config), jax.random.key(0))
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        yield _Leaf("/".join(key.key for key in path), leaf.shape)


def _open_checkpoint(path: pathlib.Path, stack: contextlib.ExitStack) -> Tensors:
    """The tensors of a directory, from one file or from the shards of an index."""
    if not (path / INDEX).is_file():
        if not (path / WEIGHTS).is_file():
            raise UserError(f"{path}: no {WEIGHTS} and no {INDEX}; give a directory with safetensors weights")
        return Tensors([path / WEIGHTS], path / WEIGHTS, "config.json", stack)
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{path / INDEX}: no weight_map from tensor names to files")
    checkpoint = Tensors(sorted({path / file for file in weight_map.values()}), path / INDEX, "config.json", stack)
    for name, file in weight_map.items():
        if checkpoint.file_of.get(name) != path / file:
            raise UserError(f"{path / file}: tensor {name} is missing; {INDEX} says that it is here")
    return checkpoint


def load_policy(path: str | os.PathLike, mesh: Mesh | None = None, **overrides: Any) -> tuple[PolicyConfig, decoder.Params]:
    """Reads `config.json` and the weights of a Hugging Face directory; `overrides` are fields of PolicyConfig.

    Returns the parameters as training lays them out on `mesh` (None: the default device), in float32; those that an adapter
    (`lora`) leaves frozen in the compute dtype, but for norms. Raises UserError when the directory, a file or a tensor is
    missing, cut short, misshapen or unexpected, naming it.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a Hugging Face directory with config.json and {WEIGHTS}")
    config = PolicyConfig.from_hf(read_json(path / "config.json"), **overrides)
    params: decoder.Params = {}
    axes = decoder.logical_axes(config)
    with contextlib.ExitStack() as stack:
        checkpoint = _open_checkpoint(path, stack)
        expected = set()
        for leaf in _leaves(config):
            layers = []
            for n in range(leaf.shape[0] if leaf.stacked else 1):
                expected.add(leaf.name(n))
                layers.append(leaf.transposed(checkpoint.read(leaf.name(n), leaf.hf_shape)))
            *parents, last = leaf.path.split("/")
            node, names = params, axes
            for key in parents:
                node, names = node.setdefault(key, {}), names[key]
            frozen = config.lora is not None and last != "scale"
            weight = np.stack(layers) if leaf.stacked else layers[0]
            sharding = None if mesh is None else NamedSharding(mesh, spec(leaf.shape, names[last], mesh, "train"))
            node[last] = jax.device_put(weight.astype(jnp.dtype(config.compute_dtype) if frozen else np.float32), sharding)
        if config.tie_embeddings and _HEAD in checkpoint.file_of:
            # Some released tied checkpoints (Qwen3-0.6B) store the head as well. That is harmless while it is the same matrix.
            shape = (config.vocab_size, config.d_model)
            if np.array_equal(checkpoint.read(_HEAD, shape), checkpoint.read(_EMBED, shape)):
                expected.add(_HEAD)
        checkpoint.refuse_others(expected)
    return config, params


def save_policy(
    path: str | os.PathLike,
    config: PolicyConfig,
    params: decoder.Params,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
) -> None:
    """Writes a Hugging Face directory in float32: all of it or nothing.

    It is written beside `path` and then renamed. A policy that already stands at `path` is replaced; anything else there, and
    a place that cannot be written, is a UserError.
    """
    with replacing(path, "policy", marker="config.json") as new:
        write_json(new / "config.json", config.to_hf())
        write_tensors(new / WEIGHTS, _to_hf(config, params))
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def _to_hf(config: PolicyConfig, params: decoder.Params) -> dict[str, np.ndarray]:
    flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    tensors = {}
    for leaf in _leaves(config):
        weight = np.asarray(flat[leaf.path], np.float32)
        for n, layer in enumerate(weight if leaf.stacked else [weight]):
            tensors[leaf.name(n)] = leaf.transposed(layer)
    return tensors
