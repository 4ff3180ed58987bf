"""The method, top to bottom: roll out, look back at the failures, distil the steps that caused them, move the teacher.

The host loop calls environments and prompts the analyser between compiled steps. Everything a step does follows from (config, step,
state), so a run that was killed continues from its last checkpoint as if it had not been: task order and keys are functions of
the step, and counters travel with the checkpoint.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from hintsd_jax.distill import packing, state as train_state
from hintsd_jax.distill.losses import LossConfig
from hintsd_jax.distill.state import OptimConfig, TrainState
from hintsd_jax.distill.step import accumulate, update, zeros
from hintsd_jax.episodes.episode import Episode
from hintsd_jax.episodes.rollout import job_key
from hintsd_jax.evaluate import held_out, score
from hintsd_jax.hindsight import analyser
from hintsd_jax.hindsight.analyser import Hindsight
from hintsd_jax.runs import metrics as run_metrics, progress as run_progress
from hintsd_jax.runs.checkpoints import Checkpoints
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.session import Session, step_tasks


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains in `workdir`, or continues what is there. Returns the last table's numbers.

    Raises:
      UserError: see `Session.open`, `Workdir.open`, `Checkpoints.restore`.
    """
    run_metrics.compile_count()  # counts from here on
    session = Session.open(config)
    tasks, eval_tasks = session.tasks(config.tasks.train_split), session.tasks(config.tasks.eval_split)
    eval_tasks = [eval_tasks[n] for n in range(min(config.eval.tasks, len(eval_tasks)))]
    loss, optim = loss_config(config), optim_config(config)
    state = train_state.create(session.params, optim)
    initial = session.params if config.hindsight.analyser == "policy_initial" else None
    with Workdir.open(workdir, config) as folder:
        checkpoints = Checkpoints(folder.path / "checkpoints", config.checkpoint.keep, best=f"eval/avg@{config.eval.rollouts}")
        step, counters = 0, {"seconds": 0.0, "tokens": 0, "before": {}}
        restored = checkpoints.restore_latest(state)
        if restored is not None:
            state, counters = restored
            step = counters["step"]
        folder.discard_after(step if restored else None)
        writer = run_metrics.MetricsWriter(folder.path, resume_step=step if restored else None)
        compile_programs(session, state, loss, optim)
        timer, began = run_metrics.Timer(), time.monotonic() - counters["seconds"]
        bar = run_progress.Progress(config.optim.steps, start=step)
        if restored is None:
            bar.note(f"{len(tasks)} training tasks; evaluating the starting policy")
            if config.eval.test_tasks:
                counters["before"] = held_out(session, state.params, config.tasks.test_split, config.eval.test_tasks)
            writer.write(0, evaluation(session, state, eval_tasks, timer) | host_metrics(timer))

        while step < config.optim.steps:
            with timer("step"):
                # -- roll out with the newest weights
                with timer("rollout"):
                    chosen = step_tasks(tasks, config.seed, step, config.tasks.tasks_per_step)
                    episodes, dropped, stats = session.play(state.params, chosen, config.tasks.rollouts, step=step)
                # -- look back: which steps broke the failed ones, and how they should have gone
                with timer("hindsight"):
                    found = look_back(session, state, initial, episodes, step)
                # -- distil exactly those action spans
                with timer("distill"):
                    rows = make_rows(session, episodes, found, step)
                    batches, too_long = packing.pack(rows, **packing_options(config))
                    state, distilled = update(state, batches, policy=session.policy, loss=loss, optim=optim)
                    distilled = jax.device_get(distilled)
            step += 1
            counters["tokens"] += stats.sampled + found.tokens
            row = rollout_metrics(episodes, dropped, stats) | hindsight_metrics(found, too_long, config)
            row |= {f"distill/{name}": value for name, value in distilled.items()}
            if step == config.optim.steps or (config.eval.every and step % config.eval.every == 0):
                row |= evaluation(session, state, eval_tasks, timer)
            folder.write_episodes(step, records(episodes, found, config))
            row = writer.write(step, row | host_metrics(timer))
            counters |= {"step": step, "seconds": time.monotonic() - began}
            if step % config.checkpoint.every == 0 or step == config.optim.steps:
                checkpoints.save(step, state, counters, row)
            bar.update(step, row)

        checkpoints.wait()
        bar.close()
        after = held_out(session, state.params, config.tasks.test_split, config.eval.test_tasks) if config.eval.test_tasks else {}
        print_result(folder, config, counters, after)
        writer.close()
        checkpoints.close()
        return {f"before/{k}": v for k, v in counters["before"].items()} | {f"after/{k}": v for k, v in after.items()}


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


def compile_programs(session: Session, state: TrainState, loss: LossConfig, optim: OptimConfig) -> None:
    """Compiles everything that the run will need, on empty input: no later step stops for it, whatever the texts."""
    config, options = session.config, packing_options(session.config)
    session.engine.compile(state.params)
    accumulator = zeros(state.params, loss)
    for length in config.distill.length_buckets:
        for action_length in config.distill.action_buckets:
            blank = packing.blank_batch(config.distill.rows_per_batch, length, action_length, options["teacher_extra"])
            accumulator = accumulate(state, accumulator, blank, policy=session.policy, loss=loss)


def evaluation(session: Session, state: TrainState, tasks: Sequence[Mapping], timer: run_metrics.Timer) -> dict[str, float]:
    with timer("eval"):
        scores, _ = score(session, state.params, tasks, session.config.eval.rollouts)
    return scores.metrics("eval")


