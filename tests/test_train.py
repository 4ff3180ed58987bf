"""The whole loop on Desk with the embedded policy: what a run leaves behind, and that one in two processes with a kill
between writes the same.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.parse import parse_failures
from hintsd_jax.hindsight.prompts import Judgement, Worded, shipped
from hintsd_jax.models.finite import non_finite
from hintsd_jax.recorder import Recorder
from hintsd_jax.runs import interruption
from hintsd_jax.runs.metrics import read_metrics
from hintsd_jax.train import train
from hintsd_jax.training.batching import make_batches
from tests.chat_server import serving
from tests.configs import MIXED, TINY, tiny_config

LONG = True  # see conftest.py
REPO = Path(__file__).parents[1]


def comparable(path):
    """Rows without what the clock, the memory and the compiler say."""
    skipped = ("time/", "memory/", "compile/")
    return [{k: v for k, v in row.items() if not k.startswith(skipped)} for row in read_metrics(path / "metrics.jsonl")]


def weights(path):
    """Every array of the last checkpoint, as bytes."""
    step = max(int(folder.name) for folder in (path / "checkpoints").iterdir() if folder.name.isdigit())
    state = ocp.StandardCheckpointer().restore(path / "checkpoints" / str(step) / "state")
    return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def read_episodes(path, step):
    return [json.loads(line) for line in (path / "episodes" / f"step_{step:06d}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
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
        train(tiny_config(data_dir), str(path))
    logger.removeHandler(listener)
    (path / "compiled.json").write_text(json.dumps(compiled))
    (path / "printed.txt").write_text(printed.getvalue())
    return path


def test_a_run_leaves_its_record(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/avg@2" in row] == [0, 2, 4]
    assert any("hindsight/precision" in row and "hindsight/recall" in row for row in rows[1:])
    assert sum(row["hindsight/targets"] for row in rows[1:]) > 0 and sum(row["train/tokens"] for row in rows[1:]) > 0
    stored = json.loads((finished / "config.json").read_text())
    assert stored["config"]["optim"]["steps"] == 4 and stored["versions"]
    held_out = json.loads((finished / "held_out.json").read_text())
    assert np.shape(held_out["before"]["success"]) == np.shape(held_out["after"]["success"]) == (4, 2)
    result = (finished / "result.md").read_text()
    targets, share, checked = re.search(r"hindsight: (\d+) steps named; (\d+) % of the (\d+) that can", result).groups()
    assert "test Avg@2" in result and int(targets) == sum(row["hindsight/targets"] for row in rows[1:])
    known = [row for row in rows if row.get("hindsight/checked_targets")]
    assert 0 < int(checked) == sum(row["hindsight/checked_targets"] for row in known) <= int(targets)
    hits = sum(row["hindsight/precision"] * row["hindsight/checked_targets"] for row in known)
    assert int(share) == round(100 * hits / int(checked))
    assert list((finished / "tensorboard").iterdir())


def glossary_patterns():
    """The metric names of docs/metrics.md; a <word> stands for one of its own."""
    names = re.findall(r"`([a-z@<>_]+/[a-z@<>_/]+)`", (REPO / "docs" / "metrics.md").read_text())
    return [
        re.compile(re.sub(r"<\w+>", r"[\\w ]+", re.escape(name).replace(r"\<", "<").replace(r"\>", ">")))
        for name in names
    ]


def test_every_metric_is_explained(finished, arms):
    rows = [row for path in (finished, *arms.values()) for row in read_metrics(path / "metrics.jsonl")]
    held_out = json.loads((finished / "held_out.json").read_text())["after"]["metrics"]
    written = {name for row in (*rows, held_out) for name in row} - {"step"}
    patterns = glossary_patterns()
    assert len(written) > 50
    assert [name for name in sorted(written) if not any(pattern.fullmatch(name) for pattern in patterns)] == []


def test_what_it_says_while_it_runs(finished):
    """As many programs as it said, in plain words; then one line a step."""
    printed = (finished / "printed.txt").read_text()
    said = re.search(r"Compiling (\d+) programs first", printed)
    ours = re.compile(r"Compiling jit\((prefill|copy_slots|decode|accumulate|apply)\)")
    assert int(said[1]) == sum(bool(ours.match(line)) for line in json.loads((finished / "compiled.json").read_text()))
    lines = [line for line in printed.splitlines() if re.match(r"step \d of 4: ", line)]
    assert len(lines) == 4 and all(re.search(r", \d+:\d\d left$", line) for line in lines)
    for line, row in zip(lines, read_metrics(finished / "metrics.jsonl")[1:], strict=True):
        assert f"success {100 * row['rollout/success']:.1f} %" in line
        assert f"{row['hindsight/targets']} target" in line and (" named" in line)
    assert "prefill" not in printed and "mesh" not in printed


def test_nothing_compiles_after_the_start(finished):
    counts = [row["compile/count"] for row in read_metrics(finished / "metrics.jsonl")]
    assert set(counts) == {counts[0]}  # the row of step 0 is written before the first step


def test_held_out_episodes_are_kept_as_they_were_scored(finished):
    results = json.loads((finished / "held_out.json").read_text())
    for kind, step in (("before", 0), ("after", 4)):
        lines = (finished / "episodes" / f"{kind}_{step:06d}.jsonl").read_text().splitlines()
        episodes = {(each["group"], each["rollout"]): each for each in map(json.loads, lines)}
        assert len(episodes) == len(lines)
        scored = {(n, k): bool(s) for n, row in enumerate(results[kind]["success"]) for k, s in enumerate(row)}
        assert {place: each["success"] for place, each in episodes.items()} == scored
        assert all(each["hindsight"] is None and each["trained"] == [] for each in episodes.values())


def test_episodes_hold_text_spans_targets_and_no_feedback(finished):
    """Invariant 2 on the real thing: what the analyser and the environment know stands in no episode's tokens."""
    targets = 0
    for step in range(1, 5):
        episodes = read_episodes(finished, step)
        assert len(episodes) == 6
        for episode in episodes:
            assert len(episode["logprobs"]) == sum(s["stop"] - s["start"] for s in episode["steps"])
            assert episode["success"] == (episode["terminated"] and episode["reward"] >= 1)
            assert (episode["hindsight"] is None) == episode["success"]
            texts = [m["content"] for m in episode["prompt_messages"]] + [s["observation"] for s in episode["steps"]]
            assert "Use " not in " ".join(texts) and "Call notify" not in " ".join(texts)
            named = (episode["hindsight"] or {"targets": []})["targets"]
            targets += len(named)
            assert [span["step"] for span in episode["trained"]] == [target["step"] for target in named]
            for span in episode["trained"]:
                action = episode["steps"][span["step"] - 1]
                lengths = {len(span[name]) for name in ("pieces", "divergence", "teacher_gap", "teacher_best")}
                assert lengths == {action["stop"] - action["start"]}
                assert "".join(span["pieces"]).startswith(action["text"])
                assert min(span["divergence"]) >= 0 and "advantage" not in span
    assert targets == sum(row["hindsight/targets"] for row in read_metrics(finished / "metrics.jsonl")[1:])


