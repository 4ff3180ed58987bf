"""The method, top to bottom: roll out, look back at the failures, distil the steps that caused them, move the teacher.

The host loop calls environments and prompts the analyser between compiled steps. Everything a step does follows from
(config, step, state), so a run that was killed continues from its last checkpoint as if it had not been: task order and
keys are functions of the step, counters travel with the checkpoint, and what the outside world answered is journalled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial

import jax
from ml_collections import ConfigDict

from hintsd_jax import lessons, records
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import held_out, score
from hintsd_jax.hindsight import analyser
from hintsd_jax.hindsight.analyser import Hindsight
from hintsd_jax.methods import method_of
from hintsd_jax.rollout.collector import job_key
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.runs import metrics as run_metrics
from hintsd_jax.runs import progress as run_progress
from hintsd_jax.runs.alarms import NOT_FINITE, Alarm, AlarmConfig, Alarms
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.session import Session, loss_config, optim_config, step_tasks
from hintsd_jax.training import batching as packing
from hintsd_jax.training.examples import Row
from hintsd_jax.training.state import TrainState, abstract, create
from hintsd_jax.training.train_step import update

# A run may go on on other devices, with another server of the same model, and with another word about alarms.
MAY_DIFFER = (
    "mesh.",
    "alarms.",
    *(f"endpoint.{name}" for name in ("url", "key_env", "concurrency", "timeout_s", "retries", "backoff_s")),
)
MAY_DIFFER += tuple(f"endpoint.{name}" for name in ("max_calls", "max_tokens", "max_failures"))
# What travels with a checkpoint beside the state.
FIRST = {"step": 0, "seconds": 0.0, "tokens": 0, "before": None, "lr_scale": 1.0, "alarms": {}, "endpoint": {}}


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains in `workdir`, or continues what is there. Returns the last held-out metrics.

    Raises:
      UserError: see `Session.open`, `Workdir.open`, `Checkpoints.restore`.
    """
    run_metrics.compile_count()  # counts from here on
    session = Session.open(config)
    config = session.config
    tasks, eval_tasks = session.tasks(config.tasks.train_split), session.tasks(config.tasks.eval_split)
    eval_tasks = [eval_tasks[n] for n in range(min(config.eval.tasks, len(eval_tasks)))]
    distil = partial(
        update,
        session.frozen,
        policy=session.policy,
        loss=loss_config(config),
        optim=optim_config(config),
        mesh=session.mesh,
    )
    shape = abstract(session.trained, optim_config(config))
    initial = session.trained if config.hindsight.analyser == "initial_policy" else None
    with Workdir.open(workdir, config, may_differ=MAY_DIFFER, benchmark=session.benchmark) as folder:
        checkpoints = Checkpoints(
            folder.path / "checkpoints", config.checkpoint.keep, best=f"eval/avg@{config.eval.rollouts}"
        )
        resume_step = checkpoints.latest_step
        if resume_step is None:
            state, counters = create(session.trained, optim_config(config)), dict(FIRST)
            session.trained = None  # the state has its own copy: no second one stays behind
        else:
            session.trained = None  # gone before what replaces it comes
            state, counters = checkpoints.restore(resume_step, shape)
        alarms = Alarms(AlarmConfig(**config.alarms), counters["alarms"])
        if session.endpoint:
            session.endpoint.used |= counters["endpoint"]
        folder.discard_after(resume_step)
        writer = run_metrics.MetricsWriter(folder.path, resume_step)
        timer, began = run_metrics.Timer(), time.monotonic() - counters["seconds"]
        bar = run_progress.Progress(config.optim.steps, start=counters["step"])
        bar.note(records.shapes_note(session))
        with timer("compile"):
            state = compile_programs(session, state, distil)
        if session.chat.deviation:
            bar.note(f"history = keep, a declared deviation from the chat template: {session.chat.deviation}")
        if resume_step is None:
            bar.note(f"{len(tasks)} training tasks; evaluating the starting policy")
            session.journal = folder.journal("before", 0)
            counters["before"] = measure(session, state)
            session.journal = folder.journal("eval", 0)
            writer.write(0, evaluation(session, state, eval_tasks, timer) | host_metrics(timer))

        for step in range(counters["step"], config.optim.steps):
            session.journal = folder.journal("step", step + 1)
            with timer("step"):
                # -- roll out with the newest weights
                with timer("rollout"):
                    chosen = step_tasks(tasks, config.seed, step, config.tasks.tasks_per_step)
                    episodes, dropped, stats = session.play(
                        session.weights(state.params), chosen, config.tasks.rollouts, step=step
                    )
                # -- look back: which steps broke the failed ones, and how they should have gone
                with timer("hindsight"):
                    found = look_back(session, state, initial, episodes, step)
                # -- distil exactly those action spans, then move the teacher
                with timer("distill"):
                    rows, without = lessons.make_rows(config, session.chat, episodes, found, step)
                    packed = pack(config, rows, session.shapes)
                    state, *told = distil(state, packed.batches, counters["lr_scale"])
                    distilled, tokens = jax.device_get(told)
            # -- write down: the row first, then the checkpoint that stands for it
            done = step + 1
            row = records.rollout_metrics(episodes, dropped, stats) | records.hindsight_metrics(episodes, found, config)
            row |= records.distill_metrics(distilled, packed, without)
            if done == config.optim.steps or (config.eval.every and done % config.eval.every == 0):
                session.journal = folder.journal("eval", done)
                row |= evaluation(session, state, eval_tasks, timer)
            raised = alarms.check(row)
            row |= {f"alarm/{alarm.name}": 1 for alarm in raised} | endpoint_metrics(session)
            trained = records.trained_spans(session.chat, packed, tokens)
            folder.write_episodes(done, records.records(episodes, found, trained, config))
            row = writer.write(done, row | host_metrics(timer))
            counters |= {
                "step": done,
                "seconds": time.monotonic() - began,
                "tokens": counters["tokens"] + stats.sampled + found.tokens,
            }
            counters |= {"alarms": alarms.state, "endpoint": dict(session.endpoint.used) if session.endpoint else {}}
            stop = heed(raised, config.alarms.action, counters)
            usable = all(alarm.name != NOT_FINITE for alarm in raised)  # else the last good checkpoint stays
            if usable and (raised or done == config.optim.steps or done % config.checkpoint.every == 0):
                checkpoints.save(done, state, counters, row)
            bar.update(done, row)
            for alarm in raised:
                bar.note(f"step {done}: ALARM {alarm.name}: {alarm.text}")
            if stop:
                checkpoints.wait()
                kept = (
                    f"step {checkpoints.latest_step} is saved"
                    if checkpoints.latest_step is not None
                    else "nothing is saved"
                )
                raise UserError(
                    f"stopped at step {done} by alarm {stop}; {kept}. Change alarms.* or what ails the run; the same command goes on"
                )
            if dropped:
                bar.note(
                    f"step {done}: rollouts that never began: {', '.join(f'{count} {reason}' for reason, count in sorted(dropped.items()))}"
                )

        checkpoints.wait()
        bar.close()
        session.journal = folder.journal("after", config.optim.steps)
        after = measure(session, state)
        before_metrics, after_metrics = ((result or {}).get("metrics", {}) for result in (counters["before"], after))
        table, markdown = records.result_tables(config, counters, before_metrics, after_metrics, session.benchmark)
        folder.write_text("held_out.json", json.dumps({"before": counters["before"], "after": after}) + "\n")
        folder.write_text("result.md", markdown)
        print(table)
        writer.close()
        checkpoints.close()
        return after_metrics


