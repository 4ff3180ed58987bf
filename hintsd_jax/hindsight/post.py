# SPDX-License-Identifier: Apache-2.0

"""One POST under one time limit and one size limit, with the standard library.

Time: the limit holds for a whole request, from the look-up of the host's name to the last byte. Each read from the
socket gets only what is left of it, so a server that trickles bytes ends in time as well; what no socket limit reaches
(a name server that does not answer) is left behind in its daemon thread. Size: of all that is read from the socket,
whatever lengths the server announces, and of the body once it is unpacked.

Certificates are checked. Redirects are not followed: they would take headers and body elsewhere. The proxies of the
environment (http_proxy, https_proxy, no_proxy) are used where that is asked for.

Why not the `openai` client: see docs/endpoint.md.
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
import zlib
from collections.abc import Callable, Mapping
from typing import Any

_MAX_HEAD = 2**20  # bytes of headers and of chunks' frames, beside the body


class TooLong(http.client.HTTPException):
    """A reply of more bytes than it may have."""


class Poster:
    """Posts to one URL, with `timeout_s` for each request as a whole, and takes bodies of at most `max_bytes`. Safe to
    use from several threads.
    """

    def __init__(self, url: str, timeout_s: float, max_bytes: int, use_proxy: bool):
        self._url, self._timeout, self._max_bytes = url, timeout_s, max_bytes
        secure = url.startswith("https:")  # reading all authorities' certificates takes its time
        self._opener = urllib.request.OpenerDirector()  # nothing in it follows redirects or raises for a status
        for handler in (
            urllib.request.ProxyHandler(None if use_proxy else {}),
            _Http(max_bytes),
            *([_Https(max_bytes, ssl.create_default_context())] if secure else []),
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)

    def post(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers, body) of the reply, whatever the status; the body unpacked.

        Raises:
          TimeoutError: no whole reply in time; also wrapped in `urllib.error.URLError`, as whatever else the network
            says. OSError, http.client.HTTPException: no connection, no HTTP, or a reply that ends early, is too long or
            packed in a way that was not asked for.
        """
        request = urllib.request.Request(self._url, body, dict(headers))

        def exchange() -> tuple[int, Mapping[str, str], bytes]:
            try:
                with self._opener.open(request, timeout=self._timeout) as response:
                    content = response.read(self._max_bytes + 1)
            except ValueError as error:  # http.client raises these for some lengths that are none
                raise http.client.HTTPException(f"no HTTP: {error}") from error
            if len(content) > self._max_bytes:
                raise TooLong(f"more than {self._max_bytes} bytes")
            if response.length:  # `read` with a size does not say that the rest is missing
                raise http.client.IncompleteRead(content, response.length)
            packed = response.headers.get("Content-Encoding", "").strip().lower()
            return response.status, response.headers, _unpacked(content, packed, self._max_bytes)

        return _within(self._timeout, exchange)


def _unpacked(content: bytes, packed: str, max_bytes: int) -> bytes:
    if packed in ("", "identity"):
        return content
    if packed not in ("gzip", "x-gzip", "deflate"):
        raise http.client.HTTPException(f"a body packed as {packed!r}, which was not asked for")
    for wbits in (47, -15):  # gzip and zlib are told apart by their first bytes; some send deflate without any
        unpacker = zlib.decompressobj(wbits)
        try:
            content = unpacker.decompress(content, max_bytes + 1)
        except zlib.error:
            continue
        if len(content) > max_bytes:
            raise TooLong(f"more than {max_bytes} bytes, unpacked")
        if not unpacker.eof:
            raise http.client.IncompleteRead(content)
        return content
    raise http.client.HTTPException(f"a body that is not packed as it says, {packed}")


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


class _Bounded(io.RawIOBase):
    """A socket's reading end: every read must be over by `deadline` (of `time.monotonic`), `most` bytes in all."""

    def __init__(self, sock: Any, raw: io.RawIOBase, deadline: float, most: int):
        self._sock, self._raw, self._deadline, self._most = sock, raw, deadline, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time of the request is over")
        if self._most <= 0:
            raise TooLong("a reply without end")
        self._sock.settimeout(left)
        count = self._raw.readinto(buffer)
        self._most -= count or 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, deadline: float, most: int, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Bounded(sock, self.fp.detach(), deadline, most))

    def _read_status(self) -> tuple[str, int, str]:
        """Early hints and the like come before the reply, as 100 does, which http.client skips."""
        version, status, reason = super()._read_status()  # pyright: ignore[reportAttributeAccessIssue] - not in its types
        return version, 100 if 100 < status < 200 and status != 101 else status, reason


class _OneLimit(http.client.HTTPConnection):
    """A connection with `timeout` seconds for all that it reads, a proxy's answer included."""

    def __init__(self, *args: Any, timeout: float, most: int, **kwargs: Any):
        super().__init__(*args, timeout=timeout, **kwargs)
        deadline = time.monotonic() + timeout
        self.response_class = functools.partial(_Response, deadline=deadline, most=most)  # pyright: ignore[reportAttributeAccessIssue] - http.client only calls it


class _OneLimitSecure(_OneLimit, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def __init__(self, max_bytes: int):
        super().__init__()
        self._connection = functools.partial(_OneLimit, most=max_bytes + _MAX_HEAD)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, request)  # pyright: ignore[reportArgumentType] - called with timeout only


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, max_bytes: int, context: ssl.SSLContext):
        super().__init__(context=context)
        self._connection = functools.partial(_OneLimitSecure, most=max_bytes + _MAX_HEAD, context=context)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, request)  # pyright: ignore[reportArgumentType] - called with timeout only