def test_a_killed_run_continues_as_if_it_had_not_been(finished, data_dir, tmp_path):
    """Killed in the middle of an update, the save of the step before still unfinished; benchmarks/resume.py has nine
    moments more.
    """
    settings = {**TINY, "env.data_dir": data_dir}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "benchmarks/resume.py", "--die=commit", "--", "--config=desk_smoke", *flags]
    command.append(f"--workdir={tmp_path / 'killed'}")
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    first = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert first.returncode == -signal.SIGKILL, first.stderr
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert "1" in left and any("tmp" in name for name in left) and "4" not in left
    # As the process before resolved it from the repository.
    train(tiny_config(data_dir, {"policy.path": stored_policy_path(tmp_path / "killed")}), str(tmp_path / "killed"))
    assert comparable(tmp_path / "killed") == comparable(finished)
    assert weights(tmp_path / "killed") == weights(finished)
    for file in (finished / "episodes").iterdir():
        assert (tmp_path / "killed" / "episodes" / file.name).read_bytes() == file.read_bytes()
    assert not (finished / "journal").exists() and not (tmp_path / "killed" / "journal").exists()  # nothing timed out
    held_out = [json.loads((path / "held_out.json").read_text()) for path in (tmp_path / "killed", finished)]
    assert held_out[0] == held_out[1]


