"""Desk's task sets: built once, read without TensorFlow, disjoint, and the same on every machine."""

import itertools
import json
import sys

import pytest

from hintsd_jax.envs.desk import Desk
from hintsd_jax.envs.desk import tasks as desk_tasks_module
from hintsd_jax.envs.desk.tasks import SPLITS, desk_tasks
from hintsd_jax.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def test_splits_are_complete_disjoint_and_playable(data_dir):
    requests = {}
    for split, count in SPLITS.items():
        tasks = Desk.tasks(split, data_dir, seed=0, length=4, difficulty=3)
        assert len(tasks) == count
        assert len({tasks[n]["id"] for n in range(count)}) == count
        requests[split] = {json.dumps([request["text"] for request in tasks[n]["requests"]]) for n in range(count)}
        assert Desk().reset(tasks[count - 1]).messages[1]["content"] == tasks[count - 1]["requests"][0]["text"]
    for one, other in itertools.combinations(requests.values(), 2):
        assert not one & other
    assert "tensorflow" not in sys.modules


def test_another_generator_is_another_task_set(data_dir, monkeypatch):
    before = desk_tasks_module.generator_hash()
    monkeypatch.setattr(desk_tasks_module.inspect, "getsource", lambda module: "changed")
    assert desk_tasks_module.generator_hash() != before


def test_seed_and_shape_are_options(data_dir, monkeypatch):
    monkeypatch.setattr(desk_tasks_module, "SPLITS", {"train": 5, "eval": 3, "test": 3})
    first, other = (desk_tasks("test", data_dir, seed=seed, length=2, difficulty=1) for seed in (1, 2))
    assert len(first[0]["requests"]) == 2 and first[0] != other[0]
    assert first[:2] == [first[0], first[1]]


def test_any_length(data_dir, monkeypatch):
    monkeypatch.setattr(desk_tasks_module, "SPLITS", {"train": 3, "eval": 3, "test": 3})
    tasks = {split: Desk.tasks(split, data_dir, length=40, difficulty=30) for split in ("train", "test")}
    assert all(len(task["requests"]) == 40 for split in tasks.values() for task in split)
    assert tasks["train"][0] != tasks["test"][0]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"length": 2, "difficulty": 7}, "0 to all are decisions, got length=2, difficulty=7"),
        ({"length": 0, "difficulty": 0}, "a Desk task has 1 request or more"),
        ({"length": 99, "difficulty": 50}, "names.* are too many, got length=99, difficulty=50"),
        ({"length": "4"}, "env.options.length = '4': must be a whole number"),
        ({"difficulty": 2.5}, "env.options.difficulty = 2.5: must be a whole number"),
    ],
)
def test_impossible_tasks_are_refused(data_dir, options, says):
    with pytest.raises(UserError, match=says):
        desk_tasks("train", data_dir, **options)
