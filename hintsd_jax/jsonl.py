# SPDX-License-Identifier: Apache-2.0

"""JSON files of a run: a path flows in, one value, or the values of its lines as a run appends them, flow out.

Invariant: a last line without a newline was torn by a kill and is no line; whatever else is broken is a UserError that
names file and line. Lines are read one at a time, so a file on a disk may be larger than memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import IO, Any, Generic, NamedTuple, TypeVar

from hintsd_jax.errors import UserError, reason
from hintsd_jax.storage import AnyPath, located, open_file

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


def read_object(path: str | os.PathLike, what: str = "a JSON object") -> dict[str, Any] | None:
    """A file that holds one JSON object; None where there is no file.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    path = located(path)
    file = open_file(path)
    if file is None:
        return None
    with file:
        try:
            return json_object(json.loads(_bytes(file, path)))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is not {what} ({reason(error)}): mend or remove it") from error


def _bytes(file: IO[bytes], path: AnyPath) -> bytes:
    try:
        return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)})") from error


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
      UserError: as `storage.open_file`, or a line other than a torn last one is not `what`.
    """
    path = located(path)
    file = open_file(path)
    if file is None:
        return
    end = 0
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                value = parse(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not {what}: mend or remove the file") from error
            yield Line(number, value, end)
