"""Every file of examples/ runs as it stands, but for the length of its run, and does what it says."""

import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path

import matplotlib
import pytest

from tests.configs import MIXED, TINY

matplotlib.use("agg")
EXAMPLES = Path(__file__).parents[1] / "examples"
# The shapes of tests/test_train.py: their programs are compiled once for all.
SHORT = TINY | MIXED | {"optim.steps": 1, "eval.every": 0, "eval.tasks": 1, "eval.test_tasks": 0}

FEWER = {key: TINY[key] for key in ("tasks.tasks_per_step", "tasks.rollouts", "rollout.slots")}
FEWER |= {"eval.tasks": 1, "eval.test_tasks": 3}


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Imports an example by its name."""

    def imported(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return imported


def cells(name):
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_all_of_them_are_tested_here():
    found = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
    assert found == ["endpoint_judge.py", "own_environment.ipynb", "own_method.py"]


def test_the_notebook(monkeypatch, capsys, tmp_path):
    """Its cells one after the other, in a module of their own, with fewer steps and tasks."""
    module = types.ModuleType("notebook_of_an_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "\n".join(cells("own_environment.ipynb"))
    shorter = f"config.update_from_flattened_dict({FEWER})\nworkdir ="
    for old, new in (("STEPS = 8", "STEPS = 2"), ("\nworkdir =", f"\n{shorter}")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(compile(code, "own_environment.ipynb", "exec"), vars(module))
    result, scores = module.result, module.scores
    assert result.step == scores.step == 2 and [row["step"] for row in result.metrics] == [0, 1, 2]
    assert result.after == {key: scores.metrics[key] for key in result.after}  # the same weights, tasks and keys
    assert len(scores.success) == 3 and len(scores.episodes()) == 12
    assert len(result.episodes(1)) == 6 and "test Avg@4" in result.table
    with pytest.raises(KeyError, match="step_000003"):
        result.episodes(3)
    assert result.checkpoints.is_dir()
    for axes in module.figure.axes:
        assert axes.get_xlabel() == "training step" and axes.has_data()
    printed = capsys.readouterr().out
    assert "test/avg@4: " in printed and "log-probability -" in printed and "episodes were looked back on" in printed


def test_a_method_and_a_judge_of_ones_own(example, monkeypatch, tmp_path, capsys):
    """In one run. The judge's rules are right where they say anything: the environment names these steps too."""
    judge, method = example("endpoint_judge"), example("own_method")
    result = judge.main(str(tmp_path / "run"), SHORT | {"algorithm": "own_method:WhereASiblingSucceeded"})
    said, row = capsys.readouterr().out, result.metrics[1]
    assert row["endpoint/calls"] == row["hindsight/questions"] > 0 and result.before == result.after == {}
    solved = {record["task_id"] for record in result.episodes(1) if record["success"]}
    targets = 0
    for record in result.episodes(1):
        assert (record["hindsight"] is not None) == (not record["success"] and record["task_id"] in solved)
        faults = {fault["step"] for fault in record["report"]["faults"] or ()}
        for target in (record["hindsight"] or {"targets": []})["targets"]:
            targets += 1
            assert target["step"] in faults and f"step {target['step']}: {target['feedback']}" in said
    assert targets == row["hindsight/targets"] > 0
    asked = []
    monkeypatch.setattr(method, "train", lambda config, workdir: asked.append(config) or result)
    assert method.main("run", {"optim.lr": 0.5}) is result
    assert (asked[0].algorithm, asked[0].optim.lr) == ("own_method:WhereASiblingSucceeded", 0.5)
    line = f"step 1: looked back on {row['hindsight/questions']} episodes, trained on {row['train/tokens']:g} tokens"
    assert line in capsys.readouterr().out
