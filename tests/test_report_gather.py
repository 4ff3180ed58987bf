"""Runs become an overview and chunks; too many episodes are thinned by whole steps, and the counts stay whole."""

import json

from hypothesis import given
from hypothesis import strategies as st

from hintsd_jax.tools.report import gather
from hintsd_jax.tools.report.reading import open_runs
from tests.report_helpers import CONFIG, record, unpack, write_run


def test_rows_and_entries_stand_in_the_same_order(tmp_path):
    first = {step: [record(f"t{step}-{n}", n, targets=(1,)) for n in range(25)] for step in (1, 2)}
    runs = open_runs(
        [write_run(tmp_path / "a", first), write_run(tmp_path / "b", {3: [record("other", success=True)]})]
    )
    content = gather.gather(runs, 1000)
    columns, names = content.overview["episodes"], content.overview["names"]
    chunks = [unpack(chunk) for chunk in content.chunks]
    assert [len(chunk) for chunk in chunks] == [gather.CHUNK, 51 - gather.CHUNK]
    assert [names["task"][n] for n in columns["task"]] == [f"t{step}-{n}" for step in (1, 2) for n in range(25)] + [
        "other"
    ]
    assert columns["run"] == [0] * 50 + [1] and columns["step"] == [1] * 25 + [2] * 25 + [3]
    entries = [entry for chunk in chunks for entry in chunk]
    assert [entry["reward"] for entry in entries] == [0] * 50 + [1]


def test_held_out_pairs_are_kept_as_pairs_and_not_among_the_targets(tmp_path):
    path = write_run(tmp_path / "a", {step: [record(targets=(1,)) for _ in range(10)] for step in (1, 2)})
    for name, count in (("before_000000", 9), ("after_000002", 8)):
        lines = [json.dumps(record(f"test-{n}", n, success=n % 2 == 0)) + "\n" for n in range(count)]
        (path / "episodes" / f"{name}.jsonl").write_text("".join(lines))
    for most, of_each, of_training in ((1000, 8, 20), (32, 4, 20), (24, 3, 10), (7, 0, 7)):
        content = gather.gather(open_runs([path]), most)
        columns, names = content.overview["episodes"], content.overview["names"]
        kinds = [names["kind"][n] for n in columns["kind"]]
        assert kinds == ["before"] * of_each + ["training"] * of_training + ["after"] * of_each
        tasks = [names["task"][n] for n in columns["task"]]
        assert tasks[:of_each] == tasks[of_each + of_training :]
        [run] = content.overview["runs"]
        assert run["episodes"] == 37 and sum(map(sum, run["target_counts"]["absolute"])) == 20


def test_what_is_left_out_is_counted_and_targets_count_all(tmp_path):
    steps = {step: [record(f"t{n}", targets=(2,)) for n in range(10)] for step in range(1, 7)}
    content = gather.gather(open_runs([write_run(tmp_path / "a", steps)]), 35)
    [run] = content.overview["runs"]
    assert (run["kept"], run["episodes"]) == (30, 60)
    assert sorted(set(content.overview["episodes"]["step"])) == [1, 3, 6]
    assert [sum(row) for row in run["target_counts"]["absolute"]] == [10] * 6


@given(st.dictionaries(st.integers(1, 100), st.integers(1, 50), max_size=20), st.integers(0, 300))
def test_choose_keeps_within_the_limit(sizes, most):
    sizes = dict(sorted(sizes.items()))
    chosen = gather.choose(sizes, most)
    assert chosen.keys() == sizes.keys() and sum(chosen.values()) <= most
    assert all(chosen[step] <= size for step, size in sizes.items())
    if sum(sizes.values()) <= most:
        assert chosen == sizes
    whole = [step for step, size in sizes.items() if chosen[step] == size]
    if len(whole) > 1:
        assert whole[0] == min(sizes) and whole[-1] == max(sizes)
    elif sizes:
        assert sum(chosen.values()) > 0 or most == 0


def test_columns_have_time_and_tokens_so_far():
    rows = [
        {"step": 0, "eval/avg@4": 0.5},
        {"step": 1, "time/step": 2.0, "rollout/tokens": 100, "hindsight/tokens": 20, "train/loss": None},
        {"step": 2, "time/step": 3.0, "rollout/tokens": 50, "train/loss": 0.25},
    ]
    found = gather.columns(rows)
    assert found["wall"] == [0.0, 2.0, 5.0] and found["generated"] == [0, 120, 170]
    assert found["train/loss"] == [None, None, 0.25] and found["eval/avg@4"] == [0.5, None, None]


def test_the_mean_step_of_no_targets_is_no_point():
    rows = [{"step": n, "hindsight/targets": n, "hindsight/mean_target_step": 2.5 * n} for n in (0, 1)]
    assert gather.columns(rows)["hindsight/mean_target_step"] == [None, 2.5]


def test_what_knows_the_ground_truth_is_privileged(tmp_path):
    oracle = CONFIG | {"hindsight": CONFIG["hindsight"] | {"select": "oracle"}}
    runs = open_runs([
        write_run(tmp_path / "own", rows=[{"step": 1, "hindsight/privileged": 0}]),
        write_run(tmp_path / "report", rows=[{"step": 1, "hindsight/privileged": 1}]),
        write_run(tmp_path / "oracle", config=oracle),
    ])  # fmt: skip
    assert [run["privileged"] for run in gather.gather(runs, 10).overview["runs"]] == [False, True, True]


def test_an_evaluation_and_settings_without_a_word_in_json(tmp_path):
    path = write_run(tmp_path / "a", config=CONFIG | {"plan": {"memory_gib": float("inf")}})
    (path / "evaluation.json").write_text('{"step": 7, "metrics": {}, "success": [[1, 0], [1, 1]], "greedy": []}')
    [run] = gather.gather(open_runs([path]), 10).overview["runs"]
    assert run["config"]["plan.memory_gib"] == "inf"
    assert run["evaluation"]["step"] == 7 and run["evaluation"]["results"][0]["after"]["value"] == 0.75
