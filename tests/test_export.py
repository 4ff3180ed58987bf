"""Checkpoints of runs as Hugging Face directories and PEFT adapters, compared with what training starts from."""

import json
import pathlib
import shutil

import hub_server
import jax
import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors.numpy import load_file

from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.peft import load_adapter
from hintsd_jax.checkpoints.safetensors import write_shards
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.config import base as base_config
from hintsd_jax.config.build import build, lora_config, optimizer_config
from hintsd_jax.errors import UserError
from hintsd_jax.export import export
from hintsd_jax.models import decoder, lora
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.training.state import create

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
BIASED, NARROW = "qwen2_tiny_untied", "llama_tiny_tied"  # float32 in one file; bfloat16 in three
EXPERTS = "qwen3_moe_tiny_renormalised"
BESIDE = {
    "tokenizer.json": "{}",
    "chat_template.jinja": "x",
    "generation_config.json": "{}",
    "LICENSE": "free",
    "README.md": "another model",
    "additional_chat_templates/tool_use.jinja": "y",
    "original/consolidated.00.pth": "weights in another format",
    "original/params.json": "{}",
    "pytorch/model.bin": "weights again",
    "earlier/config.json": "{}",
    ".cache/downloaded": "",
}
LEFT = {"original/consolidated.00.pth", "pytorch/model.bin", "earlier/config.json", ".cache/downloaded"}


@pytest.fixture
def run(tmp_path):
    """Makes a workdir with checkpoints of the starting weights after `change`: of steps 3 (best) and 5 (latest)."""

    def make(name: str, rank: int, change=lambda leaf: leaf):
        base = shutil.copytree(FIXTURES / name, tmp_path / "base")
        (base / "expected.npz").unlink()
        for file, text in BESIDE.items():
            (base / file).parent.mkdir(exist_ok=True)
            (base / file).write_text(text)
        targets = ("q_proj", "o_proj", "down_proj")
        edge = base_config()
        edge.policy.path, edge.lora.rank, edge.lora.targets = str(base), rank, targets
        config = build(edge)
        adapter = lora_config(config)
        policy, weights = load_policy(base, lora=adapter)
        trained = lora.init_adapter(policy, jax.random.key(0)) if adapter else weights
        state = create(jax.tree.map(change, trained), optimizer_config(config))
        state = state.replace(ema=jax.tree.map(lambda leaf: leaf / 2, state.params))
        with Workdir.open(tmp_path / "run", config):
            checkpoints = Checkpoints.open(tmp_path / "run", config)
            for step, score in ((3, 0.9), (5, 0.1)):
                params = jax.tree.map(lambda leaf, step=step: leaf + (5 - step), state.params)
                checkpoints.save(step, state.replace(params=params), {}, {"eval/avg@4": score})
            checkpoints.close()
        return config, tmp_path / "run", base, policy

    return make


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def random(leaf):
    return leaf + 0.1 * np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", [BIASED, NARROW, EXPERTS])