def test_two_processes_end_as_one_and_one_continues_what_two_began(finished, data_dir, tmp_path):
    """The same episodes, targets and counts, and numbers that differ by rounding. Each process plays a half, and they
    leave no more behind than one.
    """
    path = tmp_path / "two"
    flags = [f"--config.{key}={value}" for key, value in {**TINY, "env.data_dir": data_dir}.items()]
    launcher = [f"--python={sys.executable}", "--processes=2", "--devices=1", "--restarts=0", "--"]
    command = ["launch/local.sh", *launcher, "train", "--config=desk_smoke", f"--workdir={path}", *flags]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 2 processes (mesh data" in done.stderr and done.stderr.count("step 1 of 4: ") == 1
    assert_alike(finished, path)
    left = {file.name for file in path.iterdir()}
    assert left == {file.name for file in finished.iterdir()} - {"compiled.json", "printed.txt"}

    for step in (3, 4):
        shutil.rmtree(path / "checkpoints" / str(step))
    train(tiny_config(data_dir, {"policy.path": stored_policy_path(path)}), str(path))
    assert_alike(finished, path)


def assert_alike(one, other):
    """Two runs of the same config: equal but for rounding, and for what the work took on other devices."""
    costs = {"rollout/decode_steps", "rollout/prefill_tokens", "rollout/copied_tokens", "train/padding_fraction"}
    costs |= {"train/student_tokens", "train/teacher_tokens"}
    for a, b in zip(comparable(one), comparable(other), strict=True):
        assert a.keys() == b.keys()
        apart = [key for key in a.keys() - costs if b[key] != pytest.approx(a[key], rel=1e-3, abs=1e-5)]
        assert not apart, {key: (a[key], b[key]) for key in apart}
    for step in range(1, 5):
        for a, b in zip(read_episodes(one, step), read_episodes(other, step), strict=True):
            assert [each["text"] for each in a["steps"]] == [each["text"] for each in b["steps"]]
            assert (a["hindsight"] or {}).get("targets") == (b["hindsight"] or {}).get("targets")


def interrupt_at(monkeypatch, function, nth):
    """Sends SIGTERM to this process when `function` ("module.name") is called for the nth time."""
    module, _, name = function.rpartition(":")
    owner = importlib.import_module(module)
    *classes, name = name.split(".")
    for each in classes:
        owner = getattr(owner, each)
    original, calls = getattr(owner, name), []

    def called(*args, **options):
        calls.append(0)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, called)


# Where SIGTERM comes, and the step that is saved then: of TINY with checkpoints at the end only.
INTERRUPTIONS = {
    "while programs compile": ("hintsd_jax.train:blank_batch", 1, None),
    "in the analysis": ("hintsd_jax.hindsight.analyser:ModelAnalyser.review", 1, 0),
    "in the update, which is finished": ("hintsd_jax.train:update", 2, 1),
    "in an evaluation, which is finished": ("hintsd_jax.train:validation", 1, 2),
    "in the evaluation after the last step": ("hintsd_jax.train:held_out_test", 1, 4),
}


def test_an_interrupted_run_continues_as_if_it_had_not_been(finished, data_dir, tmp_path, monkeypatch, capfd):
    config = tiny_config(data_dir, {"checkpoint.every": 100})
    for where, (function, nth, saved) in INTERRUPTIONS.items():
        with monkeypatch.context() as patch, interruption.handled():
            interrupt_at(patch, function, nth)
            with pytest.raises(interruption.Interrupted, match="SIGTERM"):
                train(config, str(tmp_path))
        said = "nothing is saved yet" if saved is None else f"step {saved} is saved"
        assert said in capfd.readouterr().err.splitlines()[-2:], where  # another thread says that it was asked to stop
    train(config, str(tmp_path))
    assert comparable(tmp_path) == comparable(finished)
    assert weights(tmp_path) == weights(finished)
    for file in (finished / "episodes").iterdir():
        assert (tmp_path / "episodes" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "held_out.json").read_bytes() == (finished / "held_out.json").read_bytes()


