# SPDX-License-Identifier: Apache-2.0

"""Messages between the processes of the engine, and with the trainer: packets with descriptors, and frames of JSON.

Invariant: nothing but JSON is ever read from a process that runs a model's code.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

MAX_PACKET = 65_536
MAX_FRAME = 64 * 2**20  # bytes
_LENGTH = 4
_read_some, _write_some = os.read, os.write  # the engine takes these out of `os` while a cell runs


class Closed(Exception):
    """The other end has gone, or sends what is no message."""


def send_packet(channel: socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Sends one message over a SOCK_SEQPACKET socket, with open files."""
    socket.send_fds(channel, [json.dumps(message).encode()], list(descriptors))


def receive_packet(channel: socket.socket, most: int = 4) -> tuple[dict[str, Any], list[int]]:
    """(message, descriptors) of the next packet.

    Raises:
      Closed: the other end has gone.
    """
    try:
        data, descriptors, _, _ = socket.recv_fds(channel, MAX_PACKET, most)
    except ConnectionError:
        data, descriptors = b"", []
    if not data:
        raise Closed("the other process has ended")
    return json.loads(data), descriptors


def send_frame(descriptor: int, message: Any) -> None:
    """Writes one JSON value to a stream.

    Raises:
      Closed: nobody reads. ValueError: more than MAX_FRAME bytes.
    """
    payload = json.dumps(message).encode()
    if len(payload) > MAX_FRAME:
        raise ValueError(f"a message of {len(payload):,} bytes, of {MAX_FRAME:,} at most")
    rest = memoryview(len(payload).to_bytes(_LENGTH, "big") + payload)
    while rest:
        try:
            rest = rest[_write_some(descriptor, rest) :]
        except OSError as error:
            raise Closed(str(error)) from None


def receive_frame(descriptor: int) -> Any:
    """The next JSON value of a stream.

    Raises:
      Closed: the stream ends, or holds what is no such message.
    """
    length = int.from_bytes(_read(descriptor, _LENGTH), "big")
    if length > MAX_FRAME:
        raise Closed(f"a message of {length:,} bytes, of {MAX_FRAME:,} at most")
    try:
        return json.loads(_read(descriptor, length))
    except (ValueError, RecursionError) as error:
        raise Closed(f"no JSON: {error}") from None


def _read(descriptor: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        try:
            more = _read_some(descriptor, min(length - len(data), 2**20))
        except OSError as error:
            raise Closed(str(error)) from None
        if not more:
            raise Closed("the stream has ended")
        data += more
    return bytes(data)
