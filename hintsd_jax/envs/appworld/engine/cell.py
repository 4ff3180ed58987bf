# SPDX-License-Identifier: Apache-2.0

"""The cell: the process that runs a model's code, and holds nothing that is worth reading.

Code comes in as frames, its output goes out. The world, with its databases, is another process: `apis` here are stubs
that ask it. So what a model's code may do to the world is what the APIs allow, whatever else it does in here; and to
leave the process it would have to leave the kernel's fences (`fences.fence_cell`).
"""

from __future__ import annotations

import builtins
import datetime
import os
import random
import signal
from types import SimpleNamespace
from typing import Any

import appworld.environment as engine  # pyright: ignore[reportMissingImports] - the second environment has it
from appworld.common.utils import CustomErrorMessageMunch  # pyright: ignore[reportMissingImports] - as above

from . import fences, wire

FAILED = "Execution failed. Traceback:\n"  # as the engine begins
MAX_DEPTH = 20
_SEED = 100  # the engine's


class Cell(engine.AppWorld):
    """The engine's own way to run a cell and to word what came of it, without a world."""

    def __init__(self, channel: int, setup: dict[str, Any]):
        """setup: "apis", the names of the APIs by app; "datetime", of the world, in ISO format; "timeout_seconds" and
        "max_interactions".
        """
        self._channel, self._names = channel, setup["apis"]
        self._prepare_shell()
        self.task = SimpleNamespace(datetime=datetime.datetime.fromisoformat(setup["datetime"]))
        self._set_datetime()
        random.seed(_SEED)
        self.timeout_seconds, self.max_interactions = setup["timeout_seconds"], setup["max_interactions"]
        self.safety_guard = engine.SafetyGuard()

    def _prepare_shell(self) -> None:
        config = engine.Config()
        config.HistoryManager.enabled = False
        self.shell = engine.InteractiveShellEmbed(config=config)
        self.shell.ast_node_interactivity = "none"
        self.remote_environment_url, self.import_utils = None, False
        self.raise_on_unsafe_syntax = self.null_patch_unsafe_execution = True
        self.num_interactions, self.environment_io = 0, []
        self._execute_preamble()

    def _execute_preamble(self) -> None:
        self.shell.run_cell(engine.TRUE_AVAILABLE_IMPORTS)
        self.shell.run_cell(_PRINT)
        for name in ("ApiCollection", "Requester"):
            self.shell.user_ns.pop(name, None)
        self.requester = SimpleNamespace(reset_request_count=lambda: None)  # the world counts
        self.shell.user_ns["apis"] = self._stubs()

    def _stubs(self) -> Any:
        apis = engine.ApiCollection(error_message="No app named '{key}' found.")
        for app, names in self._names.items():
            apis[app] = CustomErrorMessageMunch.build("No API named '{key}' found in the " + app + " app.")
            for name in names:
                apis[app][name] = self._stub(app, name)
        return apis

    def _stub(self, app: str, name: str):
        channel = self._channel

        def _api_request(**arguments: Any) -> Any:
            request = {"app": app, "api": name, "arguments": packed(arguments)}
            # The engine's alarm waits: between a question and its answer it would leave the answer to the next one.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            try:
                wire.send_frame(channel, request)
                answer = wire.receive_frame(channel)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if "error" in answer:
                raise _error(answer["kind"])(answer["error"])
            return answer["value"]

        return _api_request

    def _save_state(self, directory: str) -> None:
        """Nothing: the world saves itself."""

    def save_logs(self) -> None:
        """Nothing: as above."""

    output_db_home_path_on_disk = ""

    def run(self, code: str) -> str:
        """What the agent sees of a cell."""
        if refused := fences.refusal(code):
            return FAILED + refused
        try:
            return str(self.execute(code))
        except BaseException as error:  # KeyboardInterrupt, SystemExit and what a model derives from BaseException
            return f"{FAILED}{type(error).__name__}"


# An own `print` and `input` for the model's code: a list or a dict alone is shown as JSON, a long one on many lines.
_PRINT = """
def print(*values, **options):
    if len(values) == 1 and not options and isinstance(values[0], (list, tuple, dict)):
        text = json.dumps(values[0])
        values = (text if len(text) < 100 else json.dumps(values[0], indent=1),)
    builtins.print(*values, **options)

def input(*values, **options):
    raise Exception("input() is not allowed: nobody answers, so decide for yourself.")
"""


def packed(value: Any, depth: int = 0) -> Any:
    """Arguments of a call as JSON. What JSON has no form for travels as its type's name and its text."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth < MAX_DEPTH and isinstance(value, list | tuple):
        return [packed(item, depth + 1) for item in value]
    if depth < MAX_DEPTH and isinstance(value, dict):
        return {"fields": [[str(key), packed(item, depth + 1)] for key, item in value.items()]}
    if isinstance(value, str | int | float):  # of a subclass
        return next(kind(value) for kind in (str, int, float) if isinstance(value, kind))
    return {"kind": type(value).__name__, "text": str(value)}


def _error(kind: str) -> type[Exception]:
    found = getattr(builtins, kind, Exception)
    return found if isinstance(found, type) and issubclass(found, Exception) else Exception


def serve(channel: int, limits: dict[str, Any]) -> None:
    """Serves the world at the other end of `channel` until it ends. limits: see `fences.fence_cell`."""
    fences.scrub_environment(fences.WORK)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    try:
        fences.fence_cell(limits["folder"], limits["cell_memory_mib"], limits["require_fences"])
    except fences.FenceRefused as error:
        wire.send_frame(channel, {"refused": str(error)})
        return
    wire.send_frame(channel, {"refused": ""})
    cell = Cell(channel, wire.receive_frame(channel))
    most = limits["output_characters"]
    while True:
        try:
            code = wire.receive_frame(channel)["code"]
        except wire.Closed:
            return
        output = cell.run(code)
        if len(output) > most:
            output = f"{output[:most]}\n... ({len(output) - most:,} more characters)"
        wire.send_frame(channel, {"output": output.encode("utf-8", "replace").decode()})


def warm() -> None:
    """Imports what a first shell imports."""
    channel, other = os.pipe()
    cell = Cell.__new__(Cell)
    cell._channel, cell._names = channel, {}
    cell._prepare_shell()
    os.close(channel)
    os.close(other)
