"""Desk's task sets: generated tasks as a TensorFlow Datasets builder, in three disjoint splits.

The generator's hash stands in the name of the config, so tasks of another generator are never read by mistake. Splits
come from different seeds of the generator, and a task whose words were seen before (in any split) is left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds

from hintsd_jax.envs.datasets import TaskBuilder, data_source
from hintsd_jax.envs.desk import generator, names, world
from hintsd_jax.errors import UserError

SPLITS = {"train": 4000, "eval": 200, "test": 400}


def generator_hash() -> str:
    """Eight hex digits over the source of everything that a task depends on."""
    source = "".join(inspect.getsource(module) for module in (names, world, generator))
    return hashlib.sha256(source.encode()).hexdigest()[:8]


@dataclasses.dataclass
class DeskConfig(tfds.core.BuilderConfig):
    """`seed`, and the requests (`length`) and decisions (`difficulty`) of a task."""

    seed: int = 0
    length: int = 4
    difficulty: int = 3


class DeskTasks(TaskBuilder):
    """Requests to a small simulated office, invented."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES = {"id": tfds.features.Text(), "task": tfds.features.Text()}

    def splits(self) -> Mapping[str, Iterator[Mapping[str, str]]]:
        config, seen = self.builder_config, set()

        def tasks(number: int, split: str, count: int) -> Iterator[Mapping[str, str]]:
            index = made = 0
            while made < count:
                # Three seeds a task set, far from each other's: no split draws from another's stream.
                task = generator.generate_task(
                    config.seed * len(SPLITS) + number, index, config.length, config.difficulty
                )
                index += 1
                words = json.dumps([request["text"] for request in task["requests"]])
                if words not in seen:
                    seen.add(words)
                    made += 1
                    yield {"id": f"{split}-{task['id']}", "task": json.dumps(task | {"id": f"{split}-{task['id']}"})}

        return {split: tasks(number, split, count) for number, (split, count) in enumerate(SPLITS.items())}


class _DeskSource(Sequence):
    """The builder's rows as tasks."""

    def __init__(self, rows: Sequence[Mapping[str, str]]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return json.loads(self._rows[index]["task"])


def desk_tasks(split: str, data_dir: str, seed: int = 0, length: int = 4, difficulty: int = 3) -> Sequence[Mapping]:
    """The tasks of `train`, `eval` or `test`, built on the first call.

    Raises:
      UserError: there is no such task (length, difficulty), or see `tasks.building.data_source`.
    """
    try:
        generator.generate_task(seed, 0, length, difficulty)
    except ValueError as error:
        raise UserError(f"env.options: {error}") from error
    config = DeskConfig(
        name=f"s{seed}_l{length}_d{difficulty}_{generator_hash()}", seed=seed, length=length, difficulty=difficulty
    )
    return _DeskSource(data_source(DeskTasks, data_dir, split, config=config))
