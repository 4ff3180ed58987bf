# SPDX-License-Identifier: Apache-2.0

"""SIGINT and SIGTERM: signals flow in, `Interrupted` is raised where a run can be left, and an exit status flows out.

The first signal asks for an end: as a rule `Interrupted` is raised at once, wherever the main thread is. Within
`deferred()`, where a run has something to save, it is only noted, and raised by `check()` at points that the run
chooses: between programs that compile, decode calls and steps, and while it waits for somebody else. The second signal
leaves the process at once, whatever the main thread does: a thread that sleeps on Python's own pipe for signals sees
them while the main thread is in a compiler too.

Invariant: an interrupted process leaves by `leave`, never through the end of the interpreter. XLA's threads may still
compile; they crashed in that end.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

# For launchers: the same command continues the run (EX_TEMPFAIL of sysexits.h); and the shell's status after Ctrl-C.
GO_ON, BY_HAND = 75, 128 + signal.SIGINT
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SLICE_S = 0.2  # between two looks at the request, while waiting
_PATIENCE_S = 1.0  # for a reader of the output that does not read

ASKED = "stopping: what is under way is finished or given up, and saved; the same signal again leaves at once"
LEFT = "left at once: the same command trains on from the last checkpoint, and begins anything else anew"


class Interrupted(BaseException):
    """Somebody asked the process to end. Not an `Exception`: nobody takes it for a failure of what it comes out of.

    why: in words. status: that the process ends with, GO_ON or BY_HAND.
    """

    def __init__(self, why: str, status: int = GO_ON):
        super().__init__(why)
        self.status = status


class _Requests:
    """What was asked for in one `handled` block. signals: how many came. why: the process is asked to end, "" where it
    is not. status: with which. deferred, kept: how many such blocks the main thread is in. raised: whether
    Interrupted was.
    """

    def __init__(self):
        self.signals, self.why, self.status = 0, "", GO_ON
        self.deferred = self.kept = 0
        self.raised = False

    def add(self, number: int) -> None:
        self.signals += 1
        if number == signal.SIGINT:  # by hand counts more than by a launcher, which would start again
            self.status = BY_HAND
        self.why = self.why or signal.Signals(number).name


_requests: _Requests | None = None


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Both signals are handled as above within this block, and as before afterwards. Outside the main thread, which
    alone may set handlers, it does nothing.
    """
    global _requests
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requests, (reading, writing) = _Requests(), os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=_watch, args=(reading, requests), name="signals", daemon=True)
    outer, _requests = _requests, requests
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda number, _: _arrived(requests)) for number in _SIGNALS}
    hook, sys.unraisablehook = sys.unraisablehook, partial(_ignored, requests, sys.unraisablehook)
    watcher.start()
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        _requests = outer
        os.close(writing)  # the watcher reads the end, and ends
        watcher.join()
        os.close(reading)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within this block a signal is raised by `check`, `wait` and `get` only, not wherever the main thread is."""
    requests = _requests or _Requests()
    requests.deferred += 1
    try:
        yield
    finally:
        requests.deferred -= 1


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """For a part of a `deferred` block that cannot be given up without loss: within it nothing raises."""
    requests = _requests or _Requests()
    requests.kept += 1
    try:
        yield
    finally:
        requests.kept -= 1


def requested() -> bool:
    """Whether the process is asked to end."""
    return _requests is not None and bool(_requests.why)


def request(why: str) -> None:
    """Asks for the end as a first SIGTERM does within `deferred`: from any thread, raised by `check`, `wait`, `get`."""
    if _requests is not None:
        _requests.why = _requests.why or why


def check() -> None:
    """A point at which the run can be left: raises Interrupted where that is asked for; in the main thread only."""
    requests = _requests
    if requests is None or requests.kept:
        return
    if requests.why and threading.current_thread() is threading.main_thread():
        requests.raised = True
        raise Interrupted(requests.why, requests.status)


def wait(event: threading.Event, seconds: float = math.inf) -> bool:
    """`event.wait(seconds)`, which raises Interrupted as `check` does; but not where that was raised before, so that
    what it unwinds can still be waited for.
    """
    until = time.monotonic() + seconds
    while not event.wait(max(0.0, min(_SLICE_S, until - time.monotonic()))):
        if time.monotonic() >= until:
            return event.is_set()
        _check_once()
    return True


def get(source: queue.SimpleQueue) -> Any:
    """`source.get()`, which raises as `wait` does."""
    while True:
        try:
            return source.get(timeout=_SLICE_S)
        except queue.Empty:
            _check_once()


def leave(status: int) -> NoReturn:
    """Ends the process without the end of the interpreter; what stdout and stderr hold is written first, if anybody
    reads it.
    """
    _within_patience(lambda: [stream.flush() for stream in (sys.stdout, sys.stderr) if stream is not None])
    os._exit(status)


def _check_once() -> None:
    if _requests is not None and not _requests.raised:
        check()


def _arrived(requests: _Requests) -> None:
    """Python's handler, in the main thread: counts nothing, since the watcher does, which may be slower."""
    if requests.deferred or requests.raised:
        return
    until = time.monotonic() + _PATIENCE_S
    while not requests.why and time.monotonic() < until:
        time.sleep(0.001)
    check()


def _ignored(requests: _Requests, outer: Callable[[Any], object], unraisable: Any) -> None:
    """Python ignores what is raised in a destructor, or where the garbage collector calls back: so an Interrupted there
    was not raised, and the next point at which the run can be left raises it.
    """
    if isinstance(unraisable.exc_value, Interrupted):
        requests.raised = False
    else:
        outer(unraisable)


def _watch(reading: int, requests: _Requests) -> None:
    """Reads the number of every signal from the pipe, in a thread of its own."""
    while numbers := os.read(reading, 64):
        for number in numbers:
            if number not in _SIGNALS:
                continue
            requests.add(number)
            if requests.signals > 1:
                _within_patience(lambda: _tell(LEFT))
                leave(requests.status)
            if requests.deferred:
                _within_patience(lambda: _tell(ASKED))


def _tell(text: str) -> None:
    """A line of its own on stderr, over the live line of a terminal."""
    over = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{over}{text}", file=sys.stderr, flush=True)


def _within_patience(call: Callable[[], object]) -> None:
    """Calls in a thread that is left behind when it takes too long, or fails: a stream may be full, closed or gone."""

    def called() -> None:
        with contextlib.suppress(OSError, ValueError):
            call()

    thread = threading.Thread(target=called, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
