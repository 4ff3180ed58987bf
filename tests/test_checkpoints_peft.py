"""Adapters made by PEFT (`fixtures/make_peft.py`) in and out, and everything that can be wrong with one."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hintsd_jax.checkpoints import huggingface
from hintsd_jax.checkpoints.peft import CONFIG, WEIGHTS, load_adapter, save_adapter
from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import LoraConfig
from hintsd_jax.models.families import LORA_TARGETS

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
BASE, ADAPTER = FIXTURES / "qwen3_tiny_tied", FIXTURES / "qwen3_tiny_tied_adapter"
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.1, targets=tuple(LORA_TARGETS))
# PEFT's form of an adapter on attention and every expert.
EXPERTS = FIXTURES / "qwen3_moe_tiny_renormalised"
# The families whose decoder differs from the first one's.
OTHERS = [
    FIXTURES / name
    for name in ("mistral_tiny_untied", "smollm3_tiny_untied", "olmo3_tiny_untied", "gemma3_tiny_scaled")
]
A_OF_O = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"


@pytest.fixture(scope="module")
def policy():
    return huggingface.load_policy(BASE, lora=LORA)


@pytest.fixture(scope="module")
def with_experts():
    some = dataclasses.replace(LORA, targets=("q_proj", "gate_proj", "up_proj", "down_proj"))
    return huggingface.load_policy(EXPERTS, lora=some)


def with_adapter(path):
    return path.with_name(f"{path.name}_adapter")


def loaded(request, path):
    shared = {BASE: "policy", EXPERTS: "with_experts"}
    return request.getfixturevalue(shared[path]) if path in shared else huggingface.load_policy(path, lora=LORA)


@pytest.fixture
def folder(tmp_path):
    """A copy of PEFT's adapter that a test may spoil."""
    return shutil.copytree(ADAPTER, tmp_path / "adapter")


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("on", [BASE, EXPERTS, *OTHERS], ids=lambda path: path.name)
def test_logits_equal_peft(request, on):
    config, base = loaded(request, on)
    adapter = load_adapter(with_adapter(on), config)
    tokens, theirs = np.load(on / "expected.npz")["input_ids"][:1], np.load(with_adapter(on) / "logits.npy")
    forward = jax.jit(
        decoder.forward, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
    )  # it compiles faster
    logits = lambda params: decoder.project(params, config, forward(params, config, tokens))
    np.testing.assert_allclose(logits(lora.attach(base, adapter)), theirs, atol=1e-5)
    without = np.load(on / "expected.npz")["logits"][:1]
    assert np.abs(theirs - without).max() > 0.5  # the adapter does something


@pytest.mark.parametrize("on", [BASE, EXPERTS, *OTHERS], ids=lambda path: path.name)
def test_what_is_read_is_written_again(request, on, tmp_path):
    config, _ = loaded(request, on)
    path = with_adapter(on)
    adapter = load_adapter(path, config)
    expected = jax.eval_shape(lambda: lora.init_adapter(config, jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), adapter) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    for _ in range(2):  # the second time it replaces the first
        save_adapter(tmp_path / "out", config, adapter, on.name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(path / WEIGHTS)
    assert set(ours) == set(theirs)
    assert_equal(ours, theirs)
    assert_equal(load_adapter(tmp_path / "out", config), adapter)
    ours, theirs = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path / "out", path))
    ours["target_modules"].sort(), theirs["target_modules"].sort()
    assert ours == {key: theirs[key] for key in ours}


def test_an_adapter_on_some_modules_round_trips(policy, tmp_path):
    some = LoraConfig(rank=5, alpha=0.5, targets=("down_proj", "o_proj", "k_proj"))
    config = dataclasses.replace(policy[0], lora=some)
    shapes, rng = jax.eval_shape(lambda: lora.init_adapter(config, jax.random.key(0))), np.random.default_rng(0)
    adapter = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_adapter(tmp_path / "out", config, adapter, "base")
    assert_equal(load_adapter(tmp_path / "out", config), adapter)


