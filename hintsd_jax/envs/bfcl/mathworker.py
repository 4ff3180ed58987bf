# SPDX-License-Identifier: Apache-2.0

"""MathAPI in a process of its own, because a call to it can hold Python's interpreter lock for hours: a thread could
not end it.

In: a tool's name and arguments. Out: the text of its result. `MathWorker.call` starts the process when it is first
needed, gives it one call at a time and kills it when a call takes too long; the next call starts another.

Invariants: the process is this file alone, run by path in a new interpreter (never forked; no JAX, nothing of ours but
this file, so that it starts in a fraction of a second). It ends when its pipe closes, whatever became of its parent,
and by an alarm if it is in a call then. MathAPI keeps no state, so episodes can share the process.
"""

import atexit
import contextlib
import importlib
import json
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import Any

START_SECONDS = 60.0  # for a busy machine; it takes about 0.2 s


class MathTimeout(Exception):
    """The call was ended because it took too long."""


class MathWorker:
    """The process, and a lock that lets one call in at a time. A call may take `limit_seconds`."""

    def __init__(self, limit_seconds: float):
        self.limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def call(self, name: str, positional: tuple[Any, ...], arguments: dict[str, Any]) -> str:
        """The text of the call's result, or of what it raised.

        Raises:
          MathTimeout: the call took longer than the limit, or the process died in it.
        """
        with self._lock:
            pipe = self._pipe
            if pipe is None or self._process is None or self._process.poll() is not None:
                pipe = self._start()
            try:
                pipe.send((name, positional, arguments))
                if pipe.poll(self.limit_seconds):
                    return pipe.recv()
            except (EOFError, OSError):  # it died: out of memory, or killed from outside
                self._stop()
                raise MathTimeout(f"{name}: the process of MathAPI died in this call") from None
            self._stop()
            raise MathTimeout(f"{name} took longer than {self.limit_seconds:g} s")

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return None if self._process is None else self._process.pid

    def _start(self) -> Connection:
        self._stop()
        pipe, child_end = Pipe()
        self._pipe = pipe
        command = [sys.executable, "-P", __file__, str(child_end.fileno()), str(self.limit_seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(child_end.fileno(),))
        child_end.close()
        atexit.register(self._stop)
        if not pipe.poll(START_SECONDS):
            self._stop()
            raise RuntimeError(f"the process of MathAPI did not start within {START_SECONDS:g} s")
        try:
            pipe.recv()
        except EOFError:
            self._stop()
            raise RuntimeError("the process of MathAPI ended as it started; its stderr says why") from None
        return pipe

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def as_text(result: Any) -> str:
    """A result as the benchmark's executor writes it."""
    if isinstance(result, str):
        return result
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError):
            return str(result)  # it holds a Decimal, an mpf or an object of the backend
    return str(result)


def _serve(pipe: Connection, limit_seconds: float) -> None:
    backend = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.func_source_code.math_api").MathAPI()
    pipe.send("ready")
    while True:
        name, positional, arguments = pipe.recv()
        # Its default action ends the process, whatever holds the interpreter, where nobody is left to kill it.
        signal.setitimer(signal.ITIMER_REAL, 2 * limit_seconds)
        try:
            text = as_text(getattr(backend, name)(*positional, **arguments))
        except Exception as error:  # the benchmark's rule: any exception is the answer to the call
            text = f"Error during execution: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(text)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which closes the pipe
    with contextlib.suppress(EOFError, OSError):  # the pipe is closed: nobody is left to answer
        _serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
