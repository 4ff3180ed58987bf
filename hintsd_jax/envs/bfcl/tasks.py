# SPDX-License-Identifier: Apache-2.0

"""BFCL v3 multi-turn task sets: the files inside the pinned `bfcl-eval` wheel in, task mappings out.

A task is {"id", "split", "category", "entry", "ground_truth"}; the last two are JSON texts, because every domain's
state has another shape.

There are two ways to divide the tasks (builder configs). In "clean" a split is a set of indices: the same index is
nearly the same task in all four categories, so an index is never in two splits; each block of 50 indices is one domain,
and every split takes the same share of each: 400 / 80 / 320 tasks. "paper" is the HINT-SD paper's: base and
long_context pooled and shuffled, 200 / 40 / 160; 71 of its test tasks have a twin in train. It is there to compare with
the paper's numbers.

Invariants: the wheel's version is the data set's version, and no other wheel is accepted (releases differ in about half
of their tasks). `ground_truth` is for scoring and for privileged reports only.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from hintsd_jax.envs.datasets import TaskBuilder, data_source
from hintsd_jax.errors import UserError

WHEEL_VERSION = "2026.3.23"
INSTALL = f"run `make bfcl`, or: pip install --no-deps bfcl-eval=={WHEEL_VERSION} && pip install mpmath"

# "clean": last digit of a task's index -> split: 100 / 20 / 80 tasks a category, 25 / 5 / 20 of each domain.
SPLIT_OF_DIGIT = ("train",) * 5 + ("eval",) + ("test",) * 4
DOMAIN_SIZE = 50
CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")


@functools.cache
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
    folders = list(spec.submodule_search_locations or ())
    return Path(folders[0]) / "data"


def read_json_lines(relative_path: str) -> list[dict[str, Any]]:
    """The objects of one of the wheel's data files (JSON lines, though named .json)."""
    with open(require_wheel() / relative_path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


@dataclasses.dataclass
class Division(tfds.core.BuilderConfig):
    """A way to divide the tasks into train, eval and test. categories: the wheel's file names after "BFCL_v4_"."""

    categories: tuple[str, ...] = ()


class BfclMultiTurn(TaskBuilder):
    """BFCL v3 multi-turn, divided by index within each domain ("clean"), or as the paper does ("paper")."""

    VERSION = tfds.core.Version(WHEEL_VERSION)
    BUILDER_CONFIGS: ClassVar = [
        Division(
            name="clean",
            version=WHEEL_VERSION,
            categories=CATEGORIES,
            description="All four categories by index within each domain: no task has a twin in another split.",
        ),
        Division(
            name="paper",
            version=WHEEL_VERSION,
            categories=("multi_turn_base", "multi_turn_long_context"),
            description="Two categories pooled and shuffled, as the HINT-SD paper does:"
            " 71 of 160 test tasks have a twin in train.",
        ),
    ]
    FEATURES: ClassVar = {key: tfds.features.Text() for key in ("id", "split", "category", "entry", "ground_truth")}

    def splits(self) -> Mapping[str, list[Mapping[str, str]]]:
        """See `TaskBuilder.splits`."""
        division: Any = self.builder_config
        tasks = [task for category in division.categories for task in _read_category(category)]
        divided = (_paper if division.name == "paper" else _clean)(tasks)
        return {split: [{**task, "split": split} for task in chosen] for split, chosen in divided.items()}


def bfcl_tasks(
    split: str, data_dir: str, division: str = "clean", categories: Sequence[str] = ()
) -> Sequence[Mapping[str, str]]:
    """The tasks of "train", "eval" or "test", built on the first call; of some `categories` only, or of all that the
    division has.

    Raises:
      UserError: no such division, category or split; or as `require_wheel` and `envs.datasets.data_source`.
    """
    divisions = {config.name: config for config in BfclMultiTurn.BUILDER_CONFIGS}
    if division not in divisions:
        raise UserError(f"env.options.split = {division!r}: choose one of {', '.join(divisions)}")
    if isinstance(categories, str):
        raise UserError(f"env.options.categories = {categories!r}: write a list of names")
    known = divisions[division].categories
    if unknown := [name for name in categories if name not in known]:
        raise UserError(
            f"env.options.categories: split = {division!r} has no {unknown[0]!r}; it has {', '.join(known)}"
        )
    require_wheel()
    tasks = data_source(BfclMultiTurn, data_dir, split, config=division)
    return [task for task in tasks if task["category"] in categories] if categories else tasks


def task_index(task_id: str) -> int:
    """The number at the end of a task's id: the same one in another category is nearly the same task."""
    return int(task_id.rsplit("_", 1)[1])


def _clean(tasks: Sequence[Mapping[str, str]]) -> Mapping[str, list[Mapping[str, str]]]:
    """By the index's last digit. Domains and categories alternate, so that the first tasks of a split are an even
    sample of it.
    """
    alternating = sorted(tasks, key=lambda task: (task_index(task["id"]) % DOMAIN_SIZE, task_index(task["id"])))
    splits: dict[str, list[Mapping[str, str]]] = {split: [] for split in SPLIT_OF_DIGIT}
    for task in alternating:
        splits[SPLIT_OF_DIGIT[task_index(task["id"]) % 10]].append(task)
    return splits


def _paper(tasks: Sequence[Mapping[str, str]]) -> Mapping[str, list[Mapping[str, str]]]:
    """The pool in the files' order, shuffled by Python's generator seeded with 42, cut into 200, 40 and the rest."""
    shuffled = list(tasks)
    random.Random(42).shuffle(shuffled)  # as `random.seed(42)` and `random.shuffle` do
    return {"train": shuffled[:200], "eval": shuffled[200:240], "test": shuffled[240:]}


def _read_category(category: str) -> list[Mapping[str, str]]:
    file_name = f"BFCL_v4_{category}.json"
    answers = {answer["id"]: answer["ground_truth"] for answer in read_json_lines(f"possible_answer/{file_name}")}
    return [
        {
            "id": entry["id"],
            "category": category,
            "entry": json.dumps(entry),
            "ground_truth": json.dumps(answers[entry["id"]]),
        }
        for entry in read_json_lines(file_name)
    ]
