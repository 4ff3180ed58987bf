# SPDX-License-Identifier: Apache-2.0

"""What a training run writes down around its loop: metrics, episodes, checkpoints, alarms, progress, the last table.

The loop hands over the outcome of every step. Nothing here changes what is learnt, but for two things that alarms may
do: halve the learning rate, and stop the run.

Invariants: the row of a step is written before the checkpoint that stands for it; a state that is not finite never
becomes a checkpoint (the update says whether it is, see `training.train_step.apply`); what a continued run needs
(`Counters`) travels with the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from hintsd_jax import processes, records
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.config import build, continuing
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import HeldOut, Scores
from hintsd_jax.fork import forked
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.jsonl import read_object
from hintsd_jax.models.finite import non_finite
from hintsd_jax.results import TrainResult
from hintsd_jax.rollout.played import Rollouts
from hintsd_jax.runs import metrics as run_metrics
from hintsd_jax.runs import nonfinite, step_line
from hintsd_jax.runs.alarms import Alarm, AlarmConfig, Alarms, not_finite
from hintsd_jax.runs.counters import Counters
from hintsd_jax.runs.interruption import Interrupted
from hintsd_jax.runs.journal import Journal
from hintsd_jax.runs.progress import Progress
from hintsd_jax.runs.time_left import Plan
from hintsd_jax.runs.trackers import Trackers
from hintsd_jax.runs.watch import FAILURES, Watch
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.session import Session, open_workdir
from hintsd_jax.training.batching import Batches, BatchShapes
from hintsd_jax.training.state import TrainState, learning_rate

_MEND_NUMBERS = (
    "Lower optim.lr, set optim.clip_norm, or look into the folder nonfinite/ of the workdir, which holds the batches;"
    " the same command continues the run"
)


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """One training step. without: episodes that gave no example, by reason. metrics, tokens: of the update, see
    `training.train_step.update`. evaluated: metrics of an evaluation after it; {} where there was none.
    """

    rollouts: Rollouts
    hindsight: Hindsight
    batches: Batches
    without: Mapping[str, int]
    metrics: Mapping[str, float]
    tokens: Sequence[Mapping[str, np.ndarray]]
    evaluated: Mapping[str, float]


class Recorder:
    """A context manager around the loop; open it with `Recorder.open`. Where `Interrupted` leaves the loop, the last
    completed step is saved.

    Attributes:
      timer: adds up seconds by name for the next row.
      continues: whether the workdir holds a checkpoint to continue from.
    """

    def __init__(self, session: Session, folder: Workdir, checkpoints: Checkpoints):
        self._session, self._folder, self._checkpoints = session, folder, checkpoints
        self._config = session.config
        self._counters = Counters()
        self._completed: tuple[TrainState, Mapping[str, Any]] | None = None  # the last step's state and row
        self._began = time.monotonic()
        self._trackers: Trackers | None = None
        self.timer = run_metrics.Timer()
        self._resume_step = checkpoints.latest_step
        self.continues = self._resume_step is not None
        self._alarms = Alarms(AlarmConfig(**self._config.alarms.to_dict()))
        start = self._resume_step or 0
        plan, stream = run_plan(self._config), processes.screen()
        self._progress = Progress(plan, start, stream, compiled=run_metrics.compile_seconds)
        session.watch = Watch(self._progress, folder.own_file(FAILURES))
        self._writer = None
        if not self.continues:
            self._adopt_settings()
            self._writer = self._opened_writer(None, None)

    @classmethod
    def open(cls, session: Session, workdir: str, shapes: BatchShapes) -> Recorder:
        """Opens and locks the workdir. Raises UserError as `Workdir.open` and `MetricsWriter` do."""
        folder = open_workdir(session, workdir, continuing.may_differ)
        try:
            recorder = cls(session, folder, Checkpoints.open(folder.run_path, session.config))
        except BaseException:
            folder.close()
            raise
        recorder.note(start_note(session, shapes))
        for text in session.chat_notes:
            recorder.note(text)
        return recorder

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if isinstance(error, Interrupted):
                self._save_interrupted()
        finally:
            if self._trackers is not None:
                self._trackers.close()
            self._progress.close()
            self._folder.close()

    @property
    def completed_steps(self) -> int:
        return self._counters.step

    @property
    def lr_scale(self) -> float:
        """What the learning rate of the schedule is multiplied with."""
        return self._counters.lr_scale

    def restore(self, shape: TrainState) -> TrainState:
        """The state of the newest checkpoint, laid out as `shape`; of the newest that is sound, where
        `checkpoint.on_damage` says so. What was written down after it is removed.

        Raises:
          UserError: it cannot be read, or is not finite, or is beyond the run's last step; or the metrics are not those
            that belong to it.
        """
        agree = lambda problem: processes.gather(problem, "a checkpoint")
        self._resume_step, state, counters = self._checkpoints.restore_latest(shape, agree)
        for text in self._checkpoints.notes:
            self.note(text)
        steps = self._config.optim.steps
        if self._resume_step > steps:
            where = f"{self._folder.run_path} is at step {self._resume_step}"
            raise UserError(f"{where} already, beyond optim.steps = {steps}: raise it")
        self.note(f"continuing from step {self._resume_step} of {steps}")
        if names := non_finite(state):
            raise UserError(
                f"step {self._resume_step} of {self._folder.run_path / 'checkpoints'} holds numbers that are not finite"
                f" (in {names[0]}, {len(names)} arrays in all): remove the folder of that step, and the same command"
                " continues from an earlier one"
            )
        self._counters = Counters(**counters)
        if self._counters.dialogues != self._digest_of_dialogues:
            raise UserError(
                f"sft.path {self._config.sft.path} holds other dialogues than those that the run began with: give these"
                " again, or another --workdir"
            )
        if self._counters.tasks not in ("", self._session.tasks_digest):
            raise UserError(
                f"environment {self._config.env.name!r} has other tasks than those that the run began with: give these"
                " again, or another --workdir"
            )
        self._adopt_settings()
        self._say_new_schedule()
        self._writer = self._opened_writer(self._resume_step, self._counters.rows)
        self._began = time.monotonic() - self._counters.seconds
        self._alarms = Alarms(self._alarms.config, self._counters.alarms)
        if self._session.endpoint:
            self._session.endpoint.used |= self._counters.endpoint
        return state

    def _adopt_settings(self) -> None:
        """When nothing refuses them any more."""
        for key, (there, now) in self._folder.changed.items():
            self.note(f"{key} was {there!r} and is {now!r} from here on")
        self._folder.adopt(self._config)

    def fork(self, shape: TrainState) -> TrainState:
        """The state of another run's checkpoint, see `fork.forked`; the first line says what it is."""
        state, line = forked(self._config, self._folder, shape, build.optimizer_config(self._config))
        self.note(line)
        return state

    def _opened_writer(self, step: int | None, digest: str | None) -> run_metrics.MetricsWriter:
        """Of rows after `step`; what was kept of later ones goes. Only the first process has what it wrote before."""
        self._folder.discard_after(step)
        leads, folder, tracking = processes.leads(), self._folder.path, self._config.tracking
        writer = run_metrics.MetricsWriter(
            folder, step, digest if leads else None, tensorboard="tensorboard" in tracking.trackers
        )
        if leads:
            self._trackers = Trackers(self._config, folder, writer.kept, self.note)
        return writer

    def _say_new_schedule(self) -> None:
        """Of another number of steps: what becomes of the learning rate."""
        if "optim.steps" in self._folder.changed and self._resume_step is not None:
            before = self._config.replaced({"optim.steps": self._folder.changed["optim.steps"][0]})
            schedules = [learning_rate(build.optimizer_config(each)) for each in (before, self._config)]
            rates = [float(np.asarray(schedule(self._resume_step))) for schedule in schedules]
            if rates[0] != rates[1]:
                self.note(
                    f"the schedule ends at step {self._config.optim.steps} now: the learning rate of the next step is"
                    f" {rates[1]:.3g}, where it would have been {rates[0]:.3g}"
                )

    def note(self, text: str) -> None:
        """One line for whoever watches."""
        self._progress.note(text)

    def journal(self, kind: str, step: int) -> Journal:
        """See `Workdir.journal`."""
        return self._folder.journal(kind, step)

    def begin_step(self, step: int) -> Journal:
        """A training step (counted from 1) begins: its journal."""
        self._progress.step_began()
        return self.journal("step", step)

    def is_evaluation_step(self, step: int) -> bool:
        return run_plan(self._config).is_evaluation_step(step)

    def before_training(self, state: TrainState, before: HeldOut | None, evaluated: Mapping[str, float]) -> None:
        """Keeps the starting policy's results: those on held-out tasks for the last table, the others as row 0."""
        self._counters.before = before and before.to_json()
        row = self._write(0, {**evaluated, **self._host_metrics()})
        self._completed = state, row

    def keep_before(self, scores: Scores, played: Rollouts) -> None:
        """Keeps what the starting policy did on the first `eval.record_tasks` of the test tasks."""
        self._keep_held_out("before", 0, played)

    def keep_after(self, scores: Scores, played: Rollouts) -> None:
        """As `keep_before`, of the trained policy on the same tasks."""
        self._keep_held_out("after", self._config.optim.steps, played)

    def _keep_held_out(self, kind: str, step: int, played: Rollouts) -> None:
        """Nothing of a split of which only results as a whole may be kept."""
        session, most = self._session, self._config.eval.record_tasks
        if not most or self._config.tasks.test_split in session.privacy.aggregate_splits:
            return
        few = lambda episodes: [episode for episode in episodes if episode.group < most]
        chosen = played._replace(episodes=few(played.episodes), lost=few(played.lost))
        kept = records.episode_records(chosen, Hindsight(), {}, session.algorithm, session.privacy)
        self._folder.write_episodes(step, kept, kind)

    def after_step(self, step: int, state: TrainState, outcome: StepOutcome) -> None:
        """Writes down a step (counted from 1).

        Raises:
          UserError: an alarm, or numbers that are not finite, stop the run; everything is saved by then. Or another
            process has taken the workdir over, of which nothing is overwritten.
        """
        self._folder.check_lock()
        row, alarms = self._write_row(step, outcome)
        self._count(step, outcome, row)
        stop = react(alarms, self._config.alarms.action, self._counters)
        broken = is_broken(row)
        self._completed = None if broken else (state, row)
        self._save(step, state, row, due=bool(alarms), broken=broken)
        self._progress.completed(step, row)
        for alarm in alarms:
            self.note(f"step {step}: ALARM {alarm.name}: {alarm.text}")
        if outcome.rollouts.too_long:
            context, prompts = self._config.rollout.context, outcome.rollouts.describe_too_long()
            self.note(f"step {step}: prompts that do not fit rollout.context = {context}: {prompts}")
        in_a_row = self._counters.nonfinite_updates
        if broken or in_a_row >= self._config.optim.max_nonfinite:
            updates = "1 update" if in_a_row == 1 else f"{in_a_row} updates in a row"
            self._stop(step, f"after {updates} with numbers that are not finite ({not_finite(row)})", _MEND_NUMBERS)
        if stop:
            self._stop(
                step, f"by alarm {stop}", "Change alarms.* or mend the cause; the same command continues the run"
            )

    def _save_interrupted(self) -> None:
        """Saves the last completed step, unless it is saved already, or the next update has used its state up."""
        processes.stop_together()
        if self._completed is not None:
            state, row = self._completed
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                self._checkpoints.save(self._counters.step, state, dataclasses.asdict(self._counters), row)
        self._checkpoints.close()
        latest = self._checkpoints.latest_step
        self.note("nothing is saved yet" if latest is None else f"step {latest} is saved")

    def _stop(self, step: int, why: str, remedy: str) -> NoReturn:
        self._checkpoints.wait()
        latest = self._checkpoints.latest_step
        saved = "nothing" if latest is None else f"step {latest}"
        raise UserError(f"stopped at step {step} {why}; {saved} is saved. {remedy}")

    def finished(self) -> TrainResult | None:
        """What `finish` gave, its table printed again, where the run that is continued was finished already."""
        kept = read_object(self._folder.run_path / "held_out.json") or {}
        after = kept.get("after")
        is_whole = after is None or (isinstance(after, dict) and isinstance(after.get("metrics"), dict))
        if not (is_whole and self._counters.step == kept.get("step") == self._config.optim.steps):
            return None
        return self._finish(after)

    def finish(self, after: HeldOut | None) -> TrainResult:
        """Writes `held_out.json` and `result.md`, prints the last table, and returns where all that is."""
        return self._finish(after and after.to_json())

    def _finish(self, result: Mapping[str, Any] | None) -> TrainResult:
        self._checkpoints.wait()
        self._progress.close()
        before = self._counters.before
        metrics = [(held_out or {}).get("metrics", {}) for held_out in (before, result)]
        counters = self._counters
        spent = dataclasses.asdict(counters)
        table, markdown = records.result_tables(self._session, spent, *metrics)
        self._folder.write_text(
            "held_out.json", json.dumps({"before": before, "after": result, "step": counters.step}) + "\n"
        )
        self._folder.write_text("result.md", markdown)
        print(table)
        if self._trackers is not None:
            self._trackers.result(counters.step, metrics[1])
        if self._writer is not None:
            self._writer.close()
        self._checkpoints.close()
        return TrainResult(self._folder.run_path, counters.step, *metrics)

    def _write_row(self, step: int, outcome: StepOutcome) -> tuple[dict[str, Any], list[Alarm]]:
        """Writes the step's metrics and episodes; the row as written, and its alarms."""
        episodes = outcome.rollouts.episodes
        row = records.rollout_metrics(outcome.rollouts)
        logprobs = (value for episode in episodes for value in episode.logprobs)
        if count := sum(not math.isfinite(value) for value in logprobs):
            row["rollout/nonfinite_logprobs"] = count  # null in the records
        row |= records.hindsight_metrics(episodes, outcome.hindsight, self._session.algorithm)
        row |= records.update_metrics(outcome.metrics, outcome.batches, outcome.without, outcome.rollouts)
        row |= outcome.evaluated
        alarms = self._alarms.check(row)
        row |= {f"alarm/{alarm.name}": 1 for alarm in alarms} | self._endpoint_metrics()
        if outcome.metrics["nonfinite"]:
            nonfinite.keep(self._folder.path, step, outcome.batches.batches, outcome.tokens, outcome.metrics)
        spans = records.trained_spans(self._session.chat, outcome.batches, outcome.tokens)
        session = self._session
        kept = records.episode_records(outcome.rollouts, outcome.hindsight, spans, session.algorithm, session.privacy)
        kept = list(kept)
        self._folder.write_episodes(step, kept)
        return self._write(step, row | self._host_metrics(), kept), alarms

    def _write(self, step: int, row: Mapping[str, Any], episodes: Sequence[Mapping] = ()) -> dict[str, Any]:
        """Writes a row; the checkpoint that stands for it knows it again by the digest."""
        if self._writer is None:
            raise ValueError("a run that continues is restored first")
        written = self._writer.write(step, row)
        self._counters.rows = self._writer.digest
        if self._trackers is not None:
            self._trackers.write(written, episodes)
        return written

    def _count(self, step: int, outcome: StepOutcome, row: Mapping[str, Any]) -> None:
        counters = self._counters
        counters.empty_updates += step_line.is_empty(row)
        counters.episodes += outcome.rollouts.begun
        counters.lost_episodes += outcome.rollouts.failed
        checked = int(row.get("hindsight/checked_targets", 0))
        counters.targets += row["hindsight/targets"]
        counters.checked_targets += checked
        counters.true_targets += round(row.get("hindsight/precision", 0.0) * checked)
        counters.skipped_updates += bool(row["train/nonfinite"])
        counters.nonfinite_updates = counters.nonfinite_updates + 1 if row["train/nonfinite"] else 0
        counters.step, counters.seconds = step, time.monotonic() - self._began
        counters.tokens += outcome.rollouts.stats.sampled_tokens + outcome.hindsight.generated_tokens
        counters.alarms, counters.dialogues = self._alarms.state, self._digest_of_dialogues
        counters.tasks = self._session.tasks_digest
        counters.endpoint = dict(self._session.endpoint.used) if self._session.endpoint else {}

    def _save(self, step: int, state: TrainState, row: Mapping[str, Any], *, due: bool, broken: bool) -> None:
        """Saves when it is due, and after an alarm; of a state that is broken the last good checkpoint stays."""
        config = self._config
        due |= step == config.optim.steps or step % config.checkpoint.every == 0
        if due and not broken:
            self._checkpoints.save(step, state, dataclasses.asdict(self._counters), row)

    @property
    def _digest_of_dialogues(self) -> str:
        return self._session.dialogues.digest if self._session.dialogues else ""

    def _endpoint_metrics(self) -> dict[str, int]:
        used = self._session.endpoint.used if self._session.endpoint else {}
        return {f"endpoint/{name}": used[name] for name in ("calls", "tokens") if name in used}

    def _host_metrics(self) -> dict[str, float]:
        compiled, peak = (
            run_metrics.compile_count(),
            processes.gather(run_metrics.peak_bytes(), "metrics", may_stop=False),
        )
        return self.timer.take() | {"compile/count": compiled, "memory/peak_bytes": max(peak)}


