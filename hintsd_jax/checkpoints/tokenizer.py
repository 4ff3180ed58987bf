# SPDX-License-Identifier: Apache-2.0

"""The tokenizer of a Hugging Face directory: tokenizer.json, its chat template and generation_config.json flow in, a
tokenizer and the token ids that end a generation flow out. No torch, no network.

Invariant: the tokenizer is tokenizer.json itself, not a rebuilt one. That is why `AutoTokenizer` is not used: for the
model types qwen2 and qwen3 transformers 5 takes only vocabulary and merges from the file and puts its own normalizer,
pre-tokenizer and BPE options in their place, so that a file with another split is tokenised otherwise than it says
(observed with 5.23). `PreTrainedTokenizerFast` takes the file as it is, for every model type.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hintsd_jax.checkpoints.safetensors import read_json
from hintsd_jax.errors import UserError, reason
from hintsd_jax.storage import AnyPath, copy_out, entries, exists, is_file, is_folder, located

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"
# What a tokenizer is made of, and the folder of further chat templates.
_TEXTS, _TEMPLATES = (".json", ".jinja", ".txt", ".model"), "additional_chat_templates"
# Contexts are the config's affair. As transformers has it where nobody says otherwise.
_ANY_LENGTH = int(1e30)
# Of tokenizer.json: written even where they are null.
_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory, exactly as `tokenizer.json` defines it, with its chat template.

    Raises UserError when tokenizer.json is missing or broken, or there is no chat template.
    """
    from transformers import PreTrainedTokenizerFast  # here, because this import alone takes seconds

    path = located(path)
    if not is_folder(path):
        raise UserError(f"{path}: no such directory; give a Hugging Face directory with a tokenizer.json")
    definition = read_json(path / "tokenizer.json")
    _check_definition(definition, path / "tokenizer.json")
    try:
        with _on_disk(path) as folder:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        tokenizer.model_max_length = _ANY_LENGTH
        tokenizer.decode(tokenizer.encode("x"))  # some of what tokenizer_config.json says is only looked at here
    except Exception as error:  # tokenizers raises bare Exception on a file that is JSON but not a tokenizer
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{path / 'tokenizer.json'}: cannot be read as a tokenizer: {said}") from error
    known = {token["content"] for token in definition["added_tokens"]} | {tokenizer.pad_token}
    new = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content not in known]
    if new:
        raise UserError(
            f"{path / 'tokenizer.json'}: has no added token {new[0]!a}, which tokenizer_config.json names; it would"
            " get an id that the model never saw: use the files that belong together"
        )
    if not tokenizer.chat_template:
        raise UserError(f"{path}: the tokenizer has no chat template; add chat_template.jinja")
    return tokenizer


@contextlib.contextmanager
def _on_disk(path: AnyPath) -> Iterator[pathlib.Path]:
    """A folder of this machine with what a tokenizer is made of: the directory itself, or copies of those of its files.

    Raises UserError where the store does not give them.
    """
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        copies = pathlib.Path(scratch)
        try:
            for folder, target in ((path, copies), (path / _TEMPLATES, copies / _TEMPLATES)):
                for file in entries(folder):
                    if file.suffix in _TEXTS and not file.name.endswith(".index.json") and is_file(file):
                        target.mkdir(exist_ok=True)
                        copy_out(file, target / file.name)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({reason(error)})") from error
        yield copies


def _check_definition(definition: dict[str, Any], file: AnyPath) -> None:
    """Raises UserError where a part is missing that would silently count as none, or two tokens share an id or a
    text.
    """
    missing = [part for part in _PARTS if part not in definition]
    if missing:
        raise UserError(
            f"{file}: cannot be read as a tokenizer: it has no {missing[0]} (null means none): copy the file again"
        )
    for part in _PARTS[1:]:
        if not _is_part(definition[part]):
            raise UserError(
                f"{file}: cannot be read as a tokenizer: {part} is no object with a type: copy the file again"
            )
    added = definition["added_tokens"]
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        for token in added
    ):
        raise UserError(f"{file}: cannot be read as a tokenizer: added_tokens is no list of tokens with id and content")
    for what in ("id", "content"):
        twice = [value for value, count in Counter(token[what] for token in added).items() if count > 1]
        if twice:
            raise UserError(f"{file}: two added tokens have the {what} {twice[0]!a}: copy the file again")
    model = definition["model"]
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        entries = {number: text for text, number in vocabulary.items() if isinstance(number, int)}
        if len(entries) < len(vocabulary):
            raise UserError(f"{file}: two entries of the vocabulary have one id: copy the file again")
        for token in added:
            if entries.get(token["id"], token["content"]) != token["content"]:
                raise UserError(
                    f"{file}: the id {token['id']} is that of {token['content']!a} and of"
                    f" {entries[token['id']]!a}: copy the file again"
                )


def _is_part(part: Any) -> bool:
    """Whether it is null or an object that names its type, and so are the parts that it is made of. (The library takes
    a list for an object's values.)
    """
    if part is None:
        return True
    if not isinstance(part, dict) or not isinstance(part.get("type", ""), str):
        return False
    lists = [part[key] for key in ("normalizers", "pretokenizers", "processors", "decoders") if key in part]
    return all(
        isinstance(inner, list) and all(each is not None and _is_part(each) for each in inner) for inner in lists
    )


def generation_stops(path: str | os.PathLike) -> tuple[int, ...]:
    """Token ids that end a generation according to `generation_config.json`; () where there is no such file or id.

    A checkpoint may know more of them than its chat template writes: Llama 3 ends a turn with <|eot_id|>, a call with
    <|eom_id|>. Raises UserError when the file is broken, its `eos_token_id` is neither an id nor a list of ids, or one
    of them is an entry of the vocabulary that is ordinary text.
    """
    file = located(path) / GENERATION
    if not exists(file):
        return ()
    stated = read_json(file).get("eos_token_id")
    ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if not all(type(token) is int and token >= 0 for token in ids):  # `type`: True is an int to isinstance
        raise UserError(f"{file}: eos_token_id is {stated!r}; it must be a token id or a list of them")
    definition = located(path) / "tokenizer.json"
    if ids and exists(definition):
        parsed = read_json(definition)
        for token in ids:
            if (text := _ordinary_text(parsed, token)) is not None:
                raise UserError(f"{file}: eos_token_id {token} is ordinary text, {text!a}: generations would end there")
    return tuple(ids)


def _ordinary_text(definition: dict[str, Any], wanted: int) -> str | None:
    """The entry of the vocabulary with this id; None where it is an added token, or none."""
    added, model = definition.get("added_tokens"), definition.get("model")
    if isinstance(added, list) and any(isinstance(token, dict) and token.get("id") == wanted for token in added):
        return None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    entries = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return next((text for text, number in entries if number == wanted), None)
