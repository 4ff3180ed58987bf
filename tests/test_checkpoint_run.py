"""The README's command for a checkpoint of one's own, on random weights of SmolLM2-135M's shape (3 of its 30 layers)
behind a template in the form of Qwen2.5's: every part of a run, with fewer and shorter episodes.
"""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hintsd_jax import main as entry
from hintsd_jax.checkpoints.parameters import parameters
from hintsd_jax.envs.desk.instructions import FULL
from hintsd_jax.envs.desk.office import tool_docs
from hintsd_jax.hindsight.prompts import shipped
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.runs.metrics import read_metrics
from tests.helpers import QWEN25_TEMPLATE, make_tokenizer

LONG = True  # see conftest.py
VOCABULARY = 49_152
SHAPE = PolicyConfig(
    vocab_size=VOCABULARY,
    num_layers=3,  # each is compiled by itself where layers are served apart
    d_model=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=8192,
    family="llama",
)
SHORTER = {
    "env.options.length": 1,
    "tasks.tasks_per_step": 1,
    "tasks.rollouts": 1,
    "rollout.slots": 1,
    "rollout.context": 448,
    "rollout.max_steps": 2,
    "rollout.max_action_tokens": 8,
    "rollout.prefill_buckets": "(128,)",
    "rollout.prefill_rows": 1,
    "hindsight.max_tokens": 16,
    "hindsight.max_targets": 1,
    "eval.rollouts": 1,
    "eval.test_tasks": 1,
    "optim.steps": 1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    rng = np.random.default_rng(0)
    tensors = {}
    for parameter in parameters(SHAPE):
        for name in parameter.hf_names:
            values = rng.standard_normal(parameter.hf_shape, np.float32) * 0.04
            tensors[name] = (values + ("norm" in name)).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SHAPE.to_hf()))
    known = (FULL, *map(json.dumps, tool_docs()), str(shipped("released").wording), QWEN25_TEMPLATE)
    tokenizer = make_tokenizer(QWEN25_TEMPLATE, corpus=known, vocab_size=4000)
    tokenizer.save_pretrained(folder)
    _fill(folder / "tokenizer.json")
    return folder


def _fill(file: Path) -> None:
    """As many entries as the model has: merges of two letters, the last to be tried."""
    definition = json.loads(file.read_text())
    vocabulary, merges = definition["model"]["vocab"], definition["model"]["merges"]
    number = len(vocabulary) + len(definition["added_tokens"])
    letters = sorted(entry for entry in vocabulary if len(entry) == 1)
    for a, b in ((a, b) for a in letters for b in letters if a + b not in vocabulary):
        if number == VOCABULARY:
            break
        vocabulary[a + b], number = number, number + 1
        merges.append([a, b])
    assert number == VOCABULARY
    file.write_text(json.dumps(definition))


def test_the_command_for_a_checkpoint_of_ones_own(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--config=desk_checkpoint", "--workdir=runs/mine", f"--config.policy.path={checkpoint}"]
    words += [f"--config.{key}={value}" for key, value in SHORTER.items()]
    assert entry.main(["train", *words]) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    start, after = read_metrics("runs/mine/metrics.jsonl")
    assert after["rollout/episodes"] == 1 and "eval/avg@1" in start
    assert after["rollout/tokens"] >= 2 and after["hindsight/questions"] == 1 and after["hindsight/tokens"] > 0
    episodes = [json.loads(line) for line in Path("runs/mine/episodes/step_000001.jsonl").read_text().splitlines()]
    assert len(episodes) == 1 and all(250 < record["prompt_length"] < 448 for record in episodes)
    assert "test Avg@1" in printed.out
    if after["train/tokens"] == 0:  # random weights write no review
        assert re.search(r"step 1 of 1: .*, 1 of 1 answers unreadable \(.*\), update skipped: nothing to", printed.err)
        assert "updates: 1 of 1 had nothing to train on: nothing was learnt" in printed.out
    assert entry.main(["export", *words]) == 0
    assert "student" in capsys.readouterr().out
    folder = Path("runs/mine/export/step_000001")
    assert (folder / "student" / "model.safetensors").stat().st_size > 75_000_000
    assert json.loads((folder / "student_adapter" / "adapter_config.json").read_text())["r"] == 16
