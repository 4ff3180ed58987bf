# SPDX-License-Identifier: Apache-2.0

"""Trackers beside the run's own files: rows of metrics and records of episodes flow in, runs of W&B, trackio and MLflow
flow out. (TensorBoard's file is written by `metrics`.)

`trackers.json` in the workdir holds each tracker's id of the run and the last step that it was given; keys are never
written. Invariants: nothing leaves this machine unless `tracking.online` says so; a row is given once, however often a
resumed run computes it again, and a tracker that lacks rows gets them out of `metrics.jsonl` at the next start;
whatever a tracker raises is said once, and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hintsd_jax.config.edge import flatten
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError, reason
from hintsd_jax.jsonl import read_object
from hintsd_jax.storage import AnyPath, whole_text

LEDGER = "trackers.json"
COLUMNS = ("task_id", "rollout", "success", "reward", "ended", "steps", "target_step", "feedback", "problem")
# Of the settings: where the address of a server or what it is sent may stand.
_KEPT_BACK = ("endpoint.url", "endpoint.headers_env", "endpoint.extra_body", "endpoint.key_env")


class Tracker(Protocol):
    """One run of one tracker. Whatever its methods raise is the tracker's own."""

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """The finite numbers of a step; steps grow."""

    def episodes(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        """What became of a step's episodes: rows of `COLUMNS`, before the step's own numbers."""

    def close(self) -> None:
        """Everything is stored when this returns."""


class Run(NamedTuple):
    """What a tracker is opened with. id: of the run within the tracker, new where `is_new`; settings: by dotted key."""

    id: str
    is_new: bool
    project: str
    name: str
    folder: Path
    online: bool
    settings: Mapping[str, Any]


class Trackers:
    """All trackers of a run; none of them can end it.

    Args:
      folder: the workdir; on a disk where a tracker keeps files there, see `validation`.
      rows: those of `metrics.jsonl` so far. A tracker that lacks some gets them now.
      note: says one line to whoever watches.
    """

    def __init__(self, config: Config, folder: AnyPath, rows: Sequence[Mapping], note: Callable[[str], None]):
        self._file, self._note = folder / LEDGER, note
        self._open: dict[str, Tracker] = {}
        named = [name for name in config.tracking.trackers if name in KINDS]
        self._ledger: dict[str, Any] = (read_object(self._file) or {}) if named else {}
        for name in named:
            with self._guarded(name):
                self._open[name] = self._opened(name, config, folder)
        for row in rows:
            self.write(row)

    def _opened(self, name: str, config: Config, folder: AnyPath) -> Tracker:
        entry = self._ledger.get(name)
        is_new = not isinstance(entry, dict)
        if is_new:
            entry = self._ledger[name] = {"id": uuid.uuid4().hex, "step": -1}
        settings = {key: value for key, value in flatten(config.to_dict()).items() if not key.startswith(_KEPT_BACK)}
        tracking = config.tracking
        run_name = tracking.name or folder.name
        if not isinstance(folder, Path) and not tracking.online:
            raise UserError(f"in a store {name} cannot keep its files: set tracking.online, or a --workdir on a disk")
        place = folder / name if isinstance(folder, Path) else Path(tempfile.mkdtemp(prefix=f"hintsd-{name}-"))
        run = Run(entry["id"], is_new, tracking.project, run_name, place, tracking.online, settings)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            tracker = KINDS[name](run)
        entry["id"] = getattr(tracker, "id", run.id)
        self._save()
        return tracker

    def write(self, row: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]] = ()) -> None:
        """A row as `MetricsWriter` has written it, and the records of its step's episodes."""
        step = row["step"]
        values = {key: value for key, value in row.items() if key != "step" and value is not None}
        for name, tracker in list(self._open.items()):
            entry = self._ledger[name]
            if step <= entry["step"]:
                continue
            with self._guarded(name, step):
                entry["step"] = step
                self._save()  # first: a kill in between costs this row there, instead of showing it twice
                if episodes:
                    tracker.episodes(step, [row for record in episodes for row in _table_rows(record)])
                tracker.row(step, values)

    def result(self, step: int, values: Mapping[str, float]) -> None:
        """What a finished run was measured to be, once, at its last step."""
        for name, tracker in list(self._open.items()):
            if values and self._ledger[name].get("result") != step:
                with self._guarded(name):
                    self._ledger[name]["result"] = step
                    self._save()
                    tracker.row(step, values)

    def close(self) -> None:
        """Ends them."""
        for name, tracker in list(self._open.items()):
            with self._guarded(name), contextlib.redirect_stdout(io.StringIO()):
                tracker.close()
        self._open.clear()

    @contextlib.contextmanager
    def _guarded(self, name: str, step: int | None = None) -> Iterator[None]:
        """A call of a tracker: what it raises closes it for this process. The rows from `step` on are due again."""
        try:
            yield
        except Exception as error:  # of whatever kind its package raises
            self._open.pop(name, None)
            if step is not None:
                self._ledger[name]["step"] = step - 1
            failures = self._ledger.setdefault(name, {"id": uuid.uuid4().hex, "step": -1})
            failures["failures"] = failures.get("failures", 0) + 1
            unsaved = ""
            try:
                self._save()
            except OSError as problem:
                unsaved = f"; {LEDGER} cannot be written ({reason(problem)}), so some rows may be given twice then"
            at = "" if step is None else f" at step {step}"
            self._note(
                f"tracker {name} failed{at} ({type(error).__name__}: {reason(error)}): the run goes on without it;"
                f" started again, it gives the tracker the rows that it lacks{unsaved}"
            )

    def _save(self) -> None:
        with whole_text(self._file) as file:
            json.dump(self._ledger, file, indent=2)
            file.write("\n")


