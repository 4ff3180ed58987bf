# SPDX-License-Identifier: Apache-2.0

"""Quests: options and a split in, tasks out; a task in, its compiled game out, made once on a machine.

A task says how its quest is made, no more: the package makes the same quest of it everywhere (2 or 3 seconds). Seeds of
splits are far apart, so that no two splits share a quest.

Invariant: a game file stands under the package's version and all that it was made from, and is whole or absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hintsd_jax.envs.packages import Package
from hintsd_jax.errors import UserError

SPLITS = ("train", "eval", "test")
_MOST = 1_000_000  # seeds of a split
_SEEDS = 100  # of the options
_FAR, _ATTEMPTS = _MOST * len(SPLITS) * (_SEEDS + 1), 10  # the further seeds of a quest are nobody's first
PACKAGE = Package("textworld")


@dataclasses.dataclass(frozen=True)
class Options:
    """The `env.options` of textworld.

    quest_length: commands that the shortest solution has. rooms, objects: of the world. size: quests of each split.
    seed: another one gives other quests. list_commands: whether observations list the commands that are possible.
    limit: commands after which the game ends as not won; 0: the run's limit alone (`rollout.max_steps`).
    """

    quest_length: int = 1
    rooms: int = 3
    objects: int = 6
    size: int = 200
    seed: int = 0
    list_commands: bool = True
    limit: int = 0

    def __post_init__(self):
        ranges = {
            "quest_length": (1, 20),
            "rooms": (1, 20),
            "objects": (1, 50),
            "size": (1, _MOST),
            "seed": (0, _SEEDS),
            "limit": (0, 10_000),
        }
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise UserError(f"textworld: env.options.{name} = {getattr(self, name)}: give {least} to {most}")


def package() -> Any:
    """The package `textworld`. It takes a second to import, and only who plays needs it: never the trainer itself."""
    warnings.filterwarnings(
        "ignore", message="Game .* is not fully supported"
    )  # scores and moves are the package's own
    return importlib.import_module("textworld")


def tasks(split: str, data_dir: str, options: Options) -> list[dict[str, Any]]:
    """The tasks of a split.

    Raises:
      UserError: an unknown split, or the package is not installed.
    """
    if split not in SPLITS:
        raise UserError(f"environment textworld has no split {split!r}; it has {', '.join(SPLITS)}")
    folder = os.path.join(os.path.abspath(os.path.expanduser(data_dir)), "textworld", PACKAGE.version())
    first = (options.seed * len(SPLITS) + SPLITS.index(split)) * _MOST
    kept = ("quest_length", "rooms", "objects", "list_commands", "limit")
    shared = {name: getattr(options, name) for name in kept} | {"folder": folder}
    return [{"id": f"{split}-{n}", "seed": first + n} | shared for n in range(options.size)]


def game_file(task: Mapping[str, Any]) -> str:
    """The compiled game of a task; its description stands beside it (".json")."""
    made_from = {name: task[name] for name in ("quest_length", "rooms", "objects", "seed")}
    name = hashlib.blake2b(repr(sorted(made_from.items())).encode(), digest_size=8).hexdigest()
    path = Path(task["folder"], f"{name}.z8")
    if not path.exists():  # the last of the files to be moved into place
        _make(made_from, path)
    return str(path)


def walkthrough(task: Mapping[str, Any]) -> list[str]:
    """The commands that win, in order."""
    metadata = json.loads(Path(game_file(task)).with_suffix(".json").read_text("utf-8"))["metadata"]
    return list(metadata["walkthrough"])


def _make(made_from: Mapping[str, int], path: Path) -> None:
    """Makes a game that its own walkthrough wins: of 100 quests of 4 commands 1 had two things whose names the
    interpreter takes for each other, such as a chest and an old chest; it is made anew from another seed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        options = package().GameOptions()
        options.nb_rooms, options.nb_objects = made_from["rooms"], made_from["objects"]
        options.quest_length, options.seeds = made_from["quest_length"], made_from["seed"] + attempt * _FAR
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            options.path = os.path.join(folder, path.name)
            _, game = package().make(options)
            if _wins(options.path, game.walkthrough):
                for suffix in (".json", ".z8"):
                    os.replace(Path(options.path).with_suffix(suffix), path.with_suffix(suffix))
                return
    raise RuntimeError(f"no walkthrough of {_ATTEMPTS} quests wins: {dict(made_from)}")


def _wins(path: str, commands: Sequence[str]) -> bool:
    env = package().start(path, request_infos=package().EnvInfos(won=True))
    try:
        state = env.reset()
        for command in commands:
            state, _, _ = env.step(command)
        return bool(state.won)
    finally:
        env.close()
