"""What a scripted agent does in an episode: known actions, with a known fault or none. Each environment's own module
writes them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Site = TypeVar("Site")


@dataclass(frozen=True)
class Script:
    """`actions`: one text a step. `fault`: a kind of the environment's `FAULTS`, and `step` the 1-based step in which
    it happens; "" and 0 for none."""

    actions: tuple[str, ...]
    fault: str = ""
    step: int = 0


def choose_site(
    task_id: str, fault: str, seed: int, known: Sequence[Site], site: Site | None
) -> tuple[random.Random, Site | None]:
    """The script's own random numbers, and where its fault goes: at `site`, or at one of the `known` that the seed
    draws; None without any.

    Raises ValueError for a site that is not known.
    """
    rng = random.Random(f"{seed} {task_id} {fault}")
    if site is None:
        return rng, rng.choice(known) if known else None
    if site not in known:
        raise ValueError(f"{task_id} has no place for {fault} at {site}")
    return rng, site
