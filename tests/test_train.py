"""The whole loop on Desk with the embedded policy: what a run leaves behind, and that one in two processes with a kill between writes the same."""

import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hintsd_jax import train as training
from hintsd_jax.runs.metrics import read_metrics

OPTIMIZED = True  # real rollouts: see conftest.py
REPO = Path(__file__).parents[1]
CONFIG = '''
from configs import desk_smoke

def get_config():
    config = desk_smoke.get_config()
    config.env.data_dir = {data!r}
    config.tasks.tasks_per_step, config.tasks.rollouts, config.rollout.slots = 3, 2, 6
    config.eval.every, config.eval.tasks, config.eval.rollouts, config.eval.test_tasks = 2, 3, 2, 4
    config.optim.steps, config.checkpoint.every = 4, 1
    return config
'''
KEYS = """rollout/success rollout/tokens rollout/turns hindsight/failed hindsight/parsed hindsight/targets hindsight/target_step_mean
    distill/loss distill/tokens distill/entropy distill/grad_norm time/rollout time/hindsight time/distill time/step
    compile/count memory/peak_bytes""".split()


def comparable(path):
    """Rows without what the clock, the memory and the compiler say."""
    skipped = ("time/", "memory/", "compile/")
    return [{k: v for k, v in row.items() if not k.startswith(skipped)} for row in read_metrics(path / "metrics.jsonl")]


def weights(path):
    """Every array of the last checkpoint, as bytes."""
    step = max(int(folder.name) for folder in (path / "checkpoints").iterdir() if folder.name.isdigit())
    state = ocp.StandardCheckpointer().restore(path / "checkpoints" / str(step) / "state")
    return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "tiny.py").write_text(CONFIG.format(data=str(folder / "data")))
    return folder / "tiny.py"


@pytest.fixture(scope="module")
def config(config_file):
    namespace = {}
    exec(config_file.read_text(), namespace)
    return namespace["get_config"]()


@pytest.fixture(scope="module", autouse=True)
def in_the_repository():
    before = os.getcwd()
    os.chdir(REPO)  # configs name the policy by a relative path
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run from beginning to end; others are compared with it. What it printed, and what jax compiled, stands beside it."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    compiled, printed = [], io.StringIO()
    listener = logging.Handler()
    listener.emit = lambda record: compiled.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(listener)
    jax.clear_caches()  # of this process: another file may have had the same programs
    with jax.log_compiles(), contextlib.redirect_stderr(printed):
        training.train(config, str(path))
    logger.removeHandler(listener)
    (path / "compiled.json").write_text(json.dumps(compiled))
    (path / "printed.txt").write_text(printed.getvalue())
    return path


def test_a_run_leaves_its_record(finished, config):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(key in row for row in rows[1:] for key in KEYS)
    assert [row["step"] for row in rows if "eval/avg@2" in row] == [0, 2, 4]
    assert any("hindsight/precision" in row and "hindsight/recall" in row for row in rows[1:])
    assert sum(row["hindsight/targets"] for row in rows[1:]) > 0 and sum(row["distill/tokens"] for row in rows[1:]) > 0
    stored = json.loads((finished / "config.json").read_text())
    assert stored["config"]["optim"]["steps"] == 4 and stored["versions"]
    held_out = json.loads((finished / "held_out.json").read_text())
    assert np.shape(held_out["before"]["success"]) == np.shape(held_out["after"]["success"]) == (4, 2)
    assert "test Avg@2" in (finished / "result.md").read_text()
    assert list((finished / "tensorboard").iterdir())


def test_the_programs_are_as_many_as_it_said(finished):
    said = re.search(r"update 4 x 288 with branches/actions 72/36: (\d+) programs", (finished / "printed.txt").read_text())
    ours = re.compile(r"Compiling jit\((prefill|copy_slots|decode|accumulate|apply)\)")
    assert int(said[1]) == sum(bool(ours.match(line)) for line in json.loads((finished / "compiled.json").read_text()))


