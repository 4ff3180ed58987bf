# SPDX-License-Identifier: Apache-2.0

"""The shape and the numerics of one decoder: a Hugging Face `config.json` flows in, a hashable `PolicyConfig` out.

The decoders of Qwen3, Qwen3 MoE, Qwen2 / Qwen2.5, Llama 3, Mistral, SmolLM3, OLMo 2, OLMo 3 and Gemma 3 are one decoder
with switches. `families` has those of a whole family; a file's own are a scaling of the rotary frequencies, and which
layers have a window or no rotary positions.

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
from hintsd_jax.models import layer_kinds
from hintsd_jax.models.families import FAMILIES, LORA_TARGETS, Family
from hintsd_jax.models.hf_keys import LARGEST, is_dimension, is_positive, short, unknown_key
from hintsd_jax.models.rope_scaling import RopeScaling, YarnScaling, read_rope, rope_to_hf

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
# What the scores of families that say so are divided by the square root of.
_SCORES_KEY = "query_pre_attn_scalar"
# Whether queries and keys are normed, where a file says it at all.
_QK_NORM_KEYS = ("use_qk_norm", "qk_norm")
# What the decoder computes; a checkpoint that says otherwise is refused. An absent key means the value given here.
_HF_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
# The same of the gate's activation: the key that the family's files have it under, and its name.
_ACTIVATIONS = {"silu": ("hidden_act", "silu"), "gelu_tanh": ("hidden_activation", "gelu_pytorch_tanh")}


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
            elif not is_dimension(value):
                raise UserError(f"policy config: {key} must be a positive integer up to {LARGEST}, not {short(value)}")
        if self.per_token > self.number:
            raise UserError(
                f"policy config: num_experts_per_tok ({self.per_token}) must not exceed num_experts ({self.number})"
            )


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A decoder. Hashable, so that it can be a static argument of `jax.jit`.

    `max_positions` is the longest context in tokens that the checkpoint claims; callers refuse longer ones.
    `windowed` are the numbers of the layers in which a token sees itself and the `window - 1` tokens before it, in
    order; `window_rope_theta` is their rotary base, None: that of all, scaled like it. `unrotated` are those of the
    layers without rotary positions. `scores_dim`: scores are divided by its square root; None: head_dim. `remat`
    recomputes each layer in the
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
    window: int | None = None
    windowed: tuple[int, ...] = ()
    window_rope_theta: float | None = None
    unrotated: tuple[int, ...] = ()
    scores_dim: int | None = None
    experts: ExpertsConfig | None = None
    compute_dtype: str = "float32"
    remat: bool = True
    lora: LoraConfig | None = None
    unknown_ids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for name in _DIMENSIONS:
            value = getattr(self, name)
            if not is_dimension(value):
                raise UserError(
                    f"policy config: {name} ({_HF_KEYS[name]}) must be a positive integer up to {LARGEST},"
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
        self._check_family()
        if self.compute_dtype not in _COMPUTE_DTYPES:
            raise UserError(
                f"policy config: compute_dtype must be one of {_COMPUTE_DTYPES}, not {self.compute_dtype!r}"
            )

    def _check_family(self) -> None:
        """Raises UserError where a field has what the family cannot have, or an impossible value of it."""
        family, impossible = FAMILIES[self.family], f"which is impossible in {self.family}"
        if family.has_experts != (self.experts is not None):
            raise UserError(f"policy config: experts are {self.experts}, {impossible}")
        if self.unrotated and not family.skips_rope:
            raise UserError(f"policy config: layers without rotary positions are impossible in {self.family}")
        if family.scales_scores != (self.scores_dim is not None):
            raise UserError(f"policy config: scores_dim ({_SCORES_KEY}) is {self.scores_dim}, {impossible}")
        too_few = family.full_every == 0 and len(self.windowed) < self.num_layers
        if self.windowed and (family.full_every is None or too_few):
            raise UserError(f"policy config: layers {self.windowed} have a window, {impossible}")
        if self.windowed and self.window is None:
            raise UserError("policy config: sliding_window is missing, but layers have one")
        if self.window is not None and not is_dimension(self.window):
            raise UserError(f"policy config: sliding_window must be a positive integer, not {short(self.window)}")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise UserError(f"policy config: rope_theta must exceed 1 with yarn rope scaling, not {self.rope_theta}")
        for value, key in ((self.window_rope_theta, family.window_theta_key), (self.scores_dim, _SCORES_KEY)):
            if value is not None and not is_positive(value):
                raise UserError(f"policy config: {key} must be a positive number, not {short(value)}")

    @property
    def switches(self) -> Family:
        """What its family computes."""
        return FAMILIES[self.family]

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
        theta, scaling, window_theta = read_rope(hf, FAMILIES[family])
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"policy config: unknown override {', '.join(unknown)}")
        found = {"rope_theta": theta, "rope_scaling": scaling, "family": family, "experts": _experts(hf, family)}
        found["windowed"], found["unrotated"] = layer_kinds.read(hf, given["num_layers"], FAMILIES[family])
        found["scores_dim"] = hf.get(_SCORES_KEY) if FAMILIES[family].scales_scores else None
        if FAMILIES[family].full_every is not None:
            found |= {"window": hf["sliding_window"], "window_rope_theta": window_theta}
        return cls(**(given | found | overrides))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read, with both spellings of the rotary settings; weights in
        float32.
        """
        family = FAMILIES[self.family]
        return {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **{key: getattr(self, name) for name, key in _HF_KEYS.items()},
            **rope_to_hf(self.rope_theta, self.rope_scaling, self.window_rope_theta, family),
            **{key: value for key, value in _fixed(family).items() if value is not None},
            **self._experts_to_hf(),
            **layer_kinds.to_hf(family, self.num_layers, self.window, self.windowed, self.unrotated),
            **({_SCORES_KEY: self.scores_dim} if family.scales_scores else {}),
            "attention_dropout": 0.0,
            "dtype": "float32",
            "torch_dtype": "float32",
        }

    def _experts_to_hf(self) -> dict[str, Any]:
        if self.experts is None:
            return {}
        keys = {key: getattr(self.experts, name) for name, key in _EXPERT_KEYS.items()}
        return keys | {"decoder_sparse_step": 1, "mlp_only_layers": []}


