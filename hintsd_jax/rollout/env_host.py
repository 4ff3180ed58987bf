# SPDX-License-Identifier: Apache-2.0

"""Where environments live: a `Host` makes workers, and a worker makes the calls of one environment, one at a time.

`ThreadHost` keeps the environment in a thread of the trainer's process.

Invariants: no environment can end or hang the run. Whatever it raises, SystemExit included, and whatever it returns
that the protocol does not allow, comes back as a value. After a time-out, also one that it raises itself
(`CallTimeout`), the object is never touched again; after an error it is closed and given up. Threads are daemons: one
that hangs does not keep the interpreter alive; too many of them are refused.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from hintsd_jax.envs.base import Environment
from hintsd_jax.envs.protocol import checked
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.env_call import ENV_ERROR, NOT_REPEATABLE, Call, CallFailure

MAX_HUNG_THREADS = 256

BeginClose = Callable[[Call], Call]
"""The call that stands for closing an environment after this call of it has failed; asked before anybody sees that."""


class Home(Protocol):
    """One environment, wherever it is. `EnvWorker` alone calls it, from one thread. pid: of its process."""

    pid: int

    def open(self) -> CallFailure | None:
        """Makes ready what a call needs; its time counts for no call."""

    def call(self, call: Call) -> Any:
        """The checked value of a call, or a CallFailure; a "close" of what was never made is None. May take longer than
        the call's limit.
        """

    def leave(self) -> None:
        """Lets go of it: after its close, or where it is not to be touched again."""


class Worker(Protocol):
    """Makes the calls of one environment, one after the other."""

    def submit(self, call: Call, after: Call | None = None) -> Call:
        """Starts a call, once `after` is over. One that is settled already ends this worker, as its failure did the
        first time.

        Raises:
          ValueError: another call is running.
        """
        ...

    def give_up(self, closing: Call) -> None:
        """Makes this call, a "close", once the one that is running is over, unless that fails: nobody asks for either
        result, and no other call follows.
        """
        ...

    @property
    def usable(self) -> bool:
        """False once a call has failed."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a call is running."""
        ...


class Host(Protocol):
    """Makes workers. Usable from one thread."""

    def worker(self, begin_close: BeginClose, name: str) -> Worker:
        """A worker with an environment that is made with its first call.

        Raises:
          UserError: no more can be made (see `ThreadHost`).
        """
        ...

    def close(self) -> None:
        """Lets go of everything. The host may be used again."""


class EnvWorker:
    """A daemon thread that alone touches one environment, from its making to its close.

    After an error it closes the environment itself.
    """

    def __init__(self, home: Home, begin_close: BeginClose, name: str = "env"):
        self._calls: queue.SimpleQueue[tuple[Call, Call | None]] = queue.SimpleQueue()
        self._last: Call | None = None
        self._home, self._begin_close = home, begin_close
        self.thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self.thread.start()

    @property
    def usable(self) -> bool:
        """See `Worker`."""
        return self._last is None or not self._last.failed

    @property
    def busy(self) -> bool:
        """See `Worker`."""
        return self._last is not None and not self._last.done

    @property
    def pid(self) -> int:
        """Of the process that the environment is in."""
        return self._home.pid

    def submit(self, call: Call, after: Call | None = None) -> Call:
        """See `Worker`."""
        if self._last is not None and not self._last.done:
            raise ValueError(f"{call.method} submitted while {self._last.method} is running")
        if self.usable:
            self._last = call
            self._calls.put((call, after))
        else:
            call.settle(CallFailure(ENV_ERROR, f"{call.method} after the environment had failed"))
        return call

    def give_up(self, closing: Call) -> None:
        """See `Worker`."""
        self._calls.put((closing, None))

    def _serve(self) -> None:
        opened = False
        try:
            while True:
                call, after = self._calls.get()
                if after is not None:
                    after.result()
                if call.done:
                    return  # it has failed before the environment could be called
                if not opened and (problem := self._home.open()):
                    call.settle(problem)
                    return
                opened = True
                call.begin()
                if not self._finish(call, self._home.call(call)):
                    return
        finally:
            self._home.leave()

    def _finish(self, call: Call, value: Any) -> bool:
        """Settles a call; returns whether the environment is kept."""
        if not isinstance(value, CallFailure):
            return call.settle(value) and call.method != "close"  # too late: the host has given this environment up
        must_close = call.method != "close" and value.reason not in NOT_REPEATABLE
        closing = self._begin_close(call) if must_close else None
        counts = call.settle(value)
        if closing is not None and not closing.done:
            closing.begin()
            problem = self._home.call(closing) if counts else None
            if isinstance(problem, CallFailure):
                problem = replace(problem, detail=f"close after an error: {problem.detail}")
            closing.settle(problem)
        return False


class _Object:
    """An environment as an object of this process."""

    def __init__(self, make_env: Callable[[], Environment]):
        self.pid = os.getpid()
        self._make_env = make_env
        self._env: Environment | None = None

    def open(self) -> None:
        """See `Home`: an object is made by its first call, so that a constructor that fails is a failed call too."""

    def call(self, call: Call) -> Any:
        """See `Home`."""
        try:
            if self._env is None:
                if call.method == "close":
                    return None
                self._env = self._make_env()
            return checked(call.method, getattr(self._env, call.method)(*map(_copied, call.args)), call.steps)
        except BaseException as error:  # SystemExit and KeyboardInterrupt of an environment are its own affair
            return CallFailure.of(error)

    def leave(self) -> None:
        """See `Home`."""
        self._env = None


class ThreadHost:
    """Environments as objects of this process, each in a thread of its own; `make_env()` builds one, in its thread.

    A call that hangs keeps its thread for good: after MAX_HUNG_THREADS of them `worker` raises UserError.
    """

    def __init__(self, make_env: Callable[[], Environment]):
        self._make_env = make_env
        self._workers: list[EnvWorker] = []

    def worker(self, begin_close: BeginClose, name: str) -> EnvWorker:
        """See `Host`."""
        self._workers = [worker for worker in self._workers if worker.thread.is_alive()]
        hung = sum(not worker.usable for worker in self._workers)
        if hung > MAX_HUNG_THREADS:
            raise UserError(
                f"{hung} calls of the environment hang beyond env.call_timeout_s, and a thread cannot be ended: use"
                " --config.env.isolation=process, which kills such calls"
            )
        worker = EnvWorker(_Object(self._make_env), begin_close, name)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        """See `Host`: threads end with their environment's close."""


def _copied(value: Any) -> Any:
    """A copy of a task's mappings and lists, so that what an environment writes into it stays its own."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
