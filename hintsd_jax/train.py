"""The method, top to bottom: roll out, look back at the failures, distil the steps that caused them, move the teacher.

The host loop calls environments and prompts the analyser between compiled steps. Everything a step does follows from (config, step,
state), so a run that was killed continues from its last checkpoint as if it had not been: task order and keys are functions of
the step, and counters travel with the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
from ml_collections import ConfigDict

from hintsd_jax import summaries
from hintsd_jax.distill import packing
from hintsd_jax.distill.losses import LossConfig
from hintsd_jax.distill.state import OptimConfig, TrainState, create
from hintsd_jax.distill.step import update
from hintsd_jax.episodes.episode import Episode
from hintsd_jax.episodes.rollout import job_key
from hintsd_jax.evaluate import held_out, score
from hintsd_jax.hindsight import analyser
from hintsd_jax.hindsight.analyser import Hindsight
from hintsd_jax.runs import metrics as run_metrics, progress as run_progress
from hintsd_jax.runs.checkpoints import Checkpoints
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.session import Session, loss_config, optim_config, packing_options, step_tasks


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains in `workdir`, or continues what is there. Returns the last held-out metrics.

    Raises:
      UserError: see `Session.open`, `Workdir.open`, `Checkpoints.restore`.
    """
    run_metrics.compile_count()  # counts from here on
    session = Session.open(config)
    tasks, eval_tasks = session.tasks(config.tasks.train_split), session.tasks(config.tasks.eval_split)
    eval_tasks = [eval_tasks[n] for n in range(min(config.eval.tasks, len(eval_tasks)))]
    loss, optim = loss_config(config), optim_config(config)
    state = create(session.params, optim)
    initial = session.params if config.hindsight.analyser == "policy_initial" else None
    session.params = None  # the state has its own copy: no second one stays behind
    with Workdir.open(workdir, config) as folder:
        checkpoints = Checkpoints(folder.path / "checkpoints", config.checkpoint.keep, best=f"eval/avg@{config.eval.rollouts}")
        restored = checkpoints.restore_latest(state)
        state, counters = restored or (state, {"step": 0, "seconds": 0.0, "tokens": 0, "before": None})
        resume_step = counters["step"] if restored else None
        folder.discard_after(resume_step)
        writer = run_metrics.MetricsWriter(folder.path, resume_step)
        state = compile_programs(session, state, loss, optim)
        timer, began = run_metrics.Timer(), time.monotonic() - counters["seconds"]
        bar = run_progress.Progress(config.optim.steps, start=counters["step"])
        if session.chat.deviation:
            bar.note(f"history = keep, a declared deviation from the chat template: {session.chat.deviation}")
        if restored is None:
            bar.note(f"{len(tasks)} training tasks; evaluating the starting policy")
            counters["before"] = measure(session, state)
            writer.write(0, evaluation(session, state, eval_tasks, timer) | host_metrics(timer))

        for step in range(counters["step"], config.optim.steps):
            with timer("step"):
                # -- roll out with the newest weights
                with timer("rollout"):
                    chosen = step_tasks(tasks, config.seed, step, config.tasks.tasks_per_step)
                    episodes, dropped, stats = session.play(state.params, chosen, config.tasks.rollouts, step=step)
                # -- look back: which steps broke the failed ones, and how they should have gone
                with timer("hindsight"):
                    found = look_back(session, state, initial, episodes, step)
                # -- distil exactly those action spans, then move the teacher
                with timer("distill"):
                    rows = make_rows(session, episodes, found, step)
                    batches, too_long = packing.pack(rows, **packing_options(config))
                    state, distilled = update(state, batches, policy=session.policy, loss=loss, optim=optim)
                    distilled = jax.device_get(distilled)
            # -- write down: the row first, then the checkpoint that stands for it
            done = step + 1
            row = summaries.rollout_metrics(episodes, dropped, stats) | summaries.hindsight_metrics(found, too_long, config)
            row |= {f"distill/{name}": value for name, value in distilled.items()}
            if done == config.optim.steps or (config.eval.every and done % config.eval.every == 0):
                row |= evaluation(session, state, eval_tasks, timer)
            folder.write_episodes(done, summaries.records(episodes, found, config))
            row = writer.write(done, row | host_metrics(timer))
            counters |= {"step": done, "seconds": time.monotonic() - began, "tokens": counters["tokens"] + stats.sampled + found.tokens}
            if done == config.optim.steps or done % config.checkpoint.every == 0:
                checkpoints.save(done, state, counters, row)
            bar.update(done, row)
            if dropped:
                bar.note(f"step {done}: rollouts that never began: {', '.join(f'{count} {reason}' for reason, count in sorted(dropped.items()))}")

        checkpoints.wait()
        bar.close()
        after = measure(session, state)
        before_metrics, after_metrics = ((result or {}).get("metrics", {}) for result in (counters["before"], after))
        table, markdown = summaries.result_tables(config, counters, before_metrics, after_metrics)
        folder.write_text("held_out.json", json.dumps({"before": counters["before"], "after": after}) + "\n")
        folder.write_text("result.md", markdown)
        print(table)
        writer.close()
        checkpoints.close()
        return after_metrics


