"""What a run does on a disk it does in a store: the same bytes under the same names, and whole or not at all."""

import json
import os
import random

import jax
import numpy as np
import pytest

from hintsd_jax import main, storage
from hintsd_jax.checkpoints import tokenizer as tokenizers
from hintsd_jax.checkpoints.huggingface import load_policy, save_policy
from hintsd_jax.errors import UserError
from hintsd_jax.runs import lock, nonfinite
from hintsd_jax.runs.journal import Journal
from hintsd_jax.runs.metrics import MetricsWriter, read_metrics
from hintsd_jax.storage import Appended, located
from tests.stores import store  # noqa: F401 - a fixture
from tests.test_runs_event_file import events

POLICY = "assets/desk-policy"


@pytest.mark.parametrize(
    "address, says",
    [
        ("ftp://host/name", "of a kind that is not known: give a folder, gs://... or s3://..."),
        ("gs:/bucket/name", "must begin with gs://"),
        ("GS://bucket/name", "must begin with gs://"),
        ("gs://bucket", "names no folder within a bucket: give gs://bucket/folder"),
        ("s3:///name", "names no folder within a bucket"),
        ("gs://bucket/a//b", "has an empty part"),
        ("gs://bucket/a/../b", ". or .. as a part"),
        ("gs://bucket/a*", "one of"),
    ],
)
def test_an_address_that_leads_nowhere(store, address, says):  # noqa: F811
    with pytest.raises(UserError, match=r"\A[^\n]*\Z") as caught:
        located(address)
    assert says in str(caught.value) and address in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(storage, "PACKAGES", {"gs": "gcsfs_that_nobody_has"})
    with pytest.raises(UserError, match=r"gs://b/a needs the package gcsfs_that_nobody_has.*hintsd-jax\[gs\]"):
        located("gs://b/a")


def test_a_path_of_this_machine_is_no_address(tmp_path):
    for path in (tmp_path, "runs/a:b", "c:/x", "./gs:x", "a//b"):
        assert isinstance(located(path), type(tmp_path)) and not storage.is_remote(path)


@pytest.fixture(params=["disk", "gs", "s3"])
def place(request, tmp_path, store):  # noqa: F811
    return tmp_path / "run" if request.param == "disk" else located(f"{request.param}://bucket/run")


def contents(place):
    """Relative name -> bytes of every file below."""
    files = {}
    for path in storage.entries(place):
        below = contents(path) if storage.is_folder(path) else {"": storage.read_bytes(path)}
        files |= {f"{path.name}/{name}".rstrip("/"): data for name, data in below.items()}
    return files


def test_a_file_appears_whole_or_not_at_all(place):
    path = place / "folder" / "file.txt"
    with storage.whole_text(path) as file:
        file.write("é\n")
        assert not storage.exists(path)
    with (
        pytest.raises(ZeroDivisionError),
        storage.whole_file(path) as out,
    ):  # not an error of the disk's: stays as it is
        out.write(b"half")
        raise ZeroDivisionError
    assert contents(place) == {"folder/file.txt": "é\n".encode()}
    assert (storage.size(path), storage.read_range(path, 1, 9)) == (3, b"\xa9\n")
    assert storage.is_file(path) and storage.is_folder(path.parent) and not storage.is_file(path.parent)
    storage.remove(path)
    storage.remove(path)
    assert not storage.exists(path) and storage.entries(place / "nowhere") == []


def test_a_folder_that_moves_goes_without_its_marker_first(place):
    for name in ("8/a", "8/b/c", "8/commit_success.txt"):
        with storage.whole_text(place / name) as file:
            file.write(name)
    storage.move_folder(place / "8", place / "damaged" / "8", "commit_success.txt")
    assert contents(place) == {f"damaged/{name}": name.encode() for name in ("8/a", "8/b/c", "8/commit_success.txt")}


def test_what_is_appended_is_there_and_a_torn_end_is_cut_off(place):
    draw, expected, path = random.Random(0), b"", place / "a" / "lines.jsonl"
    for _ in range(20):
        file = Appended(path, keep=len(expected) if draw.random() < 0.5 else None)
        for _ in range(draw.randrange(3)):
            line = os.urandom(draw.randrange(30)) + b"\n"
            file.write(line)
            expected += line
            assert storage.read_bytes(path) == expected and file.size == len(expected)
        if expected and draw.random() < 0.5:
            with storage.whole_file(path) as torn:
                torn.write(expected + b"torn")
            Appended(path, keep=len(expected)).write(b"")
    assert len(expected) > 100


def test_a_file_that_is_cut_while_it_is_written_is_not_filled_with_zeros(tmp_path):
    file = Appended(tmp_path / "a")
    file.write(b"line\n")
    os.truncate(tmp_path / "a", 2)
    with pytest.raises(UserError, match="was removed or cut while it was written"):
        file.write(b"more\n")


def test_errors_of_a_stores_library_are_one_line(store):  # noqa: F811
    path = located("gs://bucket/run/file")
    file = Appended(path)
    store.refuses = True
    for call in (
        lambda: storage.open_file(path),
        lambda: file.write(b"x"),
        lambda: storage.remove(path),
        lambda: Journal(path),
        lambda: lock.take(path.parent, note=print),
    ):
        with pytest.raises(UserError, match=r"gs://bucket/run.*Refused: no credentials for this bucket"):
            call()
    # A store that does not answer is not one that has nothing: a policy would be taken for untrained.
    for ask in (storage.exists, storage.is_folder, storage.is_file, storage.entries, storage.size):
        with pytest.raises(OSError, match="no credentials") as caught:
            ask(path)
        assert caught.value.filename == "gs://bucket/run/file"


