# SPDX-License-Identifier: Apache-2.0

"""Keys of config.json that this decoder does not read: a parsed file flows in, the first key that may change what is
computed flows out.

Whoever adds a term to a decoder adds a key to its config.json, under whatever name. So keys are not looked for by name:
those are listed that change nothing, and any other one must be off (absent, null, false, zero or empty) or at the value
that is listed as meaning nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

# Far above any real dimension, and low enough that no product of dimensions overflows where shapes are computed.
LARGEST = 2**24
# What transformers writes into files of these families and of any model, what tools add, and settings of generation.
_HARMLESS = """
_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
attention_dropout attn_implementation bos_token_id dtype eos_token_id gradient_checkpointing id2label
initializer_range label2id max_window_layers name_or_path num_labels output_attentions output_hidden_states
pad_token_id pretraining_tp problem_type return_dict sep_token_id task_specific_params tokenizer_class torch_dtype
torchscript transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache

bad_words_ids begin_suppress_tokens cache_implementation decoder_start_token_id diversity_penalty do_sample
early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_scores prefix remove_invalid_values repetition_penalty return_dict_in_generate
suppress_tokens temperature top_k top_p typical_p

attention_probs_dropout_prob attn_pdrop classifier_dropout embd_pdrop embedding_dropout hidden_dropout
hidden_dropout_prob resid_pdrop residual_dropout
"""
# Factors and shares that mean nothing at this value, and zero is not off.
_NEUTRAL = dict.fromkeys(
    ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "embedding_scale", "rotary_pct"), 1
)
# Of the layers' window, which acts where `use_sliding_window` says so; without that key it may act by itself.
_GATED = {"sliding_window": "use_sliding_window"}


def unknown_key(hf: Mapping[str, Any], read: Collection[str]) -> str | None:
    """The first key of `hf`, by name, that is neither `read` elsewhere nor known to change nothing; None if there is
    none.
    """
    for key in sorted(set(map(str, hf)) - set(read) - set(_HARMLESS.split())):
        value = hf[key]
        if key in _NEUTRAL and (value is None or value == _NEUTRAL[key]):
            continue
        if key not in _NEUTRAL and is_off(value):
            continue
        if key in _GATED and hf.get(_GATED[key]) is False:
            continue
        return key
    return None


def is_off(value: Any) -> bool:
    """Whether a value means that there is none: null, false, zero, or empty."""
    return value is None or (isinstance(value, bool | int | float | str | list | dict) and not value)


def is_dimension(value: Any) -> bool:
    """Whether a value is a number of something, and no more than LARGEST."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def is_positive(value: Any) -> bool:
    """Whether a value is a number above 0, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def short(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
