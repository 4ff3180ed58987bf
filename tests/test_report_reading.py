"""Run folders in every state: whole, running, torn, foreign."""

import json

import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.runs.metrics import read_metrics
from hintsd_jax.tools.report.reading import count_lines, open_runs, read_run
from tests.report_helpers import CONFIG, record, write_run


def test_a_whole_run(tmp_path):
    held_out = {"before": None, "after": {"metrics": {}, "success": [[1]], "greedy": []}}
    path = write_run(tmp_path / "r", {2: [record()], 1: [record()]}, held_out=held_out)
    (path / "episodes" / "eval_000001.jsonl").write_text("{}\n")  # of another kind
    run = read_run(path, "r")
    assert run.rows == read_metrics(path / "metrics.jsonl")
    assert run.config["hindsight.max_targets"] == 3 and run.config["env.options"] == {}
    assert [(file.kind, file.step) for file in run.episodes] == [("training", 1), ("training", 2)]
    assert run.held_out == held_out and run.evaluation is None
    assert (run.steps, run.planned) == (2, 4)


def test_held_out_episodes_stand_where_they_were_played_and_evaluations_where_nothing_else_was(tmp_path):
    path = write_run(tmp_path / "r", {2: [record()], 10: [record()]})
    for name in ("after_000002", "after_000010", "before_000000", "evaluation_000010"):
        (path / "episodes" / f"{name}.jsonl").write_text(json.dumps(record()) + "\n")
    files = read_run(path, "r").episodes
    assert [(file.kind, file.step) for file in files] == [
        ("before", 0),
        ("training", 2),
        ("training", 10),
        ("after", 10),
    ]
    only = write_run(tmp_path / "e")
    (only / "episodes").mkdir()
    (only / "episodes" / "evaluation_000000.jsonl").write_text("")
    assert [(file.kind, file.step) for file in read_run(only, "e").episodes] == [("evaluation", 0)]


def test_when_a_run_is_finished_and_whether_it_has_written_more(tmp_path):
    config = CONFIG | {"eval": {"test_tasks": 2}}
    path = write_run(tmp_path / "r", rows=[{"step": 3}], config=config)
    states = []

    def finished():
        states.append(read_run(path, "r").state())
        return read_run(path, "r").is_finished

    assert not finished()
    (path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n')
    assert not finished()  # the held-out tasks are still to come
    (path / "held_out.json").write_text('{"before": null, "after": {"success": [[1]]}}')
    assert finished() and finished()
    assert states[0] != states[1] != states[2] == states[3]
    assert read_run(write_run(tmp_path / "n", rows=[{"step": 4}]), "n").is_finished  # nothing is to be played
    assert not read_run(write_run(tmp_path / "b"), "b").is_finished


def test_a_run_that_has_just_begun(tmp_path):
    run = read_run(write_run(tmp_path / "r"), "r")
    assert (run.rows, run.episodes, run.held_out, run.steps) == ([], [], None, 0)


def test_a_torn_last_line_is_left_out_and_any_other_is_named(tmp_path):
    path = write_run(tmp_path / "r")
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "x": 1')
    assert read_run(path, "r").rows == [{"step": 1}, {"step": 2}]
    assert count_lines(path / "metrics.jsonl") == 2
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not a metrics row"):
        read_run(path, "r")


@pytest.mark.parametrize("text", ["[]", "{", '{"config": 3}', '{"other": {}}'])
def test_a_foreign_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_run(tmp_path, "r")


def test_a_row_without_a_step_is_refused(tmp_path):
    path = write_run(tmp_path / "r", rows=[{"step": 1}, {"x": 2}])
    with pytest.raises(UserError, match="line 2 is not a metrics row"):
        read_run(path, "r")


def test_runs_have_the_shortest_names_that_tell_them_apart(tmp_path):
    paths = [write_run(tmp_path / name) for name in ("a/desk", "b/desk", "b/bfcl")]
    assert [run.name for run in open_runs(paths)] == ["a/desk", "b/desk", "b/bfcl"]
    assert [run.name for run in open_runs(paths[1:])] == ["desk", "bfcl"]


def test_rows_with_nan_written_as_null(tmp_path):
    path = write_run(tmp_path / "r", rows=[{"step": 1, "train/loss": None}])
    assert read_run(path, "r").rows[0]["train/loss"] is None
    assert json.loads((path / "metrics.jsonl").read_text())["train/loss"] is None
