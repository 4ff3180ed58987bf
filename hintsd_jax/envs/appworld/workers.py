# SPDX-License-Identifier: Apache-2.0

"""The trainer's side of AppWorld's processes: it starts them, asks them, and ends them.

One process forks all others (`engine/zygote.py`, under the Python of AppWorld's own environment). A worker is two
forks: the world, which answers on a unix socket, and the cell, which runs the model's code (`engine/cell.py`).

Invariants: nothing is read from a worker but bounded JSON (`client`). Whatever happens to a worker is a `WorkerFailed`
or a `CallTimeout`. Workers see a root without ground truth; who grades sees the whole one and runs no model's code. All
processes, sockets and files end with `stop`, or with the trainer, however it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hintsd_jax.envs.appworld.client import WorkerFailed, post
from hintsd_jax.envs.appworld.engine import wire
from hintsd_jax.errors import UserError

ENGINE = Path(__file__).parent / "engine"
BOOT_SECONDS = 300.0  # for what imports much, on a busy machine
FORK_SECONDS = 60.0
RESET_SECONDS = 120.0
GRADE_SECONDS = 120.0
MAX_ANSWER_BYTES = 16 * 2**20
_END_SECONDS = 10.0
_TASK_ID = re.compile(r"[A-Za-z0-9]+_[0-9]+")
_BOOT = "import sys; sys.path.insert(0, sys.argv[2]); from engine import zygote; zygote.main()"


@dataclass(frozen=True)
class Limits:
    """What a worker may take. Memory in MiB, beside what it shares; `cell_seconds`: of one cell, in the engine's own
    way, which the code can defeat; `output_characters`: of one cell, then cut with a note. require_fences: whether to
    refuse a machine that does not allow a fence. quote_failures: whether a `WorkerFailed` quotes what a worker
    answered.
    """

    require_fences: bool = True
    cell_memory_mib: int = 1024
    world_memory_mib: int = 4096
    output_characters: int = 200_000
    cell_seconds: int = 60
    max_calls: int = 1000  # of APIs in one cell
    max_cells: int = 1000
    quote_failures: bool = False


class _Process:
    """A process that somebody else has forked: ended without a mistake about its id."""

    def __init__(self, pid: int):
        try:
            self._descriptor: int | None = os.pidfd_open(pid)
        except OSError:  # it has ended already
            self._descriptor = None

    def kill(self) -> None:
        """Ends it and waits until it has; safe twice."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(_END_SECONDS * 1000)
        os.close(descriptor)


class Worker:
    """One open world and its cell."""

    def __init__(self, path: Path, pids: list[int], task_id: str, name: str, outputs: Path, quote: bool = False):
        self.task_id, self.name, self.pids = task_id, name, tuple(pids)
        self.task: Mapping[str, Any] = {}
        self._path, self._outputs, self._quote = path, outputs, quote
        self._processes = [_Process(pid) for pid in pids]
        self._lock = threading.Lock()

    def request(self, path: str, body: Mapping[str, Any], deadline_s: float) -> Any:
        """The output of one endpoint (`engine/server.py`).

        Raises:
          CallTimeout: no whole answer in time; the worker is of no use any more, kill it.
          WorkerFailed: the worker has ended, or answers with an error.
        """
        asked = {"task_id": self.task_id} | dict(body)
        return post(self._path, path, asked, deadline_s, MAX_ANSWER_BYTES, self._quote)

    def kill(self) -> None:
        """Ends its processes, whatever they do, and removes its socket and files; safe twice."""
        with self._lock:
            for process in self._processes:
                process.kill()
        self._path.unlink(missing_ok=True)
        shutil.rmtree(self._outputs, ignore_errors=True)