def heed(raised: Sequence[Alarm], action: str, counters: MutableMapping) -> str:
    """Does what the config says about alarms: why the run stops, or "". Weights that are not finite are past halving
    the learning rate.
    """
    broken = [alarm for alarm in raised if alarm.name == NOT_FINITE]
    if action == "halve_lr" and raised and not broken:
        counters["lr_scale"] *= 0.5
    stopping = {"note": [], "stop": raised, "halve_lr": broken}[action]
    return "; ".join(f"{alarm.name} ({alarm.text})" for alarm in stopping)


def look_back(session: Session, state: TrainState, initial, episodes: Sequence[Episode], step: int) -> Hindsight:
    """What the method's analyser says of the episodes that the method asks about; nothing where it asks about none."""
    config = session.config
    asks, hindsight = method_of(config).asks, session.hindsight_config()
    chosen = {
        "": [],
        "failed": [episode for episode in episodes if not episode.success],
        "steps": episodes,
        "orphans": [episode for episode in episodes if not episode.success and not lessons.siblings(episodes, episode)],
    }
    keyed = [
        (episode, job_key(config.seed, step, f"hindsight {episode.task_id}", episode.rollout))
        for episode in chosen[asks]
    ]
    if not keyed:
        return Hindsight()
    if config.hindsight.analyser in analyser.PRIVILEGED_ANALYSERS:
        return analyser.ask_environment(keyed, hindsight)
    if session.endpoint:
        ask = partial(session.endpoint.ask, journal=session.journal)
    else:
        ask = session.policy_asker(session.weights(analyser_weights(config, state, initial)))
    return analyser.judge(keyed, ask) if asks == "steps" else analyser.analyse(keyed, hindsight, ask)


def analyser_weights(config: ConfigDict, state: TrainState, initial):
    return {"ema_teacher": state.ema, "policy": state.params, "initial_policy": initial}[config.hindsight.analyser]


def pack(config: ConfigDict, rows: Sequence[Row], shapes: packing.Shapes) -> packing.Packed:
    weight = config.loss.policy_gradient_weight if method_of(config).loss == "distill+policy" else None
    return packing.pack(rows, shapes, mean_of_micro_means=config.loss.mean_of_micro_means, policy_weight=weight)


def compile_programs(session: Session, state: TrainState, distil) -> TrainState:
    """Compiles everything that the run will need, on empty input: no later step stops for it, whatever the texts. The
    state is donated and comes back as it was (an update without a token changes nothing)."""
    session.engine.compile(session.weights(state.params))
    return distil(state, [packing.blank_batch(session.shapes, *shape) for shape in session.shapes.all()])[0]


def measure(session: Session, state: TrainState) -> dict | None:
    """The held-out result of the current weights as JSON values; None where the config asks for none."""
    config = session.config
    if not config.eval.test_tasks:
        return None
    return held_out(session, session.weights(state.params), config.tasks.test_split, config.eval.test_tasks).to_json()


def evaluation(
    session: Session, state: TrainState, tasks: Sequence[Mapping], timer: run_metrics.Timer
) -> dict[str, float]:
    with timer("eval"):
        scores, _ = score(session, session.weights(state.params), tasks, session.config.eval.rollouts)
    return scores.metrics("eval")


def endpoint_metrics(session: Session) -> dict[str, int]:
    used = session.endpoint.used if session.endpoint else {}
    return {f"endpoint/{name}": used[name] for name in ("calls", "tokens") if name in used}


def host_metrics(timer: run_metrics.Timer) -> dict[str, float]:
    return timer.take() | {"compile/count": run_metrics.compile_count(), "memory/peak_bytes": run_metrics.peak_bytes()}
