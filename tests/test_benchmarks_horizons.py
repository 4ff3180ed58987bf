"""Algorithms at several lengths of tasks, from summaries that are written down here; nothing is trained."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

from benchmarks import compare_algorithms, compare_horizons, comparison, comparison_tables
from tests.test_benchmarks_comparison import summary

RATES = {2: {"hint_sd": 0.6, "grpo": 0.6}, 8: {"hint_sd": 0.8, "grpo": 0.4}}  # by length; desk has 8 of its own


def runs_at(length, seeds=(0, 1, 2)):
    settings = {"checkpoint.every": "2"} | ({} if length == 8 else {"env.options.length": str(length)})
    return [
        summary(arm, seed, rate, config="desk", settings=settings)
        for arm, rate in RATES[length].items()
        for seed in seeds
    ]


def test_lengths_grow_in_proportion_and_the_configs_own_length_changes_nothing():
    grown = dict(each.split("=") for each in compare_horizons.overrides_at("desk", "env.options.length", 12))
    assert grown["env.options.length"] == "12" and grown["env.options.difficulty"] == "9"
    assert grown["rollout.context"] == "864" and grown["rollout.max_steps"] == "48"  # 576 and 32 at length 8
    assert grown["batch.length_buckets"] == "(480,864,)" and grown["hindsight.context"] == "1152"
    assert compare_horizons.overrides_at("desk", "env.options.length", 8) == []
    assert "env.options.difficulty=3" in compare_horizons.overrides_at("desk", "env.options.length", 3)  # 2.25
    open_ones = compare_horizons.overrides_at("textworld", "env.options.quest_length", 2)
    assert not [each for each in open_ones if each.startswith(("batch.", "hindsight.context"))]
    with pytest.raises(SystemExit, match="--length-key=env.name: config desk gives 'desk' there, no length"):
        compare_horizons.overrides_at("desk", "env.name", 4)


def test_the_first_arm_minus_each_at_each_length_over_common_seeds():
    by_length = {length: comparison.by_arm(runs_at(length)) for length in RATES}
    del by_length[8]["grpo"][2]
    ahead = compare_horizons.differences(by_length)
    assert list(ahead) == ["grpo"] and list(ahead["grpo"]) == [2, 8]
    expected = comparison.contrast(by_length[8]["hint_sd"], by_length[8]["grpo"], "avg")
    assert ahead["grpo"][8] == expected and not expected.over_seeds and ahead["grpo"][2].over_seeds
    text = re.sub(" +", " ", compare_horizons.page(by_length, "env.options.length"))
    assert f"| GRPO | {ahead['grpo'][2].text('+')} | {ahead['grpo'][8].text('+')} |" in text
    assert "| GRPO | 3 | 2 |" in text and "on 50 tasks at each length" in text
    by_decisions = compare_horizons.page(by_length, "env.options.difficulty")
    assert "| difficulty 2 |" in re.sub(" +", " ", by_decisions) and "length" not in by_decisions.split("## Seeds")[0]
    by_length[2].pop("hint_sd")
    with pytest.raises(SystemExit, match="grpo has no finished run|hint_sd has no finished run at length 2"):
        compare_horizons.page({8: by_length[8], 2: by_length[2]}, "env.options.length")


def test_kept_results_of_all_lengths_are_read_and_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks import comparison_figures

    kept, out = tmp_path / "kept.json", tmp_path / "out" / "horizons"
    kept.write_text(comparison_tables.to_json([run for length in RATES for run in runs_at(length)]))
    options = ["--read", f"--collected={kept}", f"--workdir={tmp_path}/runs", f"--out={out}", "--lengths=2,8"]
    monkeypatch.setattr(sys, "argv", ["compare_horizons", *options, "--arms=hint_sd,grpo"])
    drawing = SimpleNamespace(draw=lambda *unused: None, against_horizon=comparison_figures.against_horizon)
    monkeypatch.setattr(compare_algorithms, "figures", lambda: drawing)  # those of each length are drawn elsewhere
    with pytest.raises(SystemExit) as exit:
        compare_horizons.main()
    assert exit.value.code == 0 and "length 8: 0 runs are left" in capsys.readouterr().out
    assert len(json.loads(out.with_suffix(".json").read_text())["runs"]) == 12
    assert out.with_name("horizons_8.md").read_text().startswith("# Algorithms side by side: desk")
    assert compare_algorithms.LABELS["grpo"] in out.with_suffix(".md").read_text()
    figure = out.with_suffix(".svg").read_bytes()
    words = "".join(ElementTree.fromstring(figure).itertext())
    assert "grpo" in words and "length of tasks" in words and len(figure) < 40_000
    by_length = {length: comparison.by_arm(runs_at(length)) for length in RATES}
    again = comparison_figures.against_horizon(compare_horizons.differences(by_length), "hint_sd", tmp_path / "b.svg")
    assert again.read_bytes() == figure
