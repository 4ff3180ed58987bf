"""The peers of `rollout`: our weights as a Qwen3 of transformers; rollouts of a case by PyTorch.

Needs requirements-parity.txt; nothing else imports it.
"""

# pyright: reportMissingImports=false, reportCallIssue=false
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.rollout import Case
from hintsd_jax.models.config import PolicyConfig


class Peer:
    """params: our weights as NumPy arrays."""

    def __init__(self, case: Case, params: dict[str, Any]):
        self.case, self.model = case, qwen3(case.policy, params).eval()
        prompts, observations = case.texts()
        self.prompts, self.observations = torch.tensor(prompts), torch.tensor(observations)

    @torch.inference_mode()
    def difference(self, tokens: Sequence[int], sampled: Sequence[int], logprobs: Sequence[float]) -> float:
        """The largest between our log-probabilities of the sampled tokens and the peer's."""
        logits = self.model(torch.tensor([tokens])).logits[0].float()
        theirs = torch.log_softmax(logits, -1)[[at - 1 for at in sampled], [tokens[at] for at in sampled]]
        return float(np.abs(theirs.numpy() - np.asarray(logprobs)).max())

    @torch.inference_mode()
    def per_turn(self) -> torch.Tensor:
        tokens, length = self.prompts, self.case.action
        settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "top_k": 0, "top_p": 1.0}
        for turn in range(self.case.turns):
            mask = torch.ones_like(tokens)
            tokens = self.model.generate(tokens, attention_mask=mask, temperature=1.0, pad_token_id=0, **settings)
            if turn < self.case.turns - 1:
                tokens = torch.cat([tokens, self.observations[:, turn]], 1)
        return tokens

    @torch.inference_mode()
    def kept_cache(self) -> torch.Tensor:
        cache, new, tokens = transformers.DynamicCache(), self.prompts, [self.prompts]
        for turn in range(self.case.turns):
            for _ in range(self.case.action):
                logits = self.model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
                new = torch.multinomial(torch.softmax(logits, -1), 1)
                tokens.append(new)
            if turn < self.case.turns - 1:
                tokens.append(self.observations[:, turn])
                new = torch.cat([new, self.observations[:, turn]], 1)
        return torch.cat(tokens, 1)


def qwen3(policy: PolicyConfig, params: dict[str, Any]) -> transformers.Qwen3ForCausalLM:
    """Our weights (NumPy) in transformers' model, with every core for PyTorch."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = transformers.Qwen3Config(
        vocab_size=policy.vocab_size,
        hidden_size=policy.d_model,
        intermediate_size=policy.d_ff,
        num_hidden_layers=policy.num_layers,
        num_attention_heads=policy.num_heads,
        num_key_value_heads=policy.num_kv_heads,
        head_dim=policy.head_dim,
        rms_norm_eps=policy.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": policy.rope_theta},
        max_position_embeddings=policy.max_positions,
        tie_word_embeddings=policy.tie_embeddings,
        attn_implementation="sdpa",
    )
    model = transformers.Qwen3ForCausalLM(config)
    _, unexpected = model.load_state_dict(_named(params, policy.num_layers), strict=False)
    if unexpected:
        raise ValueError(f"the peer has no {unexpected}")
    return model


def _named(params: dict[str, Any], layers: int) -> dict[str, torch.Tensor]:
    """By transformers' names; its matrices are [out, in]."""
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    norms = {"query_norm": "q_norm", "key_norm": "k_norm"}
    named = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    stacked = params["layers"]
    for n in range(layers):
        at = f"model.layers.{n}."
        for ours, theirs in attention.items():
            named[f"{at}self_attn.{theirs}.weight"] = stacked["attention"][ours]["kernel"][n].T
        for ours, theirs in norms.items():
            named[f"{at}self_attn.{theirs}.weight"] = stacked["attention"][ours]["scale"][n]
        for name in ("gate", "up", "down"):
            named[f"{at}mlp.{name}_proj.weight"] = stacked["mlp"][name]["kernel"][n].T
        named[f"{at}input_layernorm.weight"] = stacked["attention_norm"]["scale"][n]
        named[f"{at}post_attention_layernorm.weight"] = stacked["mlp_norm"]["scale"][n]
    return {name: torch.tensor(np.ascontiguousarray(array)) for name, array in named.items()}
