"""Environment calls beside the host loop: each environment in a thread of its own, with a time limit per call.

Flows: `EnvPool.submit(slot, "step", action)` starts a call and returns a `Call`; `Call.result()` waits for it and
gives the checked value, or a `Failure` (reason "env_error" or "env_timeout", and one line of detail).

Invariants: no environment can end or hang the run. Whatever it raises, SystemExit included, and whatever it
returns that is not in the protocol, comes back as a value. After a time-out, also one that it tells itself
(`CallTimeout`), the object is never touched again; after an error it is closed and left; the slot gets a fresh one at
its next "reset". Threads are
daemons: one that hangs does not keep the interpreter. The verdict on a call depends on its own duration, not on when
its result is collected.

A time-out is the one answer that depends on the clock. With `answers` (a run's journal) it is put down before anybody
learns of it; where it is there already, because a killed run is done again, the call fails at once and the environment
is not called.
"""

import json
import math
import numbers
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from hintsd_jax.envs.base import CallTimeout, Environment, Fault, Message, Report, Start, StepResult

ENV_ERROR, ENV_TIMEOUT = "env_error", "env_timeout"


@dataclass(frozen=True)
class Failure:
    """A call that gave no value: `reason` is ENV_ERROR or ENV_TIMEOUT, `detail` one line for people."""

    reason: str
    detail: str


class Answers(Protocol):
    """Where time-outs are kept (see `runs.journal.Journal`)."""

    def get(self, *key: str | int) -> Any: ...

    def put(self, *key: str | int, value: Any) -> None: ...


