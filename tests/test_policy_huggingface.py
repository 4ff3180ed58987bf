"""Checkpoints made by transformers (`fixtures/make_qwen3.py`) in and out, and everything that can be wrong with a directory."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hintsd_jax.errors import UserError
from hintsd_jax.policy import decoder
from hintsd_jax.policy.config import PolicyConfig
from hintsd_jax.policy.huggingface import INDEX, WEIGHTS, load_policy, save_policy

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
TIED, UNTIED = FIXTURES / "qwen3_tiny_tied", FIXTURES / "qwen3_tiny_untied"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
HF = json.loads((TIED / "config.json").read_text())


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


@pytest.mark.parametrize("path", [TIED, UNTIED], ids=lambda path: path.name)
def test_logits_equal_transformers(path):
    config, params = load_policy(path)
    logits = jax.jit(lambda p, ids: decoder.project(p, config, decoder.forward(p, config, ids)))
    actual = logits(params, np.load(path / "input_ids.npy"))
    np.testing.assert_allclose(actual, np.load(path / "logits.npy"), atol=1e-5)


@pytest.mark.parametrize("path", [TIED, UNTIED], ids=lambda path: path.name)
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


def test_parameters_have_the_shapes_of_init_params():
    config, params = load_policy(UNTIED)
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


def test_bfloat16_weights_become_float32(checkpoint):
    def narrow(tensors):
        for name in tensors:
            tensors[name] = np.asarray(jnp.asarray(tensors[name], jnp.bfloat16))

    edit(checkpoint, narrow)
    params = load_policy(checkpoint)[1]
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), load_policy(TIED)[1])
    assert_equal(params, expected)


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
        (lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]}), rf"{Q_PROJ} has shape \[47, 32\]; config.json asks for \[48, 32\]"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int32)}), f"{Q_PROJ} has dtype I32"),
        (lambda t: t.update({"model.layers.3.mlp.bias": t[Q_PROJ]}), "unexpected tensor model.layers.3.mlp.bias;"),
    ],
    ids=["missing", "misshapen", "integer", "extra"],
)
def test_a_wrong_tensor_is_named(checkpoint, change, message):
    edit(checkpoint, change)
    with pytest.raises(UserError, match=message):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures is \['LlamaForCausalLM'\]; only"),
        ({"architectures": None}, "architectures is None"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": None}, "missing rope_theta"),
        ({"num_attention_heads": 3}, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": "32"}, "d_model must be a positive integer"),
        ({"rms_norm_eps": 0}, "norm_eps must be a positive number"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        PolicyConfig.from_hf(HF | change)


def test_config_round_trip_overrides_and_both_homes_of_rope_theta():
    config = PolicyConfig.from_hf(HF, compute_dtype="bfloat16", remat=False)
    assert (config.compute_dtype, config.remat, config.rope_theta) == ("bfloat16", False, 10_000.0)
    assert PolicyConfig.from_hf(config.to_hf(), compute_dtype="bfloat16", remat=False) == config
    older = {key: value for key, value in HF.items() if key != "rope_parameters"} | {"rope_theta": 7}
    assert PolicyConfig.from_hf(older).rope_theta == 7.0
    with pytest.raises(UserError, match="missing hidden_size, head_dim"):
        PolicyConfig.from_hf({key: value for key, value in HF.items() if key not in ("hidden_size", "head_dim")})
    with pytest.raises(UserError, match="unknown override lr"):
        PolicyConfig.from_hf(HF, lr=1)
    with pytest.raises(UserError, match="compute_dtype must be one of"):
        PolicyConfig.from_hf(HF, compute_dtype="float16")


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

    monkeypatch.setattr("hintsd_jax.policy.files.save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_policy(tmp_path / "out", config, jax.tree.map(jnp.zeros_like, params))
    assert_equal(load_policy(tmp_path / "out")[1], params)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "notes", "out"]
