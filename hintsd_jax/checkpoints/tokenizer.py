# SPDX-License-Identifier: Apache-2.0

"""The tokenizer of a Hugging Face directory: tokenizer.json, its chat template and generation_config.json flow in, a
tokenizer and the token ids that end a generation flow out. No torch, no network.

Invariant: the tokenizer is tokenizer.json itself, not a rebuilt one. That is why `AutoTokenizer` is not used: for the
model types qwen2 and qwen3 transformers 5 takes only vocabulary and merges from the file and puts its own normalizer,
pre-tokenizer and BPE options in their place, so that a file with another split is tokenised otherwise than it says
(observed with 5.23). `PreTrainedTokenizerFast` takes the file as it is, for every model type.
"""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING

from hintsd_jax.checkpoints.safetensors import read_json
from hintsd_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory, exactly as `tokenizer.json` defines it, with its chat template.

    Raises UserError when tokenizer.json is missing or broken, or there is no chat template.
    """
    from transformers import PreTrainedTokenizerFast  # here, because this import alone takes seconds

    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a Hugging Face directory with a tokenizer.json")
    read_json(path / "tokenizer.json")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a file that is JSON but not a tokenizer
        raise UserError(f"{path / 'tokenizer.json'}: cannot be read as a tokenizer: {error}") from error
    if not tokenizer.chat_template:
        raise UserError(f"{path}: the tokenizer has no chat template; add chat_template.jinja")
    return tokenizer


def generation_stops(path: str | os.PathLike) -> tuple[int, ...]:
    """Token ids that end a generation according to `generation_config.json`; () where there is no such file or id.

    A checkpoint may know more of them than its chat template writes: Llama 3 ends a turn with <|eot_id|>, a call with
    <|eom_id|>. Raises UserError when the file is broken or its `eos_token_id` is neither an id nor a list of ids.
    """
    file = pathlib.Path(path) / GENERATION
    if not file.exists():
        return ()
    stated = read_json(file).get("eos_token_id")
    ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if not all(type(token) is int and token >= 0 for token in ids):  # `type`: True is an int to isinstance
        raise UserError(f"{file}: eos_token_id is {stated!r}; it must be a token id or a list of them")
    return tuple(ids)
