# SPDX-License-Identifier: Apache-2.0

"""The shape and the numerics of one decoder: a Hugging Face `config.json` flows in, a hashable `PolicyConfig` out.

The decoders of Qwen3, Qwen3 MoE, Qwen2 / Qwen2.5, Llama 3, Mistral and SmolLM3 are one decoder with five switches:
RMSNorm of queries and keys, biases of query, key and value, experts in place of the feed-forward part (all in
`families`), a scaling of the rotary frequencies, and layers without rotary positions.

Precision policy (the only one): what is trained, its EMA and its optimizer state are stored in float32, weights that
are not trained (under LoRA) or only served in `compute_dtype`; matrix products read them cast to `compute_dtype`;
RMSNorm, rotary angles, the attention softmax, the logits and every sum over tokens are float32 whatever `compute_dtype`
is.

Invariants: `PolicyConfig.from_hf(config.to_hf())` equals `config` up to the fields that say how to run it rather than
what it is: `compute_dtype`, `remat`, `lora` and `unknown_ids`. A config.json that asks for anything that this decoder
does not compute is refused by name, and so is a key that nobody has heard of (`hf_keys`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hintsd_jax.errors import UserError
from hintsd_jax.models.families import FAMILIES, LORA_TARGETS, Family
from hintsd_jax.models.hf_keys import is_positive, short, unknown_key
from hintsd_jax.models.rope_scaling import ROPE_KEYS, RopeScaling, read_rope

_COMPUTE_DTYPES = ("float32", "bfloat16")


# Our field -> the key of config.json.
_HF_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}
# The same for the experts of a family that has them.
_EXPERT_KEYS = {
    "number": "num_experts",
    "per_token": "num_experts_per_tok",
    "d_ff": "moe_intermediate_size",
    "renormalised": "norm_topk_prob",
}
# What else such a family's file says of them: which layers have none, which ours all have, and the loss that balances
# the router while a model is made, which no algorithm here has.
_EXPERT_KEYS_BESIDES = (
    "num_local_experts",
    "decoder_sparse_step",
    "mlp_only_layers",
    "output_router_logits",
    "router_aux_loss_coef",
)
_DIMENSIONS = tuple(name for name in _HF_KEYS if name not in ("norm_eps", "tie_embeddings"))
# Read elsewhere: how they are read stands in `from_hf` and `rope_scaling`.
_READ_BESIDES = ("architectures", "model_type", "layer_types", "rope_theta", "rope_parameters", "rope_scaling")
# Which layers of a family that skips some rotate: 1 or 0 for each, or else all but every so many.
_ROTATED_KEYS = ("no_rope_layers", "no_rope_layer_interval")
# Whether queries and keys are normed, where a file says it at all.
_QK_NORM_KEYS = ("use_qk_norm", "qk_norm")
# What the decoder computes; a checkpoint that says otherwise is refused. An absent key means the value given here.
_HF_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
# Far above any real dimension, and low enough that no product of dimensions overflows where shapes are computed.
_LARGEST = 2**24


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685): y = x W + alpha / rank * dropout(x) A B on the target projections.

    With `rslora` the factor is alpha / sqrt(rank) (arXiv:2312.03732). `dropout` is the share of a target's inputs set
    to 0, in the student's training pass only. `targets` are Hugging Face's names, those of `LORA_TARGETS`. Raises
    UserError on impossible values.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False

    def __post_init__(self):
        if self.rank < 1 or self.alpha < 0 or not 0.0 <= self.dropout < 1.0:
            raise UserError(
                f"lora: rank {self.rank} must be at least 1, alpha {self.alpha} not negative,"
                f" dropout {self.dropout} in [0, 1)"
            )
        wrong = [target for target in self.targets if target not in LORA_TARGETS]
        if wrong or not self.targets or len(set(self.targets)) != len(self.targets):
            raise UserError(f"lora.targets = {self.targets}: name different ones of {', '.join(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The experts in place of each layer's feed-forward part: how many, how many of them a token has, how wide each is,
    and whether the router's probabilities of these are made to sum to 1. Raises UserError on impossible values.
    """

    number: int
    per_token: int
    d_ff: int
    renormalised: bool

    def __post_init__(self):
        for name, key in _EXPERT_KEYS.items():
            value = getattr(self, name)
            if name == "renormalised":
                if not isinstance(value, bool):
                    raise UserError(f"policy config: {key} must be true or false, not {short(value)}")
            elif not _is_dimension(value):
                raise UserError(f"policy config: {key} must be a positive integer up to {_LARGEST}, not {short(value)}")
        if self.per_token > self.number:
            raise UserError(
                f"policy config: num_experts_per_tok ({self.per_token}) must not exceed num_experts ({self.number})"
            )


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A decoder. Hashable, so that it can be a static argument of `jax.jit`.

    `max_positions` is the longest context in tokens that the checkpoint claims; callers refuse longer ones.
    `unrotated` are the numbers of the layers without rotary positions, in order. `remat` recomputes each layer in the
    backward pass of the training forward. `lora` is how an adapter acts where the parameters hold one. `unknown_ids`
    are ranges (first, last + 1) of ids that no token has, as in padded vocabularies: they have probability 0. Raises
    UserError on impossible shapes.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_positions: int
    family: str = "qwen3"
    rope_scaling: RopeScaling | None = None
    unrotated: tuple[int, ...] = ()
    experts: ExpertsConfig | None = None
    compute_dtype: str = "float32"
    remat: bool = True
    lora: LoraConfig | None = None
    unknown_ids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for name in _DIMENSIONS:
            value = getattr(self, name)
            if not _is_dimension(value):
                raise UserError(
                    f"policy config: {name} ({_HF_KEYS[name]}) must be a positive integer up to {_LARGEST},"
                    f" not {short(value)}"
                )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"policy config: num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"policy config: head_dim must be even for rotary positions, not {self.head_dim}")
        for name in ("rope_theta", "norm_eps"):
            if not is_positive(getattr(self, name)):
                raise UserError(f"policy config: {name} must be a positive number, not {short(getattr(self, name))}")
        if not isinstance(self.tie_embeddings, bool):
            raise UserError(f"policy config: tie_embeddings must be true or false, not {short(self.tie_embeddings)}")
        if self.family not in FAMILIES:
            raise UserError(f"policy config: family must be one of {', '.join(FAMILIES)}, not {self.family!r}")
        if FAMILIES[self.family].has_experts != (self.experts is not None):
            raise UserError(f"policy config: experts are {self.experts}, which is impossible in {self.family}")
        if self.unrotated and not FAMILIES[self.family].skips_rope:
            raise UserError(f"policy config: layers without rotary positions are impossible in {self.family}")
        if self.compute_dtype not in _COMPUTE_DTYPES:
            raise UserError(
                f"policy config: compute_dtype must be one of {_COMPUTE_DTYPES}, not {self.compute_dtype!r}"
            )

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed per head."""
        return FAMILIES[self.family].qk_norm

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections of query, key and value have a bias."""
        return FAMILIES[self.family].qkv_bias

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> PolicyConfig:
        """Reads a parsed `config.json`; `overrides` set fields by our names, `compute_dtype` and `remat` among them.

        Absent keys mean what they mean to transformers where old checkpoints lack them: kv heads as many as heads,
        head_dim hidden_size / heads (but where `Family.states_head_dim`), untied embeddings. Raises UserError naming
        the architecture, or the key that is missing or asks for something not supported.
        """
        known = {family.architecture: name for name, family in FAMILIES.items()}
        architectures = hf.get("architectures")
        if not isinstance(architectures, list) or len(architectures) != 1 or str(architectures[0]) not in known:
            raise UserError(
                f"config.json: architectures is {short(architectures)}; supported is one of {', '.join(known)}"
            )
        family = known[architectures[0]]
        _refuse(hf, FAMILIES[family])
        given = {name: hf[key] for name, key in _HF_KEYS.items() if hf.get(key) is not None}
        given.setdefault("tie_embeddings", FAMILIES[family].ties_by_default)
        if not FAMILIES[family].states_kv_heads:
            given.setdefault("num_kv_heads", given.get("num_heads"))
        if not FAMILIES[family].states_head_dim and "head_dim" not in given:
            given["head_dim"] = _head_dim(hf.get("hidden_size"), hf.get("num_attention_heads"))
        missing = [key for name, key in _HF_KEYS.items() if given.get(name) is None]
        if missing:
            raise UserError(f"config.json: missing {', '.join(missing)}")
        theta, scaling = read_rope(hf)
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"policy config: unknown override {', '.join(unknown)}")
        found = {"rope_theta": theta, "rope_scaling": scaling, "family": family, "experts": _experts(hf, family)}
        found["unrotated"] = _unrotated(hf, given["num_layers"]) if FAMILIES[family].skips_rope else ()
        return cls(**(given | found | overrides))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read, with both spellings of the rotary settings; weights in
        float32.
        """
        family, scaling = FAMILIES[self.family], None
        if self.rope_scaling is not None:
            scaling = {"rope_type": "llama3"} | {
                key: getattr(self.rope_scaling, name) for name, key in ROPE_KEYS.items()
            }
        return {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **{key: getattr(self, name) for name, key in _HF_KEYS.items()},
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
            **{key: value for key, value in _HF_FIXED.items() if value is not None},
            **self._experts_to_hf(),
            **self._rotated_to_hf(),
            **({"sliding_window": None} if family.windowed_by_default else {}),
            "attention_dropout": 0.0,
            "dtype": "float32",
            "torch_dtype": "float32",
        }

    def _experts_to_hf(self) -> dict[str, Any]:
        if self.experts is None:
            return {}
        keys = {key: getattr(self.experts, name) for name, key in _EXPERT_KEYS.items()}
        return keys | {"decoder_sparse_step": 1, "mlp_only_layers": []}

    def _rotated_to_hf(self) -> dict[str, Any]:
        if not FAMILIES[self.family].skips_rope:
            return {}
        return {"no_rope_layers": [int(n not in self.unrotated) for n in range(self.num_layers)]}


def _refuse(hf: Mapping[str, Any], family: Family) -> None:
    """Raises UserError by the first key of a config.json that asks for what is not computed, or that nobody knows."""
    for key, only in _HF_FIXED.items():
        if hf.get(key, only) != only:
            raise UserError(f"config.json: {key} is {short(hf[key])}; only {only!r} is supported")
    for key in _QK_NORM_KEYS:
        if hf.get(key) not in (None, family.qk_norm):
            raise UserError(f"config.json: {key} is {short(hf[key])}, unlike in {family.architecture}")
    if hf.get("model_type") not in (None, family.model_type):
        raise UserError(
            f"config.json: model_type is {short(hf['model_type'])}, but the architecture {family.architecture} is of"
            f" {family.model_type!r}: they must belong together"
        )
    of_experts = (*_EXPERT_KEYS.values(), *_EXPERT_KEYS_BESIDES) * family.has_experts
    of_rope = _ROTATED_KEYS * family.skips_rope
    read = (*_HF_KEYS.values(), *_HF_FIXED, *_READ_BESIDES, *_QK_NORM_KEYS, *of_experts, *of_rope)
    unheard = unknown_key(hf, read)
    if unheard:
        raise UserError(
            f"config.json: {ascii(unheard)[1:-1]:.60} is {short(hf[unheard])}, which may change what the model"
            " computes and is not supported: take another checkpoint, or remove the key if it changes nothing"
        )
    if family.windowed_by_default and "sliding_window" not in hf:
        raise UserError(
            f"config.json: sliding_window is absent, which means a window in {family.architecture}; it must be null"
        )
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"config.json: layer_types is {short(kinds)}; only full_attention is supported")


def _is_dimension(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


def _head_dim(hidden_size: Any, heads: Any) -> int | None:
    """What transformers takes where head_dim is absent. None where the sizes are no numbers: they are refused later."""
    if not (isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0):
        return None
    if hidden_size % heads:
        raise UserError(
            f"config.json: head_dim is missing, and hidden_size ({hidden_size}) is no multiple of"
            f" num_attention_heads ({heads})"
        )
    return hidden_size // heads


def _experts(hf: Mapping[str, Any], family: str) -> ExpertsConfig | None:
    """Those of every layer; a file that leaves layers without them is refused. None in families that have none."""
    if not FAMILIES[family].has_experts:
        return None
    step, without = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers")
    if step != 1 or isinstance(step, bool) or without not in (None, []):
        key, value = (
            ("decoder_sparse_step", step) if step != 1 or isinstance(step, bool) else ("mlp_only_layers", without)
        )
        raise UserError(f"config.json: {key} is {short(value)}: layers without experts among others are not supported")
    given: dict[str, Any] = {name: hf.get(key) for name, key in _EXPERT_KEYS.items()}
    numbers = [hf[key] for key in ("num_experts", "num_local_experts") if hf.get(key) is not None]
    if any(number != numbers[0] for number in numbers):
        raise UserError("config.json: num_experts and num_local_experts contradict each other")
    given["number"] = numbers[0] if numbers else None
    missing = [_EXPERT_KEYS[name] for name, value in given.items() if value is None and name != "renormalised"]
    if missing:
        raise UserError(f"config.json: missing {', '.join(missing)}")
    return ExpertsConfig(**(given | {"renormalised": given["renormalised"] or False}))


def _unrotated(hf: Mapping[str, Any], num_layers: Any) -> tuple[int, ...]:
    """The layers that do not rotate: those with a 0 in the list, or, without one, every so many."""
    rotated, interval = hf.get("no_rope_layers"), hf.get("no_rope_layer_interval", 4)
    if not _is_dimension(num_layers):
        return ()  # refused later
    if rotated is None:
        if not _is_dimension(interval):
            raise UserError(f"config.json: no_rope_layer_interval must be a positive integer, not {short(interval)}")
        return tuple(range(interval - 1, num_layers, interval))
    if not isinstance(rotated, list) or len(rotated) != num_layers or any(each not in (0, 1) for each in rotated):
        raise UserError(
            f"config.json: no_rope_layers must have a 0 or 1 for each of {num_layers} layers, not {short(rotated)}"
        )
    return tuple(n for n, each in enumerate(rotated) if not each)