class Workers:
    """All processes over one root. Usable from any thread."""

    def __init__(self, python: str | os.PathLike, root: str | os.PathLike, options: Mapping[str, Any] | None = None):
        """python: of the environment that has appworld. root: the folder that holds `data`. options: see `Limits`.

        Raises:
          UserError: either is absent.
        """
        self.python, self.root = Path(os.path.abspath(python)), Path(os.path.abspath(root))
        self.limits = Limits(**dict(options or {}))
        if not os.access(self.python, os.X_OK):
            raise UserError(f"env.options.python is {python}, which is no program: `make appworld` makes it")
        if not (self.root / "data" / "tasks").is_dir():
            raise UserError(
                f"env.options.root is {root}, which holds no data/tasks: docs/appworld.md says how to get the data, and"
                " how to make an invented root"
            )
        self._lock = threading.Lock()
        self._names = itertools.count()
        self._workers: set[Worker] = set()
        self._zygote: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._folder: Path | None = None

    def warm(self) -> None:
        """Starts the process that workers are forked from, where it is not running: about 15 s.

        Raises:
          UserError: it does not start, or a fence is not allowed here.
        """
        with self._lock:
            self._running()

    def start(self, task_id: str) -> Worker:
        """A new worker with the world of a task open; `worker.task` has its instruction, supervisor and datetime.

        Raises:
          CallTimeout, WorkerFailed: it does not open. UserError: see `warm`.
        """
        if not _TASK_ID.fullmatch(task_id) or not (self.root / "data" / "tasks" / task_id / "specs.json").is_file():
            raise WorkerFailed(f"the root has no task {task_id!r}")
        limits = self.limits
        with self._lock:
            folder = self._running()
            self._show_task(folder, task_id)
            name = str(next(self._names))
            asked = {"make": "worker", "folder": str(folder / "empty")} | asdict(limits)
            path, pids = self._fork(name, asked)
            outputs = folder / "worker" / "experiments" / "outputs" / name
            worker = Worker(path, pids, task_id, name, outputs, limits.quote_failures)
            self._workers = {other for other in self._workers if other._path.exists()} | {worker}
        asked = {"experiment_name": name, "timeout_seconds": limits.cell_seconds, "max_interactions": limits.max_cells}
        asked["max_api_calls_per_interaction"] = limits.max_calls
        try:
            worker.task = worker.request("/initialize", asked, RESET_SECONDS)
        except BaseException:
            worker.kill()
            raise
        return worker

    def grade(self, worker: Worker, task_id: str, deadline_s: float = GRADE_SECONDS) -> dict[str, Any]:
        """PRIVILEGED: what the tests of the task say of the world's state: task_id, success, difficulty, num_tests,
        passes and failures, each failure with its requirement and its trace, which holds the ground truth.

        Raises:
          CallTimeout, WorkerFailed: nobody can grade it.
        """
        worker.request("/save", {}, deadline_s)
        with self._lock:
            folder = self._running()
            asked = {"make": "grader", "root": str(folder / "grader")}
            path, pids = self._fork(f"g{next(self._names)}", asked)
        process = _Process(pids[0])
        try:
            body = {"task_id": task_id, "experiment_name": worker.name}
            return post(path, "/evaluate", body, deadline_s, MAX_ANSWER_BYTES, self.limits.quote_failures)
        finally:
            process.kill()
            path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends every process and removes every file; `start` may begin anew."""
        with self._lock:
            self._stop()

    def _fork(self, name: str, asked: dict[str, Any]) -> tuple[Path, list[int]]:
        """(unix socket, process ids) of new processes. The socket listens before they exist, so no request is early."""
        assert self._folder is not None and self._control is not None, "running"
        path = self._folder / f"{name}.sock"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(path))
                listener.listen(8)
                wire.send_packet(self._control, asked, (listener.fileno(),))
            reply, _ = wire.receive_packet(self._control)
            if reply.get("failed"):
                raise wire.Closed(reply["failed"])
        except (OSError, wire.Closed) as error:
            self._stop()
            raise WorkerFailed(f"no process can be made: {error}") from None
        return path, [reply[key] for key in ("pid", "cell") if key in reply]

    def _running(self) -> Path:
        """The folder of the running zygote; starts it where it is not running."""
        if self._zygote is not None and self._zygote.poll() is None and self._folder is not None:
            return self._folder
        self._stop()
        folder = self._folder = Path(tempfile.mkdtemp(prefix="appworld-"))
        self._lay_out(folder)
        control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = control
        with other, open(folder / "log", "wb") as log:
            self._zygote = subprocess.Popen(
                [self.python, "-c", _BOOT, str(other.fileno()), ENGINE.parent],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(other.fileno(),),
                start_new_session=True,  # out of the reach of Ctrl-C
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
                | {"PYTHONHASHSEED": "0", "APPWORLD_ROOT": str(folder / "worker"), "APPWORLD_CACHE": str(folder)},
            )
        setup = {"folder": str(folder), "home": str(folder / "home"), "worker_root": str(folder / "worker")}
        setup |= asdict(self.limits) | {"task_id": self._first_task(folder), "empty": str(folder / "empty")}
        try:
            wire.send_packet(control, setup)
            control.settimeout(BOOT_SECONDS)
            reply, _ = wire.receive_packet(control)
            control.settimeout(FORK_SECONDS)
            failed = reply["failed"]
        except (OSError, wire.Closed) as error:
            lines = (folder / "log").read_text(errors="replace").strip().splitlines() if folder.exists() else []
            failed = lines[-1] if lines else str(error)
        if failed:
            self._stop()
            remedy = f"see whether {self.python} has appworld (`make appworld`) and the root is whole"
            if failed.startswith("FenceRefused"):
                remedy = "allow it, or run without what it keeps out: --config.env.options.require_fences=False"
            raise UserError(f"AppWorld does not start: {' '.join(failed.split())}: {remedy}")
        return folder

    def _lay_out(self, folder: Path) -> None:
        """The root that workers see, without ground truth, and that of who grades."""
        data = folder / "worker" / "data"
        for place in (data / "tasks", folder / "worker" / "experiments" / "outputs", folder / "home", folder / "empty"):
            place.mkdir(parents=True)
        for entry in (self.root / "data").iterdir():
            if entry.name != "tasks":
                (data / entry.name).symlink_to(entry)
        (folder / "grader").mkdir()
        (folder / "grader" / "data").symlink_to(self.root / "data")
        (folder / "grader" / "experiments").symlink_to(folder / "worker" / "experiments")

    def _show_task(self, folder: Path, task_id: str) -> None:
        seen, whole = folder / "worker" / "data" / "tasks" / task_id, self.root / "data" / "tasks" / task_id
        if not seen.exists():
            seen.mkdir()
            for name in ("specs.json", "dbs"):
                (seen / name).symlink_to(whole / name)

    def _first_task(self, folder: Path) -> str:
        tasks = (path.name for path in sorted((self.root / "data" / "tasks").iterdir()))
        task_id = next((name for name in tasks if _TASK_ID.fullmatch(name)), None)
        if task_id is None:
            raise UserError(f"{self.root}/data/tasks holds no task")
        self._show_task(folder, task_id)
        return task_id

    def _stop(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = set()
        if self._control is not None:
            self._control.close()
        if self._zygote is not None:
            try:
                self._zygote.wait(_END_SECONDS)  # it ends the others first
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._zygote = self._control = self._folder = None