def look_back(session: Session, state: TrainState, initial, episodes: Sequence[Episode], step: int) -> Hindsight:
    """Targets for the failed episodes of a step; none for the control that does not look back."""
    config = session.config
    if config.method == "sharpen":
        return Hindsight([], Counter())
    failed = [
        (episode, job_key(config.seed, step, f"hindsight {episode.task_id}", episode.rollout))
        for episode in episodes
        if not episode.success
    ]
    hindsight = session.hindsight_config()
    if hindsight.analyser in analyser.PRIVILEGED:
        return analyser.ask_environment(failed, hindsight)
    weights = {"policy_ema": state.ema, "policy": state.params, "policy_initial": initial}[hindsight.analyser]
    return analyser.ask_policy(session.engine, weights, session.chat, failed, hindsight)


def make_rows(session: Session, episodes: Sequence[Episode], found: Hindsight, step: int) -> list[packing.Row]:
    """One row per target. The sharpening control instead takes one random step of every episode, failed or not."""
    config = session.config
    numbers = {id(episode): n for n, episode in enumerate(episodes)}
    micro = config.tasks.rollouts  # the released code's micro-step is one task
    if config.method == "sharpen":
        return [
            packing.action_row(
                episode, analyser.given_step(episode, job_key(config.seed, step, f"sharpen {episode.task_id}", episode.rollout)),
                index=n, micro=n // micro,
            )
            for n, episode in enumerate(episodes)
            if episode.steps
        ]  # fmt: skip
    return [
        packing.target_row(analysis.episode, target, session.chat, index=numbers[id(analysis.episode)], micro=numbers[id(analysis.episode)] // micro)
        for analysis in found.analyses
        for target in analysis.targets
    ]


def compile_programs(session: Session, state: TrainState, loss: LossConfig, optim: OptimConfig) -> TrainState:
    """Compiles everything that the run will need, on empty input: no later step stops for it, whatever the texts. The state is
    donated and comes back as it was (an update without a token changes nothing)."""
    config, options = session.config, packing_options(session.config)
    session.engine.compile(state.params)
    blanks = [
        packing.blank_batch(config.distill.rows_per_batch, length, action_length, options["teacher_extra"])
        for length in config.distill.length_buckets
        for action_length in config.distill.action_buckets
    ]
    return update(state, blanks, policy=session.policy, loss=loss, optim=optim)[0]


def measure(session: Session, state: TrainState) -> dict | None:
    """The held-out result of the current weights as JSON values; None where the config asks for none."""
    config = session.config
    if not config.eval.test_tasks:
        return None
    return dataclasses.asdict(held_out(session, state.params, config.tasks.test_split, config.eval.test_tasks))


def evaluation(session: Session, state: TrainState, tasks: Sequence[Mapping], timer: run_metrics.Timer) -> dict[str, float]:
    with timer("eval"):
        scores, _ = score(session, state.params, tasks, session.config.eval.rollouts)
    return scores.metrics("eval")


def host_metrics(timer: run_metrics.Timer) -> dict[str, float]:
    return timer.take() | {"compile/count": run_metrics.compile_count(), "memory/peak_bytes": run_metrics.peak_bytes()}