def write_run(folder):
    """Two processes' worth of a run's own files: the second repeats step 2."""
    for resume, rows in ((None, {0: 0.5, 1: 0.25, 2: float("nan")}), (1, {2: 0.75})):
        writer = MetricsWriter(folder, resume)
        nonfinite.discard_after(folder, resume or 0)
        for step, value in rows.items():
            writer.write(step, {"success": value})
        writer.close()
        nonfinite.keep(folder, 2, [], [], {"loss": 1.0})
        journal = Journal(folder / "journal" / "step_000002.jsonl")
        journal.put("call", resume or 0, value={"text": "é"})
        assert journal.get("call", 0) == {"text": "é"}


def test_a_runs_files_are_the_same_on_a_disk_and_in_a_store(tmp_path, store):  # noqa: F811
    there = located("gs://bucket/run")
    write_run(tmp_path)
    write_run(there)
    disk, remote = contents(tmp_path), contents(there)
    boards = [name for name in remote if name.startswith("tensorboard/")]
    assert [row["step"] for row in read_metrics(there / "metrics.jsonl")] == [0, 1, 2]
    assert {n: d for n, d in disk.items() if n[:4] != "tens"} == {n: d for n, d in remote.items() if n[:4] != "tens"}
    # The newest file of TensorBoard's hides what was there and holds every row.
    newest = tmp_path / "newest"
    newest.write_bytes(remote[max(boards, key=lambda name: len(remote[name]))])
    assert [(e.step, e.summary.value[0].simple_value) for e in events(newest) if e.summary.value] == [
        (0, 0.5), (1, 0.25), (2, 0.75)
    ]  # fmt: skip


def test_a_lock_in_a_store(store, monkeypatch):  # noqa: F811
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_SILENCE", 0.4)
    folder, notes = located("gs://bucket/run"), []
    held = lock.StoreLock(folder, notes.append)
    assert notes == []
    with pytest.raises(UserError, match=r"gs://bucket/run is in use by another run \(process \d+ on .*wait for it"):
        lock.take(folder, notes.append)
    held.check()
    # A process that stands still is taken for dead, and says so when it goes on.
    monkeypatch.setattr(held, "_beat", lambda: None)
    second = lock.take(folder, notes.append)
    assert "waiting 0 s for a sign of life" in notes[-1]
    held._thread.join(5)
    with pytest.raises(UserError, match="was taken over by another run"):
        held.check()
    held.release()
    second.check()
    second.release()
    assert store.objects == {}


def test_policies_and_tokenizers(store, tmp_path):  # noqa: F811
    config, params = load_policy(POLICY)
    address = "s3://bucket/policies/desk"
    tokenizer = tokenizers.load_tokenizer(POLICY)
    for target in (tmp_path / "desk", address, address):  # the second time it replaces what is there
        store.written.clear()
        save_policy(target, config, params, tokenizer)
    assert store.written[-1].endswith("desk/config.json")  # without which the rest is no policy
    assert contents(located(address)) == contents(tmp_path / "desk")
    read_config, read_params = load_policy(address)
    assert read_config == config and jax.tree.all(jax.tree.map(np.array_equal, params, read_params))
    text = "Book a table\n<|im_start|>"
    read = tokenizers.load_tokenizer(address)
    assert read.encode(text) == tokenizer.encode(text) and read.chat_template == tokenizer.chat_template
    assert tokenizers.generation_stops(address) == ()
    store.objects["bucket/other/file"] = b""
    with pytest.raises(UserError, match="s3://bucket/other: exists and is no policy directory"):
        save_policy("s3://bucket/other", config, params)
    name = "bucket/policies/desk/model.safetensors"
    store.objects[name] = store.objects[name][:-1]
    with pytest.raises(UserError, match="cut short"):
        load_policy(address)


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--workdir=s3://bucket/run", "cannot hold checkpoints: orbax writes them to disks and to gs:// only"),
        ("--workdir=gs://bucket", "names no folder within a bucket"),
        ("--config.env.data_dir=gs://bucket/data", "must be on a disk of this machine, not in a store"),
        ("--config.plan.cache_dir=gs://bucket/data", "must be on a disk of this machine, not in a store"),
        ("--config.policy.path=hf://name/name", "of a kind that is not known"),
        ("--config.export.path=gs://bucket/../x", ". or .. as a part"),
    ],
)
def test_what_cannot_lie_in_a_store_is_refused_by_name(store, capsys, tmp_path, flag, says):  # noqa: F811
    workdir = [] if flag.startswith("--workdir") else [f"--workdir={tmp_path / 'run'}"]
    assert main.main(["train", "--config=desk_smoke", *workdir, flag]) == 2
    error = capsys.readouterr().err
    name = flag.removeprefix("--config.").partition("=")[0]
    assert says in error and name in error and error.count("\n") == 1
    assert json.dumps(store.objects) == "{}"
