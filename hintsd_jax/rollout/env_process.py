# SPDX-License-Identifier: Apache-2.0

"""Environments in processes of their own: calls flow in, checked values flow out, and whatever an environment does ends
with its process.

A `ProcessHost` keeps one template process (`env_template`), which has imported the environment's module; each
environment is a fork of it, made in a few milliseconds and killed when its episode is over, when a call takes too long
and when it takes too much memory.

Invariants: the trainer is never forked, and reads nothing from a worker but bounded JSON (`env_wire`). A call ends at
its limit, whatever holds the interpreter over there. The death of a process is a value, ENV_DIED. All processes end
with the trainer, and Ctrl-C reaches the trainer only.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hintsd_jax.envs.protocol import ProtocolError, shown
from hintsd_jax.envs.registry import path_of
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.env_call import ENV_DIED, ENV_ERROR, Call, CallFailure
from hintsd_jax.rollout.env_host import BeginClose, EnvWorker, Host, ThreadHost
from hintsd_jax.rollout.env_template import Setup
from hintsd_jax.rollout.env_wire import Ended, Late, read_answer, receive, request, send
from hintsd_jax.texts import described

AUTO, THREAD, PROCESS = "auto", "thread", "process"
START_SECONDS = 300.0  # for a module that imports much, on a busy machine
FORK_SECONDS = 60.0
_REPLY_BYTES = 64
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]);"
    " from hintsd_jax.rollout.env_template import main; main(int(sys.argv[1]))"
)


# What `read_answer` raises.
_NONSENSE = (ProtocolError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


class _TooMuchMemory(Exception):
    pass


class ProcessHost:
    """Environments of the class at `path` ("package.module:Class"), each in a process that may take `memory_gib` GiB of
    memory.
    """

    def __init__(self, path: str, options: Mapping[str, Any], memory_gib: float):
        self.memory_bytes = int(memory_gib * 2**30)
        self._setup = Setup(path, dict(options), self.memory_bytes)
        self._lock = threading.Lock()
        self._template: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._broken = ""  # why trying again is of no use

    def worker(self, begin_close: BeginClose, name: str) -> EnvWorker:
        """See `Host`."""
        return EnvWorker(_Process(self), begin_close, name)

    def close(self) -> None:
        """See `Host`: ends the template and with it every process."""
        with self._lock:
            self._stop()

    def fork(self, channel: socket.socket) -> int:
        """The process id of a new worker that answers on the other end of `channel`.

        Raises:
          Ended: the template cannot be started, or has died.
        """
        with self._lock:
            try:
                control = self._running()
                socket.send_fds(control, [b"fork"], [channel.fileno()])
                return self._reply(control)
            except (OSError, ValueError) as error:
                self._stop()
                raise Ended(f"no process can be made: {error}") from error

    def reap(self, pid: int) -> None:
        """Ends a worker for good, with its process group."""
        for kill in (os.killpg, os.kill):  # at once, whatever the template does; it keeps the id until it is told
            with contextlib.suppress(OSError):
                kill(pid, signal.SIGKILL)
        with self._lock:
            if self._control is None:
                return
            try:
                self._control.sendall(json.dumps(pid).encode())
                self._reply(self._control)
            except (OSError, ValueError):
                self._stop()

    def _reply(self, control: socket.socket) -> int:
        control.settimeout(FORK_SECONDS)
        reply = control.recv(_REPLY_BYTES, socket.MSG_WAITALL)
        if not reply:
            raise OSError("the process that environments are forked from has ended")
        return int(json.loads(reply))

    def _running(self) -> socket.socket:
        if self._control is not None and self._template is not None and self._template.poll() is None:
            return self._control
        if self._broken:
            raise OSError(self._broken)
        self._stop()
        control, other = socket.socketpair()
        self._control = control
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # the accelerator is the trainer's
        environment.setdefault("PYTHONHASHSEED", "0")  # the order of sets is the same when a step is done again
        command = [sys.executable, "-c", _BOOT, str(other.fileno()), json.dumps([str(folder) for folder in sys.path])]
        self._template = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=(other.fileno(),),
            start_new_session=True,  # out of the reach of Ctrl-C
            env=environment,
        )
        other.close()
        deadline = time.monotonic() + START_SECONDS
        try:
            send(control, pickle.dumps(self._setup), deadline)
            failure = read_answer("close", receive(control, deadline=deadline), 0)
        except Late:
            raise OSError(f"its module was not imported within {START_SECONDS:g} s") from None
        except (Ended, *_NONSENSE):
            raise OSError("the process that imports its module ended; its last words are on stderr") from None
        if isinstance(failure, CallFailure):
            self._broken = f"its module cannot be imported in a process of its own: {failure.detail}"
            raise OSError(self._broken)
        return control

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._template is not None:
            try:
                self._template.wait(5)  # it kills its workers first
            except subprocess.TimeoutExpired:
                self._template.kill()
                self._template.wait()
        self._control = self._template = None


class _Process:
    """An environment in a process of its own; see `env_host.Home`."""

    def __init__(self, host: ProcessHost):
        self._host = host
        self._channel: socket.socket | None = None
        self.pid = 0
        self._descriptor: int | None = None  # of the process
        self._memory_limit = 0

    def open(self) -> CallFailure | None:
        """See `Home`."""
        try:
            self._channel, other = socket.socketpair()
            with other:
                self.pid = self._host.fork(other)
        except (Ended, OSError) as error:
            return CallFailure(ENV_DIED, f"the environment has no process: {error}")
        with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
            self._descriptor = os.pidfd_open(self.pid)
        self._memory_limit = self._resident() + self._host.memory_bytes
        return None

    def call(self, call: Call) -> Any:
        """See `Home`; takes no longer than the call's limit."""
        deadline = time.monotonic() + call.limit_seconds
        channel = self._channel
        assert channel is not None, "opened"
        try:
            asked = request(call.method, call.args, call.steps)
        except ProtocolError as error:
            return CallFailure(ENV_ERROR, str(error))
        try:
            send(channel, asked, deadline)
            frame = receive(channel, deadline=deadline, process=self._descriptor, watch=self._check_memory)
            return read_answer(call.method, frame, call.steps)
        except Late:
            return call.timeout()
        except _TooMuchMemory:
            gib = self._host.memory_bytes / 2**30
            return CallFailure(
                ENV_DIED, f"{call.method} took more than env.memory_gib = {gib:g}: its process was killed"
            )
        except Ended:
            return CallFailure(ENV_DIED, f"{call.method}: the environment's process ended in this call")
        except _NONSENSE as error:  # code of the environment has written into the socket itself
            return CallFailure(ENV_DIED, f"{call.method}: its process sent what is no answer: {described(error)}")

    def leave(self) -> None:
        """See `Home`: kills the process."""
        if self._channel is not None:
            self._channel.close()
        if self.pid:
            self._host.reap(self.pid)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._channel, self.pid, self._descriptor = None, 0, None

    def _check_memory(self) -> None:
        """What RLIMIT_DATA does not count: memory that is shared or mapped from files."""
        if self._resident() > self._memory_limit:
            raise _TooMuchMemory

    def _resident(self) -> int:
        """Bytes of the process in memory; 0 where the system does not say."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0


def host_for(env_class: type, name: str, options: Mapping[str, Any], isolation: str, memory_gib: float) -> Host:
    """The host of an environment.

    Args:
      name: of the config, registered or a path.
      isolation: "thread", "process" or "auto": what the class names in `isolation`, else "process"; but "thread" for a
        class of the script or notebook that runs, which no process of its own can import.
      memory_gib: that one process may take.

    Raises:
      UserError: the class names something else; it needs a process, and none could import it.
    """
    importable = not path_of(name).startswith("__main__:")
    if isolation == AUTO:
        isolation = getattr(env_class, "isolation", PROCESS if importable else THREAD)
        if isolation not in (THREAD, PROCESS):
            raise UserError(
                f"isolation of environment {shown(name)} is {shown(isolation)}: use {THREAD!r} or {PROCESS!r}"
            )
    if isolation == THREAD:
        return ThreadHost(partial(env_class, **options))
    if not importable:
        raise UserError(
            f"environment {shown(name)} is a class of the script that runs, which a process of its own cannot import:"
            f" move it into a module, or set env.isolation = {THREAD}"
        )
    return ProcessHost(path_of(name), options, memory_gib)
