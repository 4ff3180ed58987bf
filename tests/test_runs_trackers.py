"""Trackers: what each real package stores, offline; and that none of them changes or ends a run."""

import json
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest

from configs import smoke_config
from hintsd_jax.config import validation
from hintsd_jax.errors import UserError
from hintsd_jax.runs import trackers
from hintsd_jax.runs.trackers import COLUMNS, LEDGER, Trackers

RECORD = {
    "task_id": "desk_1",
    "rollout": 0,
    "success": False,
    "reward": 0.0,
    "ended": "terminated",
    "steps": [{}, {}, {}],
    "hindsight": {"targets": [{"step": 1, "feedback": "look it up"}, {"step": 3, "feedback": "say so"}], "problem": ""},
}
WON = {**RECORD, "rollout": 1, "success": True, "reward": 1.0, "hindsight": None}
ROWS = [{"step": step, "train/loss": 0.5 / (step + 1), "eval/avg@2": step / 4, "bad": None} for step in range(4)]


class Fake:
    """A tracker that keeps what it gets, and fails when it is told to."""

    def __init__(self, run):
        self.run, self.rows, self.tables, self.closed = run, [], [], False
        made.append(self)

    def row(self, step, values):
        if step in failing:
            raise OSError("no such server")
        self.rows.append((step, values))

    def episodes(self, step, rows):
        self.tables.append((step, rows))

    def close(self):
        self.closed = True


