# SPDX-License-Identifier: Apache-2.0

"""One key of the schema: its default, its meaning and what it may be; checks, messages and the reference read it."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from hintsd_jax.errors import UserError

_SHOWN = 160  # characters of a value in a message


@dataclasses.dataclass(frozen=True)
class Key:
    """meaning: one line. interval: "[0, 1)" of a number ("inf" bounds are open), or of each number of a tuple.
    choices: of a text, or of each text of a tuple. by_algorithm: None in a config means "as the algorithm decides".
    open: may also be a path "package.module:name", and a file of the kind `suffix`, where there is one. derived: 0, or
    an empty tuple, means "as `config.lengths` says". path: of a file or folder, where "~" is the home folder. remote:
    of one that may lie in a store, see `storage`.
    """

    meaning: str
    interval: str = ""
    choices: tuple[str, ...] = ()
    by_algorithm: bool = False
    open: bool = False
    derived: bool = False
    path: bool = False
    remote: bool = False
    suffix: str = ""


def key(default: Any, meaning: str, interval: str = "", **more: Any) -> Any:
    """A field of a section."""
    spec = Key(meaning, interval, **more)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"key": spec})
    return dataclasses.field(default=default, metadata={"key": spec})


def shown(value: Any) -> str:
    """A value as messages show it: its repr, cut where that is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a mapping that holds itself
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def expanded(path: str, name: str) -> str:
    """A path with the home folder in place of a leading "~". Raises UserError where the system knows no such user.

    name: of the key or flag that holds it.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise UserError(f"{name} = {shown(path)} names the home folder of nobody: write ./~... for a name with a ~")
    return whole


def inside(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "(0, 1]"; NaN lies in none."""
    try:
        value = float(value)
    except OverflowError:  # a whole number beyond all floats
        return False
    if math.isnan(value):
        return False
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below