def test_an_adapter_that_one_expert_lacks_is_refused(with_experts, tmp_path):
    config, folder = with_experts[0], shutil.copytree(with_adapter(EXPERTS), tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS)
    lacking = "base_model.model.model.layers.1.mlp.experts.6.up_proj.lora_B.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lacking}, folder / WEIGHTS)
    with pytest.raises(UserError, match=f"tensor {lacking} of shape .* is missing"):
        load_adapter(folder, config)
    parsed = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(parsed | {"target_modules": ["q_proj", "experts.1.up_proj"]}))
    with pytest.raises(UserError, match="target_modules comes to up_proj in 2 of 16 experts"):
        load_adapter(folder, config)


def test_bfloat16_becomes_float32(policy, folder):
    narrow = {
        name: np.asarray(jnp.asarray(weight, jnp.bfloat16)) for name, weight in load_file(folder / WEIGHTS).items()
    }
    save_file(narrow, folder / WEIGHTS)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), load_adapter(ADAPTER, policy[0]))
    assert_equal(load_adapter(folder, policy[0]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 16}, "r is 16, config.lora.rank is 2: change it, or give another adapter"),
        ({"r": None}, "r is None, config.lora.rank is 2"),
        ({"lora_alpha": 4}, "lora_alpha is 4, config.lora.alpha is 3.0"),
        (
            {"target_modules": ["v_proj", "q_proj"]},
            "target_modules is ['q_proj', 'v_proj'], config.lora.targets is ['down_proj', ",
        ),
        ({"target_modules": r".*\.[qv]_proj"}, "target_modules is ['q_proj', 'v_proj'], config.lora.targets is"),
        ({"target_modules": ".*(_proj|lm_head)"}, "target_modules comes to lm_head; only q_proj, k_proj"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules comes to model.embed_tokens; only"),
        ({"target_modules": r".*\.1\..*_proj"}, "target_modules comes to q_proj in 1 of 3 layers"),
        ({"target_modules": ["model.layers.0.self_attn.o_proj"]}, "target_modules comes to o_proj in 1 of 3 layers"),
        ({"target_modules": "(q_proj"}, "target_modules is no regular expression: '(q_proj'"),
        ({"target_modules": []}, "target_modules is [], config.lora.targets is"),
        ({"target_modules": ["c_attn"]}, "target_modules is [], config.lora.targets is"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}, config.lora.targets is"),
        ({"r": True}, "r is True, config.lora.rank is 2"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', which is not supported; peft_type may be 'LORA'"),
        ({"bias": "all"}, "bias is 'all', which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which is not supported"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"use_rslora": True}, "use_rslora is True, config.lora.rslora is False"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is {'q_proj': 4}"),
        ({"layers_to_transform": [0]}, "layers_to_transform is [0]"),
        ({"use_something_new": True}, "use_something_new is True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_adapter_than_the_configured_is_refused_by_name(policy, folder, change, message):
    about = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(about | change))
    with pytest.raises(UserError, match=re.escape(f"{CONFIG}: {message}")):
        load_adapter(folder, policy[0])


@pytest.mark.parametrize(
    "modules",
    ["all-linear", ".*_proj", r"model\.layers\.\d+\.(self_attn|mlp)\.\w+"]
    + [["self_attn.q_proj", "k_proj", "v_proj", "o_proj", "mlp.gate_proj", "up_proj", "down_proj", "not_here"]],
)
def test_pefts_ways_of_naming_modules_come_to_the_same(policy, folder, modules):
    about = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(about | {"target_modules": modules}))
    assert_equal(load_adapter(folder, policy[0]), load_adapter(ADAPTER, policy[0]))


def test_rank_stabilised_adapters_follow_their_formula(policy, folder, tmp_path):
    """W + alpha / sqrt(rank) * B A, attached, merged, and written again."""
    about = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(about | {"use_rslora": True}))
    config, base = policy
    with pytest.raises(UserError, match="use_rslora is True, config.lora.rslora is False"):
        load_adapter(folder, config)
    config = dataclasses.replace(config, lora=dataclasses.replace(LORA, rslora=True))
    adapter = load_adapter(folder, config)
    pair = adapter["layers"]["attention"]["query"]
    kernel = np.asarray(base["layers"]["attention"]["query"]["kernel"], np.float64)
    expected = kernel + 3.0 / 2**0.5 * np.einsum("nir,nro->nio", pair["a"].astype(np.float64), pair["b"])
    merged = lora.merge(np.asarray(base["layers"]["attention"]["query"]["kernel"]), pair, lora.settings(config))
    np.testing.assert_allclose(merged, expected, atol=1e-6)
    tokens = np.load(BASE / "expected.npz")["input_ids"][:1, :4]
    stronger = dataclasses.replace(config, lora=dataclasses.replace(LORA, alpha=3.0 * 2**0.5))
    hidden = [np.asarray(decoder.forward(lora.attach(base, adapter), shape, tokens)) for shape in (config, stronger)]
    np.testing.assert_allclose(*hidden, atol=1e-5)
    save_adapter(tmp_path / "out", config, adapter, "base")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["use_rslora"] is True
    assert_equal(load_adapter(tmp_path / "out", config), adapter)


