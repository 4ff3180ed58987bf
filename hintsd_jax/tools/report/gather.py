# SPDX-License-Identifier: Apache-2.0

"""Runs in, the content of a page out: a small overview that is read at once, and chunks of episodes that are read when
one is opened.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hintsd_jax.errors import UserError, reason
from hintsd_jax.jsonl import read_jsonl
from hintsd_jax.storage import AnyPath
from hintsd_jax.tools.report import records, results
from hintsd_jax.tools.report.reading import Run, count_lines

CHUNK = 32  # episodes that are unpacked together
COLUMNS = ("run", "step", "task", "rollout", "success", "steps", "ended", "targets", "trained")  # of the list


@dataclasses.dataclass
class Content:
    """overview: plain JSON values. chunks: whole entries of the episodes, in the order of the list, `CHUNK` each,
    packed.
    """

    overview: dict[str, Any]
    chunks: list[str]


def gather(runs: Sequence[Run], most: int) -> Content:
    """Everything a page shows of some runs, with at most `most` episodes to open.

    Raises:
      UserError: a file of episodes holds something else.
    """
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    names: dict[str, dict[str, int]] = {"task": {}, "ended": {}}
    chunks: list[str] = []
    entries: list[dict[str, Any]] = []
    overviews = []
    for n, run in enumerate(runs):
        counts, kept, total = records.TargetCounts(), 0, 0
        chosen = choose({step: count_lines(file) for step, file in run.episodes.items()}, most // len(runs))
        for step, file in run.episodes.items():
            episodes = [line.value for line in read_jsonl(file, "an episode")]
            total += len(episodes)
            with written_by_a_run(file):
                counts.add(step, episodes)
                for record in episodes[: chosen[step]]:
                    line: dict[str, Any] = records.row(record) | {"run": n, "step": step}
                    for name, numbers in names.items():
                        line[name] = numbers.setdefault(line[name], len(numbers))
                    for name, column in columns.items():
                        column.append(line[name])
                    entries.append(as_json(records.entry(record)))
                    kept += 1
                    if len(entries) == CHUNK:  # packed at once: whole runs need not fit in memory
                        chunks.append(pack(entries))
                        entries = []
        overviews.append(overview(run) | {"target_counts": counts.to_json(), "kept": kept, "episodes": total})
    if entries:
        chunks.append(pack(entries))
    tables = {name: list(numbers) for name, numbers in names.items()}
    return Content({"runs": overviews, "episodes": columns, "names": tables, "chunk": CHUNK}, chunks)


@contextlib.contextmanager
def written_by_a_run(file: AnyPath) -> Iterator[None]:
    """What comes out of a file with something else in it becomes a UserError with its path."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{file} holds what no run has written ({what}): mend or remove the file") from error


def as_json(value: Any) -> Any:
    """The value itself. Raises ValueError or TypeError where JSON has no word for a part of it."""
    json.dumps(value, allow_nan=False)
    return value


def pack(value: Any) -> str:
    """JSON, gzip, base64. Level 9 takes ten times as long as 6."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("ascii"), compresslevel=6, mtime=0)).decode("ascii")


def choose(sizes: Mapping[int, int], most: int) -> dict[int, int]:
    """How many episodes of each training step to keep, at most `most` in all: whole steps, evenly spaced, the first and
    the last among them.

    Where not even one step fits whole, the last one's first episodes.
    """
    steps, keep = list(sizes), dict.fromkeys(sizes, 0)
    for count in range(len(steps), 0, -1):
        picked = {steps[round(n * (len(steps) - 1) / (count - 1))] for n in range(count)} if count > 1 else {steps[-1]}
        if sum(sizes[step] for step in picked) <= most:
            return keep | {step: sizes[step] for step in picked}
    return keep | ({steps[-1]: most} if steps else {})


def overview(run: Run) -> dict[str, Any]:
    """A run without its episodes: facts, metrics by column, results."""
    split, folder = str(run.config.get("tasks.test_split", "test")), run.path
    with written_by_a_run(folder / "config.json"):
        config = {key: value if records.plain(value) else str(value) for key, value in run.config.items()}
        facts = as_json({"config": config, "versions": run.versions, "planned": records.number(run.planned)})
    with written_by_a_run(folder / "metrics.jsonl"):
        metrics = as_json(columns(run.rows))
    with written_by_a_run(folder / "held_out.json"):
        held_out = as_json(results.lines(run.held_out, split))
    with written_by_a_run(folder / "evaluation.json"):
        evaluation = run.evaluation and as_json(
            {
                "step": run.evaluation.get("step"),
                "results": results.lines({"after": run.evaluation}, split),
            }
        )
    return facts | {
        "name": run.name,
        "steps": run.steps,
        # what knows the ground truth is labelled wherever it shows
        "privileged": run.config.get("hindsight.select") == "oracle"
        or any(row.get("hindsight/privileged") for row in run.rows),
        "metrics": metrics,
        "results": held_out,
        "evaluation": evaluation,
    }


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Metrics by name, None where a row has none, with two more x axes: `wall` (seconds of training steps so far,
    evaluations left out) and `generated` (tokens sampled so far, in rollouts and by the analyser)."""
    names = sorted({name for row in rows for name in row})
    metrics = {name: [records.number(row.get(name)) for row in rows] for name in names}
    wall = generated = 0.0
    metrics["wall"], metrics["generated"] = [], []
    if "hindsight/mean_target_step" in metrics:  # 0 where there was no target
        pairs = zip(metrics["hindsight/mean_target_step"], rows, strict=True)
        metrics["hindsight/mean_target_step"] = [mean if row.get("hindsight/targets") else None for mean, row in pairs]
    for row in rows:
        wall += row.get("time/step") or 0.0
        generated += (row.get("rollout/tokens") or 0) + (row.get("hindsight/tokens") or 0)
        metrics["wall"].append(round(wall, 3))
        metrics["generated"].append(int(generated))
    return metrics
