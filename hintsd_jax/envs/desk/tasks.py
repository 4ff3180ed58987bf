# SPDX-License-Identifier: Apache-2.0

"""Desk's task sets: a seed and a shape of tasks in, generated tasks in three disjoint splits out.

A TensorFlow Datasets builder keeps them. The generator's hash is in the name of its config, so tasks of another
generator are never read by mistake. Splits come from different seeds of the generator, and a task whose requests read
like those of an earlier one (in any split) is left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from hintsd_jax.envs.datasets import TaskBuilder, data_source
from hintsd_jax.envs.desk import generator, names, office
from hintsd_jax.envs.desk import kinds as kinds_module
from hintsd_jax.errors import UserError

SPLITS = {"train": 4000, "eval": 200, "test": 400}


def generator_hash() -> str:
    """Eight hex digits over the source of everything that a task depends on."""
    source = "".join(inspect.getsource(module) for module in (names, kinds_module, office, generator))
    return hashlib.sha256(source.encode()).hexdigest()[:8]


@dataclasses.dataclass
class DeskConfig(tfds.core.BuilderConfig):
    """seed: of the tasks. length: requests a task. difficulty: decisions a task."""

    seed: int = 0
    length: int = 8
    difficulty: int = 6


class DeskTasks(TaskBuilder):
    """Requests to a small simulated office, invented."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: ClassVar = {"id": tfds.features.Text(), "task": tfds.features.Text()}

    def splits(self) -> Mapping[str, Iterator[Mapping[str, str]]]:
        """See `TaskBuilder.splits`; a split is generated when it is read, after those before it."""
        config: Any = self.builder_config
        earlier: set[str] = set()

        def tasks(number: int, split: str, count: int) -> Iterator[Mapping[str, str]]:
            # Three seeds a task set, far from each other's: no split draws from another's random numbers.
            seed, index = config.seed * len(SPLITS) + number, 0
            while count:
                task = generator.generate_task(seed, index, config.length, config.difficulty)
                index += 1
                requests = json.dumps([request["text"] for request in task["requests"]])
                if requests not in earlier:
                    earlier.add(requests)
                    count -= 1
                    task_id = f"{split}-{task['id']}"
                    yield {"id": task_id, "task": json.dumps(task | {"id": task_id})}

        return {split: tasks(number, split, count) for number, (split, count) in enumerate(SPLITS.items())}


class ParsedTasks(Sequence):
    """The stored entries of a split, as tasks. Slices give lists."""

    unique_ids = True  # as those of `StoredTasks`

    def __init__(self, entries: Sequence[Mapping[str, str]]):
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [json.loads(entry["task"]) for entry in self._entries[index]]
        return json.loads(self._entries[index]["task"])


def desk_tasks(
    split: str, data_dir: str, seed: int = 0, length: int = 8, difficulty: int = 6
) -> Sequence[Mapping[str, Any]]:
    """The tasks of `train`, `eval` or `test`, built on the first call.

    Raises:
      UserError: there is no task of this length and difficulty, or as `envs.datasets.data_source`.
    """
    for option, value in (("seed", seed), ("length", length), ("difficulty", difficulty)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"env.options.{option} = {value!r}: must be a whole number")
    try:
        generator.generate_task(seed, 0, length, difficulty)
    except ValueError as error:
        raise UserError(f"env.options: {error}") from error
    name = f"s{seed}_l{length}_d{difficulty}_{generator_hash()}"
    config = DeskConfig(name=name, seed=seed, length=length, difficulty=difficulty)
    return ParsedTasks(data_source(DeskTasks, data_dir, split, config=config))
