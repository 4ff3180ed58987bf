# SPDX-License-Identifier: Apache-2.0

"""A step or a run as numbers, records and a last table. Reads everything, changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.hindsight import selectors
from hintsd_jax.hindsight.analyser import PRIVILEGED_ANALYSERS, privileged
from hintsd_jax.hindsight.analysis import Hindsight, attribution
from hintsd_jax.privacy import Privacy
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.played import Rollouts
from hintsd_jax.runs import progress
from hintsd_jax.session import Session
from hintsd_jax.training.batching import Batches


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Of the episodes that were played, and how many were not: begun = episodes + what was dropped. dropped_share: what
    environments' failures took of those begun. Without any episode there is no success.
    """
    episodes, stats = rollouts.episodes, rollouts.stats
    failed_calls = Counter(f"{failure.call.partition(' ')[0]}/{failure.reason}" for failure in rollouts.failures)
    count, steps = max(len(episodes), 1), sum(len(episode.steps) for episode in episodes)
    ended = Counter(episode.ended for episode in episodes)
    problems = Counter(step.problem for episode in episodes for step in episode.steps if step.problem)
    return {
        "rollout/begun": rollouts.begun,
        "rollout/episodes": len(episodes),
        **({"rollout/success": sum(episode.success for episode in episodes) / count} if episodes else {}),
        "rollout/tokens": stats.sampled_tokens,
        "rollout/steps": steps / count,
        "rollout/action_length": sum(len(episode.logprobs) for episode in episodes) / max(steps, 1),
        "rollout/calls": sum(step.calls for episode in episodes for step in episode.steps) / count,
        "rollout/cut_actions": sum(step.cut for episode in episodes for step in episode.steps),
        **{f"rollout/problems/{kind}": number for kind, number in sorted(problems.items())},
        "rollout/prefill_tokens": stats.prefill_tokens,
        "rollout/decode_steps": stats.decode_steps,
        **{f"rollout/ended/{reason}": number for reason, number in sorted(ended.items())},
        **{f"rollout/dropped/{reason}": number for reason, number in sorted(rollouts.dropped.items())},
        "rollout/dropped_share": rollouts.failed / max(rollouts.begun, 1),
        **{f"rollout/failed_calls/{call}": number for call, number in sorted(failed_calls.items())},
    }


def hindsight_metrics(episodes: Sequence[Episode], hindsight: Hindsight, algorithm: Algorithm) -> dict[str, float]:
    steps = [target.step for analysis in hindsight.analyses for target in analysis.targets]
    verdicts = [verdict for analysis in hindsight.analyses for verdict in analysis.verdicts]
    return {
        "hindsight/failed_episodes": sum(not episode.success for episode in episodes),
        "hindsight/questions": hindsight.questions,
        "hindsight/readable_answers": hindsight.readable_answers,
        "hindsight/unreadable": 1 - hindsight.readable_answers / hindsight.questions if hindsight.questions else 0.0,
        "hindsight/targets": len(steps),
        "hindsight/mean_target_step": float(np.mean(steps)) if steps else 0.0,
        "hindsight/tokens": hindsight.generated_tokens,
        "hindsight/privileged": int(is_privileged(algorithm)),
        **({"hindsight/verdict": float(np.mean(verdicts))} if verdicts else {}),
        **{f"hindsight/{name}": value for name, value in attribution(hindsight.analyses).items()},
        **{f"hindsight/dropped/{reason}": number for reason, number in sorted(hindsight.dropped.items())},
    }


def update_metrics(
    metrics: Mapping[str, float], batches: Batches, without: Mapping[str, int], rollouts: Rollouts
) -> dict[str, float]:
    """What the update reports, the tokens that student and teacher went through, and the share of padding among them;
    actions that fit no batch and episodes `without` anything to learn from, by reason. Where nothing was rolled out no
    sampler is known that the update could be compared with.
    """
    if not rollouts.begun:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("logprob_mismatch")}
    processed = batches.student_tokens + batches.teacher_tokens
    dropped = sorted((Counter(batches.dropped) + Counter(without)).items())
    values = {
        **metrics,
        "student_tokens": batches.student_tokens,
        "teacher_tokens": batches.teacher_tokens,
        "padding_fraction": batches.padding_tokens / max(processed, 1),
        **{f"dropped/{reason}": number for reason, number in dropped},
    }
    return {f"train/{name}": value for name, value in values.items()}


