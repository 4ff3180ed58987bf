"""The shape and the numerics of one decoder. A Hugging Face `config.json` flows in, a hashable `PolicyConfig` flows out.

Precision policy (the only one): what is trained, its EMA and its optimizer state are stored in float32, weights that are not trained
(under LoRA) or only served in `compute_dtype`; matrix products read them cast to `compute_dtype`; RMSNorm, rotary angles, the attention
softmax, the logits and every sum over tokens are float32 whatever `compute_dtype` is.

Invariant: `PolicyConfig.from_hf(config.to_hf())` equals `config` up to the fields that say how to run it rather than what it
is: `compute_dtype`, `remat` and `lora`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hintsd_jax.errors import UserError

_ARCHITECTURE = "Qwen3ForCausalLM"
_COMPUTE_DTYPES = ("float32", "bfloat16")

# Our field -> the key of config.json. `rope_theta` has two homes and is read on its own.
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
# What the decoder computes; a checkpoint that says otherwise is refused. An absent key means the value given here.
_HF_FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "rope_scaling": None}


# Hugging Face's name of a projection -> where it stands in a layer of ours.
LORA_TARGETS = {
    "q_proj": ("attention", "query"),
    "k_proj": ("attention", "key"),
    "v_proj": ("attention", "value"),
    "o_proj": ("attention", "out"),
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685): y = x W + alpha / rank * dropout(x) A B on the target projections.

    `dropout` is the share of a target's inputs set to 0, in the student's training pass only. `targets` are Hugging Face's names,
    those of `LORA_TARGETS`. Raises UserError on impossible values.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self):
        if self.rank < 1 or self.alpha < 0 or not 0.0 <= self.dropout < 1.0:
            raise UserError(f"lora: rank {self.rank} must be at least 1, alpha {self.alpha} not negative, dropout {self.dropout} in [0, 1)")
        wrong = [target for target in self.targets if target not in LORA_TARGETS]
        if wrong or not self.targets or len(set(self.targets)) != len(self.targets):
            raise UserError(f"lora.targets = {self.targets}: name different ones of {', '.join(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A Qwen3 decoder. Hashable, so that it can be a static argument of `jax.jit`.

    `max_positions` is the longest context in tokens that the checkpoint claims; callers refuse longer ones.
    `remat` recomputes each layer in the backward pass of the training forward. `lora` is how an adapter acts where the
    parameters hold one. Raises UserError on impossible shapes.
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
    compute_dtype: str = "float32"
    remat: bool = True
    lora: LoraConfig | None = None

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"policy config: {name} must be a positive integer, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"policy config: num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"policy config: head_dim must be even for rotary positions, not {self.head_dim}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise UserError(f"policy config: {name} must be a positive number, not {value!r}")
        if not isinstance(self.tie_embeddings, bool):
            raise UserError(f"policy config: tie_embeddings must be true or false, not {self.tie_embeddings!r}")
        if self.compute_dtype not in _COMPUTE_DTYPES:
            raise UserError(f"policy config: compute_dtype must be one of {_COMPUTE_DTYPES}, not {self.compute_dtype!r}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> "PolicyConfig":
        """Reads a parsed `config.json`; `overrides` set fields by our names, `compute_dtype` and `remat` among them.

        Raises UserError naming the architecture, or the key that is missing or asks for something not supported.
        """
        architectures = hf.get("architectures")
        if architectures != [_ARCHITECTURE]:
            raise UserError(f"config.json: architectures is {architectures!r}; only [{_ARCHITECTURE!r}] is supported")
        for key, only in _HF_FIXED.items():
            if hf.get(key, only) != only:
                raise UserError(f"config.json: {key} is {hf[key]!r}; only {only!r} is supported")
        if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
            raise UserError(f"config.json: layer_types is {hf['layer_types']!r}; only full_attention is supported")
        missing = [key for key in _HF_KEYS.values() if key not in hf]
        if missing:
            raise UserError(f"config.json: missing {', '.join(missing)}")
        fields = {name: hf[key] for name, key in _HF_KEYS.items()} | {"rope_theta": _rope_theta(hf)}
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"policy config: unknown override {', '.join(unknown)}")
        return cls(**(fields | overrides))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM read, with both spellings of the rotary base."""
        return {
            "architectures": [_ARCHITECTURE],
            "model_type": "qwen3",
            **{key: getattr(self, name) for name, key in _HF_KEYS.items()},
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            **_HF_FIXED,
            "attention_dropout": 0.0,
            "dtype": "float32",
            "torch_dtype": "float32",
        }


def _rope_theta(hf: Mapping[str, Any]) -> float:
    """The rotary base: `rope_parameters.rope_theta` (transformers 5) or `rope_theta` (older)."""
    rope = hf.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UserError(f"config.json: rope_parameters.rope_type is {kind!r}; only 'default' is supported")
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    if theta is None:
        raise UserError("config.json: missing rope_theta (or rope_parameters.rope_theta)")
    return float(theta) if isinstance(theta, int | float) else theta