made, failing = [], set()


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens the trackers of a run in the same workdir, each call as a new process would."""
    made.clear(), failing.clear()
    config = smoke_config(tmp_path / "data").replaced({"tracking.trackers": ("tensorboard", "wandb")})
    monkeypatch.setitem(trackers.KINDS, "wandb", Fake)
    (tmp_path / "run").mkdir()
    notes = []

    def make(rows=(), **changes):
        changed = config.replaced({f"tracking.{name}": value for name, value in changes.items()})
        return Trackers(changed, tmp_path / "run", rows, notes.append), notes

    return make


def steps_of(fake):
    return [step for step, _ in fake.rows]


def test_rows_and_tables_of_episodes(opened, tmp_path):
    mine, notes = opened(name="first try")
    mine.write(ROWS[0])
    mine.write(ROWS[1], [RECORD, WON])
    mine.result(1, {"test/avg@2": 0.5})
    mine.result(1, {"test/avg@2": 0.5})
    mine.close()
    (fake,) = made
    assert fake.rows[:2] == [(0, {"train/loss": 0.5, "eval/avg@2": 0.0}), (1, {"train/loss": 0.25, "eval/avg@2": 0.25})]
    assert fake.rows[2:] == [(1, {"test/avg@2": 0.5})] and fake.closed and not notes
    lost = ("desk_1", 0, False, 0.0, "terminated", 3)
    won = ("desk_1", 1, True, 1.0, "terminated", 3, None, None, None)
    assert fake.tables == [(1, [(*lost, 1, "look it up", ""), (*lost, 3, "say so", ""), won])]
    assert len(won) == len(COLUMNS)
    assert (fake.run.name, fake.run.project, fake.run.online) == ("first try", "hintsd_jax", False)
    assert fake.run.folder == tmp_path / "run" / "wandb" and fake.run.settings["env.name"] == "desk"
    assert not any(name.startswith("endpoint.url") for name in fake.run.settings)


def test_a_resumed_run_goes_on_and_no_step_appears_twice(opened):
    mine, _ = opened()
    for row in ROWS[:3]:
        mine.write(row)
    again, _ = opened(ROWS[:2])  # killed after step 2, continued from the checkpoint of step 1
    for row in ROWS[2:]:
        again.write(row)
    first, second = made
    assert second.run.id == first.run.id and (first.run.is_new, second.run.is_new) == (True, False)
    assert first.run.name == second.run.name == "run"
    assert steps_of(first) + steps_of(second) == [0, 1, 2, 3]


def test_one_that_is_named_later_gets_the_rows_before(opened):
    mine, _ = opened(ROWS[:3])
    mine.write(ROWS[3])
    assert steps_of(made[0]) == [0, 1, 2, 3]


def test_one_that_fails_is_said_once_and_gets_the_rest_at_the_next_start(opened, tmp_path):
    failing.add(1)
    mine, notes = opened()
    for row in ROWS[:3]:
        mine.write(row)
    mine.close()
    assert len(notes) == 1 and "tracker wandb failed at step 1 (OSError: no such server): the run goes on" in notes[0]
    assert json.loads((tmp_path / "run" / LEDGER).read_text())["wandb"]["failures"] == 1
    failing.clear()
    opened(ROWS[:3])[0].write(ROWS[3])
    assert steps_of(made[0]) + steps_of(made[1]) == [0, 1, 2, 3]


def test_one_that_does_not_open_ends_nothing(opened, monkeypatch):
    def broken(run):
        raise RuntimeError("not\nlogged in")

    monkeypatch.setitem(trackers.KINDS, "wandb", broken)
    mine, notes = opened()
    mine.write(ROWS[0])
    mine.close()
    assert notes == [notes[0]] and "tracker wandb failed (RuntimeError: not logged in)" in notes[0]


def test_without_any_nothing_is_written(opened, tmp_path):
    mine, _ = opened(trackers=("tensorboard",))
    mine.write(ROWS[0], [RECORD])
    mine.close()
    assert not list((tmp_path / "run").iterdir())


def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch):
    config = smoke_config(tmp_path)
    monkeypatch.setattr(validation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match='tracking.trackers names mlflow, which is not installed: pip install "hints'):
        smoke_config(tmp_path, {"tracking.trackers": ("tensorboard", "mlflow")})
    assert config.tracking.trackers == ("tensorboard",)


# -- the real packages; each is skipped where it is not installed


def real(name, folder, tmp_path):
    """Two processes of a run, of which the second computes step 1 again. Returns what was said."""
    if find_spec(name) is None:  # its import reads the environment, which the tracker sets
        pytest.skip(f"{name} is not installed")
    config = smoke_config(tmp_path / "data").replaced({"tracking.trackers": (name,), "tracking.name": "mine"})
    notes = []
    mine = Trackers(config, folder, [], notes.append)
    mine.write(ROWS[0])
    mine.write(ROWS[1], [RECORD, WON])
    mine.close()
    mine = Trackers(config, folder, ROWS[:1], notes.append)
    mine.write(ROWS[1], [RECORD, WON])
    mine.write(ROWS[2], [RECORD, WON])
    mine.result(2, {"test/avg@2": 0.5})
    mine.close()
    assert not notes
    return json.loads((folder / LEDGER).read_text())[name]["id"]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_trackio(run, tmp_path, capfd):
    real("trackio", run, tmp_path)
    (file,) = run.glob("trackio/*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step, id").fetchall()
        configs = database.execute("select config from configs").fetchall()
    assert len({name for name, _, _ in rows}) == 1 and rows[0][0].startswith("mine-")
    values = [(step, json.loads(text)) for _, step, text in rows]
    losses = [(step, row["train/loss"]) for step, row in values if "train/loss" in row]
    assert losses == [(0, 0.5), (1, 0.25), (2, pytest.approx(1 / 6))]
    tables = [row["episodes"]["_value"] for _, row in values if "episodes" in row]
    assert len(tables) == 2 and [line["feedback"] for line in tables[0]] == ["look it up", "say so", None]
    assert "hint_sd" in str(configs) and values[-1][1]["test/avg@2"] == 0.5
    assert capfd.readouterr().out == ""


def test_mlflow(run, tmp_path, capfd):
    pytest.importorskip("sqlalchemy")
    number = real("mlflow", run, tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
    stored = client.get_run(number)
    assert (stored.info.run_name, stored.info.status) == ("mine", "FINISHED")
    assert stored.data.params["algorithm"] == "hint_sd" and stored.data.metrics["test/avg_at_2"] == 0.5
    history = [(each.step, each.value) for each in client.get_metric_history(number, "train/loss")]
    assert sorted(history) == [(0, 0.5), (1, 0.25), (2, pytest.approx(1 / 6))]
    (table, _) = sorted(run.glob("mlflow/artifacts/**/episodes/*.json"))
    assert [row[-2] for row in json.loads(table.read_text())["data"]] == ["look it up", "say so", None]


def test_wandb(run, tmp_path, capfd, monkeypatch):
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    number = real("wandb", run, tmp_path)
    histories = [history for file in sorted(run.glob("wandb/wandb/offline-run-*/*.wandb")) for history in read(file)]
    losses = [(row["_step"], row["train/loss"]) for row in histories if "train/loss" in row]
    assert losses == [(0, 0.5), (1, 0.25), (2, pytest.approx(1 / 6))]
    assert {file.stem for file in run.glob("wandb/wandb/offline-run-*/*.wandb")} == {f"run-{number}"}
    assert sum("episodes" in row or "episodes._type" in row for row in histories) == 2
    tables = [json.loads(file.read_text()) for file in sorted(run.glob("wandb/**/*.table.json"))]
    assert [row[-2] for row in tables[0]["data"]] == ["look it up", "say so", None]


def read(file: Path):
    """The history of an offline run. Its file is a log in LevelDB's form behind a head of 7 bytes: blocks of 32 KiB
    with records, each behind checksum, length and type (1 whole, 2 first, 3 middle, 4 last part).
    """
    from wandb.proto import wandb_internal_pb2

    data, place, parts = file.read_bytes(), 7, []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts.clear()
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                yield row | {"_step": record.history.step.num}


def test_a_ledger_that_cannot_be_written_is_said(opened, monkeypatch):
    mine, notes = opened()

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr(trackers, "whole_text", full)
    mine.write(ROWS[0])
    (said,) = notes
    assert "tracker wandb failed at step 0 (OSError: No space left on device)" in said
    assert f"{LEDGER} cannot be written (No space left on device)" in said and not mine._open