def trained_spans(
    chat: ChatFormat, batches: Batches, tokens: Sequence[Mapping[str, np.ndarray]]
) -> dict[int, list[dict[str, Any]]]:
    """What an update did, token by token: for each episode (its number in the step) the actions that were trained on,
    in order.

    tokens: of each batch, arrays [B, A] by name; see `training.losses.span_losses`.
    """
    spans: dict[int, list[dict[str, Any]]] = {}
    for location in batches.spans:
        where = (location.row, slice(location.start, location.stop))
        batch = batches.batches[location.batch]
        span = {"step": location.step, "pieces": chat.token_texts(batch.actions_BA[where].tolist())}
        if location.scored:
            arrays = tokens[location.batch]
            span |= {name: _rounded(arrays[name][where]) for name in ("divergence", "teacher_gap") if name in arrays}
            span["teacher_best"] = chat.token_texts(arrays["teacher_best"][where].tolist())
        if batch.advantage_BA[where].any():
            span["advantage"] = _rounded(batch.advantage_BA[where])
        spans.setdefault(location.episode, []).append(span)
    return {episode: sorted(actions, key=lambda span: span["step"]) for episode, actions in spans.items()}


def _rounded(values: np.ndarray) -> list[float]:
    """For records: four decimals of a nat are plenty."""
    return [round(float(value), 4) for value in values]


def is_privileged(algorithm: Algorithm) -> bool:
    """Whether the ground truth has a say in what is trained on."""
    hindsight = algorithm.config.hindsight
    return algorithm.uses_analyser and privileged(hindsight.select, hindsight.analyser)


def episode_records(
    rollouts: Rollouts,
    hindsight: Hindsight,
    spans: Mapping[int, Sequence[Mapping[str, Any]]],
    algorithm: Algorithm,
    privacy: Privacy,
) -> Iterator[Mapping[str, Any]]:
    """What `episodes/` keeps of a step: every episode with its text and spans, its targets, the analyser's own words,
    and what the update did to its actions (`trained_spans`), as far as `privacy` lets it. Those that their environment
    ended come last.
    """
    analyses = {id(analysis.episode): analysis for analysis in hindsight.analyses}
    config = algorithm.config.hindsight
    for n, episode in enumerate([*rollouts.episodes, *rollouts.lost]):
        analysis, record = analyses.get(id(episode)), None
        if analysis is not None:
            record = {
                "analyser": config.analyser,
                "privileged": is_privileged(algorithm),
                "select": config.select,
                "feedback_position": config.feedback_position,
                "answer": analysis.answer,
                "problem": analysis.problem,
                "targets": [{"step": target.step, "feedback": target.feedback} for target in analysis.targets],
            }
            if analysis.verdicts:
                record["verdicts"] = list(analysis.verdicts)
        yield privacy.record(episode.to_json() | {"hindsight": record, "trained": list(spans.get(n, ()))})


