# SPDX-License-Identifier: Apache-2.0

"""Files of one JSON value a line, as a run appends them: a path flows in, parsed lines flow out.

Invariant: a last line without a newline was torn by a kill and is no line; any other broken line is an error that names
file and line. A file that is not there has no lines. Lines are read one at a time, so a file may be larger than memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from hintsd_jax.errors import UserError

T = TypeVar("T")


class Line(NamedTuple, Generic[T]):
    """number: from 1 on. value: what `parse` made of it. end: bytes of the file up to the end of this line."""

    number: int
    value: T
    end: int


def json_object(value: Any) -> dict[str, Any]:
    """The value itself. Raises TypeError where it is no JSON object."""
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__}, not an object")
    return value


def read_jsonl(
    path: str | os.PathLike, what: str = "a JSON object", parse: Callable[[Any], T] = json_object
) -> Iterator[Line[T]]:
    """Yields the whole lines of a file in order.

    Args:
      path: the file; where there is none, nothing is yielded.
      what: what a line should be, for the error message, such as "a metrics row".
      parse: takes the JSON value of a line and returns what it stands for; raises ValueError, KeyError or TypeError
        where the value is not `what`.

    Raises:
      UserError: the file cannot be read, or a line other than a torn last one is not `what`.
    """
    path = Path(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - the `with` below closes it
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    end = 0
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                value = parse(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} line {number} is not {what}: mend or remove the file") from error
            yield Line(number, value, end)
