"""BFCL v3 multi-turn task sets, made from the files inside the pinned `bfcl-eval` wheel.

In: the wheel's JSON-lines files. Out: task mappings {"id", "split", "category", "entry", "ground_truth"}; the last two are JSON
texts, because every domain's state has another shape.

Invariants: the wheel's version is the data set's version, and no other wheel is accepted (releases differ in about half of their
tasks). A split is a set of indices: the same index is nearly the same task in all four categories, so an index must never stand
in two splits. Each block of 50 indices is one domain, and every split takes the same share of each. `ground_truth` is
for scoring and for privileged reports only.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from hintsd_jax.errors import UserError
from hintsd_jax.tasks.building import TaskBuilder, data_source

WHEEL_VERSION = "2026.3.23"
INSTALL = f"run `make bfcl`, or: pip install --no-deps bfcl-eval=={WHEEL_VERSION} && pip install mpmath"

# Last digit of a task's index -> split: 100 / 20 / 80 tasks a category, 25 / 5 / 20 of each domain.
SPLIT_OF_DIGIT = ("train",) * 5 + ("eval",) + ("test",) * 4


def require_wheel() -> Path:
    """The data folder of the installed wheel.

    Raises:
      UserError: the wheel (or mpmath, which its tools need) is missing, or is another release.
    """
    # Located, not imported: some of its modules create folders inside site-packages when they are imported.
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or importlib.util.find_spec("mpmath") is None:
        raise UserError(f"BFCL needs bfcl-eval=={WHEEL_VERSION} and mpmath, which are not installed: {INSTALL}")
    installed = importlib.metadata.version("bfcl-eval")
    if installed != WHEEL_VERSION:
        raise UserError(f"BFCL needs bfcl-eval=={WHEEL_VERSION}, found {installed}, whose tasks differ: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "data"


def read_json_lines(relative_path: str) -> list[dict[str, Any]]:
    """The objects of one of the wheel's data files (JSON lines, though named .json)."""
    with open(require_wheel() / relative_path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


CATEGORIES = tuple(f"multi_turn_{kind}" for kind in ("base", "miss_func", "miss_param", "long_context"))


class BfclMultiTurn(TaskBuilder):
    """BFCL v3 multi-turn, split by index within each domain."""

    VERSION = tfds.core.Version(WHEEL_VERSION)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="clean", version=WHEEL_VERSION, description="Split by index.")]
    FEATURES = {key: tfds.features.Text() for key in ("id", "split", "category", "entry", "ground_truth")}

    def splits(self) -> Mapping[str, list[Mapping[str, str]]]:
        tasks = [task for category in CATEGORIES for task in self._tasks(category)]
        return {name: [task for task in tasks if task["split"] == name] for name in dict.fromkeys(SPLIT_OF_DIGIT)}

    def _tasks(self, category: str) -> Iterator[Mapping[str, str]]:
        file_name = f"BFCL_v4_{category}.json"
        answers = {answer["id"]: answer["ground_truth"] for answer in read_json_lines(f"possible_answer/{file_name}")}
        for entry in read_json_lines(file_name):
            index = int(entry["id"].rsplit("_", 1)[1])
            yield {
                "id": entry["id"],
                "split": SPLIT_OF_DIGIT[index % 10],
                "category": category,
                "entry": json.dumps(entry),
                "ground_truth": json.dumps(answers[entry["id"]]),
            }


def bfcl_tasks(split: str, data_dir: str, division: str = "clean", categories: Sequence[str] = ()) -> Sequence[Mapping[str, str]]:
    """The tasks of "train", "eval" or "test", built on the first call; of some `categories` only, or of all."""
    require_wheel()
    tasks = data_source(BfclMultiTurn, data_dir, split, config=division)
    return [task for task in tasks if task["category"] in categories] if categories else tasks
