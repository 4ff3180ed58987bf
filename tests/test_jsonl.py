"""A file of JSON lines: whole lines come out, a torn last one does not, a broken one is named."""

import json
import os

import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.jsonl import Line, read_jsonl, read_object

ROWS = [{"a": 1}, {"text": "line\u2028separator, é"}, {}]


def _write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_line_comes_out_with_its_number_and_its_end(tmp_path):
    path = _write(tmp_path / "a.jsonl")
    lines = list(read_jsonl(path))
    assert [line.value for line in lines] == ROWS and [line.number for line in lines] == [1, 2, 3]
    assert lines[0] == Line(1, {"a": 1}, len(b'{"a": 1}\n')) and lines[-1].end == path.stat().st_size


def test_no_file_has_no_lines(tmp_path):
    assert list(read_jsonl(tmp_path / "absent.jsonl")) == []


def test_wherever_the_last_line_is_torn_it_is_no_line(tmp_path):
    path = _write(tmp_path / "a.jsonl")
    whole = path.read_bytes()
    torn = json.dumps({"key": "é" * 3}, ensure_ascii=False).encode()
    for kept in range(len(torn) + 1):
        path.write_bytes(whole + torn[:kept])
        lines = list(read_jsonl(path))
        assert [line.value for line in lines] == ROWS and lines[-1].end == len(whole)


@pytest.mark.parametrize("broken", [b"{]\n", b"3\n", b"[1]\n", b"\n", b'"\xff"\n', b"[" * 100_000 + b"\n"])
def test_a_broken_line_is_one_line_for_the_user(tmp_path, broken):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + broken + b"{}\n")
    lines = read_jsonl(path, "a metrics row")
    assert next(lines).value == {}
    with pytest.raises(UserError, match=r"line 2 is not a metrics row: mend or remove the file") as caught:
        next(lines)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_parse_says_what_a_line_is(tmp_path):
    path = _write(tmp_path / "a.jsonl", [{"step": 1}, {"stop": 2}])
    lines = read_jsonl(path, "a row", lambda row: row["step"] * 10)
    assert next(lines).value == 10
    with pytest.raises(UserError, match="line 2 is not a row"):
        next(lines)


@pytest.mark.parametrize("read", [read_object, lambda path: list(read_jsonl(path))])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, read):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, says in {
        "": "is no file",
        "pipe": "is no file",
        "link": "a link to nothing",
        "loop": "cannot be",
    }.items():
        with pytest.raises(UserError, match=says) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", "", "{", '{"a": "\xff"}', "[" * 100_000, "9" * 5000])
def test_a_file_with_something_else_than_an_object(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="is not the config of a run") as caught:
        read_object(path, "the config of a run")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert read_object(tmp_path / "absent.json") is None
