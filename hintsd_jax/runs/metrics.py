# SPDX-License-Identifier: Apache-2.0

"""Numbers of a run: one mapping a step flows in, one line of `metrics.jsonl` and TensorBoard events flow out.

Invariant: after a resume at step s the file has exactly the rows of steps <= s, so a run that was killed and continued
ends with the file of one that never was. For that, write the row of a step *before* its checkpoint is saved.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from hintsd_jax.errors import UserError
from hintsd_jax.jsonl import json_object, read_jsonl
from hintsd_jax.runs.event_file import EventFile
from hintsd_jax.storage import Appended, is_remote, located, whole_file

NONFINITE = "metrics/nonfinite"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class MetricsWriter:
    """Appends rows to `directory/metrics.jsonl` and TensorBoard events under `directory/tensorboard`.

    Args:
      directory: the workdir.
      resume_step: the step whose checkpoint was restored: later rows are cut off. None (a new start): all are.
      digest: of the rows up to that step, as `digest` was then; None where that is not known.
      tensorboard: whether TensorBoard gets them.

    Attributes:
      kept: the rows that were there.

    Raises:
      UserError: `metrics.jsonl` has a line, other than a torn last one, that is not a row, or rows that are not those
        that were written, or cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        resume_step: int | None = None,
        digest: str | None = None,
        tensorboard: bool = True,
    ):
        folder = located(directory)
        path = folder / "metrics.jsonl"
        kept = [] if resume_step is None else [row for row in read_metrics(path) if row["step"] <= resume_step]
        steps = [row["step"] for row in kept]
        if any(later <= step for step, later in itertools.pairwise(steps)):
            raise UserError(f"{path} holds the steps {steps[:20]}, which do not grow: mend or remove it")
        self._written = hashlib.sha256(b"".join(map(_line, kept)))
        if digest is not None and digest != self.digest:
            lacking = sorted(set(range((resume_step or 0) + 1)) - set(steps))
            what = f"lacks the rows of {len(lacking)} steps, the first {lacking[0]}" if lacking else "has other rows"
            raise UserError(
                f"{path} {what} than when step {resume_step} was saved: put it back as it was; or begin a new run, in"
                f" another --workdir, from the weights of this one: --config.fork.path={folder}"
            )
        with whole_file(path) as file:
            file.writelines(map(_line, kept))
        self._file, self.kept = Appended(path), kept
        # purge_step hides the events of the steps that are repeated.
        purge_step = None if resume_step is None else resume_step + 1
        purge_step = 0 if kept and is_remote(folder) else purge_step
        self._board = EventFile(folder / "tensorboard", purge_step) if tensorboard else None
        for row in kept if is_remote(folder) else ():
            self._show(row)

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, int | float | None]:
        """Writes one row: `step` first, then the keys in sorted order, floats as their shortest exact representation.

        NaN and infinities are not JSON: they are written as null and counted under `metrics/nonfinite`.

        Args:
          step: the optimizer step that the row belongs to.
          metrics: numbers, or zero-dimensional arrays (fetched from the device here).

        Returns:
          The row as written.

        Raises:
          TypeError: a value is not one number.
          UserError: the disk refuses it.
        """
        numbers = {key: _number(key, value) for key, value in jax.device_get(dict(metrics)).items()}
        bad = [key for key, value in numbers.items() if not math.isfinite(value)]
        row: dict[str, int | float | None] = {**numbers, **dict.fromkeys(bad)}
        if bad:
            row[NONFINITE] = len(bad)
        row = {"step": int(step), **{key: row[key] for key in sorted(row)}}
        self._file.write(_line(row))  # on disk when this returns: a checkpoint must never outlive its row
        self._written.update(_line(row))
        self._show(row)
        return row

    def _show(self, row: Mapping[str, Any]) -> None:
        if self._board is not None:
            self._board.write(row["step"], {key: row[key] for key in row if row[key] is not None and key != "step"})

    @property
    def digest(self) -> str:
        """Of all rows so far; it goes into the checkpoint that stands for them."""
        return self._written.hexdigest()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl` (no file: none). A torn last line, left by a kill, is no row.

    Raises:
      UserError: another line is broken.
    """
    return [line.value for line in read_jsonl(path, "a metrics row", _row)]


def _row(value: Any) -> dict[str, Any]:
    numbers = {key: number for key, number in json_object(value).items() if number is not None}
    if type(numbers["step"]) is not int or not all(type(number) in (int, float) for number in numbers.values()):
        raise TypeError("step is no integer, or something else no number")
    json.dumps(value, allow_nan=False)  # ValueError
    return value


class Timer:
    """Adds up seconds by name: `with timer("rollout"): ...`, then `timer.take()` -> {"time/rollout": seconds}."""

    def __init__(self):
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last `take`, by `time/<name>`; starts again from zero."""
        taken = {f"time/{name}": seconds for name, seconds in sorted(self._seconds.items())}
        self._seconds.clear()
        return taken


@functools.cache
def _compilations() -> list[float]:
    """The seconds of each of the process's compilations; the listener is registered at the first call, once."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **unused) -> None:
        if event == _COMPILE_EVENT:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def compile_count() -> int:
    """Programs that were compiled, or loaded from the persistent cache, since the first call of this function."""
    return len(_compilations())


def compile_seconds() -> float:
    """What that took, seconds."""
    return sum(_compilations())


def peak_bytes() -> int:
    """Highest memory in use so far, bytes: of the fullest local device; of the process on a CPU, which reports none."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    if peaks:
        return max(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _number(key: str, value: Any) -> int | float:
    """A Python number from a number or a zero-dimensional array; float32 becomes the float64 of the same value."""
    if isinstance(value, str) or getattr(value, "ndim", 0) != 0:
        raise TypeError(f"metric {key} is not one number: {value!r}")
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, int | float):
        raise TypeError(f"metric {key} is not one number: {value!r}")
    return value
