"""Tokenizers from disk: tokenizer.json as it is, whatever the model type; the ids that end a generation; broken files
in one line.
"""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from hintsd_jax.checkpoints.tokenizer import generation_stops, load_tokenizer
from hintsd_jax.errors import UserError
from tests.helpers import make_tokenizer

TEXTS = (
    '<|im_start|>user\nMove "report.txt" to /archive<|im_end|>\n',
    "12345 don't DON'T  cafe\u0301 caf\u00e9\n\n\nend",  # what another split or normalizer changes
    " <tool_call>\n{}\n</tool_call><think>",
)


def directory(tmp_path, model_type: str, tokenizer_class: str | None, other_split: bool):
    """A folder as one finds it: tokenizer.json, its config, a template, a model's config.json."""
    make_tokenizer().save_pretrained(tmp_path)
    if other_split:  # no normalizer, up to three digits at a time: Llama's way
        definition = json.loads((tmp_path / "tokenizer.json").read_text())
        definition["normalizer"] = None
        definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}|\p{L}+|\s+|[^\s\p{L}\p{N}]+"
        (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    about.pop("tokenizer_class", None)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(about | ({"tokenizer_class": tokenizer_class} if tokenizer_class else {}))
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return tmp_path


@pytest.mark.parametrize("other_split", [False, True])
@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [
        ("qwen2", "Qwen2Tokenizer"),
        ("qwen3", "Qwen2Tokenizer"),
        ("qwen3", None),
        ("llama", "PreTrainedTokenizerFast"),
        ("llama", "LlamaTokenizer"),
    ],
)
def test_the_tokenizer_is_the_file_itself(tmp_path, model_type, tokenizer_class, other_split):
    folder = directory(tmp_path, model_type, tokenizer_class, other_split)
    truth, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(truth.to_str())
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == truth.encode(text, add_special_tokens=False).ids
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == make_tokenizer().chat_template and len(tokenizer) == len(make_tokenizer())


def test_neither_torch_nor_the_network_is_needed(tmp_path):
    folder = directory(tmp_path, "qwen3", "Qwen2Tokenizer", other_split=False)
    code = f"""
import socket, sys
def refuse(*unused): raise AssertionError("network")
socket.socket.connect = refuse
sys.modules["torch"] = None
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
print(len(load_tokenizer({str(folder)!r})))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == [str(len(make_tokenizer()))], result.stderr


@pytest.mark.parametrize("length", ["", {"x": {}}, True, 2, None])
def test_a_length_in_the_tokenizers_config_has_no_effect(tmp_path, length):
    folder = directory(tmp_path, "qwen3", None, other_split=False)
    about = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    assert load_tokenizer(folder).encode(TEXTS[0]) == make_tokenizer().encode(TEXTS[0])


def test_what_is_missing_or_broken_is_named(tmp_path):
    make_tokenizer(template=None).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="bare: the tokenizer has no chat template"):
        load_tokenizer(tmp_path / "bare")
    for text, words in (('{"model": 1}', "cannot be read as a tokenizer"), ("{", "cannot be read as JSON")):
        (tmp_path / "bare" / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=f"tokenizer.json: {words}"):
            load_tokenizer(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json: missing"):
        load_tokenizer(tmp_path / "bare")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("pre_tokenizer"), "it has no pre_tokenizer"),
        (lambda t: t.pop("normalizer"), "it has no normalizer"),
        (lambda t: t.update(normalizer=["x"]), "normalizer is no object with a type"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, ["x"]), "pre_tokenizer is no object with a type"),
        (lambda t: t.update(decoder="ByteLevel"), "decoder is no object with a type"),
        (lambda t: t.update(added_tokens={"a": 1}), "added_tokens is no list of tokens"),
        (lambda t: t["added_tokens"][0].update(id="7"), "added_tokens is no list of tokens"),
        (lambda t: t["added_tokens"][1].update(id=t["added_tokens"][2]["id"]), "two added tokens have the id"),
        (lambda t: t["added_tokens"][4].update(content="<think>"), "two added tokens have the content '<think>'"),
        (lambda t: t["added_tokens"][3].update(id=5), "the id 5 is that of '<tool_call>' and of"),
        (lambda t: t["model"]["vocab"].update({"zzz": 5}), "two entries of the vocabulary have one id"),
        (lambda t: t["added_tokens"].pop(2), "has no added token '<|im_end|>', which tokenizer_config.json names"),
    ],
)
def test_a_tokenizer_that_would_read_otherwise_than_it_did_is_refused(tmp_path, change, message):
    make_tokenizer().save_pretrained(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    change(definition)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "stops"),
    [
        ({"eos_token_id": [128001, 128008, 128009]}, (128001, 128008, 128009)),
        ({"eos_token_id": 151645}, (151645,)),
        ({"eos_token_id": None}, ()),
        ({}, ()),
    ],
)
def test_generation_stops(tmp_path, content, stops):
    assert generation_stops(tmp_path) == ()
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert generation_stops(tmp_path) == stops


@pytest.mark.parametrize("stated", ["</s>", [1, "2"], True, -1, [None], {"id": 2}, 1.0])
def test_stops_that_are_no_ids_are_refused(tmp_path, stated):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    with pytest.raises(
        UserError, match="generation_config.json: eos_token_id is .* must be a token id or a list"
    ) as error:
        generation_stops(tmp_path)
    assert "\n" not in str(error.value)


def test_a_stop_that_is_ordinary_text_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, stop - 1, 9999]}))
    assert generation_stops(tmp_path) == (stop, stop - 1, 9999)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 0]}))
    with pytest.raises(UserError, match="generation_config.json: eos_token_id 0 is ordinary text, '!'"):
        generation_stops(tmp_path)


def test_a_broken_generation_config_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match="generation_config.json: cannot be read as JSON"):
        generation_stops(tmp_path)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory; give a Hugging Face directory"):
        load_tokenizer(tmp_path / "nowhere")
