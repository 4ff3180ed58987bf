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
from hintsd_jax.tools.report import arms, records, results
from hintsd_jax.tools.report.reading import AFTER, BEFORE, TRAINING, EpisodeFile, Run, count_lines

CHUNK = 32  # episodes that are unpacked together
COLUMNS = ("run", "kind", "step", "task", "rollout", "success", "steps", "tokens", "ended")  # of the list
COLUMNS += ("targets", "trained", "review", "missed", "divergence")
NAMES = ("kind", "task", "ended", "review")  # columns of which the list holds numbers, and a table the words
HELD_OUT_SHARE = 8  # of the episodes to keep, at most one in so many is of held-out tasks before, and as many after


@dataclasses.dataclass
class Content:
    """overview: plain JSON values. chunks: whole entries of the episodes, in the order of the list, `CHUNK` each,
    packed.
    """

    overview: dict[str, Any]
    chunks: list[str]


def gather(runs: Sequence[Run], most: int, live: float | None = None) -> Content:
    """Everything a page shows of some runs, with at most `most` episodes to open. live: after so many seconds the page
    loads itself again; None: it does not.

    Raises:
      UserError: a file of episodes holds something else.
    """
    table, overviews = _Episodes(), []
    for n, run in enumerate(runs):
        counts, kept, total = records.TargetCounts(), 0, 0
        for file, most_of_file in zip(run.episodes, shares(run.episodes, most // len(runs)), strict=True):
            episodes = [line.value for line in read_jsonl(file.path, "an episode")]
            total += len(episodes)
            with written_by_a_run(file.path):
                if file.kind == TRAINING:
                    counts.add(file.step, episodes)
                for record in episodes[:most_of_file]:
                    table.add(record, {"run": n, "kind": file.kind, "step": file.step})
                    kept += 1
        overviews.append(overview(run) | {"target_counts": counts.to_json(), "kept": kept, "episodes": total})
    content = {"runs": overviews, "episodes": table.columns, "names": table.words, "chunk": CHUNK, "live": live}
    return Content(content | {"compared": arms.compare(runs)}, table.packed())


class _Episodes:
    """The list of episodes, column by column, and their entries, packed as soon as a chunk is full: whole runs need not
    fit in memory.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list] = {name: [] for name in COLUMNS}
        self._numbers: dict[str, dict[str, int]] = {name: {} for name in NAMES}
        self._chunks: list[str] = []
        self._entries: list[dict[str, Any]] = []

    def add(self, record: Mapping[str, Any], place: Mapping[str, Any]) -> None:
        line = {**records.row(record, training=place["kind"] == TRAINING), **place}
        for name, numbers in self._numbers.items():
            line[name] = numbers.setdefault(line[name], len(numbers))
        for name, column in self.columns.items():
            column.append(line[name])
        self._entries.append(as_json(records.entry(record)))
        if len(self._entries) == CHUNK:
            self._chunks.append(pack(self._entries))
            self._entries = []

    @property
    def words(self) -> dict[str, list[str]]:
        return {name: list(numbers) for name, numbers in self._numbers.items()}

    def packed(self) -> list[str]:
        return [*self._chunks, *([pack(self._entries)] if self._entries else [])]


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


def shares(files: Sequence[EpisodeFile], most: int) -> list[int]:
    """How many episodes of each file to keep, its first ones, at most `most` in all: as many held-out ones before as
    after, so that they stay pairs, and of the rest what `choose` says.
    """
    sizes = [count_lines(file.path) for file in files]
    held_out = {n for n, file in enumerate(files) if file.kind in (BEFORE, AFTER)}
    each = min([most // HELD_OUT_SHARE, *(sizes[n] for n in held_out)]) if held_out else 0
    chosen = choose({n: size for n, size in enumerate(sizes) if n not in held_out}, most - each * len(held_out))
    return [each if n in held_out else chosen[n] for n in range(len(files))]


def choose(sizes: Mapping[int, int], most: int) -> dict[int, int]:
    """How many episodes of each training step to keep, at most `most` in all: whole steps, evenly spaced, the first and
    the last among them. sizes: the episodes of each, by any number that grows with the step.

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
        "finished": run.is_finished,
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