def stored_policy_path(workdir):
    return json.loads((workdir / "config.json").read_text())["config"]["policy"]["path"]


class Spoiler:
    """Makes batches as they are, but with a sampler's log-probability that is not a number in some steps."""

    def __init__(self, monkeypatch, *steps):
        self.steps, self.made, self.make = steps, 0, make_batches
        monkeypatch.setattr("hintsd_jax.train.make_batches", self)

    def __call__(self, *arguments, **options):
        result, self.made = self.make(*arguments, **options), self.made + 1
        if self.made in self.steps:
            batch = result.batches[-1]
            spoiled = np.where(batch.mask_BA, np.nan, batch.sampler_logprob_BA).astype(np.float32)
            result.batches[-1] = batch._replace(sampler_logprob_BA=spoiled)
        return result


SHORT = {"eval.every": 0, "eval.test_tasks": 0, "eval.tasks": 1, "checkpoint.every": 1}


def test_numbers_that_are_not_finite_are_counted_kept_and_end_the_run_after_some(
    data_dir, tmp_path, monkeypatch, capsys
):
    """The weights are not touched, and the same command goes on."""
    spoiler = Spoiler(monkeypatch, 2, 3)
    config = tiny_config(data_dir, {"optim.steps": 4, "optim.max_nonfinite": 2, **SHORT})
    says = r"stopped at step 3 after 2 updates in a row with numbers that are not finite \(.*; step 3 is saved\. Lower"
    with pytest.raises(UserError, match=says):
        train(config, str(tmp_path))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row.get("train/nonfinite") for row in rows] == [None, 0, 1, 1]
    assert rows[2]["train/skipped"] == rows[2]["alarm/not_finite"] == 1 and rows[2]["train/logprob_mismatch"] is None
    assert rows[2]["metrics/nonfinite"] >= 1 and rows[2]["train/lr"] == 0 and rows[1]["train/skipped"] == 0
    said = capsys.readouterr().err
    assert "update skipped: a number was not finite" in said and "step 2: ALARM not_finite: " in said
    with np.load(tmp_path / "nonfinite" / "step_000002.npz") as file:
        (name,) = [name for name in file if name.endswith("sampler_logprob_BA")]
        assert np.isnan(file[name]).any() and np.isnan(file["metrics/logprob_mismatch"])
    spoiler.steps = ()
    train(config, str(tmp_path))
    assert "continuing from step 3 of 4" in capsys.readouterr().err
    assert [row.get("train/nonfinite") for row in read_metrics(tmp_path / "metrics.jsonl")] == [None, 0, 1, 1, 0]
    state = ocp.StandardCheckpointer().restore(tmp_path / "checkpoints" / "4" / "state")
    assert int(state["step"]) == 2 and not non_finite(state)
    assert len(list((tmp_path / "nonfinite").iterdir())) == 2


def test_weights_that_break_are_never_saved(data_dir, tmp_path, monkeypatch):
    """A learning rate that no weight survives: the run ends at once, and the checkpoint before it stays the newest."""
    rates = {0: 1.0, 1: np.inf}
    monkeypatch.setattr(Recorder, "lr_scale", property(lambda recorder: rates[recorder.completed_steps]))
    with pytest.raises(
        UserError, match=r"stopped at step 2 after 1 update .*made weights.* finite .*; step 1 is saved"
    ):
        train(tiny_config(data_dir, {"optim.steps": 2, **SHORT}), str(tmp_path))
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (row["train/nonfinite"], row["train/skipped"]) == (1, 0) and "eval/avg@2" not in row
    saved = [folder.name for folder in (tmp_path / "checkpoints").iterdir() if folder.name.isdigit()]
    assert str(row["step"]) not in saved


