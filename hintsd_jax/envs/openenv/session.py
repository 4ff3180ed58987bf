# SPDX-License-Identifier: Apache-2.0

"""One session with an environment's server, by the package's own client: resets and actions in, its results out.

Who is to blame stays apart: `Refused` is an action that the server does not take; a server that is slow, gone, full or
that fails is a fault of the world, and raises.

Invariant: an episode is played in one session. The client would connect anew, to an environment that was never reset.
"""

from __future__ import annotations

import functools
import ipaddress
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from hintsd_jax.envs.base import CallTimeout
from hintsd_jax.envs.openenv.options import module

_SECONDS = 86_400.0  # of an answer: the trainer's own limit on a call comes first
_SCHEMA_SECONDS = 30.0
_ROOM_SECONDS, _PAUSE = 30.0, 0.1  # how long a full server is asked again


class Refused(Exception):
    """The server does not take an action, as it does not fit its schema."""


class _Full(Exception):
    """The server has no session to give."""


class Session:
    """A session at `url`. seconds: that an answer may take."""

    def __init__(self, url: str, seconds: float = _SECONDS):
        self._url = url
        beat = {"websocket_ping_interval_s": None} if is_local(url) else {}
        self._client: Any = _client_class()(base_url=url, message_timeout_s=seconds, mode="simulation", **beat).sync()

    def tools(self) -> list[Mapping[str, Any]]:
        """The tools of an environment that has tools: name, description and input_schema of each."""
        observation = self._ask(self._client.step, {"type": "list_tools"}).observation
        failure = (observation.get("metadata") or {}).get("error")
        if failure or not isinstance(observation.get("tools"), list):
            raise RuntimeError(f"the environment at {self._url} does not say which tools it has: {failure}")
        return observation["tools"]

    def reset(self, **arguments: Any) -> Any:
        """The package's `StepResult`, whose observation is a mapping."""
        return self._ask(self._client.reset, **arguments)

    def step(self, action: Mapping[str, Any]) -> Any:
        """As `reset`. Raises Refused where the action is not what the server takes."""
        return self._ask(self._client.step, dict(action))

    def state(self) -> Mapping[str, Any]:
        return self._ask(self._client.state)

    def close(self) -> None:
        self._client.close()

    def _ask(self, ask: Callable[..., Any], *given: Any, **named: Any) -> Any:
        try:
            return ask(*given, **named)
        except TimeoutError as error:
            raise CallTimeout(f"the server at {self._url} did not answer in time") from error
        except RuntimeError as error:  # what the client makes of a server's error
            said = str(error)
            if said.endswith("(code: VALIDATION_ERROR)"):
                raise Refused(said) from error
            if said.endswith("(code: CAPACITY_REACHED)"):
                raise _Full(said) from error
            raise RuntimeError(f"the server at {self._url}: {said}") from error


def begun(url: str, with_tools: bool, arguments: Mapping[str, Any], **limits: float) -> tuple[Session, list[Any], Any]:
    """(a new session, the environment's tools, what its reset gave). A server that is full is asked again for a while:
    it may not know yet that an episode is over.

    arguments: of the reset.

    Raises whatever keeps it from beginning.
    """
    last = time.monotonic() + _ROOM_SECONDS
    while True:
        session = Session(url, **limits)
        try:
            tools = session.tools() if with_tools else []  # before the reset, which undoes what asking may have counted
            return session, tools, session.reset(**arguments)
        except _Full as error:
            session.close()
            if time.monotonic() > last:
                raise RuntimeError(
                    f"the server at {url} has no session to give ({error}): let it have more (max_concurrent_envs), or"
                    " keep rollout.slots + env.resets_ahead within what it has"
                ) from error
            time.sleep(_PAUSE)
        except BaseException:
            session.close()
            raise


def action_schema(url: str) -> Mapping[str, Any]:
    """The JSON schema of the actions that the server at `url` takes. Raises ValueError where it is no server of the
    package, and httpx's error where none answers.
    """
    httpx = module("httpx")
    address = url.replace("ws", "http", 1) if url.startswith("ws") else url
    answer = httpx.get(f"{address}/schema", timeout=_SCHEMA_SECONDS, trust_env=not is_local(url))
    schema = answer.json().get("action") if answer.status_code == httpx.codes.OK else None
    if not isinstance(schema, dict):
        raise ValueError(f"{address}/schema answers {answer.status_code} and tells of no actions")
    return schema


def is_local(url: str) -> bool:
    """Whether a URL names this machine, to which no proxy leads."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@functools.cache
def _client_class() -> Any:
    client: Any = module("openenv.core.generic_client").GenericEnvClient

    class OneSession(client):
        _begun = False

        async def _connect_async(self) -> Any:
            before = self._ws
            await super()._connect_async()
            if self._ws is not before:
                if self._begun:
                    raise ConnectionError(f"the server at {self.base_url} closed the session before its end")
                self._begun = True
            return self

    return OneSession
