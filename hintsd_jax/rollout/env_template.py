# SPDX-License-Identifier: Apache-2.0

"""The process that environments are forked from, and what a forked worker does. Runs beside the trainer, not in it.

In: a control socket. The first frame is a pickled `Setup`; the class is imported once, and then every request for a
worker, which comes with a socket of its own, is answered with a fork. A worker makes its environment with its first
call and answers call after call, as `env_wire` says.

Invariants: nothing of JAX is imported here, unless the environment does. The template itself never runs a method of an
environment, so that it answers at once and dies with the trainer: when the control socket closes it kills every worker
and what that has left behind. A worker is in a session of its own, takes no more memory than its limit, leaves no core
file, is the first that an out-of-memory killer takes, and ends with the template.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hintsd_jax.envs.protocol import checked
from hintsd_jax.plugins import load
from hintsd_jax.rollout.env_call import ENV_DIED, CallFailure
from hintsd_jax.rollout.env_wire import Ended, answer, receive, send

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PARENT_SECONDS = 1.0  # how often the template looks whether the trainer still lives
_REQUEST_BYTES = 64
_ROOM_TO_SAY_SO = 1 << 26  # bytes
OUT_OF_MEMORY = "MemoryError: more than env.memory_gib"


@dataclass(frozen=True)
class Setup:
    """path: of the environment's class, "package.module:Class". memory_bytes: that a worker may take on top of what the
    template has.
    """

    path: str
    options: Mapping[str, Any]
    memory_bytes: int


def main(descriptor: int) -> NoReturn:
    """The template's life: `descriptor` is its end of the control socket."""
    os.dup2(2, 1)  # what an environment prints is no output of the run
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and a launcher's to all processes, are for the trainer
        signal.signal(number, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of workers become the template's to kill
    control = socket.socket(fileno=descriptor)
    parent = os.getppid()
    with contextlib.suppress(Ended):
        setup: Setup = pickle.loads(receive(control))
        try:
            env_class = load(setup.path, "environment")
        except BaseException as error:
            send(control, answer(CallFailure.of(error)))
            os._exit(0)
        gc.collect()
        gc.freeze()  # a worker that collects would copy every page of what is shared
        send(control, answer(None))
        _serve(control, parent, env_class, setup)
    _kill_all()
    os._exit(0)


def _serve(control: socket.socket, parent: int, env_class: type, setup: Setup) -> None:
    """Forks and reaps as it is told, until the trainer is gone."""
    workers: set[int] = set()
    try:
        _serve_until_gone(control, parent, workers, env_class, setup)
    finally:
        for pid in workers:
            _kill(pid)


def _serve_until_gone(control: socket.socket, parent: int, workers: set[int], env_class: type, setup: Setup) -> None:
    while True:
        control.settimeout(_PARENT_SECONDS)
        try:
            message, descriptors, _, _ = socket.recv_fds(control, _REQUEST_BYTES, 1)
        except TimeoutError:
            if os.getppid() != parent:
                return
            continue
        except OSError:
            return
        if not message:
            return
        if descriptors:
            pid = os.fork()
            if pid == 0:
                _become_worker(control, descriptors[0], env_class, setup)
            workers.add(pid)
            os.close(descriptors[0])
            control.sendall(json.dumps(pid).encode().ljust(_REQUEST_BYTES))
        else:
            pid = json.loads(message)
            if pid in workers:
                workers.remove(pid)
                _kill(pid)
                os.waitpid(pid, 0)
            if not workers:
                _kill_all()
            control.sendall(b"0".ljust(_REQUEST_BYTES))


def _terminated(worker: int, number: int, frame: object) -> None:
    """A worker stays; what an environment in it has forked ends, as it may have asked for."""
    if os.getpid() != worker:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _become_worker(control: socket.socket, descriptor: int, env_class: type, setup: Setup) -> NoReturn:
    try:
        control.close()
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, partial(_terminated, os.getpid()))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = _status("VmData") + setup.memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit + _ROOM_TO_SAY_SO))
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        with contextlib.suppress(Ended):
            _work(socket.socket(fileno=descriptor), env_class, setup)
    finally:
        os._exit(0)


def _work(channel: socket.socket, env_class: type, setup: Setup) -> None:
    out_of_memory = answer(CallFailure(ENV_DIED, OUT_OF_MEMORY))  # made while there is some
    env, own = None, os.getpid()
    near_limit = _status("VmHWM") + 0.8 * setup.memory_bytes
    while True:
        method, args, steps = pickle.loads(receive(channel, sys.maxsize))
        try:
            if env is None:
                if method == "close":
                    send(channel, answer(None))
                    continue
                env = env_class(**setup.options)
            frame = answer(checked(method, getattr(env, method)(*args), steps))
        except MemoryError:
            _make_room()
            frame = out_of_memory
        except BaseException as error:  # SystemExit and KeyboardInterrupt of an environment are its own affair
            _make_room()
            # Where memory is out some of Python's own functions fail with other errors.
            out = isinstance(error, SystemError) and _status("VmHWM") > near_limit
            frame = out_of_memory if out else answer(CallFailure.of(error))
        if os.getpid() != own:
            return  # a fork that the environment's method has made: only one of the two answers
        send(channel, frame)


def _make_room() -> None:
    """For a failure's own words, as what filled the memory may still be held by its traceback."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _status(name: str) -> int:
    """Bytes of this process: "VmData", what counts for RLIMIT_DATA; "VmHWM", the most that was in memory at once. 0
    where the system does not say.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return 0


def _kill(pid: int) -> None:
    """Ends a worker that is not reaped yet, with its process group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def _kill_all() -> None:
    """Ends and reaps every process below this one, whatever it has made of itself."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                _kill(int(pid))
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
