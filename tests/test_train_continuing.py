"""Runs that go on: with other settings, for more steps, after damage; runs that begin with what another has learnt."""

import json
import shutil

import numpy as np
import pytest

from benchmarks.injected_faults import play_scripts
from benchmarks.scripted_dialogues import dialogue
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.script import ground_truth
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import evaluate
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.runs.metrics import read_metrics
from hintsd_jax.train import train
from tests.configs import POLICY, tiny_config

LONG = True  # see conftest.py; the compiled programs are those of tests/test_train.py
SMALL = {"eval.every": 0, "eval.test_tasks": 0, "optim.steps": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    return lambda **changes: tiny_config(data, SMALL | {key.replace("__", "."): v for key, v in changes.items()})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(config(), str(path))
    return path


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def part(workdir, step, name):
    checkpoints = Checkpoints(workdir / "checkpoints", 2, read_only=True)
    flat = checkpoints.restore_part(step, {name: {"embed": {"embedding": 0}}})[name]["embed"]["embedding"]
    checkpoints.close()
    return np.asarray(flat)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_run_goes_on_for_more_steps_with_other_memory(config, copied, capsys):
    """A longer schedule is said; rows so far stay; config.json holds what is now, and what was."""
    before = read_metrics(copied / "metrics.jsonl")
    longer = config(optim__steps=3, rollout__slots=3, checkpoint__every=3)
    train(longer, str(copied))
    printed = capsys.readouterr().err
    assert "optim.steps was 2 and is 3 from here on" in printed and "continuing from step 2 of 3" in printed
    assert "the schedule ends at step 3 now: the learning rate of the next step is" in printed
    rows = read_metrics(copied / "metrics.jsonl")
    assert rows[:3] == before and [row["step"] for row in rows] == [0, 1, 2, 3]
    kept = json.loads((copied / "config.json").read_text())
    assert kept["config"]["optim"]["steps"] == 3 and kept["changed"][0]["optim.steps"] == [2, 3]
    with pytest.raises(UserError, match="is at step 3 already, beyond optim.steps = 2"):
        train(config(), str(copied))
    assert json.loads((copied / "config.json").read_text()) == kept  # a command that is refused changes nothing


def test_a_run_goes_on_with_the_tasks_that_it_began_with_alone(config, copied, monkeypatch):
    original, longer = Desk.tasks, config(optim__steps=3)
    for changed in ("train", "eval"):

        def tasks(split, data_dir, changed=changed, **options):
            found = list(original(split, data_dir, **options))
            return [*found[:1], {**found[1], "requests": []}, *found[2:]] if split == changed else found

        monkeypatch.setattr(Desk, "tasks", tasks)
        with pytest.raises(UserError, match="environment 'desk' has other tasks than those that the run began with"):
            train(longer, str(copied))


def test_a_damaged_latest_stops_a_run_or_gives_way(config, copied, finished, capsys):
    flip(largest_file(copied / "checkpoints" / "2" / "state"))
    before = (copied / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="checkpoints/2 cannot be restored .*on_damage = previous .* from step 1"):
        train(config(), str(copied))
    assert (copied / "metrics.jsonl").read_bytes() == before
    train(config(checkpoint__on_damage="previous"), str(copied))
    printed = capsys.readouterr().err
    assert "damaged/2 now, and step 1 takes its place" in printed and "continuing from step 1 of 2" in printed
    shown = lambda path: [
        {key: value for key, value in row.items() if not key.startswith(("time/", "memory/", "compile/"))}
        for row in read_metrics(path / "metrics.jsonl")
    ]
    assert shown(copied) == shown(finished)
    stored = Checkpoints(copied / "checkpoints", 2, read_only=True)
    assert stored.steps == [1, 2]
    sums = [json.loads((path / "checkpoints/2/extra/metadata").read_text())["arrays"] for path in (copied, finished)]
    assert sums[0] == sums[1]  # bit-equal weights, EMA and moments


def test_metrics_that_are_gone_or_cut_are_refused(config, copied):
    path = copied / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for text in (b"".join(lines[:2]), b"".join(lines).replace(b'"step": 1', b'"step": 1, "x": 0')):
        path.write_bytes(text)
        with pytest.raises(UserError, match="than when step 2 was saved: put it back"):
            train(config(), str(copied))
        assert path.read_bytes() == text
    path.unlink()
    with pytest.raises(UserError, match="lacks the rows of 3 steps"):
        train(config(), str(copied))


def test_a_fork_begins_with_what_another_run_has_learnt(config, finished, tmp_path, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    forked = config(optim__steps=1, optim__lr=0.0, fork__path=str(finished), fork__checkpoint="1")
    evaluate(forked, str(tmp_path / "new"))
    assert f"evaluated: the weights of step 1 of {finished}" in capsys.readouterr().out
    train(forked, str(tmp_path / "new"))
    printed = capsys.readouterr().err
    assert f"begins with step 1 of {finished}: its weights" in printed and "Steps count from 0" in printed
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before
    assert [row["step"] for row in read_metrics(tmp_path / "new" / "metrics.jsonl")] == [0, 1]
    weights, new = part(finished, 1, "params"), part(tmp_path / "new", 1, "params")
    np.testing.assert_array_equal(new, weights)  # at a learning rate of 0
    evaluate(forked, str(tmp_path / "new"))
    played = [(tmp_path / "new" / "episodes" / f"evaluation_{step:06d}.jsonl").read_text() for step in (0, 1)]
    assert played[0] == played[1] and "logprobs" in played[0]  # the same weights before and after, bit for bit


def test_sft_learns_from_dialogues_alone_and_goes_on_as_if_never_stopped(config, tmp_path, capsys):
    """Nothing is rolled out in training; the last step made again from the checkpoint before it is bit-equal; a file
    that has changed in between is another run's.
    """
    tasks = [generate_task(0, index, 1, 0) for index in range(8)]
    actions = {task["id"]: [ground_truth(task).actions] for task in tasks}
    chat = ChatFormat(load_tokenizer(str(POLICY)), history="keep")
    played = [dialogue(episode) for _, (episode,) in play_scripts(chat, Desk, tasks, actions)]
    path = tmp_path / "dialogues.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in played))
    learning = config(algorithm="sft", sft__path=str(path), optim__lr=1e-3, optim__steps=3)
    train(learning, str(tmp_path / "run"))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for row in rows[1:]:
        assert row["rollout/begun"] == row["rollout/tokens"] == row["hindsight/questions"] == 0
        assert row["train/cross_entropy_tokens"] == row["train/tokens"] > 0 and "train/logprob_mismatch" not in row
    assert rows[3]["train/cross_entropy"] < rows[1]["train/cross_entropy"]
    count = sum(len(each) for (each,) in actions.values())
    assert f"from 8 dialogues of {path}, {count} actions" in capsys.readouterr().err
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "3")
    (again / "held_out.json").unlink()
    train(learning, str(again))
    kept = [run / "checkpoints/3/extra/metadata" for run in (again, tmp_path / "run")]
    sums = [json.loads(path.read_text())["arrays"] for path in kept]
    assert sums[0] == sums[1] and "continuing from step 2 of 3" in capsys.readouterr().err
    path.write_text(json.dumps(played[0]) + "\n")
    with pytest.raises(UserError, match="holds other dialogues than those that the run began with"):
        train(learning, str(again))
