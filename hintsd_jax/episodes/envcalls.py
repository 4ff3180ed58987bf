"""Environment calls beside the host loop: each environment in a thread of its own, with a time limit per call.

Flows: `EnvPool.submit(slot, "step", action)` starts a call and returns a `Call`; `Call.result()` waits for it and
gives the checked value, or a `Failure` (reason "env_error" or "env_timeout", and one line of detail).

Invariants: no environment can end or hang the run. Whatever it raises, SystemExit included, and whatever it
returns that is not in the protocol, comes back as a value. After a time-out the object is never touched again; after an
error it is closed and left; the slot gets a fresh one at its next "reset". Threads are daemons: one that hangs does
not keep the interpreter. The verdict on a call depends on its own duration, not on when its result is collected.
"""

import json
import math
import numbers
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hintsd_jax.envs.base import Environment, Fault, Message, Report, Start, Turn

ENV_ERROR, ENV_TIMEOUT = "env_error", "env_timeout"


@dataclass(frozen=True)
class Failure:
    """A call that gave no value: `reason` is ENV_ERROR or ENV_TIMEOUT, `detail` one line for people."""

    reason: str
    detail: str


class Call:
    """A call under way. `result()` may be asked more than once and always says the same."""

    def __init__(self, method: str, args: tuple, limit_seconds: float):
        self.method, self.args = method, args
        self._limit = limit_seconds
        self._submitted = time.monotonic()
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._value: Any = None

    def result(self) -> Start | Turn | Report | None | Failure:
        """Blocks until the value is there or the limit is over. (None: the value of "close".)"""
        if not self._finished.wait(max(0.0, self._submitted + self._limit - time.monotonic())):
            self.settle(self._timeout())
        return self._value

    def settle(self, value: Any) -> bool:
        """Gives the call its value, once; whether this value stands. A value that comes after the limit does not."""
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
        """Whether it has ended in a Failure; False while it runs."""
        return self.done and isinstance(self._value, Failure)

    def _timeout(self) -> Failure:
        return Failure(ENV_TIMEOUT, f"{self.method} took longer than {self._limit:g} s")


class EnvWorker:
    """One environment object and the daemon thread that alone touches it, from its construction to its close.

    `close_failures` collects what closing after an error raised, since that call's own failure is already told.
    """

    def __init__(self, make: Callable[[], Environment], close_failures: list[Failure], name: str = "env"):
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._last: Call | None = None
        threading.Thread(target=self._serve, args=(make, close_failures), name=name, daemon=True).start()

    @property
    def usable(self) -> bool:
        """False once a call failed."""
        return self._last is None or not self._last.failed

    @property
    def busy(self) -> bool:
        """Whether a call is running."""
        return self._last is not None and not self._last.done

    def submit(self, method: str, args: tuple, limit_seconds: float) -> Call:
        """Starts `method(*args)`; the limit counts from now. Raises ValueError while another call is running."""
        if self.busy:
            raise ValueError(f"{method} submitted while {self._last.method} is running")
        call = Call(method, args, limit_seconds)
        if self.usable:
            self._last = call
            self._calls.put(call)
        else:
            call.settle(Failure(ENV_ERROR, f"{method} after the environment had failed"))
        return call

    def _serve(self, make: Callable[[], Environment], close_failures: list[Failure]) -> None:
        env = None
        while True:
            call = self._calls.get()
            try:
                if env is None:
                    env = make()  # here, so that a constructor that hangs or fails is a failed call too
                value = _CHECKS[call.method](getattr(env, call.method)(*call.args))
            except BaseException as error:  # SystemExit and KeyboardInterrupt of an environment are its own affair
                stands = call.settle(Failure(ENV_ERROR, _describe(error)))
                if stands and env is not None and call.method != "close":
                    _close_after_error(env, close_failures)
                return
            if not call.settle(value) or call.method == "close":
                return  # too late: the host has given this environment up; or closed


