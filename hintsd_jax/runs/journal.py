# SPDX-License-Identifier: Apache-2.0

"""Answers of the outside world: a key and a JSON value flow in, and come out again when a killed run repeats the step.

A step is computed again from its checkpoint, and everything that it computes comes out as before. What the outside
world answered does not: whether an environment answered in time, what an endpoint replied. Such an answer is written
here first and acted on second.

Invariant: an answer that anything was built on is on disk, under one key once. Journals are never cut back: a resumed
run reads those of the steps that it repeats, the others stay as a record. A run that writes nothing leaves no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

from hintsd_jax.errors import UserError
from hintsd_jax.jsonl import read_jsonl
from hintsd_jax.storage import Appended, exists, located, read_range, size

Key = tuple[str | int, ...]
_ANSWER = "an answer written by this program"


class Journal:
    """The answers of one step, one file: `{"key": [...], "value": ..., "sum": ...}` a line. Safe to use from several
    threads.

    A torn last line, left by a kill, is no answer: nothing had been built on it. It is cut off before the next answer
    is written.

    Args:
      path: the file; it and its folder are created with the first answer.
      others: files of answers that are read only: of the run's other processes, which may have had other shares.

    Raises:
      UserError: another line is not what was written, by its sum.
    """

    def __init__(self, path: str | os.PathLike, others: Sequence[str | os.PathLike] = ()):
        self.path = located(path)
        self._lock = threading.Lock()
        self._answers: dict[Key, Any] = {}
        whole = 0  # bytes of whole lines
        for other in others:
            self._answers |= dict(line.value for line in read_jsonl(other, _ANSWER, _answer))
        for line in read_jsonl(self.path, _ANSWER, _answer):
            key, value = line.value
            self._answers[key] = value
            whole = line.end
        self._check_torn(whole)
        self._file = Appended(self.path, keep=whole)

    def _check_torn(self, whole: int) -> None:
        """A kill leaves the beginning of a line. A whole one with something else than a newline was an answer."""
        torn = read_range(self.path, whole, size(self.path)) if exists(self.path) else b""
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            _answer(json.loads(torn[:-1]))
            raise UserError(f"the last line of {self.path} has lost its end: mend or remove the file")

    def get(self, *key: str | int, default: Any = None) -> Any:
        """The JSON value under `key`, written by this process or an earlier one."""
        with self._lock:
            return self._answers.get(key, default)

    def put(self, *key: str | int, value: Any) -> None:
        """Writes a JSON value under a new key; on return it is on disk.

        Raises:
          ValueError: the key has a value already, or the value is not JSON.
          UserError: the disk refuses it.
        """
        text = json.dumps({"key": key, "value": value}, allow_nan=False)
        line = f'{text[:-1]}, "sum": "{_sum(json.loads(text))}"}}\n'.encode()
        with self._lock:
            if key in self._answers:
                raise ValueError(f"{self.path} has an answer for {key} already")
            self._file.write(line)
            self._answers[key] = json.loads(line)["value"]  # as a resumed run will read it: tuples are lists


def _answer(entry: Any) -> tuple[Key, Any]:
    key = tuple(entry["key"])
    hash(key)  # TypeError where a part of it is a list
    if entry.pop("sum") != _sum(entry):
        raise ValueError("it is not what was written")
    return key, entry["value"]


def _sum(entry: Any) -> str:
    """Of a line's JSON without its sum, 16 hexadecimal digits: an answer that a disk has changed is none."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]
