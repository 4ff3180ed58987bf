# SPDX-License-Identifier: Apache-2.0

"""The processes of a run, one a host (or one a GPU): a value of each flows in, those of all flow out, in their order.

Every process plays episodes and asks questions of its own; `gather` gives the outcomes to all of them. From there on
each computes the same on its host and makes the same calls on the devices of all, in the same order. So nothing else
need be sent, and no decision announced. What crosses is bytes, in pieces of one fixed shape.

Before anything crosses the processes *meet*: each says that it is there, and waits for the others without a device
being busy. A process may say instead that it was asked to stop; then none of them gets further, and all stop at the
same point. Meanwhile each shows every second that it lives. One that shows nothing for `silence_s`, or that has ended
by an error, is named by all others, and they end too: the run continues from its last checkpoint.

With one process nothing of this happens: `gather` gives back what it gets.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import pickle
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from hintsd_jax.config.schema import DistributedSection
from hintsd_jax.errors import UserError, of_the_machine, reason
from hintsd_jax.runs import interruption

T = TypeVar("T")

START_S = 300  # that the processes of a run may need until the last one is there
PIECE = 2**18  # bytes
SIGN_S = 1.0  # between two signs of life
PARTING_S = 10.0  # that a process which ends by an error waits until the others have read why
_HOW_TO_JOIN = (
    "set distributed.coordinator = host:port of process 0, distributed.processes to their number, and"
    " distributed.process to that of each, from 0 on; or distributed.coordinator = none for one process"
)
_TABLE_GONE = "process 0 of {}, at which all others meet, has ended or cannot be reached ({})"
GOES_ON = "start all processes with the same command again: the run continues from its last checkpoint"


def index() -> int:
    """The number of this process, from 0 on."""
    return jax.process_index()


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def leads() -> bool:
    """Whether this process writes what is written once: config, metrics, episodes, tables."""
    return index() == 0


def share(things: int) -> range:
    """Which of so many things this process does. The shares of all processes, in their order, are the whole, and differ
    in size by one at most.
    """
    begin, end = (place * things // count() for place in (index(), index() + 1))
    return range(begin, end)


def screen() -> TextIO | None:
    """Where what a person watches is written: None, stderr; the other processes show nothing, but for their errors."""
    return None if leads() else open(os.devnull, "w", encoding="utf-8")


def gather(value: T, what: str, *, may_stop: bool = True) -> list[T]:
    """What every process gives, in their order; `what` it is, in words. All processes must call it, in the same order.

    value: anything that can be pickled. The bytes of all of them are in the memory of each for a moment. may_stop:
    False where the run cannot be left.

    Raises:
      interruption.Interrupted: a process was asked to stop; all processes raise it at the same call.
    """
    if _meetings is None:
        return [value]
    _meetings.meet(what, may_stop=may_stop)
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int64)).ravel()
    parts: list[list[bytes]] = [[] for _ in sizes]
    for begin in range(0, int(sizes.max()), PIECE):
        piece = np.zeros(PIECE, np.uint8)
        own = np.frombuffer(data[begin : begin + PIECE], np.uint8)
        piece[: len(own)] = own
        for part, got in zip(parts, multihost_utils.process_allgather(piece), strict=True):
            part.append(got.tobytes())
    return [pickle.loads(b"".join(part)[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def stop_together() -> None:
    """For a process that was interrupted: the others are interrupted at their next `gather`, if they are not yet.
    Returns when all of them are there.
    """
    if _meetings is not None:
        _meetings.stop()


@contextlib.contextmanager
def joined(settings: DistributedSection, same: str = "") -> Iterator[None]:
    """Joins this process to the others of its run, if there are any, before jax looks for devices; parts at the end.

    same: what all processes must agree in, such as their config.

    Raises:
      UserError: the others do not come, or do not agree.
    """
    global _meetings
    _join(settings)
    if count() == 1:
        yield
        return
    _meetings = _Meetings(settings.silence_s)
    stdout = screen()
    output = contextlib.nullcontext() if stdout is None else contextlib.redirect_stdout(stdout)
    try:
        _check_same(gather(same, "the settings"))
        with output:
            yield
        _meetings.meet("the end", may_stop=False)
    except interruption.Interrupted:
        _meetings.meet("the end", may_stop=False)
        raise
    except BaseException as error:
        if re.match(r"[A-Z_]{5,}: ", str(error)):  # a status of XLA's, whatever class jax gives it
            _meetings.outwait()
        _meetings.part(error)
        raise
    finally:
        _meetings.close()
        _meetings = None
    jax.distributed.shutdown()


def _join(settings: DistributedSection) -> None:
    """Starts `jax.distributed` where there is more than one process, or where the machine says so (a TPU pod, Slurm,
    Open MPI, Kubernetes jobs).
    """
    where, number = settings.coordinator, settings.process
    if where == "none" or jax.distributed.is_initialized():
        return
    is_named = where != "auto"
    if is_named and not (re.fullmatch(r"\S+:\d+", where) and 0 <= number < settings.processes):
        raise UserError(
            f"distributed.coordinator = {where}, distributed.processes = {settings.processes}, distributed.process ="
            f" {number} name no process of a run: {_HOW_TO_JOIN}"
        )
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself, see `interruption`
    try:
        jax.distributed.initialize(
            where if is_named else None,
            settings.processes or None,
            None if number < 0 else number,
            cluster_detection_method="deactivate" if is_named else None,
            initialization_timeout=START_S,
            # Our own signs of life come first: jax ends a process by an abort, with a stack of C++ instead of a name.
            heartbeat_timeout_seconds=int(10 * settings.silence_s),
        )
    except ValueError as error:
        if "coordinator_address" in str(error) and not settings.processes:
            return  # nothing says that there are more
        raise UserError(f"the processes of this run cannot be joined ({reason(error)}): {_HOW_TO_JOIN}") from error
    except RuntimeError as error:
        if not is_named and "before any JAX calls" in str(error):
            return  # within a program that uses jax already: it has joined the processes if there are more
        raise UserError(
            f"process {number} of {settings.processes} could not join the others at {where} ({reason(error)}): start"
            f" all of them within {START_S} s, with the same address, each with a distributed.process of its own"
        ) from error


def _check_same(given: list[str]) -> None:
    """Raises UserError, in all processes, where one was started with something else than process 0."""
    if other := [number for number, value in enumerate(given) if value != given[0]]:
        raise UserError(
            f"process {other[0]} was started with other settings than process 0: start all processes with the same"
            " command, but for distributed.process"
        )


class _Meetings:
    """The table at which processes meet: the key-value store of `jax.distributed`, which is at process 0.

    jax has no public name for it; orbax uses the same one.
    """

    def __init__(self, silence_s: float):
        from jax._src.distributed import global_state

        self._store: Any = global_state.client
        self._silence_s = silence_s
        self._number = 0
        self._at = "its start"  # where this process was last
        self._stopped = False
        self._ended = threading.Event()
        self._store.key_value_set(f"hintsd/name/{index()}", f"{platform.node()} (process id {os.getpid()})")
        self._watcher = threading.Thread(target=self._watch, name="processes", daemon=True)
        self._watcher.start()
        if not leads():
            self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)  # kept for as long as it may be called
            self._table_at = global_state.coordinator_address or ""
            ctypes.CDLL(None).signal(signal.SIGABRT, self._aborted)

    def meet(self, what: str, *, may_stop: bool = True) -> None:
        """Returns when all processes are at this meeting; raises Interrupted where one of them has come to stop."""
        posts = self._post("here", what)
        if may_stop and "stop" in posts.values():
            self._stopped = True
            raise interruption.Interrupted("another process was asked to stop")

    def stop(self) -> None:
        """Comes to the next meeting to stop, unless that was done there already."""
        if not self._stopped:
            self._post("stop", "the end")
        self._stopped = True

    def _post(self, word: str, what: str) -> dict[int, str]:
        self._number, self._at = self._number + 1, what
        place = f"hintsd/meeting/{self._number}/"
        self._store.key_value_set(f"{place}{index()}", word)
        if leads() and self._number > 2:  # everybody is past it
            self._store.key_value_delete(f"hintsd/meeting/{self._number - 2}/")
        wait = 0.002
        while len(posts := self._read(place)) < count():
            time.sleep(wait)
            wait = min(2 * wait, 0.25)
        return posts

    def _read(self, place: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): value for key, value in self._store.key_value_dir_get(place)}

    def _watch(self) -> None:
        """Shows that this process lives, and looks at the others until the end; runs in a thread."""
        try:
            self._look_after_each_other()
        except Exception as error:  # as a rule of the store; a thread that just ended would let this process seem dead
            self._leave(f"{_TABLE_GONE.format(count(), reason(error))}; {GOES_ON}", interruption.GO_ON)

    def _look_after_each_other(self) -> None:
        seen: dict[int, tuple[str, float]] = {number: ("", time.monotonic()) for number in range(count())}
        sign = 0
        while not self._ended.wait(SIGN_S):
            sign += 1
            word = "stop" if interruption.requested() else "on"
            self._store.key_value_set(f"hintsd/alive/{index()}", f"{sign} {word} {self._at}", allow_overwrite=True)
            signs, now = self._read("hintsd/alive/"), time.monotonic()
            seen |= {number: (text, now) for number, text in signs.items() if text != seen[number][0]}
            if any(text.split()[1] == "stop" for text in signs.values()):
                interruption.request("another process was asked to stop")
            for number, text in self._read("hintsd/parted/").items():
                told = json.loads(text)
                self._leave(f"{self._name(number)} has ended: {told['why']}", told["status"])
            for number, (text, when) in seen.items():
                if now - when > self._silence_s and number != index():
                    at = f", last at {text.split(maxsplit=2)[2]}" if text else ""
                    silent = f"{self._name(number)} has shown no sign of life for {now - when:.0f} s{at}"
                    self._leave(f"{silent}; {GOES_ON}", interruption.GO_ON)

    def _name(self, number: int) -> str:
        names = self._read("hintsd/name/")
        return f"process {number} of {count()} on {names.get(number, 'an unknown host')}"

    def _leave(self, why: str, status: int) -> NoReturn:
        """Ends this process from the watching thread: the main one may wait for a device that never answers."""
        if not self._ended.is_set():
            print(f"error: {' '.join(why.split())}", file=sys.stderr, flush=True)
        if leads():  # the store is here
            with contextlib.suppress(RuntimeError, ValueError):  # of a store that is gone: nobody is left to read it
                self._parted(why, status)
                self._wait_for_others()
        sys.stdout.flush()
        os._exit(status)

    def _on_abort(self, number: int) -> None:
        """Where the table is gone, jax aborts the process from a thread of C++ and prints that one's stack; a handler
        of Python's never runs then. Any other abort goes on.
        """
        host, _, port = self._table_at.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            return
        why = _TABLE_GONE.format(count(), self._table_at)
        print(f"error: {why}; {GOES_ON}", file=sys.stderr, flush=True)
        os._exit(interruption.GO_ON)

    def outwait(self) -> None:
        """After an error of the devices, which may only say that another process is gone ("connection reset by peer"):
        if one is, the watching thread names it meanwhile and ends this process, so that the run can be continued.
        """
        self._ended.wait(self._silence_s + 5 * SIGN_S + PARTING_S)

    def part(self, error: BaseException) -> None:
        """Says to the others why this process ends; process 0, at which they read, waits until they have."""
        self._ended.set()
        told = error if isinstance(error, UserError) else of_the_machine(error) if _of_machine(error) else None
        why = str(told) if told else "".join(traceback.format_exception_only(error)).strip()
        # Once the error is told: at its end the interpreter would wait for processes that are gone.
        atexit.register(interruption.leave, 2 if told else 1)
        with contextlib.suppress(RuntimeError, ValueError):  # of a store that is gone: the others see its silence
            self._parted(why, 2 if told else 1)
            if leads():
                self._wait_for_others()

    def _parted(self, why: str, status: int) -> None:
        text = json.dumps({"why": " ".join(why.split())[:2000], "status": status})
        self._store.key_value_set(f"hintsd/parted/{index()}", text, allow_overwrite=True)

    def _wait_for_others(self) -> None:
        """Waits until the others show no more signs of life, but not for ever."""
        end, last, since = time.monotonic() + PARTING_S, None, time.monotonic()
        while time.monotonic() < end and time.monotonic() - since < 3 * SIGN_S:
            signs = self._read("hintsd/alive/") | {index(): ""}
            if signs != last:
                last, since = signs, time.monotonic()
            time.sleep(SIGN_S / 4)

    def close(self) -> None:
        """Ends the watching."""
        self._ended.set()
        self._watcher.join(timeout=10 * SIGN_S)


def _of_machine(error: BaseException) -> bool:
    return isinstance(error, OSError | MemoryError | RuntimeError)


_meetings: _Meetings | None = None
