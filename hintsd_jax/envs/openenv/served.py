# SPDX-License-Identifier: Apache-2.0

"""Where an environment is reached: options in, the URL of its server out. One that is installed here is served here, by
the package's own server, in a thread.

Invariant: a server that was started here listens on this machine alone and ends with `close`.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import typing
from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.openenv.options import Options, module, package
from hintsd_jax.errors import UserError
from hintsd_jax.plugins import load
from hintsd_jax.texts import described

_HOST = "127.0.0.1"
_STARTING_SECONDS, _CLOSING_SECONDS, _PAUSE = 60.0, 5.0, 0.005
_MOST_BYTES = 100 << 20  # of a message, as the package's client has it


class Place:
    """The server of an environment: `url`. One that runs already is taken as it is."""

    def __init__(self, options: Options):
        package()
        self._thread: threading.Thread | None = None
        if options.is_remote:
            self.url = options.environment.rstrip("/")
            return
        # A tool that refuses what an agent asks is no news of the run; the agent reads it.
        logging.getLogger("fastmcp").setLevel(logging.CRITICAL)
        uvicorn = module("uvicorn")
        config = uvicorn.Config(
            app_of(options.environment, options.arguments),
            host=_HOST,
            port=0,
            log_level="error",
            ws_max_size=_MOST_BYTES,
            ws_ping_interval=None,  # an environment that computes for long is not gone
        )
        self._server: Any = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        last = time.monotonic() + _STARTING_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > last:
                raise RuntimeError(f"the server of {options.environment} did not start")
            time.sleep(_PAUSE)
        self.url = f"http://{_HOST}:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        if self._thread is not None:
            self._server.should_exit = True
            self._thread.join(_CLOSING_SECONDS)


def app_of(path: str, arguments: Mapping[str, Any]) -> Any:
    """The app at a path "package.module:name": as packages ship it, or one around a class of environments.

    Raises:
      UserError: there is nothing, or neither of these; the class does not say what its actions are.
    """
    found = load(path, "OpenEnv environment")
    if isinstance(found, type) and issubclass(found, package().Environment):
        return _app_around(found, path, arguments)
    if not callable(getattr(found, "websocket_route", None)) and not callable(getattr(found, "websocket", None)):
        raise UserError(f"OpenEnv environment {path!r} is neither an app nor a class of environments of openenv")
    if arguments:
        raise UserError(f"openenv: env.options.arguments are for a class, and {path!r} is an app: name its class")
    return found


def _app_around(env_class: type, path: str, arguments: Mapping[str, Any]) -> Any:
    action, observation = action_class(env_class), package().Observation
    if action is None:
        raise UserError(
            f"OpenEnv environment {path!r}: its step does not say which class its actions have: annotate it, or name"
            " the package's app"
        )
    factory = functools.partial(env_class, **arguments) if arguments else env_class
    try:
        return package().create_fastapi_app(factory, action, observation, mode="simulation")
    except Exception as error:  # whatever making one raises
        raise UserError(f"OpenEnv environment {path!r} cannot be served: {described(error)}") from error


def action_class(env_class: Any) -> type | None:
    """The class of actions that an environment's `step` or its base `Environment[...]` names; the calls of tools where
    it takes no others. None where nothing says so.
    """
    types = module("openenv.core.env_server.mcp_types")
    try:
        hint: Any = typing.get_type_hints(env_class.step).get("action")
    except NameError:  # of a class that only a type checker imports: the base may say it all the same
        hint = None
    named = [*(typing.get_args(hint) or (hint,))]
    for each in env_class.__mro__:
        for generic in vars(each).get("__orig_bases__", ()):
            named += typing.get_args(generic)
    base = package().Action
    actions = [each for each in named if isinstance(each, type) and issubclass(each, base) and each is not base]
    own = [each for each in actions if not issubclass(each, (types.CallToolAction, types.ListToolsAction))]
    if own:
        return own[0]
    return types.CallToolAction if actions or issubclass(env_class, package().MCPEnvironment) else None
