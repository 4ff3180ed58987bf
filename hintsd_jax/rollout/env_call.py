# SPDX-License-Identifier: Apache-2.0

"""One call of an environment: a method and its arguments flow in, a value or a `CallFailure` flows out, in time.

The clock of a call starts when a worker begins it (`begin`), not when it is queued. Whether it was in time depends on
its own duration, not on when its result is collected.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hintsd_jax.envs.base import CallTimeout
from hintsd_jax.envs.protocol import ProtocolError
from hintsd_jax.runs import interruption
from hintsd_jax.texts import described, encodable

ENV_ERROR, ENV_TIMEOUT, ENV_DIED = "env_error", "env_timeout", "env_died"
# What depends on the clock, or on the memory that was free: a step that is done again may find it otherwise.
NOT_REPEATABLE = (ENV_TIMEOUT, ENV_DIED)
MAX_TRACEBACK = 4_000  # characters

T = TypeVar("T")


@dataclass(frozen=True)
class CallFailure:
    """A call that gave no value.

    reason: ENV_ERROR, ENV_TIMEOUT or ENV_DIED (its process ended or was killed). detail: one line for people.
    traceback: the whole text, for a file; its last MAX_TRACEBACK characters.
    """

    reason: str
    detail: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> CallFailure:
        """What an environment raised: ENV_TIMEOUT for a `CallTimeout`, else ENV_ERROR."""
        reason = ENV_TIMEOUT if isinstance(error, CallTimeout) else ENV_ERROR
        return cls(reason, described(error, with_place=not isinstance(error, ProtocolError)), _whole(error))


class Call(Generic[T]):
    """A call under way, of a method that gives a T. `result()` may be called more than once, from several threads, and
    always gives the same. steps: that the episode has had.

    `on_failure(failure)` is called for a failure that is NOT_REPEATABLE, once, before `result()` gives it.
    """

    def __init__(
        self,
        method: str,
        args: tuple[Any, ...],
        limit_seconds: float,
        on_failure: Callable[[CallFailure], None] | None = None,
        steps: int = 0,
    ):
        self.method, self.args, self.steps = method, args, steps
        self._on_failure = on_failure
        self.limit_seconds = limit_seconds
        self._begun_at = 0.0
        self._begun, self._finished = threading.Event(), threading.Event()
        self._lock, self._noting = threading.Lock(), threading.Lock()
        self._value: Any = None

    def begin(self) -> None:
        """Starts the clock, once: called by the worker when it turns to this call."""
        with self._lock:
            if not self._begun.is_set():
                self._begun_at = time.monotonic()
                self._begun.set()

    def result(self) -> T | CallFailure:
        """Blocks until there is a value or the limit is over. Raises Interrupted as `interruption.wait` does."""
        interruption.wait(self._begun)
        if not interruption.wait(self._finished, max(0.0, self._begun_at + self.limit_seconds - time.monotonic())):
            self.settle(self.timeout())
        with self._noting:
            if self._on_failure and isinstance(self._value, CallFailure) and self._value.reason in NOT_REPEATABLE:
                self._on_failure(self._value)
            self._on_failure = None
        return self._value

    def settle(self, value: Any) -> bool:
        """Gives the call its value, once. Returns whether this value counts: not where it comes after the limit."""
        with self._lock:
            if self._finished.is_set():
                return False
            late = self._begun.is_set() and time.monotonic() - self._begun_at > self.limit_seconds
            self._value = self.timeout() if late else value
            self._finished.set()
            self._begun.set()
            return not late

    @property
    def done(self) -> bool:
        """Whether `result()` would not block."""
        return self._finished.is_set()

    @property
    def failed(self) -> bool:
        """Whether it has ended in a CallFailure; False while it runs."""
        return self.done and isinstance(self._value, CallFailure)

    def timeout(self) -> CallFailure:
        """The failure of a call that takes longer than its limit."""
        return CallFailure(ENV_TIMEOUT, f"{self.method} took longer than {self.limit_seconds:g} s")


def _whole(error: BaseException) -> str:
    try:
        lines = _without_columns(traceback.TracebackException.from_exception(error)).format()
        text = "".join(lines)
    except BaseException:  # as above, for the causes of the error too
        text = described(error) + "\n"
    return encodable(text[-MAX_TRACEBACK:])


def _without_columns(error: traceback.TracebackException) -> traceback.TracebackException:
    """Columns are underlined with the help of `ast`, which Python 3.11 cannot use in two threads at once."""
    pending: list[traceback.TracebackException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None:
            pending += [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]
            for frame in each.stack:
                frame.colno = frame.end_colno = None
    return error
