"""TensorBoard's files say what was written, and what the disk refuses is one line."""

import errno
import struct

import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from hintsd_jax.errors import UserError
from hintsd_jax.runs.event_file import EventFile


def events(path):
    """The events of a file: a length, its checksum, the bytes, their checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack("Q", data[at : at + 8])
        yield Event.FromString(data[at + 12 : at + 12 + size])
        at += size + 16


def test_what_was_written_stands_in_the_file_at_once(tmp_path):
    file = EventFile(tmp_path / "board", purge_step=3)
    file.write(3, {"eval/avg@4": 0.5, "large": 1e300})
    (path,) = (tmp_path / "board").iterdir()
    version, start, *values = events(path)
    assert version.file_version == "brain.Event:2" and (start.step, start.session_log.status) == (3, 1)
    assert [(event.step, event.summary.value[0].tag) for event in values] == [(3, "eval/avg_at_4"), (3, "large")]
    assert values[0].summary.value[0].simple_value == 0.5
    file.close()


def test_what_the_disk_refuses_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "board").write_text("")
    with pytest.raises(UserError, match="board cannot be written .File exists"):
        EventFile(tmp_path / "board")
    file = EventFile(tmp_path / "other")

    def full(*unused):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventsWriter, "flush", full)
    with pytest.raises(UserError, match="other cannot be written .No space left on device"):
        file.write(1, {"x": 1})
