"""The benchmarks of rollouts at their smallest, without PyTorch, so that they cannot rot."""

import json

from benchmarks import rollout, scaling


def test_rollout(tmp_path):
    rollout.main(["--only=smallest", "--without-peers", "--rounds=2", f"--out={tmp_path / 'rollout'}"])
    (result,) = json.loads((tmp_path / "rollout.json").read_text())["results"]
    assert result["sampled"] == 2 * 2 * 3 and result["seconds"]["ours"] > 0
    assert "| smallest" in (tmp_path / "rollout.md").read_text()


def test_scaling(tmp_path):
    scaling.main(["--smallest", "--rounds=2", f"--out={tmp_path / 'scaling'}"])
    results = json.loads((tmp_path / "scaling.json").read_text())["results"]
    assert len(results) == 6 and all(ms > 0 for row in results for ms in row["ms"].values())
    assert (tmp_path / "scaling.md").read_text().count("\n") == 8
