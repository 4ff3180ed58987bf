# SPDX-License-Identifier: Apache-2.0

"""One episode of verifiers, turned around: the package asks a model; here it waits until it is told the answer.

In: the package's config and one of its tasks. Out, one after the other: what the package asks its model (the body of a
chat completion request), and at the end its own `Episode`. The package's runner plays, as it always does, in a thread
with an event loop of its own, against a server on this machine that holds each request until `answer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import threading
from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.verifiers import here
from hintsd_jax.envs.verifiers.tasksets import package

MODEL = "policy"
_NO_KEY = "HINTSD_JAX_NO_KEY"  # a variable that nobody sets: the server asks for no key
_HOST = "127.0.0.1"
_MOST_BYTES = 1 << 28  # of a request
_CLOSING_SECONDS = 5.0


class Play:
    """An episode under way; it begins at once."""

    def __init__(self, config: Any, task: Any):
        here.install()
        _reach_without_proxy()
        self._config, self._task = config, task
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: asyncio.Future[Mapping[str, Any]] | None = None
        self._loop = asyncio.new_event_loop()
        self._playing: asyncio.Task[Any] = self._loop.create_task(self._play())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def next(self) -> Any:
        """What the package asks its model next, a dict, or its `Episode`, when it is over. Raises what stopped it."""
        news = self._news.get()
        if isinstance(news, BaseException):
            raise news
        return news

    def answer(self, message: Mapping[str, Any]) -> None:
        """Gives the model's message to what was asked last."""
        assert self._waiting is not None
        self._loop.call_soon_threadsafe(self._waiting.set_result, message)

    def close(self) -> None:
        """Breaks off what is not over; the package then ends what it has started."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # its loop has just been closed
                self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(_CLOSING_SECONDS)

    def _stop(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._playing.cancel()

    def _run(self) -> None:
        try:
            self._news.put(self._loop.run_until_complete(self._playing))
        except BaseException as error:  # raised where it is waited for
            self._news.put(error)
        finally:
            self._loop.close()

    async def _play(self) -> Any:
        from aiohttp import web  # pyright: ignore[reportMissingImports]

        vf = package()
        app = web.Application(client_max_size=_MOST_BYTES)
        app.router.add_post("/v1/chat/completions", self._asked)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, _HOST, 0).start()
            client = vf.EvalClientConfig(base_url=f"http://{_HOST}:{runner.addresses[0][1]}/v1", api_key_var=_NO_KEY)
            environment = vf.load_environment(self._config)
            async with environment.serving():
                return await environment.run_episode(self._task, vf.ModelContext(model=MODEL, client=client))
        finally:
            await runner.cleanup()

    async def _asked(self, request: Any) -> Any:
        from aiohttp import web  # pyright: ignore[reportMissingImports]

        body = await request.json()
        if self._waiting is not None and not self._waiting.done():
            self._news.put(RuntimeError("the package asks its model twice at once: only one conversation is supported"))
            raise web.HTTPBadRequest
        self._waiting = self._loop.create_future()
        self._news.put(body)
        message = await self._waiting
        kind, text = ("text/event-stream", _events(message)) if body.get("stream") else (_JSON, _whole(message))
        return web.Response(body=text.encode(), content_type=kind)


_JSON = "application/json"
_USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def _reach_without_proxy() -> None:
    """A proxy of this machine's environment is no way to this machine."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        if _HOST not in hosts:
            os.environ[name] = ",".join([*hosts, _HOST, "localhost"])


def _reason(message: Mapping[str, Any]) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


def _whole(message: Mapping[str, Any]) -> str:
    choice = {"index": 0, "finish_reason": _reason(message), "message": message}
    return json.dumps({**_frame("chat.completion"), "choices": [choice], "usage": _USAGE})


def _events(message: Mapping[str, Any]) -> str:
    """The same as a stream of one piece."""
    delta = dict(message)
    if calls := message.get("tool_calls"):
        delta["tool_calls"] = [{**call, "index": index} for index, call in enumerate(calls)]
    pieces = [(delta, None), ({}, _reason(message))]
    chunks = [
        {**_frame("chat.completion.chunk"), "choices": [{"index": 0, "delta": piece, "finish_reason": reason}]}
        for piece, reason in pieces
    ]
    lines = [json.dumps(chunk) for chunk in (chunks[0], {**chunks[1], "usage": _USAGE})]
    return "".join(f"data: {line}\n\n" for line in (*lines, "[DONE]"))


def _frame(kind: str) -> dict[str, Any]:
    return {"id": "answer", "object": kind, "created": 1, "model": MODEL}