class Call:
    """A call under way. `result()` may be asked more than once and always says the same.

    `keep(failure)` is called with a time-out, once, before `result()` tells it.
    """

    def __init__(self, method: str, args: tuple, limit_seconds: float, keep: Callable[[Failure], None] | None = None):
        self.method, self.args = method, args
        self._keep = keep
        self._limit = limit_seconds
        self._submitted = time.monotonic()
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._value: Any = None

    def result(self) -> Start | StepResult | Report | None | Failure:
        """Blocks until the value is there or the limit is over. (None: the value of "close".)"""
        if not self._finished.wait(max(0.0, self._submitted + self._limit - time.monotonic())):
            self.settle(self._timeout())
        if self._keep and isinstance(self._value, Failure) and self._value.reason == ENV_TIMEOUT:
            self._keep(self._value)
            self._keep = None
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

    After an error it closes the object itself: `begin_close()` gives the call that this counts as, before the error is
    told.
    """

    def __init__(self, make: Callable[[], Environment], begin_close: Callable[[], Call], name: str = "env"):
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._last: Call | None = None
        threading.Thread(target=self._serve, args=(make, begin_close), name=name, daemon=True).start()

    @property
    def usable(self) -> bool:
        """False once a call failed."""
        return self._last is None or not self._last.failed

    @property
    def busy(self) -> bool:
        """Whether a call is running."""
        return self._last is not None and not self._last.done

    def submit(self, call: Call) -> Call:
        """Starts a call. One that is settled already ends this worker, as its failure did the first time.

        Raises ValueError while another call is running.
        """
        if self.busy:
            raise ValueError(f"{call.method} submitted while {self._last.method} is running")
        if self.usable:
            self._last = call
            self._calls.put(call)
        else:
            call.settle(Failure(ENV_ERROR, f"{call.method} after the environment had failed"))
        return call

    def _serve(self, make: Callable[[], Environment], begin_close: Callable[[], Call]) -> None:
        env = None
        while True:
            call = self._calls.get()
            if call.done:
                return  # it has failed before the environment could be called
            try:
                if env is None:
                    env = make()  # here, so that a constructor that hangs or fails is a failed call too
                value = _CHECKS[call.method](getattr(env, call.method)(*call.args))
            except BaseException as error:  # SystemExit and KeyboardInterrupt of an environment are its own affair
                reason = ENV_TIMEOUT if isinstance(error, CallTimeout) else ENV_ERROR
                closing = begin_close() if env is not None and call.method != "close" and reason == ENV_ERROR else None
                stands = call.settle(Failure(reason, _describe(error)))
                if closing is not None and not closing.done:
                    closing.settle(_close_after_error(env) if stands else None)
                return
            if not call.settle(value) or call.method == "close":
                return  # too late: the host has given this environment up; or closed


class EnvPool:
    """`size` slots, one environment each; every call under the same limit in seconds.

    `make()` builds an environment, in the slot's thread. A slot keeps its environment through resets; after a
    failure its next "reset" builds another. `close()` at the end, or use the pool in a `with` statement.

    `answers` keeps time-outs under `(*names[slot], call)`, the call being "reset", "step 1", "step 2", ..., "report" or
    "close": names must tell the slots apart, and a slot's episodes too if it is reset more than once.
    """

    def __init__(
        self,
        make: Callable[[], Environment],
        size: int,
        limit_seconds: float,
        answers: Answers | None = None,
        names: Sequence[tuple[str | int, ...]] = (),
    ):
        if size < 1 or not limit_seconds > 0:
            raise ValueError(f"a pool of {size} environments with a limit of {limit_seconds} s")
        self._make, self._limit = make, float(limit_seconds)
        self._answers, self._names = answers, names
        self._workers: list[EnvWorker | None] = [None] * size
        self._steps = [0] * size
        self._closings: list[Call] = []  # of environments that failed

    def submit(self, slot: int, method: str, *args: Any) -> Call:
        """Starts "reset"(task), "step"(action) or "report"() on a slot. One call at a time per slot."""
        if method not in ("reset", "step", "report"):
            raise ValueError(f"no environment call {method!r}")
        worker = self._workers[slot]
        if method == "reset" and (worker is None or not worker.usable):
            worker = self._workers[slot] = EnvWorker(self._make, lambda: self._begin_close(slot), name=f"env-{slot}")
        if worker is None:
            raise ValueError(f"{method} on slot {slot} before its reset")
        self._steps[slot] = 0 if method == "reset" else self._steps[slot] + (method == "step")
        return worker.submit(self._call(slot, method, args))

    def close(self) -> list[Failure]:
        """Closes, all at once, every environment that has not failed and is not in a call; returns what went wrong in
        closing, after an error too, to be counted. Blocks for one limit at most; the pool may be used again
        afterwards."""
        workers = [
            (slot, worker)
            for slot, worker in enumerate(self._workers)
            if worker is not None and worker.usable and not worker.busy
        ]
        self._workers = [None] * len(self._workers)
        calls, self._closings = self._closings, []
        calls += [worker.submit(self._call(slot, "close", ())) for slot, worker in workers]
        return [result for result in [call.result() for call in calls] if isinstance(result, Failure)]

    def _begin_close(self, slot: int) -> Call:
        call = self._call(slot, "close", ())
        self._closings.append(call)
        return call

    def _call(self, slot: int, method: str, args: tuple) -> Call:
        """A call of this slot; settled where a time-out is known for it."""
        if self._answers is None:
            return Call(method, args, self._limit)
        key = (*self._names[slot], f"step {self._steps[slot]}" if method == "step" else method)
        known = self._answers.get(*key)
        if known is None:
            return Call(method, args, self._limit, lambda failure: self._answers.put(*key, value=asdict(failure)))
        call = Call(method, args, self._limit)
        call.settle(Failure(**known))
        return call

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close_after_error(env: Environment) -> Failure | None:
    try:
        env.close()
    except BaseException as error:
        return Failure(ENV_ERROR, f"close after an error: {_describe(error)}")
    return None


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
    return Start(messages, _check_tools(value.tools))


def _check_turn(value: Any) -> StepResult:
    _expect(isinstance(value, StepResult), f"step returned {type(value).__name__}, not a StepResult")
    messages = _check_messages(value.messages, ("user", "tool"))
    real = isinstance(value.reward, numbers.Real) and math.isfinite(value.reward)
    _expect(real, f"the reward is {value.reward!r}, not a finite number")
    turn = StepResult(
        messages, float(value.reward), bool(value.terminated), bool(value.truncated), _check_tools(value.tools)
    )
    _expect(messages or turn.terminated or turn.truncated, "a turn without messages must end the episode")
    return turn


def _check_report(value: Any) -> Report:
    _expect(isinstance(value, Report), f"report returned {type(value).__name__}, not a Report")
    _expect(isinstance(value.summary, str), "the report's summary is not text")
    valid_turns = tuple(value.valid_turns)
    _expect(
        all(type(valid) is bool for valid in valid_turns), f"the report's valid_turns are {valid_turns!r}, not bools"
    )
    if value.faults is None:
        return Report(value.summary, None, valid_turns)
    for fault in value.faults:
        right = (
            isinstance(fault, Fault) and type(fault.step) is int and fault.step >= 1 and isinstance(fault.feedback, str)
        )
        _expect(right, f"the report holds {fault!r}, not a Fault with a step from 1 on and text")
    return Report(value.summary, tuple(value.faults), valid_turns)


def _check_tools(tools: Iterable[Any]) -> tuple[dict[str, Any], ...]:
    try:
        checked = tuple(json.loads(json.dumps(tool, allow_nan=False)) for tool in tools)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"the tools are not JSON: {error}") from error
    _expect(all(isinstance(tool, dict) for tool in checked), "each tool must be a JSON object")
    return checked


def _check_messages(messages: Iterable[Any], roles: tuple[str, ...]) -> tuple[Message, ...]:
    checked = []
    for message in messages:
        _expect(isinstance(message, dict), f"a message is {type(message).__name__}, not a dict")
        role, content = message.get("role"), message.get("content")
        _expect(role in roles, f"a message has the role {role!r}: use {', '.join(roles)}")
        _expect(isinstance(content, str), f"a message's content is {type(content).__name__}, not text")
        # half of a surrogate pair is a str that no tokenizer takes
        _expect(
            content.isascii() or content == content.encode("utf-8", "replace").decode(), "a message is not Unicode text"
        )
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