def test_nothing_compiles_after_the_start(finished):
    counts = [row["compile/count"] for row in read_metrics(finished / "metrics.jsonl")]
    assert counts[3:] == counts[3:4] * len(counts[3:])


def test_episodes_hold_text_spans_targets_and_no_feedback(finished):
    """Invariant 2 on the real thing: what the analyser and the environment know stands in no episode's tokens."""
    targets = 0
    for step in range(1, 5):
        records = [json.loads(line) for line in (finished / "episodes" / f"step_{step:06d}.jsonl").read_text().splitlines()]
        assert len(records) == 6
        for record in records:
            assert len(record["logprobs"]) == sum(s["stop"] - s["start"] for s in record["steps"])
            assert record["success"] == (record["terminated"] and record["reward"] >= 1)
            assert (record["hindsight"] is None) == record["success"]
            seen = " ".join([m["content"] for m in record["prompt_messages"]] + [s["observation"] for s in record["steps"]])
            assert "Use " not in seen and "Call notify" not in seen
            targets += len(record["hindsight"]["targets"]) if record["hindsight"] else 0
    assert targets == sum(row["hindsight/targets"] for row in read_metrics(finished / "metrics.jsonl")[1:])


def test_a_killed_run_continues_as_if_it_had_not_been(finished, config, config_file, tmp_path):
    """Killed in the middle of an update, the save of the step before still unfinished; benchmarks/resume.py has nine moments more."""
    command = [sys.executable, "benchmarks/resume.py", "--die=commit", "--", f"--config={config_file}", f"--workdir={tmp_path / 'killed'}"]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    first = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert first.returncode == -signal.SIGKILL, first.stderr
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert "1" in left and any("tmp" in name for name in left) and "4" not in left
    training.train(config, str(tmp_path / "killed"))
    assert comparable(tmp_path / "killed") == comparable(finished)
    assert weights(tmp_path / "killed") == weights(finished)
    for file in (finished / "episodes").iterdir():
        assert (tmp_path / "killed" / "episodes" / file.name).read_bytes() == file.read_bytes()
    assert not (finished / "journal").exists() and not (tmp_path / "killed" / "journal").exists()  # nothing timed out
    assert json.loads((tmp_path / "killed" / "held_out.json").read_text()) == json.loads((finished / "held_out.json").read_text())


@pytest.mark.parametrize(
    "overrides",
    [
        {"method": "sharpen"},
        {"hindsight.select": "random", "hindsight.max_targets": 1},
        {"hindsight.analyser": "environment"},
        {"hindsight.analyser": "policy_initial", "distill.divergence": "jsd", "distill.support": "teacher_topk"},
        {"hindsight.analyser": "policy", "optim.lr": 0.0, "distill.mean_of_micro_means": True},
    ],
)
def test_every_arm_runs(config, tmp_path, overrides):
    arm = config.copy_and_resolve_references()
    arm.update_from_flattened_dict({"optim.steps": 1, "eval.every": 0, "eval.test_tasks": 0, **overrides})
    training.train(arm, str(tmp_path / "arm"))
    rows = read_metrics(tmp_path / "arm" / "metrics.jsonl")
    assert rows[1]["hindsight/privileged"] == (overrides.get("hindsight.analyser") == "environment")
    if overrides.get("hindsight.analyser") == "environment":
        assert rows[1]["hindsight/precision"] == 1.0 and rows[1]["distill/tokens"] > 0
        assert "PRIVILEGED" in (tmp_path / "arm" / "result.md").read_text()
    if overrides.get("method") == "sharpen":
        assert rows[1]["distill/tokens"] > 0 and rows[1]["hindsight/failed"] == 0
    if overrides.get("optim.lr") == 0.0:
        assert rows[0]["eval/avg@2"] == rows[1]["eval/avg@2"]
