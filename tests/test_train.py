"""The whole loop on Desk with the embedded policy: what a run leaves behind, and that one in two processes with a kill
between writes the same.
"""

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
from hintsd_jax.errors import UserError
from hintsd_jax.runs.alarms import NOT_FINITE, Alarm
from hintsd_jax.runs.metrics import read_metrics
from tests.chat_server import serving

OPTIMIZED = True  # real rollouts: see conftest.py
REPO = Path(__file__).parents[1]
CONFIG = """
from hintsd_jax.configs import desk_smoke

def get_config():
    config = desk_smoke.get_config()
    config.env.data_dir = {data!r}
    config.tasks.tasks_per_step, config.tasks.rollouts, config.rollout.slots = 3, 2, 6
    config.eval.every, config.eval.tasks, config.eval.rollouts, config.eval.test_tasks = 2, 3, 2, 4
    config.optim.steps, config.checkpoint.every = 4, 1
    return config
"""
KEYS = [
    "rollout/success",
    "rollout/tokens",
    "rollout/steps",
    "hindsight/failed_episodes",
    "hindsight/readable_answers",
    "hindsight/targets",
    "hindsight/mean_target_step",
    "train/loss",
    "train/tokens",
    "train/entropy",
    "train/grad_norm",
    "time/rollout",
    "time/analysis",
    "time/update",
    "time/step",
    "compile/count",
    "memory/peak_bytes",
]


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
    """A run from beginning to end; others are compared with it. What it printed, and what jax compiled, stands beside
    it.
    """
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
    assert sum(row["hindsight/targets"] for row in rows[1:]) > 0 and sum(row["train/tokens"] for row in rows[1:]) > 0
    stored = json.loads((finished / "config.json").read_text())
    assert stored["config"]["optim"]["steps"] == 4 and stored["versions"]
    held_out = json.loads((finished / "held_out.json").read_text())
    assert np.shape(held_out["before"]["success"]) == np.shape(held_out["after"]["success"]) == (4, 2)
    assert "test Avg@2" in (finished / "result.md").read_text()
    assert list((finished / "tensorboard").iterdir())


def test_the_programs_are_as_many_as_it_said(finished):
    said = re.search(
        r"update 4 x 288 with branches/actions 72/36: (\d+) programs", (finished / "printed.txt").read_text()
    )
    ours = re.compile(r"Compiling jit\((prefill|copy_slots|decode|accumulate|apply)\)")
    assert int(said[1]) == sum(bool(ours.match(line)) for line in json.loads((finished / "compiled.json").read_text()))


def test_nothing_compiles_after_the_start(finished):
    counts = [row["compile/count"] for row in read_metrics(finished / "metrics.jsonl")]
    assert counts[3:] == counts[3:4] * len(counts[3:])


def test_episodes_hold_text_spans_targets_and_no_feedback(finished):
    """Invariant 2 on the real thing: what the analyser and the environment know stands in no episode's tokens."""
    targets = 0
    for step in range(1, 5):
        records = [
            json.loads(line) for line in (finished / "episodes" / f"step_{step:06d}.jsonl").read_text().splitlines()
        ]
        assert len(records) == 6
        for record in records:
            assert len(record["logprobs"]) == sum(s["stop"] - s["start"] for s in record["steps"])
            assert record["success"] == (record["terminated"] and record["reward"] >= 1)
            assert (record["hindsight"] is None) == record["success"]
            seen = " ".join(
                [m["content"] for m in record["prompt_messages"]] + [s["observation"] for s in record["steps"]]
            )
            assert "Use " not in seen and "Call notify" not in seen
            targets += len(record["hindsight"]["targets"]) if record["hindsight"] else 0
            assert [span["step"] for span in record["trained"]] == [
                t["step"] for t in (record["hindsight"] or {"targets": []})["targets"]
            ]
            for span in record["trained"]:
                action = record["steps"][span["step"] - 1]
                lengths = {len(span[name]) for name in ("pieces", "divergence", "teacher_gap", "teacher_best")}
                assert lengths == {action["stop"] - action["start"]} and "".join(span["pieces"]).startswith(
                    action["text"]
                )
                assert min(span["divergence"]) >= 0 and "advantage" not in span
    assert targets == sum(row["hindsight/targets"] for row in read_metrics(finished / "metrics.jsonl")[1:])


def test_a_killed_run_continues_as_if_it_had_not_been(finished, config, config_file, tmp_path):
    """Killed in the middle of an update, the save of the step before still unfinished; benchmarks/resume.py has nine
    moments more.
    """
    command = [
        sys.executable,
        "benchmarks/resume.py",
        "--die=commit",
        "--",
        f"--config={config_file}",
        f"--workdir={tmp_path / 'killed'}",
    ]
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
    assert json.loads((tmp_path / "killed" / "held_out.json").read_text()) == json.loads(
        (finished / "held_out.json").read_text()
    )


