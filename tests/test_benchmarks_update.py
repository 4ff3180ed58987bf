"""The benchmarks of the update at their smallest, so that they go on running: `update` (without PyTorch), `branches`,
`causal_attention`.
"""

import json

import jax
import numpy as np

from benchmarks import branches, causal_attention
from benchmarks import update as update_benchmark
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh
from hintsd_jax.training.state import OptimConfig, create

POLICY = PolicyConfig(
    vocab_size=64, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24, rope_theta=1e4,
    norm_eps=1e-6, tie_embeddings=True, max_positions=256,
)  # fmt: skip
LONG = True  # see conftest.py


def test_one_pass_and_one_for_each_target_have_one_gradient():
    state = create(decoder.init_params(POLICY, jax.random.key(0)), OptimConfig())
    mesh = make_mesh(devices=jax.devices()[:1])
    measured = branches.measure(POLICY, state, mesh, length=96, rounds=1, rng=np.random.default_rng(0))
    assert measured["tokens"]["branches"] < measured["tokens"]["separate"]
    assert measured["loss"] < 1e-5 and measured["gradient"] < 1e-4
    assert all(seconds > 0 for seconds in measured["seconds"].values())


def test_an_update_is_timed_and_its_memory_taken(tmp_path):
    update_benchmark.main(["--only=smallest", "--without-peers", "--rounds=1", f"--out={tmp_path / 'update'}"])
    (result,) = json.loads((tmp_path / "update.json").read_text())["results"]
    assert result["losses"]["ours"] > 0 and result["seconds"]["ours"] > 0 and 0 < result["gib"]["ours"] < 4
    assert "| smallest" in (tmp_path / "update.md").read_text()


def test_every_form_of_attention_is_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "attention"
    options = {"--shape": "1,40,2,1,8", "--tiles": "8,64", "--rounds": "1", "--out": str(out)}
    monkeypatch.setattr("sys.argv", ["causal_attention", *(part for pair in options.items() for part in pair)])
    causal_attention.main()
    rows = json.loads(out.with_suffix(".json").read_text())["shapes"]["1,40,2,1,8"]
    assert [row["form"] for row in rows] == ["whole square", "tiles of 8", "tiles of 64", "attend_causal"]
    assert all(row["ms"] > 0 and row["apart"] < 1e-5 for row in rows)
    table = out.with_suffix(".md").read_text()
    assert all(row["form"] in table for row in rows) and len(capsys.readouterr().out.splitlines()) == 4
