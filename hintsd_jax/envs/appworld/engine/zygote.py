# SPDX-License-Identifier: Apache-2.0

"""The processes that all others are forked from, so that a worker is there at once and shares memory.

Two of them: the first has imported everything and forks cells; its child has opened one world too and forks worlds and
who grades. Cells come from the first, for what a world was opened with stays in the memory of its process.

A request is a packet: {"make": "worker", ...} with a listening socket, answered by the process ids; {"make": "grader"}
alike. When the trainer's end of the control socket closes, every process here is killed and the folder removed.

    python -c "...; from engine import zygote; zygote.main()" CONTROL
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from . import fences, wire

_LOOK_SECONDS = 1.0  # how often ended children are collected


def main() -> None:
    """Reads the setup from the control socket, gets warm, and forks until the trainer ends; then all ends with it."""
    control = socket.socket(fileno=int(sys.argv[1]))
    setup, _ = wire.receive_packet(control)
    cells = _Children()
    try:
        _run(control, setup, cells)
    except OSError:
        pass  # the trainer has ended before all was warm
    finally:
        cells.kill()
        shutil.rmtree(setup["folder"], ignore_errors=True)
        os._exit(0)


def _run(control: socket.socket, setup: dict[str, Any], cells: _Children) -> None:
    fences.scrub_environment(setup["worker_root"])
    os.environ["HOME"] = setup["home"]  # what Python keeps there is removed with the folder
    os.environ["APPWORLD_CACHE"] = setup["home"]
    os.chdir(setup["home"])
    try:
        from . import cell

        cell.warm()
        _probe(setup)
        worlds, pid = _start_worlds(setup, control)
        cells.pids.add(pid)
        failed = wire.receive_packet(worlds)[0]["failed"]
    except Exception as error:
        failed = _told(error)
    wire.send_packet(control, {"failed": failed})
    if failed:
        return

    def handle(message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        if message["make"] == "grader":
            wire.send_packet(worlds, message, (descriptors[0],))
            return wire.receive_packet(worlds)[0]
        mine, other = socket.socketpair()
        with mine, other:
            wire.send_packet(worlds, message, (descriptors[0], mine.fileno()))
            world = wire.receive_packet(worlds)[0]["pid"]
            serve = lambda: cell.serve(other.fileno(), message)
            return {"pid": world, "cell": cells.fork(serve, [other.fileno()], group=world)}

    _serve(control, handle, cells)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def _probe(setup: dict[str, Any]) -> None:
    """Tries the fences in a process of its own, before any episode needs them."""
    from . import cell

    mine, other = socket.socketpair()
    with mine, other:
        pid = os.fork()
        if pid == 0:
            mine.close()
            try:
                cell.serve(other.fileno(), setup | {"folder": setup["empty"]})
            finally:
                os._exit(0)
        other.close()
        refused = wire.receive_frame(mine.fileno())["refused"]
    os.waitpid(pid, 0)
    if refused:
        raise fences.FenceRefused(refused)


def _start_worlds(setup: dict[str, Any], control: socket.socket) -> tuple[socket.socket, int]:
    """Forks the process that opens a world; (the control socket to it, its process id)."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent, pid = os.getpid(), os.fork()
    if pid:
        other.close()
        return mine, pid
    fences.die_with_parent(parent)
    mine.close()
    control.close()
    try:
        failed = ""
        try:
            _warm_world(setup)
        except Exception as error:
            failed = _told(error)
        wire.send_packet(other, {"failed": failed})
        children = _Children()
        _serve(other, lambda message, given: {"pid": children.fork(_process_of(message, given), given)}, children)
        children.kill()
    finally:
        os._exit(0)


def _process_of(message: dict[str, Any], given: list[int]) -> Callable[[], None]:
    """What a new world's process, or a grader's, does."""

    def world() -> None:
        from . import server

        fences.fence_world(message["world_memory_mib"], message["require_fences"])
        server.serve(socket.socket(fileno=given[0]), server.World(given[1]).answer)

    def grader() -> None:
        from . import grading, server

        os.environ["APPWORLD_ROOT"] = message["root"]
        server.serve(socket.socket(fileno=given[0]), grading.answer)

    return world if message["make"] == "worker" else grader


def _warm_world(setup: dict[str, Any]) -> None:
    """Opens and closes one world, which imports and builds the apps."""
    import gc

    from appworld.environment import AppWorld  # pyright: ignore[reportMissingImports] - the second environment has it

    from . import grading, server

    assert grading and server, "imported before the forks"
    world = AppWorld(setup["task_id"], experiment_name="warm", load_ground_truth=False)
    world.execute("print(apis.supervisor.show_profile())")
    world.task_completed()
    world.close()
    AppWorld.close_all()
    gc.freeze()  # what is shared stays shared


class _Children:
    """The processes forked here that have not been collected."""

    def __init__(self) -> None:
        self.pids: set[int] = set()

    def fork(self, serve: Callable[[], None], kept: list[int], group: int = 0) -> int:
        """A new process that runs `serve` with the sockets `kept` and no others; in the process group `group`, or
        in one of its own.
        """
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            try:
                fences.die_with_parent(parent)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setpgid(0, group)
                _close_others(kept)
                serve()
            except BaseException as error:  # one line for who looks; who asked sees that the process has ended
                os.write(2, f"appworld: {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(0)
        with contextlib.suppress(OSError):  # here too: whoever comes first, the group is there for the next one
            os.setpgid(pid, group or pid)
        self.pids.add(pid)
        return pid

    def collect(self) -> None:
        """Lets go of those that have ended."""
        for pid in list(self.pids):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.pids.discard(pid)

    def kill(self) -> None:
        """Ends all."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)


def _close_others(kept: list[int]) -> None:
    """Of a fork: the sockets that lead to the trainer and to others are not its own. Files stay: a world's databases
    are among them, and a cell's process has none.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) not in kept and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.close(int(name))
        except OSError:
            pass  # the one that listed them


def _serve(control: socket.socket, handle: Callable, children: _Children) -> None:
    """Answers requests until the other end closes."""
    while True:
        ready = select.select([control], [], [], _LOOK_SECONDS)[0]
        children.collect()
        if not ready:
            continue
        try:
            message, descriptors = wire.receive_packet(control)
        except (wire.Closed, json.JSONDecodeError):
            return
        try:
            reply = handle(message, descriptors)
        except (OSError, wire.Closed) as error:
            reply = {"failed": str(error)}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        try:
            wire.send_packet(control, reply)
        except OSError:
            return
