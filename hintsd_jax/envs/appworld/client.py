# SPDX-License-Identifier: Apache-2.0

"""One request to a worker: JSON over HTTP/1.1 on a unix socket, in at most so many seconds and bytes.

An answer is believed only where it is whole: status 200, a Content-Length that holds, a JSON object with "output".
Everything else is a `WorkerFailed` that says what came instead; nothing in time is a `CallTimeout`. The deadline is one
for the whole request: an answer that trickles in does not stretch it.

A failure is written into files and shown, and the licence of the benchmark does not let its texts be passed on: so it
tells the kind and the size of what came instead, and quotes it only where that is asked for.
"""

import json
import os
import re
import socket
import time
from typing import Any

from hintsd_jax.envs.base import CallTimeout

MAX_HEAD = 65_536  # bytes of a status line and headers
_DETAIL = 500  # characters of what came instead
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: [^\r\n]*)?")


class WorkerFailed(Exception):
    """A worker, or who grades, gave no answer that can be believed; the text says what came instead."""


def post(
    socket_path: str | os.PathLike, path: str, body: Any, deadline_s: float, max_bytes: int, quote: bool = False
) -> Any:
    """The "output" of the answer to `body` (plain JSON), posted to `path` at a unix socket.

    deadline_s: seconds for everything, from connecting to the answer's last byte. max_bytes: of the answer's body.
    quote: whether failures quote what came instead.

    Raises:
      CallTimeout: the answer was not whole in time.
      WorkerFailed: the socket is dead, or the answer is none of status 200, cut, too long, or not what it should be.
    """
    ends_at = time.monotonic() + deadline_s
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: worker\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_left(ends_at))
            connection.connect(os.fspath(socket_path))
            connection.settimeout(_left(ends_at))  # of `sendall` as a whole
            connection.sendall(head.encode() + payload)
            status, raw = _receive(connection, ends_at, max_bytes, quote)
    except TimeoutError:
        raise CallTimeout(f"{path}: no answer in {deadline_s:g} s") from None
    except (OSError, WorkerFailed) as error:
        raise WorkerFailed(f"{path}: {error}") from None
    if status != 200:
        raise WorkerFailed(f"{path}: status {status}{_kind(raw)}: {_shown(raw, quote)}")
    return _output(path, raw, quote)


def _left(ends_at: float) -> float:
    seconds = ends_at - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _receive(connection: socket.socket, ends_at: float, max_bytes: int, quote: bool) -> tuple[int, bytes]:
    """(status, body) of the one answer on a connection."""
    received = bytearray()
    while (end := received.find(b"\r\n\r\n")) < 0:
        if len(received) > MAX_HEAD:
            raise WorkerFailed(f"the answer's headers have no end in {MAX_HEAD:,} bytes")
        received += _more(connection, ends_at, len(received), "its headers' end")
    status, length = _read_head(bytes(received[:end]), quote)
    if length > max_bytes:
        raise WorkerFailed(f"the answer has {length:,} bytes, of {max_bytes:,} at most")
    body = received[end + 4 :]
    while len(body) < length:
        body += _more(connection, ends_at, len(body), f"its {length:,} bytes")
    if len(body) > length:
        raise WorkerFailed(f"the answer is longer than its Content-Length of {length:,}")
    return status, bytes(body)


def _more(connection: socket.socket, ends_at: float, so_far: int, end: str) -> bytes:
    connection.settimeout(_left(ends_at))
    if data := connection.recv(65_536):
        return data
    raise WorkerFailed(f"the answer is cut after {so_far:,} bytes, before {end}" if so_far else "no answer")


def _read_head(head: bytes, quote: bool) -> tuple[int, int]:
    first, *lines = head.split(b"\r\n")
    status = _STATUS.fullmatch(first)
    if not status:
        raise WorkerFailed(f"no HTTP: {_shown(first, quote)}")
    headers = [line.partition(b":") for line in lines]
    lengths = {value.strip() for name, _, value in headers if name.strip().lower() == b"content-length"}
    length = lengths.pop() if len(lengths) == 1 else b""
    if not re.fullmatch(rb"\d{1,15}", length):
        raise WorkerFailed("the answer has no Content-Length, so that nobody knows whether it is whole")
    return int(status[1]), int(length)


def _output(path: str, raw: bytes, quote: bool) -> Any:
    try:
        answer = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise WorkerFailed(f"{path}: the answer is not JSON: {_shown(raw, quote)}") from None
    if not isinstance(answer, dict) or "output" not in answer:
        raise WorkerFailed(f'{path}: the answer has no "output": {_shown(raw, quote)}')
    return answer["output"]


def _no_constant(literal: str) -> None:
    raise ValueError(literal)


def _kind(raw: bytes) -> str:
    """The name of the error that a worker's 500 tells; "" where it tells none."""
    try:
        kind = json.loads(raw)["kind"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return ""
    return f" ({kind})" if isinstance(kind, str) and re.fullmatch(r"[A-Za-z_]{1,60}", kind) else ""


def _shown(raw: bytes, quote: bool) -> str:
    if not quote:
        return f"{len(raw):,} bytes (env.options.quote_failures shows them)"
    text = raw.decode("utf-8", errors="replace")
    return ascii(text[:_DETAIL]) + (" ..." if len(text) > _DETAIL else "")