def _table_rows(record: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """One row for each target of an episode; one without a target where it has none."""
    hindsight = record.get("hindsight") or {}
    steps = len(record["steps"])
    head = (record["task_id"], record["rollout"], record["success"], record["reward"], record["ended"], steps)
    for target in hindsight.get("targets") or [{}]:
        yield (*head, target.get("step"), target.get("feedback"), hindsight.get("problem"))


class Wandb:
    """A run of Weights & Biases; offline, a folder that `wandb sync` sends."""

    def __init__(self, run: Run):
        self._wandb: Any = importlib.import_module("wandb")
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = self._wandb.init(
            project=run.project,
            id=run.id,
            name=run.name,
            config=dict(run.settings),
            dir=str(run.folder),
            mode="online" if run.online else "offline",
            resume="allow" if run.online else None,
            settings=self._wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def episodes(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        table = self._wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({"episodes": table}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio: a database under the workdir (`TRACKIO_DIR=... trackio show`), or, online, the space or server
    that its environment variables name.
    """

    def __init__(self, run: Run):
        if not run.online:
            os.environ["TRACKIO_DIR"] = str(run.folder)  # read when the package is imported
            for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID"):
                os.environ.pop(variable, None)
        self._trackio: Any = importlib.import_module("trackio")
        if not run.online and Path(self._trackio.utils.TRACKIO_DIR).resolve() != run.folder.resolve():
            raise RuntimeError(f"this process uses trackio with {self._trackio.utils.TRACKIO_DIR} already")
        name = f"{run.name}-{run.id[:8]}"  # its runs are told apart by their names
        self._run = self._trackio.init(
            project=run.project,
            name=name,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def episodes(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        table = self._trackio.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self._run.log({"episodes": table}, step=step)

    def close(self) -> None:
        self._trackio.finish()


class Mlflow:
    """A run of MLflow: a database and files under the workdir, or, online, what MLFLOW_TRACKING_URI names."""

    def __init__(self, run: Run):
        for variable, value in {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}.items():
            os.environ.setdefault(variable, value)  # a server that does not answer must not hold up a run for minutes
        self._entities: Any = importlib.import_module("mlflow.entities")
        tracking: Any = importlib.import_module("mlflow.tracking")
        run.folder.mkdir(parents=True, exist_ok=True)
        local = f"sqlite:///{run.folder / 'mlflow.db'}"
        self._client = tracking.MlflowClient(tracking_uri=None if run.online else local)
        found = self._client.get_experiment_by_name(run.project)
        if found is not None:
            experiment = found.experiment_id
        else:
            files = None if run.online else (run.folder / "artifacts").absolute().as_uri()
            experiment = self._client.create_experiment(run.project, artifact_location=files)
        self.id = run.id
        if run.is_new:
            self.id = self._client.create_run(experiment, run_name=run.name).info.run_id
            params = [self._entities.Param(key, str(value)[:500]) for key, value in run.settings.items()]
            for begin in range(0, len(params), 100):  # the most that it takes at once
                self._client.log_batch(self.id, params=params[begin : begin + 100])
        else:
            self._client.update_run(self.id, status="RUNNING")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        metrics = [self._entities.Metric(key.replace("@", "_at_"), value, 0, step) for key, value in values.items()]
        for begin in range(0, len(metrics), 500):
            self._client.log_batch(self.id, metrics=metrics[begin : begin + 500])

    def episodes(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        table = {"columns": list(COLUMNS), "data": [list(row) for row in rows]}
        self._client.log_dict(self.id, table, f"episodes/step_{step:06d}.json")

    def close(self) -> None:
        self._client.set_terminated(self.id)


KINDS: dict[str, Callable[[Run], Tracker]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}