def test_keys_that_are_absent_have_their_defaults(policy, folder):
    modules = {"r": 2, "lora_alpha": 3, "target_modules": list(LORA_TARGETS)}
    (folder / CONFIG).write_text(json.dumps(modules | {"lora_dropout": 0.9}))  # how it was trained: not what it is
    assert_equal(load_adapter(folder, policy[0]), load_adapter(ADAPTER, policy[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A_OF_O), f"{WEIGHTS}: tensor {A_OF_O} of shape [2, 48] is missing"),
        (
            lambda t: t.update({A_OF_O: t[A_OF_O][:, 1:].copy()}),
            f"{A_OF_O} has shape [2, 47]; the policy with rank 2 asks for [2, 48]",
        ),
        (lambda t: t.update({A_OF_O: t[A_OF_O].astype(np.int32)}), f"{A_OF_O} has dtype I32"),
        (lambda t: t.update({A_OF_O: t[A_OF_O] * np.nan}), f"tensor {A_OF_O} holds NaN or infinite values"),
        (
            lambda t: t.update({A_OF_O.replace(".1.", ".3."): t[A_OF_O]}),
            f"unexpected tensor {A_OF_O.replace('.1.', '.3.')}; the policy",
        ),
    ],
    ids=["missing", "misshapen", "integer", "nan", "extra"],
)
def test_a_wrong_tensor_is_named(policy, folder, change, message):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=re.escape(message)):
        load_adapter(folder, policy[0])


def test_files_that_are_missing_or_something_else(policy, folder):
    with pytest.raises(UserError, match="no such directory; give a PEFT adapter"):
        load_adapter(folder / "nothing", policy[0])
    (folder / WEIGHTS).write_bytes((ADAPTER / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{WEIGHTS}: cut short .* is not complete"):
        load_adapter(folder, policy[0])
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS}: missing"):
        load_adapter(folder, policy[0])
    (folder / CONFIG).unlink()
    with pytest.raises(UserError, match=f"{CONFIG}: missing"):
        load_adapter(folder, policy[0])


def test_save_replaces_adapters_only_and_leaves_nothing_half_written(policy, tmp_path, monkeypatch):
    config, _ = policy
    adapter = load_adapter(ADAPTER, config)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="policy: exists and is no adapter directory"):
        save_adapter(tmp_path / "policy", config, adapter, "base")
    save_adapter(tmp_path / "out", config, adapter, "base")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hintsd_jax.checkpoints.safetensors.save_file", full_disk)
    with pytest.raises(UserError, match="cannot write the adapter there: .*No space left"):
        save_adapter(tmp_path / "out", config, jax.tree.map(np.zeros_like, adapter), "base")
    assert_equal(load_adapter(tmp_path / "out", config), adapter)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "policy"]
