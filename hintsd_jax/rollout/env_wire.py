# SPDX-License-Identifier: Apache-2.0

"""What crosses between the trainer and a worker process: frames of bounded size on a socket.

Towards the worker: a pickled (method, arguments, steps). Back: JSON, because the worker runs code of an environment,
which must not make the trainer build any object but those of the protocol; what comes is checked again.

Invariant: reading an answer ends in time, whatever the worker sends: at the deadline, or at MAX_ANSWER_BYTES.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from hintsd_jax.envs.base import Fault, Report, Start, StepResult
from hintsd_jax.envs.protocol import ProtocolError, checked
from hintsd_jax.rollout.env_call import ENV_DIED, ENV_ERROR, ENV_TIMEOUT, MAX_TRACEBACK, CallFailure
from hintsd_jax.texts import encodable

MAX_ANSWER_BYTES = 1 << 28  # more than what `envs.protocol` lets through takes as JSON
_CHUNK = 1 << 20
_HEADER = struct.Struct("!Q")


class Ended(Exception):
    """The other side is gone, or has sent what is no frame."""


class Late(Exception):
    """The deadline is over."""


def send(channel: socket.socket, frame: bytes, deadline: float | None = None) -> None:
    """Sends a frame. deadline: of `time.monotonic`; None waits for ever. Raises Ended or Late."""
    try:
        channel.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
        channel.sendall(_HEADER.pack(len(frame)) + frame)
    except TimeoutError as error:
        raise Late from error
    except OSError as error:
        raise Ended(str(error)) from error


def receive(
    channel: socket.socket,
    limit: int = MAX_ANSWER_BYTES,
    deadline: float | None = None,
    process: int | None = None,
    watch: Callable[[], None] = lambda: None,
) -> bytes:
    """The next frame, of at most `limit` bytes.

    process: a file descriptor of the process that sends it (`os.pidfd_open`): its children may keep the socket open.
    watch: called a few times a second while nothing comes; what it raises ends the wait.

    Raises Ended or Late.
    """
    (size,) = _HEADER.unpack(_exactly(channel, _HEADER.size, deadline, process, watch))
    if size > limit:
        raise Ended(f"a frame of {size} bytes")
    return _exactly(channel, size, deadline, process, watch)


def _exactly(
    channel: socket.socket, size: int, deadline: float | None, process: int | None, watch: Callable[[], None]
) -> bytes:
    got = bytearray()
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    if process is not None:
        poll.register(process, select.POLLIN)
    while len(got) < size:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise Late
        ready = poll.poll(None if left is None else 1000 * min(left, 0.2) + 1)
        if not ready:
            watch()
            continue
        if any(descriptor == channel.fileno() for descriptor, _ in ready):
            try:
                part = channel.recv(min(_CHUNK, size - len(got)), socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                raise Ended(str(error)) from error
            if not part:
                raise Ended("the socket is closed")
            got += part
        else:
            raise Ended("the process is gone")
    return bytes(got)


def request(method: str, args: tuple[Any, ...], steps: int) -> bytes:
    """A call as a frame.

    Raises:
      ProtocolError: an argument cannot be pickled, a task for instance.
    """
    try:
        return pickle.dumps((method, args, steps))
    except Exception as error:  # the pickling of objects is code of their own
        plain = tuple(dict(arg) if isinstance(arg, Mapping) else arg for arg in args)
        try:
            return pickle.dumps((method, plain, steps))
        except Exception:
            problem = f"{type(error).__name__}: {error}"
        raise ProtocolError(
            f"{method}: its task cannot be sent to a process ({problem}); use --config.env.isolation=thread"
        ) from error


def answer(value: Start | StepResult | Report | CallFailure | None) -> bytes:
    """A checked value, or a failure, as a frame.

    Raises:
      ProtocolError: it takes more than MAX_ANSWER_BYTES.
    """
    kind = "failure" if isinstance(value, CallFailure) else "value"
    fields = None if value is None else dataclasses.asdict(value)
    frame = json.dumps({kind: fields}, allow_nan=False, ensure_ascii=False).encode()
    if len(frame) > MAX_ANSWER_BYTES:
        raise ProtocolError(f"an answer of {len(frame):,} bytes")
    return frame


def read_answer(method: str, frame: bytes, steps: int) -> Any:
    """The value that a frame brings, checked, or the CallFailure.

    Raises:
      ProtocolError, ValueError, TypeError, KeyError, RecursionError: the worker did not send it by `answer`.
    """
    fields = json.loads(frame)
    if "failure" in fields:
        failure = CallFailure(**fields["failure"])
        if failure.reason not in (ENV_ERROR, ENV_TIMEOUT, ENV_DIED):
            raise ValueError("a failure for no known reason")
        line = " ".join(encodable(str(failure.detail)[:400]).split())
        return CallFailure(failure.reason, line, encodable(str(failure.traceback)[-MAX_TRACEBACK:]))
    value = fields["value"]
    match method:
        case "reset":
            value = Start(**value)
        case "step":
            value = StepResult(**value)
        case "report":
            faults = value["faults"]
            value = Report(**value | {"faults": None if faults is None else [Fault(**fault) for fault in faults]})
    return checked(method, value, steps)
