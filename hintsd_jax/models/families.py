# SPDX-License-Identifier: Apache-2.0

"""The families of decoders: one row each for what differs between them, and Hugging Face's names for what they
share. Tables only.

A family that is one of the rows with other switches needs a row more, nothing else; CONTRIBUTING.md lists what a family
that computes something new needs.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """What differs between the decoders.

    architecture, model_type: Hugging Face's names. qk_norm: RMSNorm of each query and key head. qkv_bias: biases of
    query, key and value. states_head_dim: its config.json always has head_dim; in others an absent one means
    hidden_size / num_attention_heads. has_experts: each layer has experts and a router in place of one feed-forward
    part. skips_rope: some layers do not rotate their queries and keys. states_kv_heads: an absent num_key_value_heads
    is not as many as heads, but a number that only transformers knows. ties_by_default: an absent tie_word_embeddings
    means that they are. windowed_by_default: an absent sliding_window means that there is one.
    """

    architecture: str
    model_type: str
    qk_norm: bool = False
    qkv_bias: bool = False
    states_head_dim: bool = False
    has_experts: bool = False
    skips_rope: bool = False
    states_kv_heads: bool = False
    ties_by_default: bool = False
    windowed_by_default: bool = False


FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", qk_norm=True, states_head_dim=True),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "qwen3_moe", qk_norm=True, states_head_dim=True, has_experts=True),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True),
    "llama": Family("LlamaForCausalLM", "llama"),
    "mistral": Family("MistralForCausalLM", "mistral", states_kv_heads=True, windowed_by_default=True),
    "smollm3": Family("SmolLM3ForCausalLM", "smollm3", skips_rope=True, states_kv_heads=True, ties_by_default=True),
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

# In place of these names, and beside them, where a layer has experts.
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
