# SPDX-License-Identifier: Apache-2.0

"""The families of decoders: one row each for what differs between them, and Hugging Face's names for what they
share. Tables, but for one look-up.

A family that is one of the rows with other switches needs a row more, nothing else; CONTRIBUTING.md lists what a family
that computes something new needs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Family(NamedTuple):
    """What differs between the decoders.

    architecture, model_type: Hugging Face's names. qk_norm: RMSNorm of queries and keys, of each head or of all heads
    as one vector. qkv_bias: biases of query, key and value. norms: of a layer's two parts, of what flows in, of what
    flows out, or of both ("around"). norm_adds_one: their scale is 1 + weight. activation: of the gate. scales_embed:
    embeddings are multiplied by sqrt(D). scales_scores: scores are divided by the square root of a number of the
    file's, not of head_dim. full_every: layers may have windows, and, where the file does not say which, every so
    many-th has none (0: all have one); None: no layer has. rotates_windows_apart: layers with windows rotate by a base
    of their own, unscaled; window_theta_key: where older files have it. has_experts: each layer has experts and a
    router in place of one feed-forward part. skips_rope: some layers do not rotate their queries and keys.

    What absent keys mean. states_head_dim: its config.json always has head_dim; in others an absent one means
    hidden_size / num_attention_heads. states_kv_heads: an absent num_key_value_heads is not as many as heads, but a
    number that only transformers knows. ties_by_default: an absent tie_word_embeddings means that they are.
    """

    architecture: str
    model_type: str
    qk_norm: Literal["none", "each_head", "all_heads"] = "none"
    qkv_bias: bool = False
    norms: Literal["before", "after", "around"] = "before"
    norm_adds_one: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    scales_embed: bool = False
    scales_scores: bool = False
    full_every: int | None = None
    rotates_windows_apart: bool = False
    window_theta_key: str = "rope_theta"
    has_experts: bool = False
    skips_rope: bool = False
    states_head_dim: bool = False
    states_kv_heads: bool = False
    ties_by_default: bool = False


_QWEN3 = Family("Qwen3ForCausalLM", "qwen3", qk_norm="each_head", states_head_dim=True)
_OLMO2 = Family("Olmo2ForCausalLM", "olmo2", qk_norm="all_heads", norms="after")
FAMILIES = {
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3._replace(architecture="Qwen3MoeForCausalLM", model_type="qwen3_moe", has_experts=True),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True),
    "llama": Family("LlamaForCausalLM", "llama"),
    "mistral": Family("MistralForCausalLM", "mistral", states_kv_heads=True, full_every=0),
    "smollm3": Family("SmolLM3ForCausalLM", "smollm3", skips_rope=True, states_kv_heads=True, ties_by_default=True),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2._replace(
        architecture="Olmo3ForCausalLM", model_type="olmo3", full_every=4, rotates_windows_apart=True
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        qk_norm="each_head",
        norms="around",
        norm_adds_one=True,
        activation="gelu_tanh",
        scales_embed=True,
        scales_scores=True,
        full_every=6,
        rotates_windows_apart=True,
        window_theta_key="rope_local_base_freq",
        states_head_dim=True,
        states_kv_heads=True,
        ties_by_default=True,
    ),
}

# Path in our parameter tree -> Hugging Face's tensor, for all families. "{n}" is the layer, "{e}" the expert.
HF_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
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
    "lm_head/kernel": "lm_head.weight",
}

# In place of these names, and beside them, where the layer's parts norm what flows out: alone, and as well.
AFTER_NAMES = {
    "layers/attention_after_norm/scale": "model.layers.{n}.post_attention_layernorm.weight",
    "layers/mlp_after_norm/scale": "model.layers.{n}.post_feedforward_layernorm.weight",
}
AROUND_NAMES = AFTER_NAMES | {"layers/mlp_norm/scale": "model.layers.{n}.pre_feedforward_layernorm.weight"}

# The same where a layer has experts.
EXPERT_NAMES = {
    "layers/mlp/router/kernel": "model.layers.{n}.mlp.gate.weight",
    "layers/mlp/gate/kernel": "model.layers.{n}.mlp.experts.{e}.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{n}.mlp.experts.{e}.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{n}.mlp.experts.{e}.down_proj.weight",
}

# Hugging Face's name of a projection -> where it stands in a layer of ours: what an adapter can be put on.
LORA_TARGETS = {
    "q_proj": ("attention", "query"),
    "k_proj": ("attention", "key"),
    "v_proj": ("attention", "value"),
    "o_proj": ("attention", "out"),
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}


def hf_names(family: Family) -> dict[str, str]:
    """Path in our parameter tree -> Hugging Face's tensor."""
    norms = {"before": {}, "after": AFTER_NAMES, "around": AROUND_NAMES}[family.norms]
    return HF_NAMES | norms | (EXPERT_NAMES if family.has_experts else {})
