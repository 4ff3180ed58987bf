# SPDX-License-Identifier: Apache-2.0

"""AppWorld's task sets: the folder with its data in, task mappings out: ids, no texts.

A task is {"id", "split", "scenario", "scenario_size", "category"}. A scenario is a task's id before its last "_",
and its size the number of its tasks in the split. The category is the difficulty, "difficulty_1" to "difficulty_3"; ""
where the data does not tell it.

Invariant: what is built and kept holds nothing of the benchmark but ids and difficulties: its licence does not allow
more to be passed on. Splits are the benchmark's own, in its order.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from hintsd_jax.envs.datasets import TaskBuilder, data_source
from hintsd_jax.errors import UserError

TRAIN, DEV = "train", "dev"
TEST_SPLITS = ("test_normal", "test_challenge")
SPLITS = (TRAIN, DEV, *TEST_SPLITS)
GET_DATA = "docs/appworld.md says how to get the data, or how to build an invented one"


def appworld_tasks(split: str, data_dir: str, root: str) -> Sequence[Mapping[str, Any]]:
    """The tasks of a split of the data in `root`, built on the first call.

    Raises:
      UserError: no data there, a split that it lacks, a task without its folder; or as `envs.datasets.data_source`.
    """
    listed = _listed(Path(root).expanduser())
    config = f"root_{hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:16]}"
    return data_source(_builder(config, listed), data_dir, split, config=config)


def _builder(config: str, listed: Mapping[str, Sequence[Mapping[str, Any]]]) -> type[TaskBuilder]:
    """The builder of one folder's task sets, whose name follows from what they hold."""

    class AppWorldTasks(TaskBuilder, skip_registration=True):
        """AppWorld's tasks by id, in the benchmark's own splits."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS: ClassVar = [
            tfds.core.BuilderConfig(name=config, description="The tasks of one folder of AppWorld's data.")
        ]
        FEATURES: ClassVar = {key: tfds.features.Text() for key in ("id", "split", "scenario", "category")} | {
            "scenario_size": tfds.features.Scalar(dtype=np.int64)
        }

        def splits(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
            """See `TaskBuilder.splits`."""
            return listed

    return AppWorldTasks


def task_folder(root: str, task_id: str) -> Path:
    """Where the data of a task is, ground truth included."""
    return Path(root).expanduser() / "data" / "tasks" / task_id


def _listed(root: Path) -> dict[str, list[dict[str, Any]]]:
    folder = root / "data" / "datasets"
    files = {split: folder / f"{split}.txt" for split in SPLITS}
    if not any(file.is_file() for file in files.values()):
        raise UserError(f"no data of AppWorld in {root} (env.options.root): {GET_DATA}")
    return {split: _read(root, split, file) for split, file in files.items() if file.is_file()}


def _read(root: Path, split: str, file: Path) -> list[dict[str, Any]]:
    try:
        ids = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): {GET_DATA}") from error
    sizes = Counter(map(scenario_of, ids))
    for task_id in ids:
        if not (root / "data" / "tasks" / task_id / "specs.json").is_file():
            raise UserError(f"{root} (env.options.root) lists task {task_id!r} without its folder: {GET_DATA}")
    return [
        {
            "id": task_id,
            "split": split,
            "scenario": scenario_of(task_id),
            "scenario_size": sizes[scenario_of(task_id)],
            "category": _difficulty(root, task_id),
        }
        for task_id in ids
    ]


def scenario_of(task_id: str) -> str:
    """The scenario that a task belongs to."""
    return task_id.rpartition("_")[0] or task_id


def _difficulty(root: Path, task_id: str) -> str:
    """The one thing that is read off the ground truth here; scores are told apart by it."""
    try:
        text = (root / "data" / "tasks" / task_id / "ground_truth" / "metadata.json").read_text(encoding="utf-8")
        difficulty = json.loads(text)["difficulty"]
    except (OSError, ValueError, KeyError, TypeError):  # data without it is allowed: test sets may come so
        return ""
    return f"difficulty_{difficulty}" if type(difficulty) is int else ""
