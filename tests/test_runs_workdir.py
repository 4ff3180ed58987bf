"""One folder, one config, one process, and no half-written file."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hintsd_jax.config.continuing import or_of
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.runs import nonfinite
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.storage import whole_text


def a_config(**changes):
    return Config().replaced({key.replace("__", "."): value for key, value in changes.items()})


def stored(path):
    return json.loads((path / "config.json").read_text())


def test_writes_the_resolved_config_with_versions(tmp_path):
    Workdir.open(tmp_path / "deep" / "run", a_config(seed=7)).close()
    content = stored(tmp_path / "deep" / "run")
    assert content["config"]["seed"] == 7 and content["config"]["rollout"]["prefill_buckets"][0] == 64
    (versions,) = content["versions"]
    packages = {"python", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "hintsd_jax"}
    assert packages | {"platform", "device_kind"} <= set(versions)


def test_same_config_continues_and_keeps_the_file(tmp_path):
    with Workdir.open(tmp_path, a_config()):
        before = (tmp_path / "config.json").read_bytes()
    Workdir.open(tmp_path, a_config()).close()
    assert (tmp_path / "config.json").read_bytes() == before


def test_other_versions_are_added(tmp_path, monkeypatch):
    with Workdir.open(tmp_path, a_config()):
        pass
    monkeypatch.setattr("hintsd_jax.runs.workdir.versions", lambda: {"jax": "other"})
    with Workdir.open(tmp_path, a_config()):
        pass
    assert len(stored(tmp_path)["versions"]) == 2 and stored(tmp_path)["versions"][1] == {"jax": "other"}


def test_the_benchmarks_version_stands_among_the_versions(tmp_path):
    for benchmark in ("quiz 7", "quiz 7", ""):  # an export plays no task, and takes nothing away
        Workdir.open(tmp_path, a_config(), benchmark=benchmark).close()
    assert [known["benchmark"] for known in stored(tmp_path)["versions"]] == ["quiz 7"]
    Workdir.open(tmp_path, a_config(), benchmark="quiz 8").close()
    assert [known["benchmark"] for known in stored(tmp_path)["versions"]] == ["quiz 7", "quiz 8"]


def test_another_config_is_refused_by_its_keys(tmp_path):
    with Workdir.open(tmp_path, a_config(seed=60)):
        pass
    other = a_config(seed=61, eval__tasks=5, env__options={"length": 3})
    with pytest.raises(UserError) as caught:
        Workdir.open(tmp_path, other)
    text = str(caught.value)
    assert "seed (there 60, now 61)" in text and "optim.lr" not in text
    assert "eval.tasks" in text and "env.options.length" in text
    Workdir.open(tmp_path, a_config(seed=60)).close()  # the refusal gave the lock back
    with pytest.raises(UserError, match="seed") as caught:
        Workdir.open(tmp_path, a_config(seed=61, eval__tasks=5), may_differ=or_of("eval."))
    assert "eval.tasks" not in str(caught.value)


def test_what_may_differ_is_the_config_from_then_on_where_a_run_continues(tmp_path):
    with Workdir.open(tmp_path, a_config(optim__steps=60)) as workdir:
        assert workdir.changed == {}
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    now = a_config(optim__steps=100, rollout__slots=4)
    wanted = {"optim.steps": (60, 100), "rollout.slots": (8, 4)}
    with Workdir.open(tmp_path, now) as workdir:  # an evaluation
        assert workdir.changed == wanted and stored(tmp_path)["config"]["optim"]["steps"] == 60
    with Workdir.open(tmp_path, now) as workdir:
        workdir.adopt(now)
    assert stored(tmp_path)["config"]["optim"]["steps"] == 100
    assert stored(tmp_path)["changed"] == [{"checkpoint": 40, "optim.steps": [60, 100], "rollout.slots": [8, 4]}]
    with Workdir.open(tmp_path, now) as workdir:
        workdir.adopt(now)
        assert workdir.changed == {} and len(stored(tmp_path)["changed"]) == len(stored(tmp_path)["versions"]) == 1


def test_a_setting_that_is_younger_than_the_run_had_its_default(tmp_path):
    with Workdir.open(tmp_path, a_config()):
        pass
    older = stored(tmp_path)
    del older["config"]["sft"], older["config"]["rollout"]["mask_cut_episodes"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    with Workdir.open(tmp_path, a_config()) as workdir:
        assert workdir.changed == {}
    with pytest.raises(UserError, match=r"another config: sft.path \(there '', now 'x.jsonl'\): give the same"):
        Workdir.open(tmp_path, a_config(sft__path="x.jsonl"))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{",
            "",
            "[]",
            "3",
            "{}",
            '{"config": {}}',
            '{"config": [], "versions": []}',
            '{"config": {}, "versions": {}}',
        ),
        *('{"config": {}, "versions": ["x"]}', '{"config": {}, "versions": null}', "[" * 100_000, '{"config": "\xff"}'),
    ],
)
def test_a_foreign_config_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="not a config written by this program|belongs to another config") as caught:
        Workdir.open(tmp_path, a_config())
    assert (tmp_path / "config.json").read_bytes() == text.encode("latin-1") and "\n" not in str(caught.value)


def test_checkpoints_without_their_config_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="config.json is gone"):
        Workdir.open(tmp_path, a_config())


@pytest.mark.parametrize("name", ["config.json", ".lock", "episodes", "result.md", "config.json.partial"])
def test_places_of_the_wrong_kind_are_named(tmp_path, name):
    def use():
        with Workdir.open(tmp_path, a_config()) as workdir:
            workdir.write_episodes(1, [{}])
            workdir.write_text("result.md", "done")

    place = tmp_path / (f".{name}" if name.endswith("partial") else name)
    if name == "episodes":
        place.write_text("")
    else:
        place.mkdir()
    with pytest.raises(UserError, match=name.removesuffix(".partial")):
        use()
    place.unlink() if name == "episodes" else place.rmdir()
    os.mkfifo(place)
    replaced = name in ("result.md", "config.json.partial")
    with contextlib.nullcontext() if replaced else pytest.raises(UserError, match=name):
        use()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_unwritable(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Workdir.open(tmp_path / where, a_config())


def test_two_runs_at_once(tmp_path):
    in_use = f"in use by another run .process {os.getpid()} on "
    with Workdir.open(tmp_path, a_config()), pytest.raises(UserError, match=in_use):
        Workdir.open(tmp_path, a_config())
    Workdir.open(tmp_path, a_config()).close()


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = f"""
import fcntl, os
lock = open({str(tmp_path / ".lock")!r}, "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write("process 1")
lock.flush()
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    Workdir.open(tmp_path, a_config()).close()


def test_episodes_and_texts(tmp_path):
    records = [{"text": "é\n", "logprobs": [-0.1]}, {"reward": 1}]
    with Workdir.open(tmp_path, a_config()) as workdir:
        for step in (1, 2, 12):
            path = workdir.write_episodes(step, records)
        workdir.write_episodes(2, records, kind="eval")
        assert path == tmp_path / "episodes" / "step_000012.jsonl"
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == records
        nonfinite.keep(tmp_path, 3, [], [], {})
        workdir.discard_after(2)
        assert not list((tmp_path / "nonfinite").iterdir())
        assert sorted(p.name for p in path.parent.iterdir()) == [
            "eval_000002.jsonl",
            "step_000001.jsonl",
            "step_000002.jsonl",
        ]
        workdir.discard_after(None)
        assert not list(path.parent.iterdir())
        assert workdir.write_text("result.md", "done").read_text() == "done"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path: Path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_text(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    with Workdir.open(tmp_path / "run", a_config()) as workdir:
        with pytest.raises(TypeError):
            workdir.write_episodes(1, [{"reward": 1.0}, {"reward": object()}])
        assert not list((workdir.path / "episodes").iterdir())


def test_what_json_cannot_hold_never_ends_a_run(tmp_path):
    nan, inf = math.nan, math.inf
    records = [{"logprobs": [-0.5, nan, -inf], "report": {"faults": ({"step": 1, "weight": inf},)}, "reward": nan}]
    records += [{"detail": "half a \udc80 character", "ok": [1, True, None, "é"]}]
    with Workdir.open(tmp_path, a_config()) as workdir:
        lines = workdir.write_episodes(1, records).read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines)
    report = {"faults": [{"step": 1, "weight": None}]}
    assert first == {"logprobs": [-0.5, None, None], "report": report, "reward": None} and second == records[1]
