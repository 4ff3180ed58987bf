# SPDX-License-Identifier: Apache-2.0

"""Scripts, the known actions of a scripted policy in an episode, with one known fault or none: a task goes in, a script
comes out of each environment's own module.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Site = TypeVar("Site")


@dataclass(frozen=True)
class Script:
    """actions: one text a step. fault: a kind of the environment's `FAULTS`; step: the one in which it happens, from 1
    on. "" and 0 where there is none.
    """

    actions: tuple[str, ...]
    fault: str = ""
    step: int = 0


def choose_site(
    task_id: str, fault: str, seed: int, known: Sequence[Site], site: Site | None
) -> tuple[random.Random, Site | None]:
    """The script's own random numbers, and where its fault goes: at `site`, or at one of the `known` sites, drawn from
    the seed; None where none is known.

    Raises:
      ValueError: `site` is not among the known ones.
    """
    rng = random.Random(f"{seed} {task_id} {fault}")
    if site is None:
        return rng, rng.choice(known) if known else None
    if site not in known:
        raise ValueError(f"{task_id} has no place for {fault} at {site}")
    return rng, site
