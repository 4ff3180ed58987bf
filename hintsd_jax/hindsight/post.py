# SPDX-License-Identifier: Apache-2.0

"""One POST under one time limit and one size limit, with the standard library.

Time: the limit holds for a whole request, from the look-up of the host's name to the last byte. Each read from the
socket gets only what is left of it, so a server that trickles bytes ends in time as well; what no socket limit reaches
(a name server that does not answer) is left behind in its daemon thread.

Certificates are checked. Redirects are not followed: they would take headers and body elsewhere. The proxies of the
environment (http_proxy, https_proxy, no_proxy) are used, as by other programs.
"""

from __future__ import annotations

import functools
import http.client
import io
import queue
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any


class Poster:
    """Posts with `timeout_s` for each request as a whole, and reads at most `max_bytes` + 1 of a reply. Safe to use
    from several threads.
    """

    def __init__(self, timeout_s: float, max_bytes: int):
        self._timeout, self._max_bytes = timeout_s, max_bytes
        self._opener = (
            urllib.request.OpenerDirector()
        )  # nothing in it follows redirects or makes exceptions of a status
        for handler in (
            urllib.request.ProxyHandler(),
            _Http(),
            _Https(context=ssl.create_default_context()),
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers, body) of the reply, whatever the status. A body of more than `max_bytes` is cut after one
        byte more.

        Raises:
          TimeoutError: no whole reply in time; also wrapped in `urllib.error.URLError`, as whatever else the network
          says. OSError, http.client.HTTPException: no connection, no HTTP, or a reply that ends early.
        """
        request = urllib.request.Request(url, body, dict(headers))

        def exchange() -> tuple[int, Mapping[str, str], bytes]:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = response.read(self._max_bytes + 1)
                if (
                    response.length and len(content) <= self._max_bytes
                ):  # `read` with a size does not say that the rest is missing
                    raise http.client.IncompleteRead(content, response.length)
                return response.status, response.headers, content

        return _within(self._timeout, exchange)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's value or exception; TimeoutError when it takes longer, and it is left behind in its thread."""
    done: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:  # raised again below
            done.put((None, error))

    threading.Thread(target=run, name="endpoint-request", daemon=True).start()
    try:
        value, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value


# http.client gives each read the whole limit again. Below, all reads of a connection share one.


class _Remaining(io.RawIOBase):
    """A socket's reading end, where every read must be over by `deadline` (of `time.monotonic`)."""

    def __init__(self, sock: Any, raw: io.RawIOBase, deadline: float):
        self._sock, self._raw, self._deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time of the request is over")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, deadline: float, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Remaining(sock, self.fp.detach(), deadline))


class _OneLimit(http.client.HTTPConnection):
    """A connection with `timeout` seconds for all that it reads, a proxy's answer included."""

    def __init__(self, *args: Any, timeout: float, **kwargs: Any):
        super().__init__(*args, timeout=timeout, **kwargs)
        self.response_class = functools.partial(_Response, deadline=time.monotonic() + timeout)  # pyright: ignore[reportAttributeAccessIssue] - http.client only calls it


class _OneLimitSecure(_OneLimit, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_OneLimit, request)  # pyright: ignore[reportArgumentType] - called with timeout only


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext):
        super().__init__(context=context)
        self._checked_by = context

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        connection = functools.partial(_OneLimitSecure, context=self._checked_by)
        return self.do_open(connection, request)  # pyright: ignore[reportArgumentType] - called with timeout only
