"""Task sets: built once, read without TensorFlow, never mixed up; BFCL's splits are disjoint by index and stratified."""

import collections
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from hintsd_jax.errors import UserError
from hintsd_jax.tasks import bfcl
from hintsd_jax.tasks.building import TaskBuilder, data_source

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="the benchmark's wheel is not installed: run `make bfcl`"
)


class NumberTasks(TaskBuilder):
    """Some numbers."""

    VERSION = tfds.core.Version("1.2.3")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, version="1.2.3", description=name) for name in ("few", "many")]
    FEATURES = {
        "id": tfds.features.Text(),
        "number": tfds.features.Scalar(np.int32),
        "words": tfds.features.Sequence(tfds.features.Text()),
    }

    def splits(self):
        count = 50 if self.builder_config.name == "many" else 5
        tasks = [{"id": f"täsk {index}", "number": index, "words": ["a", "é"][: index % 3]} for index in range(count)]
        return {"train": tasks[:-2], "test": iter(tasks[-2:])}


class FailingTasks(TaskBuilder):
    """Fails after its first task."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES = {"id": tfds.features.Text()}

    def splits(self):
        def tasks():
            yield {"id": "first"}
            raise UserError("the generator gave up")

        return {"train": tasks()}


class SlowTasks(TaskBuilder):
    """Writes down every build."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES = {"id": tfds.features.Text()}

    def splits(self):
        with open(os.environ["BUILD_LOG"], "a") as log:
            log.write("built\n")
        time.sleep(0.5)
        return {"train": [{"id": "only"}]}


def build_slowly(data_dir):
    return data_source(SlowTasks, data_dir, "train")[0]["id"]


def test_reads_python_values_in_the_builders_order(tmp_path, capfd):
    tasks = data_source(NumberTasks, str(tmp_path), "train", config="many")
    assert len(tasks) == 48
    assert tasks[1] == {"id": "täsk 1", "number": 1, "words": ["a"]} and type(tasks[1]["number"]) is int
    assert [task["number"] for task in tasks] == list(range(48))
    assert tasks[-1] == tasks[47] and [task["number"] for task in tasks[3:9:2]] == [3, 5, 7]
    for outside in (48, -49):
        with pytest.raises(IndexError):
            tasks[outside]
    assert capfd.readouterr().out == ""
    assert len(data_source(NumberTasks, str(tmp_path), "train[:10]", config="many")) == 10
    assert data_source(NumberTasks, str(tmp_path), "test")[1]["number"] == 4  # the first config is the default
    assert (tmp_path / "number_tasks" / "many" / "1.2.3").is_dir() and (tmp_path / "number_tasks" / "few" / "1.2.3").is_dir()


def test_what_the_user_can_mend(tmp_path):
    with pytest.raises(UserError, match="no split 'trian'; it has test, train"):
        data_source(NumberTasks, str(tmp_path), "trian")
    with pytest.raises(UserError, match="split 'train.:x.' cannot be read"):
        data_source(NumberTasks, str(tmp_path), "train[:x]")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept in .*file.*choose another data_dir"):
        data_source(NumberTasks, str(tmp_path / "file"), "train")


def test_a_failed_build_leaves_nothing_that_counts_as_built(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="the generator gave up"):
            data_source(FailingTasks, str(tmp_path), "train")
    assert not list(tmp_path.glob("failing_tasks/1.0.0"))


def test_two_processes_build_once(tmp_path, monkeypatch):
    monkeypatch.setenv("BUILD_LOG", str(tmp_path / "log"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        built = pool.map_async(build_slowly, [str(tmp_path / "data")] * 2, chunksize=1)
        assert built.get(timeout=300) == ["only"] * 2  # a pool whose workers cannot start would wait for ever
    assert (tmp_path / "log").read_text() == "built\n"


@needs_wheel
def test_bfcl_splits_are_disjoint_by_index_and_even_over_domains(tmp_path):
    indices = {}
    for split, size in {"train": 100, "eval": 20, "test": 80}.items():
        tasks = data_source(bfcl.BfclMultiTurn, str(tmp_path), split)
        assert len(tasks) == size and all(task["split"] == split and task["category"] == "multi_turn_base" for task in tasks)
        indices[split] = [int(task["id"].rsplit("_", 1)[1]) for task in tasks]
        assert set(collections.Counter(index // 50 for index in indices[split]).values()) == {size // 4}
    assert sorted(sum(indices.values(), [])) == list(range(200))
    assert (tmp_path / "bfcl_multi_turn" / "multi_turn_base" / bfcl.WHEEL_VERSION).is_dir()


@needs_wheel
def test_bfcl_tasks_are_the_wheels_entries(tmp_path):
    entries = bfcl.read_json_lines("BFCL_v4_multi_turn_base.json")
    answers = bfcl.read_json_lines("possible_answer/BFCL_v4_multi_turn_base.json")
    for task in data_source(bfcl.BfclMultiTurn, str(tmp_path), "eval"):
        index = int(task["id"].rsplit("_", 1)[1])
        assert json.loads(task["entry"]) == entries[index] and entries[index]["id"] == task["id"] == answers[index]["id"]
        assert json.loads(task["ground_truth"]) == answers[index]["ground_truth"]


def test_a_missing_or_another_wheel_is_one_clear_line(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"bfcl-eval==2026\.3\.23.*not installed: run `make bfcl`.*pip install --no-deps bfcl-eval"):
            bfcl.require_wheel()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2025.1.1")
    with pytest.raises(UserError, match="found 2025.1.1.*make bfcl"):
        bfcl.require_wheel()


@needs_wheel
def test_neither_tensorflow_nor_the_wheels_side_effects_are_needed(tmp_path):
    program = (
        "import sys; from hintsd_jax.envs.bfcl import Bfcl; tasks = Bfcl.tasks('eval', sys.argv[1]); Bfcl().reset(tasks[0]);"
        "print([name for name in ('tensorflow', 'torch', 'bfcl_eval.utils', 'bfcl_eval.eval_checker.eval_runner') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
