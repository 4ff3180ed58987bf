# SPDX-License-Identifier: Apache-2.0

"""Scripts of quests for the scripted policy: a task in, the commands of an episode out: the package's walkthrough, or
the walkthrough with one fault at a known step.

After the fault all goes on as the walkthrough has it, so that what was left out is missing to the end; then the player
looks around until the game's limit (`env.options.limit`) ends it.

Invariant: everything follows from the task, the kind of fault and the seed. Scripts know the ground truth: they
measure hindsight, and as dialogues for `sft` stand for a policy that errs never; no rollout, teacher or analyser reads
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.script import Script, choose_site
from hintsd_jax.envs.textworld import quests

LOOK = "look"
FAULTS = {
    "dropped_command": "one command is left out, and the player looks around instead",
    "unknown_command": "one command has a verb that the game does not know",
    "several_commands": "one message holds two commands, which the game refuses",
    "wrong_object": "one command names another thing of the quest, or one that is not there",
}


def ground_truth(task: Mapping[str, Any]) -> Script:
    """The walkthrough."""
    return Script(tuple(quests.walkthrough(task)))


def sites(task: Mapping[str, Any], fault: str) -> list[int]:
    """The steps that a kind of fault can stand in, 0-based: each of the walkthrough's.

    Raises ValueError for a kind that is not in `FAULTS`.
    """
    if fault not in FAULTS:
        raise ValueError(f"no fault {fault!r}: choose one of {', '.join(FAULTS)}")
    return list(range(len(quests.walkthrough(task))))


def with_fault(task: Mapping[str, Any], fault: str, seed: int, site: int | None = None) -> Script | None:
    """The walkthrough with one fault: at `site`, or at one that the seed draws.

    Raises ValueError for another kind or site, or where the game has no limit of its own.
    """
    if not task["limit"]:
        raise ValueError("a script that does not win goes on to the game's limit: set env.options.limit")
    _, site = choose_site(task["id"], fault, seed, sites(task, fault), site)
    if site is None:
        return None
    commands = quests.walkthrough(task)
    right = commands[site]
    wrong = {
        "dropped_command": LOOK,
        "unknown_command": f"achieve {right}",
        "several_commands": f"{right}\n{LOOK}",
        "wrong_object": f"{right.split()[0]} the golden lantern",
    }[fault]
    commands[site] = wrong
    return Script((*commands, *[LOOK] * max(0, task["limit"] - len(commands))), fault, site + 1)