def result_tables(
    session: Session, spent: Mapping[str, float], before: Mapping[str, float], after: Mapping[str, float]
) -> tuple[str, str]:
    """The last table for a terminal and in Markdown: held-out success before and after, and what it took. Where the
    tasks have categories, each has its own lines, and there are 95 % intervals over tasks.

    spent: `seconds`, `tokens` (sampled in training), `episodes` (begun), `lost_episodes` (by environments' failures),
    `targets`, `checked_targets` and `true_targets` (see `runs.counters.Counters`),
    `empty_updates` (nothing to train on) and `skipped_updates` (a number was not finite).
    """
    config, algorithm = session.config, session.algorithm
    split, k, hindsight = config.tasks.test_split, config.eval.rollouts, config.hindsight
    knows = " (PRIVILEGED: knows the ground truth)"
    facts = {"algorithm": config.algorithm}
    if algorithm.uses_analyser:
        by_oracle = hindsight.select in selectors.PRIVILEGED_SELECTORS
        facts["targets"] = algorithm.describe_targets() + (knows if by_oracle else "")
        facts["analyser"] = hindsight.analyser + (knows if hindsight.analyser in PRIVILEGED_ANALYSERS else "")
    facts |= {
        "tasks": f"{after.get(f'{split}/tasks', 0)} x {k} rollouts, seed {config.seed}",
        "wall time": progress.format_seconds(spent["seconds"]),
        "tokens": f"{spent['tokens']:,} sampled in training",
    }
    if targets := spent.get("targets"):
        facts["hindsight"] = f"{targets:,} steps named"
        if checked := spent.get("checked_targets"):
            share = spent["true_targets"] / checked
            facts["hindsight"] += f"; {100 * share:.0f} % of the {checked:,} that can be checked were faults"
    if lost := spent.get("lost_episodes"):
        facts["episodes"] = f"{lost:,} of {spent['episodes']:,} in training lost to environments' failures"
    if skipped := spent.get("skipped_updates"):
        facts["skipped updates"] = f"{skipped} of {config.optim.steps} met a number that is not finite"
    if empty := spent.get("empty_updates"):
        steps = config.optim.steps
        nothing = ": nothing was learnt" if empty == steps else ""
        facts["updates"] = f"{empty} of {steps} had nothing to train on{nothing}"
    for when, metrics in {"before": before, "after": after}.items():
        if text := not_played(metrics, split):
            facts[f"not played {when}"] = text
    if session.benchmark:
        facts["benchmark"] = session.benchmark
    results = success_results(before, after, split, k)
    return progress.plain_table(results, facts), progress.markdown_table(results, facts)


def not_played(metrics: Mapping[str, float], split: str) -> str:
    """What environments' failures took from an evaluation, in words; "" where it took nothing."""
    head = f"{split}/lost/"
    lost = {key.removeprefix(head): value for key, value in metrics.items() if key.startswith(head)}
    greedy = sum(value for key, value in metrics.items() if key.startswith(f"{split}/greedy_lost/"))
    if not lost and not greedy:
        return ""
    tasks = metrics.get(f"{split}/tasks", 0)
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in lost.items()) or "no sampled episode"
    greedy_too = f", and {greedy:,} greedy ones" if greedy else ""
    return f"{reasons}{greedy_too}; rates are over {metrics.get(f'{split}/tasks_played', tasks):,} of {tasks:,} tasks"


def success_results(
    before: Mapping[str, float], after: Mapping[str, float], split: str, k: int, *, intervals: bool = False
) -> list[progress.Result]:
    """The lines of the last table: Avg@k, Best@k and greedy success on a split as a whole, then in each category that
    `after` has; where tasks have scenarios, Avg@k is the task goal completion and the scenario goal completion follows.
    Where environments' failures took episodes, before and after are not of the same ones: no change then.

    intervals: also where the split is one whole.
    """
    comparable = not not_played(before, split) and not not_played(after, split)
    tail = f"/avg@{k}"
    parts = [key.removesuffix(tail) for key in after if key.startswith(f"{split}/") and key.endswith(tail)]
    parts = [split, *(part for part in parts if part != split)]

    plain = not intervals and len(parts) == 1 and f"{split}/sgc@{k}" not in after

    def bounds(metrics: Mapping[str, float], name: str) -> tuple[float, float] | None:
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        return None if plain or low is None or high is None else (low, high)

    labels, results = {f"avg@{k}": f"Avg@{k}", f"best@{k}": f"Best@{k}", "greedy": "greedy"}, []
    if f"{split}/sgc@{k}" in after:  # of AppWorld
        labels = {f"avg@{k}": f"TGC (Avg@{k})", f"sgc@{k}": "SGC", f"best@{k}": f"Best@{k}", "greedy": "greedy"}
    for part in parts:
        for key, label in labels.items():
            name = f"{part}/{key.partition('@')[0]}"
            values = before.get(f"{part}/{key}"), after.get(f"{part}/{key}")
            line = f"{part.replace('/', ' ')} {label}"
            results.append(progress.Result(line, *values, bounds(before, name), bounds(after, name), comparable))
    return results
