# SPDX-License-Identifier: Apache-2.0

"""The world: one open AppWorld, served as JSON over HTTP on a unix socket. No model's code runs in here.

`/initialize` opens it. `/execute` has the cell run code, and answers the API calls that the code makes;
`/task_completed` says whether the agent has ended the task; `/save` writes the state for who grades; `/close` closes
the world. 200 carries {"output": ...}; everything else is a 500 with {"kind": an error's name, "detail": ...}.

Invariant: the cell reaches the public APIs of the apps and nothing else of this process.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from typing import Any

from appworld.common.utils import get_name_to_apis  # pyright: ignore[reportMissingImports] - the second environment
from appworld.environment import AppWorld  # pyright: ignore[reportMissingImports] - as above
from appworld.requester import (  # pyright: ignore[reportMissingImports] - as above
    METHOD_NOT_ALLOWED_MESSAGE,
    _get_api_name_to_doc,
    _get_app_api_name_to_argument_names,
)

from . import wire

_IN_PATH = re.compile(r"[^/\\?#%\x00-\x1f]+")
MAX_BODY = 8 * 2**20


class World:
    """The endpoints over one world; `cell`: the stream to the process that runs the code."""

    def __init__(self, cell: int):
        self._cell = cell
        self._world: Any = None
        self._apis: dict[str, list[str]] = {}
        self._refused = str(wire.receive_frame(cell)["refused"])

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        """The output of one request.

        Raises:
          Exception: whatever is wrong with it.
        """
        if path == "/initialize":
            return self._initialize(**body)
        if self._world is None or self._world.task_id != body["task_id"]:
            raise ValueError("no world is open for this task")
        if path == "/execute":
            return self._execute(body["code"])
        if path == "/task_completed":
            return bool(self._world.task_completed())
        if path == "/save":
            return self._world._save_state(self._world.output_db_home_path_on_disk)
        if path == "/close":
            self._world.close()
            self._world = None
            return None
        raise ValueError(f"no endpoint {path}")

    def _initialize(
        self,
        task_id: str,
        experiment_name: str,
        timeout_seconds: int,
        max_interactions: int,
        max_api_calls_per_interaction: int = 1000,
    ) -> dict[str, Any]:
        if self._refused:
            raise RuntimeError(f"a fence is refused: {self._refused}")
        if self._world is not None:
            raise ValueError("a world is open")
        world = AppWorld(
            task_id=task_id,
            experiment_name=experiment_name,
            timeout_seconds=timeout_seconds,
            max_interactions=max_interactions,
            max_api_calls_per_interaction=max_api_calls_per_interaction,
            load_ground_truth=False,
        )
        self._world = world
        supervisor = {key: world.task.supervisor[key] for key in ("first_name", "last_name", "email", "phone_number")}
        started = world.task.datetime.isoformat()
        names = {app: list(get_name_to_apis(app, ignore_private_apis=True)) for app in world.requester.apps}
        self._apis = {app: apis for app, apis in names.items() if apis}
        setup = {"apis": self._apis, "datetime": started}
        setup |= {"timeout_seconds": timeout_seconds, "max_interactions": max_interactions}
        wire.send_frame(self._cell, setup)
        task = {"task_id": world.task.id, "instruction": world.task.instruction}
        return task | {"supervisor": supervisor, "datetime": started}

    def _execute(self, code: str) -> str:
        self._world.requester.reset_request_count()
        wire.send_frame(self._cell, {"code": code})
        while True:
            message = wire.receive_frame(self._cell)
            if "output" in message:
                return str(message["output"])
            wire.send_frame(self._cell, self._call(message))

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            app, api, arguments = message["app"], message["api"], unpacked(message["arguments"])
            if app not in self._apis or api not in self._apis[app]:
                raise LookupError("no such API")
            _check(app, api, arguments)
            reply = {"value": self._world.apis[app][api](**arguments)}
            json.dumps(reply)
            return reply
        except Exception as error:  # the agent's mistake, told to its code
            return {"error": str(error), "kind": type(error).__name__}


def _check(app: str, api: str, arguments: dict[str, Any]) -> None:
    """Refuses arguments that would lead a call elsewhere: the engine puts some into the path of a request, where "../"
    leads to another endpoint, also to those that agents must not have; others are its own switches.

    Raises:
      Exception: with the words that the engine has for a path that leads nowhere.
    """
    path = _get_api_name_to_doc(app, include_private_apis=True)[api]["path"]
    for name, value in arguments.items():
        text = str(value)
        if f"{{{name}}}" in path and (not _IN_PATH.fullmatch(text) or not text.strip(".")):
            raise Exception(f'Response status code is 404:\n{{"message":"{METHOD_NOT_ALLOWED_MESSAGE}"}}')
        if name in ("client", "track", "show") and name not in _get_app_api_name_to_argument_names(app)[(app, api)]:
            raise TypeError(f"unexpected argument {name!r}")


def unpacked(value: Any) -> Any:
    """What `cell.packed` has packed."""
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "fields" in value:
        return {str(key): unpacked(item) for key, item in value["fields"]}
    text = str(value["text"])
    return type(str(value["kind"]), (), {"__str__": lambda self: text, "__deepcopy__": lambda self, memo: self})()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer: Any = None  # of a request

    def do_POST(self) -> None:
        """Answers one request."""
        try:
            length = int(self.headers["Content-Length"])
            if not 0 <= length <= MAX_BODY:
                raise ValueError(f"a body of {length:,} bytes, of {MAX_BODY:,} at most")
            body = json.loads(self.rfile.read(length))
            status, reply = 200, {"output": self.answer(self.path, body)}
        except wire.Closed as error:
            status, reply = 500, {"kind": "Closed", "detail": f"the process of the code: {error}"}
        except Exception as error:  # told to who asked; the next request may be right
            status, reply = 500, {"kind": type(error).__name__, "detail": str(error)}
        payload = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(payload)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def serve(listener: socket.socket, answer) -> None:
    """Serves `answer(path, body)` at `listener`, one request after the other, for good."""
    handler = type("Handler", (_Handler,), {"answer": staticmethod(answer)})
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):  # who asked has gone
            handler(connection, ("", 0), None)  # pyright: ignore[reportArgumentType] - it has no use for a server
