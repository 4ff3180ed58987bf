# SPDX-License-Identifier: Apache-2.0

"""Adapters in PEFT's format in and out: adapter_config.json + adapter_model.safetensors <-> the adapter tree of
`models.lora`.

PEFT stores A as [r, in] and B as [out, r], separately for each layer, and of experts for each expert; here they are
[N, in, r] and [N, r, out], of experts [N, E, in, r] and [N, E, r, out]. Reading and writing walk the same targets, so
what is written is read back bit for bit.

Invariant: an adapter that loads computes here what PEFT computes with it. What this decoder does not compute (DoRA,
biases, ranks that differ between modules, ...) is refused by the name of its key, keys that are not known among them.
PEFT's ways of naming modules (a list of names or of their ends, a regular expression, "all-linear") all do, as long as
they come to the same projections in every layer and to nothing else.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import numpy as np

from hintsd_jax.checkpoints.parameters import hf_name, stacked_names
from hintsd_jax.checkpoints.safetensors import CARD, TensorFiles, read_json, replacing, write_json, write_tensors
from hintsd_jax.errors import UserError
from hintsd_jax.models import lora
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.families import LORA_TARGETS
from hintsd_jax.storage import AnyPath, is_folder, located

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Keys of adapter_config.json by what they may say. First value: what PEFT means by an absent key, and what is written.
_SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # Other starts (PiSSA, OLoRA, ...) also change the base weights, which an adapter alone does not bring along.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
# These change nothing that is computed with a loaded adapter. Every other key must be off: null, false or empty.
_FREE = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "task_type",
)  # fmt: skip
# These must be what the config says.
_COMPARED = {"r", "lora_alpha", "use_rslora", "target_modules"}
# What is written beside these: everything else that PEFT knows, off.
_OFF = {
    "alpha_pattern": {}, "auto_mapping": None, "fan_in_fan_out": False, "layers_pattern": None,
    "layers_to_transform": None, "modules_to_save": None, "rank_pattern": {}, "revision": None, "use_dora": False,
}  # fmt: skip


def load_adapter(path: str | os.PathLike, config: PolicyConfig) -> lora.Adapter:
    """Reads an adapter for the policy `config`, whose `lora` says what it must be: the tree of `lora.init_adapter` as
    float32 NumPy.

    Raises UserError when the directory, a file or a tensor is missing, cut short, misshapen or unexpected, and when
    adapter_config.json differs from `config.lora` (but for dropout, which is a setting of training) or asks for
    something that is not supported, naming it.
    """
    path = located(path)
    if not is_folder(path):
        raise UserError(f"{path}: no such directory; give a PEFT adapter with {CONFIG} and {WEIGHTS}")
    settings = lora.settings(config)
    _check(read_json(path / CONFIG), path / CONFIG, config)
    expected: set[str] = set()
    tensors = TensorFiles([path / WEIGHTS], path / WEIGHTS, f"the policy with rank {settings.rank}")

    def read(target: lora.LoraTarget, _: int) -> tuple[np.ndarray, ...]:
        pair = []
        for letter, shape in zip("AB", _hf_shapes(target, settings.rank), strict=True):
            names = _names(config, target, letter)
            expected.update(names)
            stacked = np.stack([tensors.read(name, shape).astype(np.float32).T for name in names])
            if wrong := [name for name, one in zip(names, stacked, strict=True) if not np.isfinite(one).all()]:
                raise UserError(f"{path / WEIGHTS}: tensor {wrong[0]} holds NaN or infinite values; copy it again")
            pair.append(stacked.reshape(*target.shape[:-2], *shape[::-1]))
        return tuple(pair)

    adapter = lora.build(config, read)
    tensors.refuse_others(expected)
    return adapter


def save_adapter(
    path: str | os.PathLike,
    config: PolicyConfig,
    adapter: lora.Adapter,
    base_model: str,
    revision: str | None = None,
    card: str = "",
) -> None:
    """Writes an adapter as PEFT does, in float32: all of it or nothing.

    base_model, revision: name or path of its policy, and the commit where it is a name. card: the model card; "": none.

    An adapter that already stands at `path` is replaced; anything else there, and a place that cannot be written, is a
    UserError.
    """
    tensors, settings = {}, lora.settings(config)
    for target in lora.targets(config):
        part, module = target.path
        pair = {key: np.asarray(leaf, np.float32) for key, leaf in adapter["layers"][part][module].items()}
        for letter in "AB":
            stacked = pair[letter.lower()]
            for place, name in zip(np.ndindex(*stacked.shape[:-2]), _names(config, target, letter), strict=True):
                tensors[name] = np.ascontiguousarray(stacked[place].T)
    alpha, on_experts = settings.alpha, any(len(target.shape) > 3 for target in lora.targets(config))
    description = {
        "base_model_name_or_path": base_model,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,  # PEFT declares an integer
        # A setting of training; PEFT 0.21 reads no adapter on experts that has any.
        "lora_dropout": 0.0 if on_experts else settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": [target.hf_name for target in lora.targets(config)],
        **{key: values[0] for key, values in _SUPPORTED.items()},
        **_OFF,
        "revision": revision,
    }
    with replacing(path, "adapter", marker=CONFIG) as new:
        write_json(new / CONFIG, dict(sorted(description.items())))
        write_tensors(new / WEIGHTS, tensors)
        if card:
            (new / CARD).write_text(card, encoding="utf-8")


def _check(parsed: dict[str, Any], file: AnyPath, policy: PolicyConfig) -> None:
    """Raises UserError unless the parsed adapter_config.json describes an adapter that `policy.lora` describes too."""
    config = lora.settings(policy)
    for key, values in _SUPPORTED.items():
        value = parsed.get(key, values[0])
        if value not in values:
            raise UserError(
                f"{file}: {key} is {value!r}, which is not supported; {key} may be {' or '.join(map(repr, values))}"
            )
    for key in sorted(set(parsed) - set(_SUPPORTED) - set(_FREE) - _COMPARED):
        if parsed[key]:
            raise UserError(f"{file}: {key} is {parsed[key]!r}, which is not supported; give a plain LoRA adapter")
    modules = _targets(parsed.get("target_modules"), file, policy)
    for key, value, name, wanted in (
        ("r", parsed.get("r"), "rank", config.rank),
        ("lora_alpha", parsed.get("lora_alpha"), "alpha", config.alpha),
        ("use_rslora", parsed.get("use_rslora") or False, "rslora", config.rslora),
        ("target_modules", modules, "targets", sorted(config.targets)),
    ):
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise UserError(
                f"{file}: {key} is {value!r}, config.lora.{name} is {wanted!r}: change it, or give another adapter"
            )


def _targets(wanted: Any, file: AnyPath, policy: PolicyConfig) -> Any:
    """The projections that `target_modules` comes to, by our names; what it says where that is no way of PEFT's.

    As PEFT 0.18 reads it: "all-linear", all but the head; another string, a regular expression for a module's whole
    name; a list, names or their ends after a dot.
    """
    is_list = isinstance(wanted, list) and wanted and all(isinstance(each, str) for each in wanted)
    if not is_list and not (isinstance(wanted, str) and wanted):
        return wanted
    try:
        pattern = re.compile(wanted) if isinstance(wanted, str) and wanted != "all-linear" else None
    except re.error as error:
        raise UserError(f"{file}: target_modules is no regular expression: {wanted!r}: {error}") from error

    def is_meant(module: str) -> bool:
        if pattern is not None:
            return pattern.fullmatch(module) is not None
        return wanted == "all-linear" or any(module == end or module.endswith(f".{end}") for end in wanted)

    meant = {module: is_meant(module) for module in _modules(policy)}
    others = [module for module in ("lm_head", "model.embed_tokens") if wanted != "all-linear" and is_meant(module)]
    if others:
        raise UserError(f"{file}: target_modules comes to {others[0]}; only {', '.join(LORA_TARGETS)} can have one")
    by_name = {name: [m for module, m in meant.items() if module.endswith(f".{name}")] for name in LORA_TARGETS}
    for name, layers in by_name.items():
        if any(layers) != all(layers):
            places = "layers" if len(layers) == policy.num_layers else "experts"
            raise UserError(
                f"{file}: target_modules comes to {name} in {sum(layers)} of {len(layers)} {places}: only adapters on"
                " the same projections of every layer are supported"
            )
    return sorted(name for name, layers in by_name.items() if any(layers))


def _modules(policy: PolicyConfig) -> list[str]:
    """PEFT's names of all projections of all layers."""
    everything = dataclasses.replace(lora.settings(policy), targets=tuple(LORA_TARGETS))
    targets = lora.targets(dataclasses.replace(policy, lora=everything))
    return [weight.removesuffix(".weight") for target in targets for weight in _weights(policy, target)]


def _weights(policy: PolicyConfig, target: lora.LoraTarget) -> list[str]:
    """Hugging Face's names of a target's weights, layer by layer, and in a layer expert by expert."""
    return stacked_names(hf_name(policy, ("layers", *target.path, "kernel")), target.shape[:-2])


def _names(policy: PolicyConfig, target: lora.LoraTarget, letter: str) -> list[str]:
    prefix = "base_model.model."
    return [f"{prefix}{weight.removesuffix('weight')}lora_{letter}.weight" for weight in _weights(policy, target)]


def _hf_shapes(target: lora.LoraTarget, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B of one layer, or of one of its experts, as PEFT stores them."""
    inputs, outputs = target.shape[-2:]
    return (rank, inputs), (outputs, rank)