def arm(config, path, overrides):
    """One update with these overrides: its row, its records, its table."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({"optim.steps": 1, "eval.every": 0, "eval.test_tasks": 0, **overrides})
    training.train(config, str(path))
    row = read_metrics(path / "metrics.jsonl")[-1]
    records = [json.loads(line) for line in (path / "episodes" / "step_000001.jsonl").read_text().splitlines()]
    return row, records, (path / "result.md").read_text()


MIXED = {"tasks.tasks_per_step": 1, "tasks.rollouts": 6}  # six rollouts of one task, which do not all end alike


def trained(records):
    """(record, span) of all actions that were trained on."""
    return [(record, span) for record in records for span in record["trained"]]


def test_dense_judges_every_step_and_its_advantage_has_the_judges_reward(config, tmp_path):
    row, records, table = arm(config, tmp_path / "dense", {"method": "dense", "hindsight.max_tokens": 64})
    assert (
        row["hindsight/questions"]
        == sum(len(record["steps"]) for record in records)
        == row["rollout/episodes"] * row["rollout/steps"]
    )
    for record in records:
        rewards = record["hindsight"]["rewards"]
        assert len(rewards) == len(record["steps"]) and set(rewards) <= {-1.0, 0.0, 1.0}
        assert [span["step"] for span in record["trained"]] == [n for n, reward in enumerate(rewards, 1) if reward]
    for record, span in trained(records):
        assert set(span["advantage"]) == {record["hindsight"]["rewards"][span["step"] - 1]}
    assert "every step, judged alone" in table


def test_sdpo_trains_whole_episodes_under_one_advice(config, tmp_path):
    row, records, _ = arm(
        config,
        tmp_path / "sdpo",
        {"method": "sdpo", "hindsight.analyser": "initial_policy", "loss.support": "teacher_topk"},
    )
    assert row["train/teacher_scored_tokens"] == row["train/tokens"] > 0 and row["train/divergence"] > 0
    assert sum(bool(record["trained"]) for record in records) == 6 - row.get("train/dropped/no_advice", 0)
    for record in records:
        assert [span["step"] for span in record["trained"]] in ([], list(range(1, len(record["steps"]) + 1)))
    assert row["hindsight/failed_episodes"] >= row["hindsight/questions"]


def test_grpo_and_hint_sd_add_up(config, tmp_path):
    overrides = {"method": "hint_sd+grpo", "hindsight.select": "random", "hindsight.max_targets": 1} | MIXED
    row, records, _ = arm(config, tmp_path / "both", overrides)
    assert (
        0 < row["train/teacher_scored_tokens"] < row["train/tokens"]
        and row["hindsight/questions"] == row["hindsight/failed_episodes"]
    )
    by_task = {}
    for record in records:
        by_task.setdefault(record["task_id"], []).append(record)
    for rollouts in by_task.values():
        mixed = len({record["success"] for record in rollouts}) == 2
        for record in rollouts:
            reinforced = [span for span in record["trained"] if "advantage" in span]
            assert len(reinforced) == (len(record["steps"]) if mixed else 0)
            assert all((span["advantage"][0] > 0) == record["success"] for span in reinforced)


def test_grpo_needs_no_teacher(config, tmp_path):
    row, _, table = arm(config, tmp_path / "grpo", {"method": "grpo"} | MIXED)
    assert row["train/teacher_tokens"] == row["hindsight/questions"] == row["hindsight/privileged"] == 0
    assert row["train/tokens"] > 0 and row["train/clip_fraction"] == 0 and "analyser" not in table


def test_the_environment_with_feedback_at_the_start_is_privileged(config, tmp_path):
    row, _, table = arm(
        config, tmp_path / "env", {"hindsight.analyser": "environment", "hindsight.feedback_position": "start"}
    )
    assert row["hindsight/privileged"] == 1 and row["hindsight/precision"] == 1.0 and row["train/tokens"] > 0
    assert "PRIVILEGED" in table and "feedback at the start" in table


def test_without_a_learning_rate_nothing_changes(config, tmp_path):
    overrides = {
        "hindsight.analyser": "policy",
        "hindsight.select": "oracle",
        "optim.lr": 0.0,
        "loss.mean_of_micro_means": True,
    }
    row, _, table = arm(config, tmp_path / "still", overrides)
    assert row["eval/avg@2"] == read_metrics(tmp_path / "still" / "metrics.jsonl")[0]["eval/avg@2"]
    assert (
        row["hindsight/privileged"] == 1 and "oracle, at most 3 an episode, feedback at the target (PRIVILEGED" in table
    )


def test_an_endpoint_that_babbles_is_counted_and_an_alarm_stops_the_run(config, tmp_path):
    """The same command goes on, and asks the server nothing that it has answered before."""
    path, answers = tmp_path / "asked", iter(range(10**6))

    def script(exchange):
        good = json.dumps({"failures": [{"step": 1, "feedback": "Go on."}]})
        exchange.answer(good if next(answers) % 2 else "no idea")

    with serving(script) as server:
        options = {
            "hindsight.analyser": "endpoint",
            "endpoint.url": server.url,
            "endpoint.model": "m",
            "endpoint.concurrency": 1,
        }
        options |= {"alarms.action": "stop", "alarms.patience": 1, "alarms.min_success": 1.0}
        with pytest.raises(UserError, match=r"stopped at step 1 by alarm min_success \(.*; step 1 is saved"):
            arm(config, path, options)
        first, asked = read_metrics(path / "metrics.jsonl")[-1], len(server.requests)
        assert first["alarm/min_success"] == 1 and first["endpoint/calls"] == asked == first["hindsight/questions"] > 1
        assert first["hindsight/dropped/unparsable"] == (asked + 1) // 2
        assert server.requests[0].body["temperature"] == 0.6 and "Find the steps" in server.requests[0].question
        arm(config, path, options)  # nothing is left to do but the last table
        assert len(server.requests) == asked


def test_what_alarms_do():
    low, broken = Alarm("min_entropy", "low"), Alarm(NOT_FINITE, "nan")
    for action, raised, says, scale in (
        ("note", [low, broken], "", 1.0), ("stop", [low], "min_entropy (low)", 1.0), ("halve_lr", [low], "", 0.5),
        ("halve_lr", [low, broken], "not_finite (nan)", 1.0), ("halve_lr", [], "", 1.0), ("stop", [], "", 1.0),
    ):  # fmt: skip
        counters = {"lr_scale": 1.0}
        assert (training.heed(raised, action, counters), counters["lr_scale"]) == (says, scale)
