# SPDX-License-Identifier: Apache-2.0

"""Environment calls beside the host loop: each environment in a thread of its own, with a time limit for every call.

`EnvPool.step(slot, action)` starts a call and returns a `Call`; `Call.result()` waits for it and gives the value,
checked by `envs.protocol`, or a `CallFailure`.

Invariants: no environment can end or hang the run. Whatever it raises, SystemExit included, and whatever it returns
that the protocol does not allow, comes back as a value. After a time-out, also one that it raises itself
(`CallTimeout`), the object is never touched again; after an error it is closed and given up; the slot gets another one
at its next "reset".
Threads are daemons: one that hangs does not keep the interpreter alive. Whether a call was in time depends on its own
duration, not on when its result is collected.

A time-out is the one result that depends on the clock. With a journal it is written down before anybody sees it; where
it is there already, because a run that was killed does a step again, the call fails at once and the environment is not
called.
"""

import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

from hintsd_jax.envs.base import Action, CallTimeout, Environment, Report, Start, StepResult
from hintsd_jax.envs.protocol import checked

ENV_ERROR, ENV_TIMEOUT = "env_error", "env_timeout"

Key = tuple[str | int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class CallFailure:
    """A call that gave no value. reason: ENV_ERROR or ENV_TIMEOUT. detail: one line for people."""

    reason: str
    detail: str


class TimeoutJournal(Protocol):
    """Where time-outs are kept, so that a step that is done again has the same ones (see `runs.journal.Journal`)."""

    def get(self, *key: str | int) -> Any:
        """The JSON value under a key, or None."""

    def put(self, *key: str | int, value: Any) -> None:
        """Keeps a JSON value under a new key; on return it is on disk."""


class Call(Generic[T]):
    """A call under way, of a method that gives a T. `result()` may be called more than once and always gives the same.

    `on_timeout(failure)` is called for a time-out, once, before `result()` gives it.
    """

    def __init__(
        self,
        method: str,
        args: tuple[Any, ...],
        limit_seconds: float,
        on_timeout: Callable[[CallFailure], None] | None = None,
    ):
        self.method, self.args = method, args
        self._on_timeout = on_timeout
        self._limit = limit_seconds
        self._submitted = time.monotonic()
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._value: Any = None

    def result(self) -> T | CallFailure:
        """Blocks until there is a value or the limit is over."""
        if not self._finished.wait(max(0.0, self._submitted + self._limit - time.monotonic())):
            self.settle(self._timeout())
        if self._on_timeout and isinstance(self._value, CallFailure) and self._value.reason == ENV_TIMEOUT:
            self._on_timeout(self._value)
            self._on_timeout = None
        return self._value

    def settle(self, value: Any) -> bool:
        """Gives the call its value, once. Returns whether this value counts: not where it comes after the limit."""
        with self._lock:
            if self._finished.is_set():
                return False
            late = time.monotonic() - self._submitted > self._limit
            self._value = self._timeout() if late else value
            self._finished.set()
            return not late

    @property
    def done(self) -> bool:
        """Whether `result()` would not block."""
        return self._finished.is_set()

    @property
    def failed(self) -> bool:
        """Whether it has ended in a CallFailure; False while it runs."""
        return self.done and isinstance(self._value, CallFailure)

    def _timeout(self) -> CallFailure:
        return CallFailure(ENV_TIMEOUT, f"{self.method} took longer than {self._limit:g} s")


class EnvWorker:
    """One environment object and the daemon thread that alone touches it, from its construction to its close.

    After an error it closes the object itself: `begin_close()` gives the call that this counts as, before anybody sees
    the error.
    """

    def __init__(self, make_env: Callable[[], Environment], begin_close: Callable[[], Call], name: str = "env"):
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._last: Call | None = None
        threading.Thread(target=self._serve, args=(make_env, begin_close), name=name, daemon=True).start()

    @property
    def usable(self) -> bool:
        """False once a call has failed."""
        return self._last is None or not self._last.failed

    @property
    def busy(self) -> bool:
        """Whether a call is running."""
        return self._last is not None and not self._last.done

    def submit(self, call: Call) -> Call:
        """Starts a call. One that is settled already ends this worker, as its failure did the first time.

        Raises:
          ValueError: another call is running.
        """
        if self._last is not None and not self._last.done:
            raise ValueError(f"{call.method} submitted while {self._last.method} is running")
        if self.usable:
            self._last = call
            self._calls.put(call)
        else:
            call.settle(CallFailure(ENV_ERROR, f"{call.method} after the environment had failed"))
        return call

    def _serve(self, make_env: Callable[[], Environment], begin_close: Callable[[], Call]) -> None:
        env = None
        while True:
            call = self._calls.get()
            if call.done:
                return  # it has failed before the environment could be called
            try:
                if env is None:
                    env = make_env()  # here, so that a constructor that hangs or fails is a failed call too
                value = checked(call.method, getattr(env, call.method)(*call.args))
            except BaseException as error:  # SystemExit and KeyboardInterrupt of an environment are its own affair
                reason = ENV_TIMEOUT if isinstance(error, CallTimeout) else ENV_ERROR
                must_close = env is not None and call.method != "close" and reason == ENV_ERROR
                closing = begin_close() if must_close else None
                counts = call.settle(CallFailure(reason, _describe(error)))
                if env is not None and closing is not None and not closing.done:
                    closing.settle(_close_after_error(env) if counts else None)
                return
            if not call.settle(value) or call.method == "close":
                return  # too late, and the host has given this environment up; or closed


class EnvPool:
    """`size` slots, one environment each; every call under the same limit in seconds.

    `make_env()` builds an environment, in the slot's thread. A slot keeps its environment through resets; after a
    failure its next "reset" builds another. Call `close()` at the end, or use the pool in a `with` statement.

    `journal` keeps time-outs under `(*slot_keys[slot], call)`, where the call is "reset", "step 1", "step 2", ...,
    "report" or "close": the keys must tell the slots apart, and the episodes of a slot too if it is reset several
    times.

    Raises ValueError for a size below 1 or a limit that is not positive.
    """

    def __init__(
        self,
        make_env: Callable[[], Environment],
        size: int,
        limit_seconds: float,
        journal: TimeoutJournal | None = None,
        slot_keys: Sequence[Key] = (),
    ):
        if size < 1 or not limit_seconds > 0:
            raise ValueError(f"a pool of {size} environments with a limit of {limit_seconds} s")
        self._make_env, self._limit = make_env, float(limit_seconds)
        self._journal, self._slot_keys = journal, slot_keys
        self._workers: list[EnvWorker | None] = [None] * size
        self._steps = [0] * size
        self._closings: list[Call] = []  # of environments that failed

    def reset(self, slot: int, task: Mapping[str, Any]) -> Call[Start]:
        """Begins an episode on a slot.

        Raises:
          ValueError: a call of this slot is still running.
        """
        worker = self._workers[slot]
        if worker is None or not worker.usable:
            begin_close = lambda: self._begin_close(slot)
            worker = self._workers[slot] = EnvWorker(self._make_env, begin_close, name=f"env-{slot}")
        self._steps[slot] = 0
        return worker.submit(self._call(slot, "reset", task))

    def step(self, slot: int, action: Action) -> Call[StepResult]:
        """Applies an action on a slot.

        Raises:
          ValueError: the slot was not reset, or a call of it is still running.
        """
        worker = self._worker(slot, "step")
        self._steps[slot] += 1
        return worker.submit(self._call(slot, "step", action))

    def report(self, slot: int) -> Call[Report]:
        """Asks for the report of a slot's episode. Raises as `step` does."""
        return self._worker(slot, "report").submit(self._call(slot, "report"))

    def close(self) -> list[CallFailure]:
        """Closes, all at once, every environment that has not failed and is not in a call.

        Returns what failed in closing, after an error too, to be counted. Blocks for one limit at most; the pool may be
        used again afterwards.
        """
        workers = [
            (slot, worker)
            for slot, worker in enumerate(self._workers)
            if worker is not None and worker.usable and not worker.busy
        ]
        self._workers = [None] * len(self._workers)
        calls, self._closings = self._closings, []
        calls += [worker.submit(self._call(slot, "close")) for slot, worker in workers]
        return [result for result in [call.result() for call in calls] if isinstance(result, CallFailure)]

    def _begin_close(self, slot: int) -> Call:
        call = self._call(slot, "close")
        self._closings.append(call)
        return call

    def _worker(self, slot: int, method: str) -> EnvWorker:
        worker = self._workers[slot]
        if worker is None:
            raise ValueError(f"{method} on slot {slot} before its reset")
        return worker

    def _call(self, slot: int, method: str, *args: Any) -> Call:
        """A call of this slot; settled where the journal has a time-out for it."""
        journal = self._journal
        if journal is None:
            return Call(method, args, self._limit)
        key = (*self._slot_keys[slot], f"step {self._steps[slot]}" if method == "step" else method)
        timeout = journal.get(*key)
        if timeout is None:
            return Call(method, args, self._limit, lambda failure: journal.put(*key, value=asdict(failure)))
        call = Call(method, args, self._limit)
        call.settle(CallFailure(**timeout))
        return call

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close_after_error(env: Environment) -> CallFailure | None:
    try:
        env.close()
    except BaseException as error:
        return CallFailure(ENV_ERROR, f"close after an error: {_describe(error)}")
    return None


def _describe(error: BaseException) -> str:
    """One line: type, message, and the innermost place."""
    try:
        message = " ".join(str(error).split())[:300]
    except BaseException as second:  # a __str__ that fails must not hide the failure that it belongs to
        message = f"(its message cannot be read: {type(second).__name__})"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{place}"
