"""Checkpoints made by transformers (`fixtures/make_checkpoints.py`) in and out, and everything that can be wrong with a
directory.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from benchmarks import load_memory
from hintsd_jax.checkpoints.huggingface import INDEX, WEIGHTS, load_policy, save_policy
from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
TIED, UNTIED = FIXTURES / "qwen3_tiny_tied", FIXTURES / "qwen3_tiny_untied"
EXPERTS = FIXTURES / "qwen3_moe_tiny_plain"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tied checkpoint that a test may spoil."""
    return shutil.copytree(TIED, tmp_path / "policy")


def edit(checkpoint, change):
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("path", [TIED, UNTIED, EXPERTS], ids=lambda path: path.name)
def test_save_gives_back_the_same_tensors(path, tmp_path):
    config, params = load_policy(path)
    for _ in range(2):  # the second time it replaces the first
        save_policy(tmp_path / "out", config, params)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(path / WEIGHTS)
    assert set(ours) == set(theirs)
    assert_equal(ours, theirs)
    config_again, params_again = load_policy(tmp_path / "out")
    assert config_again == config
    assert_equal(params_again, params)


def test_an_expert_that_is_missing_or_misshapen_is_named(tmp_path):
    checkpoint = shutil.copytree(EXPERTS, tmp_path / "policy")
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    edit(checkpoint, lambda tensors: tensors.update({name: tensors[name][:-1].copy()}))
    with pytest.raises(UserError, match=f"tensor {name} has shape"):
        load_policy(checkpoint)
    edit(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"tensor {name} of shape .* is missing"):
        load_policy(checkpoint)
    parsed = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(parsed | {"num_local_experts": 2**20}))
    with pytest.raises(UserError, match="config.json asks for 1048576 experts in each of 2 layers"):
        load_policy(checkpoint)


@pytest.mark.parametrize("path", [UNTIED, EXPERTS], ids=lambda path: path.name)
def test_parameters_have_the_shapes_of_init_params(path):
    config, params = load_policy(path)
    expected = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_a_sharded_checkpoint_reads_the_same(checkpoint):
    tensors = load_file(checkpoint / WEIGHTS)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, checkpoint / file)
    (checkpoint / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (checkpoint / INDEX).write_text(json.dumps(index))
    assert_equal(load_policy(checkpoint)[1], load_policy(TIED)[1])

    index["weight_map"][names[0]] = "b.safetensors"
    (checkpoint / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"b.safetensors: tensor {names[0]} is missing"):
        load_policy(checkpoint)
    (checkpoint / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors: missing"):
        load_policy(checkpoint)


def test_weights_beside_an_index_of_other_files_are_refused(checkpoint):
    weights = checkpoint / WEIGHTS
    names = dict.fromkeys(load_file(weights), "a.safetensors")
    shutil.copy(weights, checkpoint / "a.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=f"{WEIGHTS} lies beside {INDEX}, which names other files: delete the one"):
        load_policy(checkpoint)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    assert_equal(load_policy(checkpoint)[1], load_policy(TIED)[1])


@pytest.mark.parametrize("file", ["a\n.safetensors", "../a.safetensors", "a.bin", "\u00e9\n", ""])
def test_an_index_names_files_of_its_own_folder(checkpoint, file):
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(checkpoint / WEIGHTS), file)}))
    with pytest.raises(UserError, match="which is no name of a safetensors file") as error:
        load_policy(checkpoint)
    assert "\n" not in str(error.value)


def test_stored_rotary_frequencies_are_ignored(checkpoint):
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        edit(checkpoint, lambda tensors, name=name: tensors.update({name: np.ones(8, np.float32)}))
    assert_equal(load_policy(checkpoint)[1], load_policy(TIED)[1])


def test_bytes_after_the_last_tensor_are_refused(checkpoint):
    with (checkpoint / WEIGHTS).open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=f"{WEIGHTS}: not a safetensors file: 4 bytes follow the last tensor"):
        load_policy(checkpoint)


