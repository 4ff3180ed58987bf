# SPDX-License-Identifier: Apache-2.0

"""Hugging Face directories in and out: config.json, safetensors, tokenizer.json <-> (PolicyConfig, Params, tokenizer).

Reading and writing walk the same list of parameters, so what is written is read back bit for bit. Every name, shape and
dtype is checked before a byte of data is read; then tensors go to their place on the mesh one at a time.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hintsd_jax.checkpoints.parameters import EMBED, HEAD, Parameter, parameters
from hintsd_jax.checkpoints.safetensors import (
    CARD,
    INDEX,
    WEIGHTS,
    TensorFiles,
    read_json,
    replacing,
    write_json,
    write_shards,
)
from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.finite import non_finite
from hintsd_jax.models.sharding import FROZEN, make_mesh, spec
from hintsd_jax.storage import AnyPath, copy_out, entries, exists, is_file, is_folder, located

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Not copied from a source directory: weights in any format, and the old model's card.
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".md"}
# Rotary frequencies, which older tools stored: they follow from config.json.
_DERIVED = ".rotary_emb.inv_freq"
_FILE = re.compile(r"[^/\\\x00-\x1f]+\.safetensors")
_ROWS = 4096  # of a vocabulary's table that are compared at once


def read_config(path: str | os.PathLike, **overrides: Any) -> PolicyConfig:
    """The `config.json` of a directory; `overrides` are fields of PolicyConfig. Raises what `load_policy` raises."""
    path = located(path)
    if not is_folder(path):
        raise UserError(f"{path}: no such directory; give a Hugging Face directory with config.json and {WEIGHTS}")
    parsed = read_json(path / "config.json")
    try:
        return PolicyConfig.from_hf(parsed, **overrides)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def open_checkpoint(path: AnyPath, config: PolicyConfig) -> TensorFiles:
    """The tensors of a directory, from one file or from the shards of an index: exactly those of `config`, all checked
    but not read.
    """
    checkpoint = _tensor_files(path)
    count = len(checkpoint.file_of)
    if config.num_layers > count:  # before a million absent layers are named
        raise UserError(f"{checkpoint.listing}: has {count} tensors; config.json asks for {config.num_layers} layers")
    if config.experts is not None and config.num_layers * config.experts.number > count:
        raise UserError(
            f"{checkpoint.listing}: has {count} tensors; config.json asks for {config.experts.number} experts in each"
            f" of {config.num_layers} layers"
        )
    expected = set()
    for parameter in parameters(config):
        for name in parameter.hf_names:
            checkpoint.check(name, parameter.hf_shape)
            expected.add(name)
    if config.tie_embeddings and HEAD in checkpoint.file_of:
        # Some released tied checkpoints (Qwen3-0.6B) store the head as well: harmless while it is the same matrix.
        checkpoint.check(HEAD, (config.vocab_size, config.d_model))
        blocks = [(first, min(first + _ROWS, config.vocab_size)) for first in range(0, config.vocab_size, _ROWS)]
        if all(np.array_equal(checkpoint.rows(HEAD, *block), checkpoint.rows(EMBED, *block)) for block in blocks):
            expected.add(HEAD)
    checkpoint.refuse_others(expected | {name for name in checkpoint.file_of if name.endswith(_DERIVED)})
    return checkpoint


def load_policy(
    path: str | os.PathLike, mesh: Mesh | None = None, *, serve_only: bool = False, **overrides: Any
) -> tuple[PolicyConfig, decoder.Params]:
    """Reads `config.json` and the weights of a Hugging Face directory; `overrides` are fields of PolicyConfig.

    Returns the parameters as training lays them out on `mesh` (None: the first device), in float32; those that are
    never trained, under an adapter (`lora`) or with `serve_only`, as serving does, in the compute dtype, but for norms.
    Raises UserError when the
    directory, a file or a tensor is missing, cut short, misshapen or unexpected, naming it.
    """
    config = read_config(path, **overrides)
    checkpoint = open_checkpoint(located(path), config)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    params: decoder.Params = {}
    is_frozen = serve_only or config.lora is not None
    for parameter in parameters(config):
        low = is_frozen and parameter.path[-1] != "scale"
        dtype = jnp.dtype(config.compute_dtype if low else np.float32)
        node = params
        for key in parameter.path[:-1]:
            node = node.setdefault(key, {})
        role = FROZEN if is_frozen else "train"
        node[parameter.path[-1]] = _place(checkpoint, parameter, mesh, role, dtype)
    wrong = set(non_finite(params))
    _refuse_non_finite(checkpoint, [parameter for parameter in parameters(config) if ".".join(parameter.path) in wrong])
    return config, params


def save_policy(
    path: str | os.PathLike,
    config: PolicyConfig,
    params: decoder.Params,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> None:
    """Writes a Hugging Face directory in float32: all of it or nothing.

    It is written beside `path` and then renamed. A policy that already stands at `path` is replaced; anything else
    there, and a place that cannot be written, is a UserError.
    """
    with replacing(path, "policy", marker="config.json") as new:
        write_json(new / "config.json", config.to_hf())
        write_shards(new, _tensors(config, params))
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def write_like(
    path: str | os.PathLike,
    source: str | os.PathLike,
    checkpoint: TensorFiles,
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str | None,
    card: str,
) -> None:
    """Writes a Hugging Face directory like `source`, with other weights: all of it or nothing.

    checkpoint: the tensors of `source`. tensors: all of them by name, in any floating dtype. dtype: of the written
    ones; None: each as `source` stores it. card: the model card, README.md. What else lies in `source` and its folders
    (tokenizer, chat templates, generation settings, licence) is copied, but for weights in other formats, other cards
    and hidden files.
    """

    def stored() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in tensors:
            with np.errstate(over="ignore"):
                cast = tensor.astype(checkpoint.dtype(name) if dtype is None else jnp.dtype(dtype))
            if cast.dtype == np.float16 and not np.isfinite(cast).all():
                raise UserError(
                    f"tensor {name} has values that float16 cannot hold: choose export.dtype bfloat16 or float32"
                )
            yield name, cast

    source = located(source)
    config = read_json(source / "config.json")
    if dtype is not None:
        config |= {"dtype": dtype, "torch_dtype": dtype}
    with replacing(path, "policy", marker="config.json") as new:
        _copy_others(source, new)
        (new / CARD).write_text(card, encoding="utf-8")
        write_json(new / "config.json", config)
        write_shards(new, stored())


def _copy_others(source: AnyPath, new: pathlib.Path) -> None:
    """What is no weights and not hidden. A policy or an adapter of its own in a folder below is no part of this one."""
    for entry in entries(source):
        left_out = entry.name.startswith(".") or entry.suffix in _NOT_COPIED or entry.name.endswith(".index.json")
        if is_folder(entry) and not left_out and not (isinstance(entry, pathlib.Path) and entry.is_symlink()):
            if not any(exists(entry / marker) for marker in ("config.json", "adapter_config.json")):
                (new / entry.name).mkdir()
                _copy_others(entry, new / entry.name)
                with contextlib.suppress(OSError):  # it held nothing but weights
                    (new / entry.name).rmdir()
        elif is_file(entry) and not left_out:
            copy_out(entry, new / entry.name)


def _tensor_files(path: AnyPath) -> TensorFiles:
    if not is_file(path / INDEX):
        if not is_file(path / WEIGHTS):
            raise UserError(f"{path}: no {WEIGHTS} and no {INDEX}; give a directory with safetensors weights")
        return TensorFiles([path / WEIGHTS], path / WEIGHTS, "config.json")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{path / INDEX}: no weight_map from tensor names to files")
    odd = [file for file in weight_map.values() if not _FILE.fullmatch(file)]
    if odd:
        raise UserError(f"{path / INDEX}: weight_map has {odd[0]!a:.80}, which is no name of a safetensors file")
    if is_file(path / WEIGHTS) and WEIGHTS not in weight_map.values():
        raise UserError(
            f"{path}: {WEIGHTS} lies beside {INDEX}, which names other files: delete the one that is not the policy's"
        )
    checkpoint = TensorFiles(sorted({path / file for file in weight_map.values()}), path / INDEX, "config.json")
    for name, file in weight_map.items():
        if checkpoint.file_of.get(name) != path / file:
            raise UserError(f"{path / file}: tensor {ascii(name)[1:-1]} is missing; {INDEX} says that it is here")
    return checkpoint


def _refuse_non_finite(checkpoint: TensorFiles, wrong: list[Parameter]) -> None:
    """Raises UserError naming the tensors of parameters that are not finite."""
    if not wrong:
        return
    named = [
        name
        for parameter in wrong
        for name in parameter.hf_names
        if not np.isfinite(checkpoint.read(name, parameter.hf_shape).astype(np.float32)).all()
    ]
    # A value that is finite in the file may not be so in the compute dtype.
    names = named or [name for parameter in wrong for name in parameter.hf_names]
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    raise UserError(
        f"{checkpoint.file_of[names[0]]}: tensor {names[0]}{more} holds NaN or infinite values; copy the checkpoint"
        " again, or take one from before it diverged"
    )


def _place(checkpoint: TensorFiles, parameter: Parameter, mesh: Mesh, role: str, dtype: np.dtype) -> jax.Array:
    """One parameter on the mesh in its place. Stacked ones are filled layer by layer in place."""
    layout = NamedSharding(mesh, spec(parameter.shape, parameter.axes, mesh, role))
    stack = parameter.stack
    parts = tuple(layout.spec)[1:] if stack else tuple(layout.spec)
    if parameter.transposed:
        parts = (*parts[:-2], *parts[:-3:-1])
    shape, file_layout = (*stack[1:], *parameter.hf_shape), NamedSharding(mesh, PartitionSpec(*parts))

    def read(names: Sequence[str]) -> jax.Array:
        """A tensor of the file, or a layer's of all experts: of these each device's own are read."""
        if len(stack) < 2:
            return jax.make_array_from_callback(
                shape, file_layout, checkpoint.read(names[0], parameter.hf_shape).__getitem__
            )
        of = lambda where: [checkpoint.read(name, parameter.hf_shape)[where[1:]] for name in names[where[0]]]
        return jax.make_array_from_callback(shape, file_layout, lambda where: np.stack(of(where)))

    names, each = parameter.hf_names, math.prod(stack[1:])
    if not stack:
        return _take(read(names), parameter.transposed, dtype, layout).block_until_ready()
    whole = jnp.zeros(parameter.shape, dtype, device=layout)
    for n in range(stack[0]):
        whole = _write(whole, read(names[n * each : (n + 1) * each]), n, transposed=parameter.transposed)
        whole.block_until_ready()  # else the host would read ahead of what devices have taken, and keep it all
    return whole


@partial(jax.jit, donate_argnums=0, static_argnames="transposed")
def _write(stack: jax.Array, tensor: jax.Array, n: int, transposed: bool) -> jax.Array:
    tensor = (tensor.mT if transposed else tensor).astype(stack.dtype)
    return jax.lax.dynamic_update_index_in_dim(stack, tensor, n, 0)


def _take(tensor: jax.Array, transposed: bool, dtype: np.dtype, layout: NamedSharding) -> jax.Array:
    if not transposed and tensor.dtype == dtype:
        return tensor
    return jax.jit(lambda x: (x.T if transposed else x).astype(dtype), out_shardings=layout)(tensor)


def _tensors(config: PolicyConfig, params: decoder.Params) -> Iterator[tuple[str, np.ndarray]]:
    for parameter in parameters(config):
        weight: Any = params
        for key in parameter.path:
            weight = weight[key]
        for name, tensor in parameter.hf_tensors(weight):
            yield name, tensor.astype(np.float32)
