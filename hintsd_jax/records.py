"""What a step or a run looked like, as numbers, records and a last table. Reads everything, changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from hintsd_jax.hindsight import analyser
from hintsd_jax.hindsight.analyser import Hindsight
from hintsd_jax.methods import method_of
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.runs import progress
from hintsd_jax.sampling import Stats
from hintsd_jax.session import Session
from hintsd_jax.training.batching import Packed


def rollout_metrics(episodes: Sequence[Episode], dropped: Mapping[str, int], stats: Stats) -> dict[str, float]:
    ended = Counter(episode.ended for episode in episodes)
    count = max(len(episodes), 1)
    return {
        "rollout/episodes": len(episodes),
        "rollout/success": sum(episode.success for episode in episodes) / count,
        "rollout/tokens": stats.sampled,
        "rollout/steps": sum(len(episode.steps) for episode in episodes) / count,
        "rollout/action_length": sum(len(episode.logprobs) for episode in episodes)
        / max(sum(len(e.steps) for e in episodes), 1),
        "rollout/prefill_tokens": stats.prefilled,
        "rollout/decode_steps": stats.decode_steps,
        **{f"rollout/ended/{reason}": number for reason, number in sorted(ended.items())},
        **{f"rollout/dropped/{reason}": number for reason, number in sorted(dropped.items())},
    }


def hindsight_metrics(episodes: Sequence[Episode], found: Hindsight, config: ConfigDict) -> dict[str, float]:
    steps = [target.step for analysis in found.analyses for target in analysis.targets]
    rewards = [reward for analysis in found.analyses for reward in analysis.rewards]
    return {
        "hindsight/failed_episodes": sum(not episode.success for episode in episodes),
        "hindsight/questions": found.asked,
        "hindsight/readable_answers": found.parsed,
        "hindsight/targets": len(steps),
        "hindsight/mean_target_step": float(np.mean(steps)) if steps else 0.0,
        "hindsight/tokens": found.tokens,
        "hindsight/privileged": int(_privileged(config)),
        **({"hindsight/verdict": float(np.mean(rewards))} if rewards else {}),
        **analyser.attribution(found.analyses),
        **{f"hindsight/dropped/{reason}": number for reason, number in sorted(found.dropped.items())},
    }


def distill_metrics(distilled: Mapping[str, float], packed: Packed, without: Mapping[str, int]) -> dict[str, float]:
    """What the update says, the tokens that student and teacher went through, and the share of padding among them;
    actions that fit no batch and episodes `without` anything to learn from, by reason."""
    passed = packed.student_tokens + packed.teacher_tokens
    tokens = {
        "student_tokens": packed.student_tokens,
        "teacher_tokens": packed.teacher_tokens,
        "padding": packed.padding / max(passed, 1),
    }
    dropped = {
        f"dropped/{reason}": number for reason, number in sorted((Counter(packed.dropped) + Counter(without)).items())
    }
    return {f"train/{name}": value for name, value in (distilled | tokens | dropped).items()}


def trained_spans(
    chat: ChatFormat, packed: Packed, tokens: Sequence[Mapping[str, np.ndarray]]
) -> dict[int, list[dict]]:
    """What an update did, token by token: for each episode (its number in the step) the actions that were trained on,
    in order.

    tokens: of each batch, arrays [B, A] by name; see `distill.losses.span_losses`.
    """
    found: dict[int, list[dict]] = {}
    for place in packed.places:
        at = (place.row, slice(place.first, place.stop))
        batch = packed.batches[place.batch]
        span = {"step": place.step, "pieces": chat.token_texts(batch.actions_BA[at].tolist())}
        if place.taught:
            told = tokens[place.batch]
            span |= {name: _rounded(told[name][at]) for name in ("divergence", "teacher_gap")}
            span["teacher_best"] = chat.token_texts(told["teacher_best"][at].tolist())
        if batch.advantage_BA[at].any():
            span["advantage"] = _rounded(batch.advantage_BA[at])
        found.setdefault(place.episode, []).append(span)
    return {episode: sorted(spans, key=lambda span: span["step"]) for episode, spans in found.items()}


def _rounded(values: np.ndarray) -> list[float]:
    """For records: four decimals of a nat are plenty."""
    return [round(float(value), 4) for value in values]


def _privileged(config: ConfigDict) -> bool:
    return bool(method_of(config).asks) and analyser.privileged(config.hindsight.select, config.hindsight.analyser)


def shapes_note(session: Session) -> str:
    """One line: devices, the lengths that programs are compiled for, and how many programs that makes."""
    engine, shapes, mesh = session.engine.config, session.shapes, session.mesh
    pairs = ", ".join(f"{M}/{A}" for M, A in zip(shapes.stream_buckets, shapes.action_buckets, strict=True))
    programs = len(engine.prefill_buckets) + 2 + len(shapes.all()) + 1  # copy and decode; apply
    return (
        f"mesh {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}, {session.policy.compute_dtype};"
        f" prefill {engine.prefill_rows} x {', '.join(map(str, engine.prefill_buckets))};"
        f" decode {engine.slots} slots x {engine.context};"
        f" update {shapes.rows} x {', '.join(map(str, shapes.length_buckets))} with branches/actions {pairs}: {programs} programs"
    )


def records(
    episodes: Sequence[Episode], found: Hindsight, trained: Mapping[int, Sequence[Mapping]], config: ConfigDict
) -> Iterator[dict]:
    """What `episodes/` keeps of a step: every episode with its text and spans, its targets, the analyser's own words,
    and what the update did to its actions (`trained_spans`)."""
    analyses = {id(analysis.episode): analysis for analysis in found.analyses}
    for n, episode in enumerate(episodes):
        analysis = analyses.get(id(episode))
        looked = None
        if analysis is not None:
            looked = {
                "analyser": config.hindsight.analyser,
                "privileged": _privileged(config),
                "select": config.hindsight.select,
                "place": config.hindsight.feedback_position,
                "answer": analysis.answer,
                "problem": analysis.problem,
                "targets": [{"step": target.step, "feedback": target.feedback} for target in analysis.targets],
            }
            if analysis.rewards:
                looked["rewards"] = list(analysis.rewards)
        yield episode.to_json() | {"hindsight": looked, "trained": list(trained.get(n, ()))}


def result_tables(
    config: ConfigDict, counters: Mapping, before: Mapping[str, float], after: Mapping[str, float], benchmark: str = ""
) -> tuple[str, str]:
    """The last table for a terminal and in Markdown: held-out success before and after, and what it took. Where the
    tasks have categories, each has its own lines, and there are 95 % intervals over tasks.

    `counters`: `seconds` and `tokens` (sampled in training). `benchmark`: its version.
    """
    split, k = config.tasks.test_split, config.eval.rollouts
    results = success_results(before, after, split, k)
    asks, hindsight = method_of(config).asks, config.hindsight
    targets = {"steps": "every step, judged alone", "orphans": "whole episodes, a sibling's success first"}
    limit = "" if hindsight.select in ("first", "last", "all") else f", at most {hindsight.max_targets} an episode"
    knows = " (PRIVILEGED: knows the ground truth)"
    facts = {
        "method": config.algorithm,
        "targets": targets.get(asks, f"{hindsight.select}{limit}, feedback at the {hindsight.feedback_position}")
        + (knows if hindsight.select in analyser.PRIVILEGED_SELECTS else ""),
        "analyser": hindsight.analyser + (knows if hindsight.analyser in analyser.PRIVILEGED_ANALYSERS else ""),
        "tasks": f"{after.get(f'{split}/tasks', 0)} x {k} rollouts, seed {config.seed}",
        "wall time": progress.format_seconds(counters["seconds"]),
        "tokens": f"{counters['tokens']:,} sampled in training",
    }
    if not asks:
        del facts["targets"], facts["analyser"]
    if benchmark:
        facts["benchmark"] = benchmark
    return progress.plain_table(results, facts), progress.markdown_table(results, facts)


def success_results(
    before: Mapping[str, float], after: Mapping[str, float], split: str, k: int
) -> list[progress.Result]:
    """The lines of the last table: Avg@k, Best@k and greedy success on a split as a whole, then in each category that
    `after` has.
    """
    tail = f"/avg@{k}"
    parts = [key.removesuffix(tail) for key in after if key.startswith(f"{split}/") and key.endswith(tail)]
    parts = [split, *(part for part in parts if part != split)]

    def ends(metrics: Mapping[str, float], name: str) -> tuple[float, float] | None:
        found = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        return None if len(parts) == 1 or None in found else found

    results = []
    for part in parts:
        for key, label in {f"avg@{k}": f"Avg@{k}", f"best@{k}": f"Best@{k}", "greedy": "greedy"}.items():
            name = f"{part}/{key.partition('@')[0]}"
            values = before.get(f"{part}/{key}"), after.get(f"{part}/{key}")
            results.append(
                progress.Result(f"{part.replace('/', ' ')} {label}", *values, ends(before, name), ends(after, name))
            )
    return results
