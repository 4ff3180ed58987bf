"""Hugging Face directories in and out. config.json + safetensors + tokenizer.json <-> (PolicyConfig, Params, tokenizer).

One table gives every parameter its Hugging Face name. Reading and writing walk the same list, so what is written is read back
bit for bit: kernels are only transposed and reshaped. Nothing is guessed: a tensor too few, too many, of another shape
or cut short ends in a UserError that names file and tensor.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hintsd_jax.errors import UserError
from hintsd_jax.policy import decoder
from hintsd_jax.policy.config import PolicyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Path in our tree -> Hugging Face name. "{n}" is the layer: such leaves are stacked here and separate there.
_NAMES = {
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
        return _NAMES[self.path].format(n=n)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def is_kernel(self) -> bool:
        return self.path.endswith("/kernel")

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Kernels are [out, in] there and [*in, *out] here; the output projection of attention has two input axes."""
        if not self.is_kernel:
            return self.layer_shape
        inputs = 2 if self.path.endswith("/out/kernel") else 1
        return math.prod(self.layer_shape[inputs:]), math.prod(self.layer_shape[:inputs])

    def to_hf(self, weight: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(weight.reshape(self.hf_shape[::-1]).T) if self.is_kernel else weight

    def from_hf(self, weight: np.ndarray) -> np.ndarray:
        return weight.T.reshape(self.layer_shape) if self.is_kernel else weight


def _leaves(config: PolicyConfig) -> Iterator[_Leaf]:
    shapes = jax.eval_shape(partial(decoder.init_params, config), jax.random.key(0))
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        yield _Leaf("/".join(key.key for key in path), leaf.shape)


class _Checkpoint:
    """The tensors of one directory by name, from one file or from the shards of an index; opened lazily, read one by one."""

    def __init__(self, path: pathlib.Path, stack: contextlib.ExitStack):
        self.file_of: dict[str, pathlib.Path] = {}
        self._open = {}
        if (path / INDEX).is_file():
            self.listing = path / INDEX
            weight_map = _read_json(self.listing).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise UserError(f"{self.listing}: no weight_map from tensor names to files")
            files = sorted({path / file for file in weight_map.values()})
        elif (path / WEIGHTS).is_file():
            self.listing, weight_map = path / WEIGHTS, None
            files = [self.listing]
        else:
            raise UserError(f"{path}: no {WEIGHTS} and no {INDEX}; give a directory with safetensors weights")
        for file in files:
            _check_complete(file)
            self._open[file] = stack.enter_context(safe_open(file, framework="np"))
            self.file_of |= dict.fromkeys(self._open[file].keys(), file)
        for name, file in (weight_map or {}).items():
            if self.file_of.get(name) != path / file:
                raise UserError(f"{path / file}: tensor {name} is missing; {INDEX} says that it is here")

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as float32. Raises UserError when it is missing, not floating point or not of `shape`."""
        if name not in self.file_of:
            raise UserError(f"{self.listing}: tensor {name} of shape {list(shape)} is missing")
        file = self.file_of[name]
        about = self._open[file].get_slice(name)
        if tuple(about.get_shape()) != shape:
            raise UserError(f"{file}: tensor {name} has shape {about.get_shape()}; config.json asks for {list(shape)}")
        if about.get_dtype() not in ("F32", "F16", "BF16"):
            raise UserError(f"{file}: tensor {name} has dtype {about.get_dtype()}; only F32, F16 and BF16 are supported")
        return self._open[file].get_tensor(name).astype(np.float32)


def load_policy(path: str | os.PathLike, **overrides: Any) -> tuple[PolicyConfig, decoder.Params]:
    """Reads `config.json` and the weights of a Hugging Face directory; `overrides` are fields of PolicyConfig.

    Returns float32 parameters on the default device. Raises UserError when the directory, a file or a tensor is missing,
    cut short, misshapen or unexpected, naming it.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a Hugging Face directory with config.json and {WEIGHTS}")
    config = PolicyConfig.from_hf(_read_json(path / "config.json"), **overrides)
    params: decoder.Params = {}
    with contextlib.ExitStack() as stack:
        checkpoint = _Checkpoint(path, stack)
        expected = set()
        for leaf in _leaves(config):
            layers = []
            for n in range(leaf.shape[0] if leaf.stacked else 1):
                expected.add(leaf.name(n))
                layers.append(leaf.from_hf(checkpoint.read(leaf.name(n), leaf.hf_shape)))
            *parents, last = leaf.path.split("/")
            node = params
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = jnp.asarray(np.stack(layers) if leaf.stacked else layers[0])
        extra = sorted(set(checkpoint.file_of) - expected)
        if config.tie_embeddings and _HEAD in extra:
            # Some released tied checkpoints (Qwen3-0.6B) store the head as well. That is harmless while it is the same matrix.
            shape = (config.vocab_size, config.d_model)
            if np.array_equal(checkpoint.read(_HEAD, shape), checkpoint.read(_EMBED, shape)):
                extra.remove(_HEAD)
        if extra:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise UserError(f"{checkpoint.file_of[extra[0]]}: unexpected tensor {extra[0]}{more}; config.json does not ask for it")
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
    path = pathlib.Path(path).absolute()
    if path.exists() and not (path / "config.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists and is not a policy directory; choose another place")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            new, old = pathlib.Path(scratch, "new"), pathlib.Path(scratch, "old")
            new.mkdir()
            (new / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
            save_file(_to_hf(config, params), new / WEIGHTS, metadata={"format": "pt"})
            (new / WEIGHTS).chmod((new / "config.json").stat().st_mode)  # safetensors writes for the owner only
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            if path.exists():
                path.rename(old)  # steps aside first: a rename cannot replace a full directory
            try:
                new.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write the policy there: {error}") from error


def load_tokenizer(path: str | os.PathLike) -> "PreTrainedTokenizerFast":
    """The tokenizer of a Hugging Face directory, exactly as `tokenizer.json` defines it, with its chat template."""
    from transformers import PreTrainedTokenizerFast  # here, because this import alone takes seconds

    path = pathlib.Path(path)
    _read_json(path / "tokenizer.json")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a file that is JSON but not a tokenizer
        raise UserError(f"{path / 'tokenizer.json'}: cannot be read as a tokenizer: {error}") from error
    if not tokenizer.chat_template:
        raise UserError(f"{path}: the tokenizer has no chat template; add chat_template.jinja")
    return tokenizer


def _to_hf(config: PolicyConfig, params: decoder.Params) -> dict[str, np.ndarray]:
    flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    tensors = {}
    for leaf in _leaves(config):
        weight = np.asarray(flat[leaf.path], np.float32)
        for n, layer in enumerate(weight if leaf.stacked else [weight]):
            tensors[leaf.name(n)] = leaf.to_hf(layer)
    return tensors


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not a JSON object")
    return content


def _check_complete(file: pathlib.Path) -> None:
    """Reads the safetensors header and names the first tensor whose bytes are not there (the library only says 'incomplete').

    Format: 8 bytes little-endian header length, the header as JSON, then the data that its offsets point into.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{file}: cut short within its header ({size} bytes); copy it again")
            header = json.loads(stream.read(length))
        ends = {name: about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise UserError(f"{file}: missing; {INDEX} lists it") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a safetensors file: {error!r}") from error
    cut = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if 8 + length + end > size]
    if cut:
        raise UserError(f"{file}: cut short ({size} bytes): tensor {cut[0]} is not complete; copy the file again")