def rollout_metrics(episodes: Sequence[Episode], dropped: Mapping[str, int], stats) -> dict[str, float]:
    ended = Counter(episode.ended for episode in episodes)
    count = max(len(episodes), 1)
    return {
        "rollout/episodes": len(episodes),
        "rollout/success": sum(episode.success for episode in episodes) / count,
        "rollout/tokens": stats.sampled,
        "rollout/turns": sum(len(episode.steps) for episode in episodes) / count,
        "rollout/prefilled": stats.prefilled,
        "rollout/decode_steps": stats.decode_steps,
        **{f"rollout/ended/{reason}": number for reason, number in sorted(ended.items())},
        **{f"rollout/dropped/{reason}": number for reason, number in sorted(dropped.items())},
    }


def hindsight_metrics(found: Hindsight, too_long: Mapping[str, int], config: ConfigDict) -> dict[str, float]:
    steps = [target.step for analysis in found.analyses for target in analysis.targets]
    dropped = found.dropped + Counter(too_long)
    return {
        "hindsight/failed": len(found.analyses) + found.dropped["no_steps"] + found.dropped["prompt_too_long"] + found.dropped["no_report"],
        "hindsight/parsed": found.parsed,
        "hindsight/targets": len(steps),
        "hindsight/target_step_mean": float(np.mean(steps)) if steps else 0.0,
        "hindsight/tokens": found.tokens,
        "hindsight/privileged": int(config.hindsight.analyser in analyser.PRIVILEGED),
        **analyser.attribution(found.analyses),
        **{f"hindsight/dropped/{reason}": number for reason, number in sorted(dropped.items())},
    }


def host_metrics(timer: run_metrics.Timer) -> dict[str, float]:
    return timer.take() | {"compile/count": run_metrics.compile_count(), "memory/peak_bytes": run_metrics.peak_bytes()}


def records(episodes: Sequence[Episode], found: Hindsight, config: ConfigDict):
    """What `episodes/` keeps of a step: every episode with its text and spans, its targets, and the analyser's own words."""
    analyses = {id(analysis.episode): analysis for analysis in found.analyses}
    for episode in episodes:
        analysis = analyses.get(id(episode))
        looked = None
        if analysis is not None:
            looked = {
                "analyser": config.hindsight.analyser,
                "privileged": config.hindsight.analyser in analyser.PRIVILEGED,
                "answer": analysis.answer,
                "problem": analysis.problem,
                "targets": [{"step": target.step, "feedback": target.feedback} for target in analysis.targets],
            }
        yield episode.to_json() | {"hindsight": looked}


def loss_config(config: ConfigDict) -> LossConfig:
    distill = config.distill
    return LossConfig(
        loss="sft" if config.method == "sharpen" else "distill",
        divergence=distill.divergence,
        support=distill.support,
        top_k=distill.top_k,
        alpha=distill.alpha,
        chunk=distill.chunk,
    )


def optim_config(config: ConfigDict) -> OptimConfig:
    options = config.optim.to_dict()
    return OptimConfig(total_steps=options.pop("steps"), **options)


def packing_options(config: ConfigDict) -> dict:
    distill = config.distill
    return {
        "length_buckets": tuple(distill.length_buckets),
        "action_buckets": tuple(distill.action_buckets),
        "rows_per_batch": distill.rows_per_batch,
        "teacher_extra": distill.teacher_extra,
        "mean_of_micro_means": distill.mean_of_micro_means,
    }


def restored_params(session: Session, workdir: str) -> tuple[dict, int]:
    """The student's weights in the newest checkpoint of a workdir, or the loaded ones, and the step they are of."""
    folder = Path(workdir).expanduser() / "checkpoints"
    if not folder.is_dir():
        return session.params, 0
    state = train_state.create(session.params, optim_config(session.config))
    checkpoints = Checkpoints(folder, session.config.checkpoint.keep, best=f"eval/avg@{session.config.eval.rollouts}")
    restored = checkpoints.restore_latest(state)
    checkpoints.close()
    return (session.params, 0) if restored is None else (restored[0].params, restored[1]["step"])


def print_result(folder: Workdir, config: ConfigDict, counters: Mapping, after: Mapping[str, float]) -> None:
    """The last table, on the terminal and as `result.md`."""
    before, split, k = counters["before"], config.tasks.test_split, config.eval.rollouts
    names = {f"avg@{k}": f"Avg@{k}", f"best@{k}": f"Best@{k}", "greedy": "greedy"}
    results = [run_progress.Result(f"{split} {label}", before.get(f"{split}/{key}"), after.get(f"{split}/{key}")) for key, label in names.items()]
    label = config.hindsight.analyser + (" (PRIVILEGED: knows the ground truth)" if config.hindsight.analyser in analyser.PRIVILEGED else "")
    facts = {
        "method": f"{config.method}, targets by {config.hindsight.select}, analyser {label}",
        "tasks": f"{after.get(f'{split}/tasks', 0)} x {k} rollouts, seed {config.seed}",
        "wall time": run_progress.format_seconds(counters["seconds"]),
        "tokens": f"{counters['tokens']:,} sampled in training",
    }
    print(run_progress.plain_table(results, facts))
    folder.write_text("result.md", run_progress.markdown_table(results, facts))