def _fixed(family: Family) -> dict[str, Any]:
    """What its decoder computes, by the keys that could ask for something else."""
    key, name = _ACTIVATIONS[family.activation]
    without_windows = {"use_sliding_window": False} if family.full_every is None else {}
    return _HF_FIXED | {key: name} | without_windows


def _refuse(hf: Mapping[str, Any], family: Family) -> None:
    """Raises UserError by the first key of a config.json that asks for what is not computed, or that nobody knows."""
    fixed = _fixed(family)
    for key, only in fixed.items():
        if hf.get(key, only) != only:
            raise UserError(f"config.json: {key} is {short(hf[key])}; only {only!r} is supported")
    for key in _QK_NORM_KEYS:
        if hf.get(key) not in (None, family.qk_norm != "none"):
            raise UserError(f"config.json: {key} is {short(hf[key])}, unlike in {family.architecture}")
    if hf.get("model_type") not in (None, family.model_type):
        raise UserError(
            f"config.json: model_type is {short(hf['model_type'])}, but the architecture {family.architecture} is of"
            f" {family.model_type!r}: they must belong together"
        )
    of_experts = (*_EXPERT_KEYS.values(), *_EXPERT_KEYS_BESIDES) * family.has_experts
    of_scores = (family.window_theta_key,) * family.rotates_windows_apart + (_SCORES_KEY,) * family.scales_scores
    read = (
        *_HF_KEYS.values(),
        *fixed,
        *_READ_BESIDES,
        *_QK_NORM_KEYS,
        *of_experts,
        *layer_kinds.keys(family),
        *of_scores,
    )
    unheard = unknown_key(hf, read)
    if unheard:
        raise UserError(
            f"config.json: {ascii(unheard)[1:-1]:.60} is {short(hf[unheard])}, which may change what the model"
            " computes and is not supported: take another checkpoint, or remove the key if it changes nothing"
        )
    layer_kinds.refuse(hf, family)


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
