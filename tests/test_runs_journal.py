"""Answers come back in the next process; a torn one does not, and is in nobody's way."""

import json
import os
import threading

import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.runs.journal import Journal

TIMEOUT = {"reason": "env_timeout", "detail": "step took longer than 3 s"}


def test_answers_are_there_in_the_next_process(tmp_path):
    path = tmp_path / "journal" / "step_000004.jsonl"
    journal = Journal(path)
    assert journal.get("sampled", "t1", 0, "step 2") is None and not path.parent.exists()
    journal.put("sampled", "t1", 0, "step 2", value=TIMEOUT)
    journal.put("endpoint", "t1", 0, 1, value={"text": "Schritt 2 é", "usage": [1, 0.1], "none": None})
    journal.put("null", value=None)
    for known in (journal, Journal(path)):
        assert known.get("sampled", "t1", 0, "step 2") == TIMEOUT
        assert known.get("endpoint", "t1", 0, 1) == {"text": "Schritt 2 é", "usage": [1, 0.1], "none": None}
        assert (
            known.get("null", default="absent") is None
            and known.get("endpoint", "t1", 0, 2, default="absent") == "absent"
        )
    assert [json.loads(line)["key"][-1] for line in path.read_text().splitlines()] == ["step 2", 1, "null"]


def test_this_process_and_the_next_read_the_same_value(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    given = {"pair": (1, 2)}
    journal.put("a", value=given)
    given["pair"] = "changed later"
    assert journal.get("a") == Journal(journal.path).get("a") == {"pair": [1, 2]}


@pytest.mark.parametrize("kept", range(0, 60, 7))
def test_a_torn_last_line_is_no_answer_and_is_cut_off(tmp_path, kept):
    path = tmp_path / "j.jsonl"
    Journal(path).put("first", value=1)
    whole = path.read_bytes()
    torn = (json.dumps({"key": ["second"], "value": "é" * 20}, ensure_ascii=False) + "\n").encode()[:kept]
    path.write_bytes(whole + torn)
    journal = Journal(path)
    assert journal.get("first") == 1 and journal.get("second") is None
    assert path.read_bytes() == whole + torn  # reading changes nothing
    journal.put("third", value=3)
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == [["first"], ["third"]]


def test_a_torn_only_line(tmp_path):
    (tmp_path / "j.jsonl").write_bytes(b'{"key": ["a"')
    journal = Journal(tmp_path / "j.jsonl")
    journal.put("a", value=1)
    assert Journal(journal.path).get("a") == 1


def test_an_answer_is_on_disk_before_it_is_acted_on(tmp_path, monkeypatch):
    journal, synced = Journal(tmp_path / "new" / "j.jsonl"), []
    fsync = os.fsync

    def record(descriptor):
        assert len(journal._answers) == (len(synced) > 2)  # nobody can get it yet
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", record)
    journal.put("a", value=1)
    assert synced == [path.stat().st_ino for path in (journal.path, journal.path.parent, tmp_path)]
    journal.put("b", value=1)
    assert synced[3:] == [journal.path.stat().st_ino]  # the file's name is there already


def test_a_key_has_one_answer(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.put("a", 1, value="x")
    with pytest.raises(ValueError, match="already"):
        journal.put("a", 1, value="y")
    with pytest.raises(ValueError):
        journal.put("b", value=float("nan"))
    assert Journal(journal.path).get("a", 1) == "x" and Journal(journal.path).get("b") is None


def test_many_threads(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    threads = [
        threading.Thread(target=lambda n=n: [journal.put(n, m, value=[n, m]) for m in range(5)]) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Journal(journal.path)
    assert all(again.get(n, m) == [n, m] for n in range(8) for m in range(5))


def test_an_answer_that_a_disk_has_changed_is_refused(tmp_path):
    """Every bit of two lines, and the newline of the last one, which a kill cannot leave so."""
    path = tmp_path / "j.jsonl"
    for key, value in (("a", "yes 1"), ("b", [0.25, None])):
        Journal(path).put(key, value=value)
    sound = path.read_bytes()
    for bit in range(len(sound) * 8):
        spoiled = bytearray(sound)
        spoiled[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoiled)
        try:
            journal = Journal(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert journal.get("a") == "yes 1" and journal.get("b") == [0.25, None], (bit, bytes(spoiled))


@pytest.mark.parametrize("line", [b"{]\n", b'{"key": ["a"]}\n', b'{"key": 3, "value": 1}\n', b"\xff\n"])
def test_a_broken_line_is_one_line_for_the_user(tmp_path, line):
    path = tmp_path / "j.jsonl"
    path.write_bytes(line + b'{"key": ["b"], "value": 1}\n')
    with pytest.raises(UserError, match="line 1 is not an answer") as caught:
        Journal(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