class EnvPool:
    """`size` slots, one environment each; every call under the same limit in seconds.

    `make()` builds an environment, in the slot's thread. A slot keeps its environment through resets; after a
    failure its next "reset" builds another. `close()` at the end, or use the pool in a `with` statement.
    """

    def __init__(self, make: Callable[[], Environment], size: int, limit_seconds: float):
        if size < 1 or not limit_seconds > 0:
            raise ValueError(f"a pool of {size} environments with a limit of {limit_seconds} s")
        self._make, self._limit = make, float(limit_seconds)
        self._workers: list[EnvWorker | None] = [None] * size
        self._close_failures: list[Failure] = []

    def submit(self, slot: int, method: str, *args: Any) -> Call:
        """Starts "reset"(task), "step"(action) or "report"() on a slot. One call at a time per slot."""
        if method not in ("reset", "step", "report"):
            raise ValueError(f"no environment call {method!r}")
        worker = self._workers[slot]
        if method == "reset" and (worker is None or not worker.usable):
            worker = self._workers[slot] = EnvWorker(self._make, self._close_failures, name=f"env-{slot}")
        if worker is None:
            raise ValueError(f"{method} on slot {slot} before its reset")
        return worker.submit(method, args, self._limit)

    def close(self) -> list[Failure]:
        """Closes, all at once, every environment that has not failed and is not in a call; returns what went wrong in closing,
        to be counted. Blocks for one limit at most; the pool may be used again afterwards."""
        workers = [worker for worker in self._workers if worker is not None and worker.usable and not worker.busy]
        self._workers = [None] * len(self._workers)
        results = [call.result() for call in [worker.submit("close", (), self._limit) for worker in workers]]
        earlier, self._close_failures = self._close_failures, []
        return earlier + [result for result in results if isinstance(result, Failure)]

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close_after_error(env: Environment, close_failures: list[Failure]) -> None:
    try:
        env.close()
    except BaseException as error:
        close_failures.append(Failure(ENV_ERROR, f"close after an error: {_describe(error)}"))


def _describe(error: BaseException) -> str:
    """One line: type, message, and the innermost place."""
    try:
        message = " ".join(str(error).split())[:300]
    except BaseException as second:  # a __str__ that fails must not hide the failure it belongs to
        message = f"(its message cannot be read: {type(second).__name__})"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{place}"


# What an environment returns is checked and copied here, so that neither a wrong type nor an object it changes
# later can reach the host loop.


class ProtocolError(Exception):
    """An environment returned something that is not in the protocol."""


def _check_start(value: Any) -> Start:
    _expect(isinstance(value, Start), f"reset returned {type(value).__name__}, not a Start")
    messages = _check_messages(value.messages, ("system", "user", "assistant", "tool"))
    _expect(messages, "reset returned no messages")
    _expect(all(m["role"] != "system" for m in messages[1:]), "a system message may only come first")
    try:
        tools = tuple(json.loads(json.dumps(tool, allow_nan=False)) for tool in value.tools)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"the tools are not JSON: {error}") from error
    _expect(all(isinstance(tool, dict) for tool in tools), "each tool must be a JSON object")
    return Start(messages, tools)


def _check_turn(value: Any) -> Turn:
    _expect(isinstance(value, Turn), f"step returned {type(value).__name__}, not a Turn")
    messages = _check_messages(value.messages, ("user", "tool"))
    real = isinstance(value.reward, numbers.Real) and math.isfinite(value.reward)
    _expect(real, f"the reward is {value.reward!r}, not a finite number")
    turn = Turn(messages, float(value.reward), bool(value.terminated), bool(value.truncated))
    _expect(messages or turn.terminated or turn.truncated, "a turn without messages must end the episode")
    return turn


def _check_report(value: Any) -> Report:
    _expect(isinstance(value, Report), f"report returned {type(value).__name__}, not a Report")
    _expect(isinstance(value.summary, str), "the report's summary is not text")
    if value.faults is None:
        return Report(value.summary)
    for fault in value.faults:
        right = isinstance(fault, Fault) and type(fault.step) is int and fault.step >= 1 and isinstance(fault.feedback, str)
        _expect(right, f"the report holds {fault!r}, not a Fault with a step from 1 on and text")
    return Report(value.summary, tuple(value.faults))


def _check_messages(messages: Iterable[Any], roles: tuple[str, ...]) -> tuple[Message, ...]:
    checked = []
    for message in messages:
        _expect(isinstance(message, dict), f"a message is {type(message).__name__}, not a dict")
        role, content = message.get("role"), message.get("content")
        _expect(role in roles, f"a message has the role {role!r}: use {', '.join(roles)}")
        _expect(isinstance(content, str), f"a message's content is {type(content).__name__}, not text")
        # half of a surrogate pair is a str that no tokenizer takes
        _expect(content.isascii() or content == content.encode("utf-8", "replace").decode(), "a message is not Unicode text")
        checked.append({"role": role, "content": content})
    return tuple(checked)


def _expect(condition: Any, complaint: str) -> None:
    if not condition:
        raise ProtocolError(complaint)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "reset": _check_start,
    "step": _check_turn,
    "report": _check_report,
    "close": lambda value: None,
}
