"""Task sets: built once, read without TensorFlow, never mixed up; what BFCL's two ways to divide the tasks promise."""

import collections
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from hintsd_jax.configs import bfcl_qwen3_4b, bfcl_qwen3_4b_clean
from hintsd_jax.envs.bfcl import Bfcl
from hintsd_jax.envs.bfcl import tasks as bfcl
from hintsd_jax.envs.datasets import TaskBuilder, data_source
from hintsd_jax.errors import UserError

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="the benchmark's wheel is not installed: run `make bfcl`"
)


class NumberTasks(TaskBuilder):
    """Some numbers."""

    VERSION = tfds.core.Version("1.2.3")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, version="1.2.3", description=name) for name in ("few", "many")
    ]
    FEATURES = {
        "id": tfds.features.Text(),
        "number": tfds.features.Scalar(np.int32),
        "texts": tfds.features.Sequence(tfds.features.Text()),
    }

    def splits(self):
        count = 50 if self.builder_config.name == "many" else 5
        tasks = [{"id": f"täsk {index}", "number": index, "texts": ["a", "é"][: index % 3]} for index in range(count)]
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
    assert tasks[1] == {"id": "täsk 1", "number": 1, "texts": ["a"]} and type(tasks[1]["number"]) is int
    assert [task["number"] for task in tasks] == list(range(48))
    assert tasks[-1] == tasks[47] and [task["number"] for task in tasks[3:9:2]] == [3, 5, 7]
    for outside in (48, -49):
        with pytest.raises(IndexError):
            tasks[outside]
    assert capfd.readouterr().out == ""
    assert len(data_source(NumberTasks, str(tmp_path), "train[:10]", config="many")) == 10
    assert data_source(NumberTasks, str(tmp_path), "test")[1]["number"] == 4  # the first config is the default
    assert (tmp_path / "number_tasks" / "many" / "1.2.3").is_dir() and (
        tmp_path / "number_tasks" / "few" / "1.2.3"
    ).is_dir()


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


def place(task):
    """(category, index) out of an id, read here on its own."""
    category, _, index = task["id"].rpartition("_")
    return category, int(index)


CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
SPLITS = ("train", "eval", "test")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@needs_wheel
def test_clean_splits_share_no_index_and_are_even_over_domains_and_categories(data_dir):
    indices = {}
    for split, size in {"train": 400, "eval": 80, "test": 320}.items():
        tasks = bfcl.bfcl_tasks(split, data_dir)
        assert all(task["split"] == split and task["category"] == place(task)[0] for task in tasks)
        places = [place(task) for task in tasks]
        counts = collections.Counter((category, index // 50) for category, index in places)
        assert len(places) == size and sorted(counts) == sorted((c, d) for c in CATEGORIES for d in range(4))
        assert set(counts.values()) == {size // 16}
        by_category = [{index for category, index in places if category == wanted} for wanted in CATEGORIES]
        assert all(chosen == by_category[0] for chosen in by_category)  # a twin stands on the same side
        indices[split] = by_category[0]
        for first in range(16, size, 16):  # the first tasks, which an evaluation may be cut to, are an even sample
            assert set(collections.Counter((category, index // 50) for category, index in places[:first]).values()) == {
                first // 16
            }
    assert sorted(index for chosen in indices.values() for index in chosen) == list(range(200))
    assert os.listdir(os.path.join(data_dir, "bfcl_multi_turn", "clean")) == [bfcl.WHEEL_VERSION]


@needs_wheel
def test_the_paper_split_is_the_seeded_shuffle_and_leaks_71_of_160_test_tasks(data_dir):
    ids = [f"multi_turn_{category}_{index}" for category in ("base", "long_context") for index in range(200)]
    state = random.getstate()
    random.seed(42)  # the module's generator, as the paper's code has it
    random.shuffle(ids)
    random.setstate(state)
    tasks = {split: bfcl.bfcl_tasks(split, data_dir, "paper") for split in SPLITS}
    assert [len(tasks[split]) for split in SPLITS] == [200, 40, 160]
    assert [task["id"] for split in SPLITS for task in tasks[split]] == ids
    assert all(task["split"] == split for split in SPLITS for task in tasks[split])
    trained = {index for _, index in map(place, tasks["train"])}
    assert {split: sum(place(task)[1] in trained for task in tasks[split]) for split in ("eval", "test")} == {
        "eval": 19,
        "test": 71,
    }


@needs_wheel
def test_categories_are_chosen_in_the_order_of_the_split(data_dir):
    whole = bfcl.bfcl_tasks("eval", data_dir)
    some = bfcl.bfcl_tasks("eval", data_dir, categories=["multi_turn_miss_param", "multi_turn_base"])
    assert [task["id"] for task in some] == [
        task["id"] for task in whole if place(task)[0] in (CATEGORIES[0], CATEGORIES[2])
    ]
    assert len(some) == 40
    # `split` is an option and an argument's name
    options = {"split": "paper", "categories": ("multi_turn_long_context",)}
    paper = Bfcl.tasks("eval", data_dir, **options)
    assert [task["id"] for task in paper] == [
        task["id"] for task in bfcl.bfcl_tasks("eval", data_dir, "paper") if "long" in task["id"]
    ]
    for options, says in {
        ("clena",): "split = 'clena': choose one of clean, paper",
        (
            "paper",
            ("multi_turn_miss_func",),
        ): "'paper' has no 'multi_turn_miss_func'; it has multi_turn_base, multi_turn_long_context",
        ("clean", "multi_turn_base"): "'multi_turn_base': write a list",
    }.items():
        with pytest.raises(UserError, match=says):
            bfcl.bfcl_tasks("eval", data_dir, *options)


@needs_wheel
@pytest.mark.parametrize("module, count", [(bfcl_qwen3_4b, 200), (bfcl_qwen3_4b_clean, 400)], ids=["paper", "clean"])
def test_the_configs_train_for_15_epochs_and_test_on_all(data_dir, module, count):
    config = module.get_config()
    sizes = [
        len(bfcl.bfcl_tasks(split, data_dir, config.env.options.split, config.env.options.categories))
        for split in SPLITS
    ]
    assert sizes[0] == count and config.optim.steps * config.tasks.tasks_per_step == 15 * count
    assert sizes[1] >= config.eval.tasks and sizes[2] == config.eval.test_tasks


@needs_wheel
@pytest.mark.parametrize("category", CATEGORIES)
def test_bfcl_tasks_are_the_wheels_entries(data_dir, category):
    entries = bfcl.read_json_lines(f"BFCL_v4_{category}.json")
    answers = bfcl.read_json_lines(f"possible_answer/BFCL_v4_{category}.json")
    for task in bfcl.bfcl_tasks("eval", data_dir, categories=(category,)):
        index = bfcl.task_index(task["id"])
        assert (
            json.loads(task["entry"]) == entries[index] and entries[index]["id"] == task["id"] == answers[index]["id"]
        )
        assert json.loads(task["ground_truth"]) == answers[index]["ground_truth"]


def test_a_missing_or_another_wheel_is_one_clear_line(monkeypatch):
    bfcl.require_wheel.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            UserError, match=r"bfcl-eval==2026\.3\.23.*not installed: run `make bfcl`.*pip install --no-deps bfcl-eval"
        ):
            bfcl.require_wheel()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2025.1.1")
    with pytest.raises(UserError, match="found 2025.1.1.*make bfcl"):
        bfcl.require_wheel()


@needs_wheel
def test_neither_tensorflow_nor_the_wheels_side_effects_are_needed(tmp_path):
    program = (
        "import sys; from hintsd_jax.envs.bfcl import Bfcl;"
        "tasks = Bfcl.tasks('eval', sys.argv[1]); Bfcl().reset(tasks[0]);"
        "unwanted = ('tensorflow', 'torch', 'bfcl_eval.utils', 'bfcl_eval.eval_checker.eval_runner');"
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