class OneQuestion(Worded):
    """A judge that is asked one question, in a review's form: to `compact`'s two the committed policy says -1 of
    refused calls alone.
    """

    def __init__(self):
        super().__init__(shipped("compact").wording)

    def judge(self, step):
        shown = f"Steps:\n#1 {step.text}\n> {step.observation}\n"
        words = self.wording.words
        asked = f"{words['ask_review']}{words['only_first']}\nIf it is ok, the list is empty."
        return {"verdict and hint": [{"role": "user", "content": shown + asked}]}

    def read_judgement(self, question, answer):
        parsed = parse_failures(answer, 1, 1)
        if parsed.problem:
            return Judgement(problem=parsed.problem)
        return Judgement(-1.0, parsed.targets[0].feedback) if parsed.targets else Judgement(1.0)


ARMS = {
    "openclaw_rl": {"algorithm": "openclaw_rl", "hindsight.prompts": f"{__name__}:OneQuestion"},
    "sdpo": {"algorithm": "sdpo", "hindsight.analyser": "initial_policy", "loss.support": "teacher_topk"},
    "hint_sd+grpo": {
        "algorithm": "hint_sd+grpo",
        "hindsight.select": "random",
        "hindsight.max_targets": 1,
        "hindsight.analyser": "student",
        **MIXED,
    },
    "grpo": {
        "algorithm": "grpo",
        "rollout.top_p": 0.9,
        "rollout.top_k": 5,
        "grpo.mean": "sequence",
        "grpo.reference_kl": 0.1,
        **MIXED,
    },
    "rejection_sampling": {"algorithm": "rejection_sampling", **MIXED},
    # the environment's report, read at the start, with a learning rate of 0
    "privileged": {
        "hindsight.analyser": "environment",
        "hindsight.feedback_position": "start",
        "optim.lr": 0.0,
        "loss.mean_of_micro_means": True,
    },
}


@pytest.fixture(scope="module")
def arms(data_dir, tmp_path_factory):
    """One update of each algorithm, by its name: the workdir."""
    root = tmp_path_factory.mktemp("arms")
    for name, overrides in ARMS.items():
        one_update = {"optim.steps": 1, "eval.every": 0, "eval.tasks": 1, "eval.test_tasks": 0, **overrides}
        train(tiny_config(data_dir, one_update), str(root / name))
    return {name: root / name for name in ARMS}


def results(path):
    """The row, the episodes and the table of a run of one update."""
    return read_metrics(path / "metrics.jsonl")[-1], read_episodes(path, 1), (path / "result.md").read_text()


def test_openclaw_rl_judges_every_step_and_its_advantage_has_the_verdict(arms):
    row, episodes, table = results(arms["openclaw_rl"])
    steps = sum(len(episode["steps"]) for episode in episodes)
    assert row["hindsight/questions"] == steps == row["rollout/episodes"] * row["rollout/steps"]
    for episode in episodes:
        verdicts = episode["hindsight"]["verdicts"]
        assert len(verdicts) == len(episode["steps"]) and set(verdicts) <= {-1.0, 0.0, 1.0}
        assert [span["step"] for span in episode["trained"]] == [n for n, verdict in enumerate(verdicts, 1) if verdict]
        for span in episode["trained"]:
            assert set(span["advantage"]) == {verdicts[span["step"] - 1]}
    assert "every step, judged alone" in table and "train/divergence" not in row


def test_sdpo_trains_whole_episodes_under_one_message(arms):
    row, episodes, _ = results(arms["sdpo"])
    assert row["train/teacher_scored_tokens"] == row["train/tokens"] > 0 and row["train/divergence"] > 0
    assert sum(bool(episode["trained"]) for episode in episodes) == 6 - row.get("train/dropped/no_feedback", 0)
    for episode in episodes:
        assert [span["step"] for span in episode["trained"]] in ([], list(range(1, len(episode["steps"]) + 1)))
    assert row["hindsight/failed_episodes"] >= row["hindsight/questions"]


