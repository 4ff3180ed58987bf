"""What a scripted agent does in an episode: known actions, with a known fault or none. Each environment's own module writes them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Script:
    """`actions`: one text a step. `fault`: a kind of the environment's `FAULTS`, and `step` the 1-based step in which it happens; "" and 0
    for none."""

    actions: tuple[str, ...]
    fault: str = ""
    step: int = 0