def test_bfloat16_weights_become_float32(checkpoint):
    def narrow(tensors):
        for name in tensors:
            tensors[name] = np.asarray(jnp.asarray(tensors[name], jnp.bfloat16))

    edit(checkpoint, narrow)
    params = load_policy(checkpoint)[1]
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), load_policy(TIED)[1])
    assert_equal(params, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_loading_holds_little_more_than_the_parameters(tmp_path):
    """Stacked parameters are filled in place: one of 80 MiB, copied or converted as a whole would show."""
    shape = load_memory.SHAPE | {
        "vocab_size": 4096,
        "hidden_size": 512,
        "num_hidden_layers": 20,
        "intermediate_size": 2048,
    }
    load_memory.write_checkpoint(tmp_path, shape, files=2)
    measured = load_memory.run(str(tmp_path))
    assert measured["files"] == 2 and measured["params"] > 250 * 2**20
    assert (
        measured["params"]
        < measured["peak"] - measured["start"]
        < measured["params"] + 2 * measured["largest"] + 110 * 2**20
    )


def test_a_tied_checkpoint_may_store_its_head_if_it_is_the_embedding(checkpoint):
    edit(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "lm_head" not in load_policy(checkpoint)[1]
    edit(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match="unexpected tensor lm_head.weight"):
        load_policy(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), rf"{WEIGHTS}: tensor {Q_PROJ} of shape \[48, 32\] is missing"),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]}),
            rf"{Q_PROJ} has shape \[47, 32\]; config.json asks for \[48, 32\]",
        ),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int32)}), f"{Q_PROJ} has dtype I32"),
        (lambda t: t.update({"model.layers.3.mlp.bias": t[Q_PROJ]}), "unexpected tensor model.layers.3.mlp.bias;"),
    ],
    ids=["missing", "misshapen", "integer", "extra"],
)
def test_a_wrong_tensor_is_named(checkpoint, change, message):
    edit(checkpoint, change)
    with pytest.raises(UserError, match=message):
        load_policy(checkpoint)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(checkpoint, name, value):
    edit(checkpoint, lambda tensors: tensors[name].reshape(-1).__setitem__(-1, value))
    with pytest.raises(UserError, match=rf"{WEIGHTS}: tensor {name} holds NaN or infinite values"):
        load_policy(checkpoint)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda size: size - 1, f"{WEIGHTS}: cut short .* tensor model.norm.weight is not complete"),
        (lambda size: 100, f"{WEIGHTS}: cut short within its header"),
        (lambda size: 0, f"{WEIGHTS}: cut short within its header"),
    ],
)
def test_a_truncated_file_is_named(checkpoint, keep, message):
    content = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(content[: keep(len(content))])
    with pytest.raises(UserError, match=message):
        load_policy(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(data_offsets=[8, 4]), "not a safetensors file"),
        (
            lambda about: about.update(dtype="BF16"),
            f"tensor {Q_PROJ} has 6144 bytes, too few or too many for its shape",
        ),
        (
            lambda about: about.update(data_offsets=[n + 4 for n in about["data_offsets"]]),
            "not a safetensors file.*begins",
        ),
        (lambda about: about.update(data_offsets=[0, 6144]), "not a safetensors file.*begins at byte"),
        (lambda about: about.pop("shape"), "not a safetensors file: KeyError"),
        (lambda about: about.update(shape="wide"), "not a safetensors file: ValueError"),
        (lambda about: about.update(dtype="F8_E4M3"), f"{Q_PROJ} has dtype F8_E4M3; only F32, F16, BF16"),
    ],
    ids=["backwards", "half", "shifted", "shared", "shapeless", "no shape", "fp8"],
)
def test_a_header_that_lies_is_refused(checkpoint, change, message):
    content = (checkpoint / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header[Q_PROJ])
    text = json.dumps(header).encode()
    (checkpoint / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    with pytest.raises(UserError, match=message):
        load_policy(checkpoint)


def test_a_config_of_more_layers_than_tensors_is_refused_at_once(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text()) | {"num_hidden_layers": 16_000_000}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has 35 tensors; config.json asks for 16000000 layers"):
        load_policy(checkpoint)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_checkpoint_spoiled_anywhere_is_refused_in_one_line(data):
    """Bytes of the file changed or cut off, or a tensor renamed: whatever it is, it loads or is refused in words."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = shutil.copytree(TIED, pathlib.Path(folder, "policy"))
        content = bytearray((checkpoint / WEIGHTS).read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        kind = data.draw(st.sampled_from(["cut", "header", "rename"]))
        if kind == "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        elif kind == "header":
            for _ in range(data.draw(st.integers(1, 3))):
                content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        else:
            name = data.draw(st.sampled_from(sorted(load_file(checkpoint / WEIGHTS)))).encode()
            content = content.replace(b'"' + name + b'"', b'"' + name[::-1] + b'"')
        (checkpoint / WEIGHTS).write_bytes(content)
        try:
            load_policy(checkpoint)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert kind == "header"  # some bytes of a header mean nothing


def test_files_that_are_missing_or_something_else(checkpoint):
    with pytest.raises(UserError, match="no such directory"):
        load_policy(checkpoint / "nothing")
    (checkpoint / WEIGHTS).write_bytes((3).to_bytes(8, "little") + b"abc")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_policy(checkpoint)
    (checkpoint / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"no {WEIGHTS} and no {INDEX}"):
        load_policy(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: cannot be read as JSON"):
        load_policy(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: missing"):
        load_policy(checkpoint)


def test_save_replaces_policies_only_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    config, params = load_policy(TIED)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(UserError, match="no policy directory"):
            save_policy(tmp_path / name, config, params)
    with pytest.raises(UserError, match="cannot write the policy"):
        save_policy(tmp_path / "file" / "below", config, params)

    save_policy(tmp_path / "out", config, params)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hintsd_jax.checkpoints.safetensors.save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_policy(tmp_path / "out", config, jax.tree.map(jnp.zeros_like, params))
    assert_equal(load_policy(tmp_path / "out")[1], params)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "notes", "out"]