def test_grpo_and_hint_sd_add_up(arms):
    row, episodes, _ = results(arms["hint_sd+grpo"])
    assert 0 < row["train/teacher_scored_tokens"] < row["train/tokens"]
    assert row["hindsight/questions"] == row["hindsight/failed_episodes"]
    assert len({episode["success"] for episode in episodes}) == 2
    for episode in episodes:
        reinforced = [span for span in episode["trained"] if "advantage" in span]
        assert len(reinforced) == len(episode["steps"])
        assert all((span["advantage"][0] > 0) == episode["success"] for span in reinforced)


def test_what_learns_from_outcomes_alone_needs_no_teacher(arms):
    for name in ("grpo", "rejection_sampling"):
        row, episodes, table = results(arms[name])
        assert row["train/teacher_tokens"] == row["hindsight/questions"] == row["hindsight/privileged"] == 0
        assert row["train/tokens"] > 0 and "analyser" not in table
        trained = {bool(episode["trained"]) for episode in episodes if not episode["success"]}
        assert trained == {name == "grpo"}
    row, _, _ = results(arms["grpo"])
    # Fresh rollouts: the ratio is 1, also with temperature, top-p and top-k; the policy is still its own reference.
    assert row["train/clip_fraction"] == 0 and row["train/logprob_mismatch_max"] < 1e-4
    assert abs(row["train/reference_kl"]) < 1e-6 and row["train/reference_kl_tokens"] == row["train/tokens"]


def test_the_environments_report_is_privileged_and_without_a_learning_rate_nothing_changes(arms):
    row, _, table = results(arms["privileged"])
    assert row["hindsight/privileged"] == 1 and row["hindsight/precision"] == 1.0 and row["train/tokens"] > 0
    assert "PRIVILEGED" in table and "feedback at the start" in table
    assert row["eval/avg@2"] == read_metrics(arms["privileged"] / "metrics.jsonl")[0]["eval/avg@2"]


def test_an_endpoint_that_babbles_is_counted_and_an_alarm_stops_the_run(data_dir, tmp_path):
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
            "alarms.action": "stop",
            "alarms.patience": 1,
            "alarms.min_success": 1.0,
        }
        config = tiny_config(data_dir, {"optim.steps": 1, "eval.every": 0, "eval.test_tasks": 0, **options})
        with pytest.raises(UserError, match=r"stopped at step 1 by alarm min_success \(.*; step 1 is saved"):
            train(config, str(path))
        first, asked = read_metrics(path / "metrics.jsonl")[-1], len(server.requests)
        assert first["alarm/min_success"] == 1 and first["endpoint/calls"] == asked == first["hindsight/questions"] > 1
        assert first["hindsight/dropped/unparsable"] == (asked + 1) // 2
        assert server.requests[0].body["temperature"] == 0.6 and "Find the steps" in server.requests[0].question
        train(config, str(path))  # nothing is left to do but the last table
        assert len(server.requests) == asked


def test_a_finished_run_says_its_last_table_again_at_once(finished, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hintsd_jax.train.compile_programs", None)
    copy = shutil.copytree(finished, tmp_path / "copy")
    result = train(tiny_config(data_dir, {"policy.path": stored_policy_path(copy)}), str(copy))
    said = json.loads((finished / "held_out.json").read_text())
    assert (result.step, result.before, result.after) == (4, said["before"]["metrics"], said["after"]["metrics"])
    assert (copy / "held_out.json").read_bytes() == (finished / "held_out.json").read_bytes()
    assert (copy / "result.md").read_text() == (finished / "result.md").read_text()
    assert "test Avg@2" in capsys.readouterr().out
    for after in ("x", {"metrics": 3}):  # damaged: it is evaluated again
        (copy / "held_out.json").write_text(json.dumps({"step": 4, "after": after}))
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            train(tiny_config(data_dir, {"policy.path": stored_policy_path(copy)}), str(copy))