@pytest.mark.parametrize("rank", [0, 2])
def test_weights_that_did_not_change_are_bit_equal_and_the_rest_comes_along(run, name, rank):
    config, workdir, base, _ = run(name, rank)
    written = export(config, workdir)
    student = workdir / "export" / "step_000005" / "student"
    same(tensors(student), tensors(base))  # a new adapter changes nothing
    assert json.loads((student / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    there = {str(file.relative_to(student)) for file in student.rglob("*") if file.is_file()}
    assert there == {"config.json", "model.safetensors", *BESIDE} - LEFT and not (student / "pytorch").exists()
    assert (student / "additional_chat_templates" / "tool_use.jinja").read_text() == "y"
    assert "another model" not in (student / "README.md").read_text()  # the card is of these weights
    assert [path.name for path in written] == (["student", "student_adapter", "ema_adapter"] if rank else ["student"])
    assert sorted(path.name for path in student.parent.iterdir()) == sorted(path.name for path in written)


def test_all_weights_after_training_of_student_and_ema(run):
    config, workdir, base, _ = run(BIASED, 0, random)
    out = str(workdir / "out")
    config = config.replaced({"export.weights": ("student", "ema"), "export.checkpoint": "3", "export.path": out})
    student, ema = export(config, workdir)
    assert (student, ema) == (workdir / "out" / "student", workdir / "out" / "ema")
    before = load_policy(base)[1]
    expected = jax.tree.map(lambda leaf: random(np.asarray(leaf)), before)
    equal = np.testing.assert_array_equal
    jax.tree.map(lambda now, trained: equal(now, trained + 2), load_policy(student)[1], expected)
    jax.tree.map(lambda now, trained: equal(now, trained / 2), load_policy(ema)[1], expected)


@pytest.mark.parametrize("name", [BIASED, EXPERTS])
def test_merged_weights_and_adapters_compute_what_training_computed(run, name):
    config, workdir, base, policy = run(name, 2, random)
    student, adapter, ema = export(config, workdir)
    before, after, changed = tensors(base), tensors(student), set()
    pairs = load_file(adapter / "adapter_model.safetensors")
    for name, weight in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in pairs:
            weight = weight + config.lora.alpha / 2 * pairs[f"{stem}.lora_B.weight"] @ pairs[f"{stem}.lora_A.weight"]
            changed.add(name)
        np.testing.assert_allclose(after[name], weight, rtol=1e-5, atol=1e-5)
    each = 2 + (policy.experts.number if policy.experts else 1)
    assert len(changed) == each * policy.num_layers and not np.array_equal(before[min(changed)], after[min(changed)])

    trained = jax.tree.map(random, lora.init_adapter(policy, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, load_adapter(adapter, policy), trained)
    jax.tree.map(lambda now, then: np.testing.assert_array_equal(now, then / 2), load_adapter(ema, policy), trained)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    tokens = np.arange(24).reshape(2, 12)
    logits = lambda params, policy: decoder.project(
        params, policy, jax.jit(decoder.forward, static_argnums=1)(params, policy, tokens)
    )
    attached = logits(lora.attach(load_policy(base)[1], load_adapter(adapter, policy)), policy)
    np.testing.assert_allclose(logits(load_policy(student)[1], policy), attached, atol=3e-5, rtol=1e-5)


def test_another_dtype_is_said_in_the_config(run):
    config, workdir, base, _ = run(BIASED, 2)
    student = export(config.replaced({"export.dtype": "bfloat16"}), workdir)[0]
    assert {str(weight.dtype) for weight in tensors(student).values()} == {"bfloat16"}
    assert json.loads((student / "config.json").read_text())["dtype"] == "bfloat16"
    for name, weight in tensors(base).items():
        np.testing.assert_array_equal(tensors(student)[name], weight.astype(tensors(student)[name].dtype))


@pytest.mark.parametrize("size", [0.02, 0.3])
def test_a_merge_says_what_rounding_leaves_of_a_small_adapter(run, capsys, size):
    config, workdir, base, _ = run(BIASED, 2, lambda leaf: random(leaf) * size)
    export(config, workdir)  # float32, as the checkpoint has it
    assert "coarsely" not in capsys.readouterr().out
    config = config.replaced({"export.dtype": "bfloat16"})
    student, adapter, _ = export(config, workdir)
    printed = capsys.readouterr().out
    before, after = tensors(base), tensors(student)
    pairs = load_file(adapter / "adapter_model.safetensors")
    wide = lambda array: np.asarray(array).astype(np.float64)
    added = meant = wrong = 0.0
    for stem in {name.rpartition(".lora_")[0] for name in pairs}:
        name = f"{stem.removeprefix('base_model.model.')}.weight"
        delta = config.lora.alpha / 2 * wide(pairs[f"{stem}.lora_B.weight"]) @ wide(pairs[f"{stem}.lora_A.weight"])
        change = wide(after[name]) - wide(before[name].astype(after[name].dtype))
        added, meant = added + (change**2).sum(), meant + (delta**2).sum()
        wrong += ((change - delta) ** 2).sum()
    share, error = (added / meant) ** 0.5, (wrong / meant) ** 0.5
    if error < 0.01:
        assert size == 0.3 and "coarsely" not in printed
        return
    says = f"added {added**0.5:.3g} of {meant**0.5:.3g} (norms over all merged weights: {share:.0%}; {error:.0%} of"
    assert size == 0.02 and error > 0.1 and says in printed
    assert "student: bfloat16 holds" in printed and "--config.export.dtype=float32" in printed


def test_what_float16_cannot_hold_is_refused_and_nothing_is_left(run):
    config, workdir, _, _ = run(BIASED, 0, lambda leaf: leaf + 1e5)
    with pytest.raises(UserError, match="has values that float16 cannot hold: choose export.dtype bfloat16 or float32"):
        export(config.replaced({"export.dtype": "float16"}), workdir)
    assert not list((workdir / "export" / "step_000005").iterdir())


def test_a_failed_export_leaves_the_one_before_it(run, monkeypatch):
    config, workdir, _, _ = run(NARROW, 0)
    student = export(config, workdir)[0]
    before = {file.name: file.read_bytes() for file in student.rglob("*") if file.is_file()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hintsd_jax.checkpoints.safetensors.save_file", full_disk)
    with pytest.raises(UserError, match="cannot write the policy there: .* No space left"):
        export(config, workdir)
    assert {file.name: file.read_bytes() for file in student.rglob("*") if file.is_file()} == before
    assert [path.name for path in student.parent.iterdir()] == ["student"]


def test_which_checkpoint(run):
    config, workdir, base, _ = run(NARROW, 2)
    for wanted, step in (("latest", 5), ("best", 3), ("3", 3)):
        assert export(config.replaced({"export.checkpoint": wanted}), workdir)[0].parent.name == f"step_{step:06d}"
    with pytest.raises(UserError, match=r"export.checkpoint = 4: .* has no such checkpoint; there are \[3, 5\]"):
        export(config.replaced({"export.checkpoint": "4"}), workdir)
    with pytest.raises(UserError, match="there is no run with checkpoints"):
        export(config, workdir / "elsewhere")
    assert not (workdir / "elsewhere").exists()
    with pytest.raises(UserError, match=r"belongs to another config: lora.rank \(there 2, now 3\)"):
        export(config.replaced({"lora.rank": 3}), workdir)
    shutil.rmtree(base)
    with pytest.raises(UserError, match="base: no such directory"):
        export(config, workdir)


def test_large_weights_go_into_several_files(tmp_path):
    config, params = load_policy(FIXTURES / NARROW)
    original = tensors(FIXTURES / NARROW)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    write_shards(tmp_path, original.items(), limit=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 3 and files[0].name == f"model-00001-of-{count:05d}.safetensors"
    assert all(file.stat().st_size < 20_000 + 5000 for file in files if len(load_file(file)) > 1)
    same(tensors(tmp_path), original)
    jax.tree.map(np.testing.assert_array_equal, load_policy(tmp_path)[1], params)


def card_of(folder):
    """A card's metadata and its text."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def finished(config, workdir, **more):
    """What a run leaves behind that has measured the weights of step 5."""
    metrics = {"test/avg@4": 0.5, "test/avg_low": 0.4, "test/avg_high": 0.6, "test/best@4": 0.75, "test/tasks": 160}
    before = {"metrics": metrics | {"test/avg@4": 0.25, "test/avg_low": 0.125, "test/avg_high": 0.375}}
    held_out = {"before": before, "after": {"metrics": metrics, "benchmark": "bench 3"}, "step": 5, **more}
    (workdir / "held_out.json").write_text(json.dumps(held_out))
    (workdir / "metrics.jsonl").write_text('{"step": 3, "eval/avg@4": 0.625}\n{"step": 5}\n')


def test_a_card_says_what_was_trained_and_what_came_of_it(run, monkeypatch):
    config, workdir, base, _ = run(BIASED, 2)
    finished(config, workdir)
    student, adapter, ema = export(config.replaced({"endpoint.url": "http://inside:1"}), workdir)
    head, text = card_of(student)
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hintsd_jax", "reinforcement-learning", "agents", "hint_sd"],
    }
    assert "after 5 of 1500 training steps of 8 episodes (a LoRA adapter of rank 2 was trained)" in text
    row = next(line for line in text.splitlines() if "Avg@4" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["test Avg@4", "25.0 (12.5 to 37.5)", "50.0 (40.0 to 60.0)", "+25.0"]
    assert "160 tasks of the split test x 4 episodes" in text and "bench 3" in text
    assert "optim.lr: 5e-06" in text and 'hindsight.analyser: "ema_teacher"' in text
    for private in (str(base), str(workdir), "inside", "data_dir", "policy.path"):
        assert private not in (student / "README.md").read_text(), private
    assert card_of(adapter)[0]["library_name"] == "peft" and "50.0" in card_of(adapter)[1]
    assert "Not measured: the run measures the student" in card_of(ema)[1]
    earlier = export(config.replaced({"export.checkpoint": "best"}), workdir)[0]
    assert "Avg@4 at this step: 62.5 % on 40 tasks of the split eval" in card_of(earlier)[1]
    finished(config, workdir, step=4)  # of a run that goes on since then
    assert "Not measured on held-out tasks at this step" in card_of(export(config, workdir)[0])[1]


MODEL = "someone/tiny"


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    with hub_server.serving() as server:
        hub_server.pointed_at(monkeypatch, server.url, tmp_path / "cache")
        yield server


def test_a_push_is_one_commit_to_a_private_model(run, server, capsys):
    config, workdir, _, _ = run(BIASED, 2, random)
    config = config.replaced({"export.push_to": MODEL})
    student, adapter, ema = export(config, workdir)
    assert f"pushed: {server.url}/{MODEL}" in capsys.readouterr().out
    assert server.private[MODEL] is True and server.summaries == ["Step 5 of bfcl by hint_sd"]
    expected = {
        str(file.relative_to(folder) if folder == student else file.relative_to(student.parent)): file.read_bytes()
        for folder in (student, adapter, ema)
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert server.models[MODEL][server.refs[MODEL]["main"]] == expected
    assert {"model.safetensors", "README.md", "student_adapter/adapter_config.json"} <= expected.keys()
    server.private[MODEL] = False  # as its owner has made it
    export(config.replaced({"export.checkpoint": "3"}), workdir)
    assert server.private[MODEL] is False and len(server.summaries) == 2


def test_a_model_by_name_stands_in_card_and_adapter(run, server):
    config, workdir, base, _ = run(BIASED, 2)
    commit = server.add(MODEL, {file.name: file.read_bytes() for file in base.iterdir() if file.is_file()})
    student, adapter, _ = export(config.replaced({"policy.path": MODEL}), workdir)
    same(tensors(student), tensors(base))
    head, text = card_of(adapter)
    assert (head["base_model"], head["base_model_relation"]) == (MODEL, "adapter")
    assert f"from [{MODEL}](https://huggingface.co/{MODEL}) at revision `{commit}`" in text
    described = json.loads((adapter / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == (MODEL, commit)


@pytest.mark.parametrize(
    "prepare, says",
    [
        (lambda server, patch: patch.delenv("HF_TOKEN"), "nobody is logged in: log in with `hf auth login`"),
        (lambda server, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE forbids it"),
        (lambda server, patch: patch.setenv("HF_TOKEN", "hf_other"), "needs a token that may write there"),
        (lambda server, patch: setattr(server, "refuses", (500, "")), "nothing was pushed: the Hub .* status 500"),
    ],
)
def test_a_push_that_fails_is_one_line_and_the_directories_stay(run, server, monkeypatch, prepare, says):
    config, workdir, _, _ = run(NARROW, 0)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(workdir / "none"))
    prepare(server, monkeypatch)
    with pytest.raises(UserError, match=f"export.push_to = {MODEL}: .*{says}") as caught:
        export(config.replaced({"export.push_to": MODEL}), workdir)
    assert "hf_" not in str(caught.value).replace("HF_", "")
    assert not server.summaries
    before_writing = "logged in" in says or "OFFLINE" in says
    assert (workdir / "export" / "step_000005" / "student").exists() is not before_writing


def test_a_store_is_not_pushed_from(run, server):
    config, workdir, _, _ = run(NARROW, 0)
    with pytest.raises(UserError, match="export.push_to needs export.path = a folder on a disk"):
        export(config.replaced({"export.push_to": MODEL, "export.path": "gs://bucket/out"}), workdir)