def is_broken(update: Mapping[str, Any], prefix: str = "train/") -> bool:
    """Whether an update, by its metrics, left a state that is not finite: one that was not skipped in time."""
    return bool(update[f"{prefix}nonfinite"]) and not update[f"{prefix}skipped"]


def run_plan(config: Config) -> Plan:
    """What a run has to do, for the estimate of its time."""
    evaluation, tests = config.eval, config.eval.test_tasks
    parts = ((tests * evaluation.rollouts, *([tests] if evaluation.greedy else []))) if tests else ()
    return Plan(config.optim.steps, evaluation.every, evaluation.tasks * evaluation.rollouts, parts)


def program_count(session: Session, shapes: BatchShapes) -> int:
    """How many programs `train.compile_programs` compiles."""
    return len(session.engine.config.prefill_buckets) + 2 + len(shapes.all()) + 1  # copy and decode; apply


def start_note(session: Session, shapes: BatchShapes) -> str:
    """What happens first, in plain words."""
    devices, config = session.mesh.devices, session.config
    kind = devices.flat[0].device_kind
    if devices.size > 1:
        sizes = " x ".join(f"{name} {size}" for name, size in session.mesh.shape.items())
        each = f" of {processes.count()} processes" if processes.count() > 1 else ""
        kind = f"{devices.size} x {kind}{each} (mesh {sizes})"
    what, source = "episodes", ""
    if session.dialogues:
        what, source = "dialogues", f" from {session.dialogues.describe(shapes.length_buckets[-1])}"
    return (
        f"{config.policy.path} learns {config.env.name} by {config.algorithm}{source} on {kind}: {config.optim.steps}"
        f" steps of {config.tasks.tasks_per_step * config.tasks.rollouts} {what}. Compiling"
        f" {program_count(session, shapes)} programs first, once; hintsd-jax plan lists them"
    )


def react(alarms: Sequence[Alarm], action: str, counters: Counters) -> str:
    """Does what the config says about alarms: why the run stops, or ""."""
    if action == "halve_lr" and alarms:
        counters.lr_scale *= 0.5
    return "; ".join(f"{alarm.name} ({alarm.text})" for alarm in alarms) if action == "stop" else ""
