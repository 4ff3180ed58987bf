"""BFCL without a model: known answers through the whole loop, faults at known steps, and what the environment costs.

  python -m benchmarks.bfcl_scripted                          all of it (about 15 minutes), then the tables of
  docs/bfcl.md python -m benchmarks.bfcl_scripted --only=truth,faults      some parts: truth, faults, cost, share

truth:  the ground truth of all 800 tasks as text, through tokenizer, engine interface, parser, environment and scoring.
faults: the ground truth with one fault at a step that is known, for each kind; how often the outcome fails, and how
        well the `environment` analyser names that step. The injected step is the truth here, not what the environment
        says of itself.
cost:   resets, calls and scorings a second on one core, and one report.
share:  seconds inside the environment against seconds of playing, in a run of configs/bfcl_smoke.py. Its policy hardly
        calls a tool: what a call costs is in the part before.

The results of each part are kept in benchmarks/results/bfcl_scripted.json, so that parts may be made anew alone; the
tables are written to benchmarks/results/bfcl_scripted.md and between the markers of docs/bfcl.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.envs.bfcl import Bfcl, script
from hintsd_jax.envs.bfcl.tasks import CATEGORIES, bfcl_tasks
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.hindsight import analysis as hindsight_analysis
from hintsd_jax.hindsight.analyser import EnvironmentAnalyser
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.runs.metrics import read_metrics
from hintsd_jax.sampling import Sampling

REPO = Path(__file__).resolve().parents[1]
RESULTS, TABLES, PAGE = (
    REPO / "benchmarks/results/bfcl_scripted.json",
    REPO / "benchmarks/results/bfcl_scripted.md",
    REPO / "docs/bfcl.md",
)
UNBOUNDED = 1 << 30
ROLLOUT = RolloutConfig(UNBOUNDED, UNBOUNDED, Sampling(1.0, 1.0, 0, UNBOUNDED))
ANALYSER = EnvironmentAnalyser(lambda episode: np.zeros(2, np.uint32), "hindsight", max_targets=3)  # the released limit
BATCH = 16  # tasks; each of their rollouts has an environment in a thread of its own


def all_tasks(data_dir: str, categories: Sequence[str] = CATEGORIES) -> list[Mapping]:
    """The 800 tasks, or those of some categories, by category and index."""
    tasks = [task for split in ("train", "eval", "test") for task in bfcl_tasks(split, data_dir, categories=categories)]
    return sorted(tasks, key=lambda task: (CATEGORIES.index(task["category"]), int(task["id"].rsplit("_", 1)[1])))


Scripts = Mapping[str, Sequence[script.Script]]  # of each task: one a rollout


def play(chat: ChatFormat, tasks: Sequence[Mapping], scripts: Scripts) -> Iterator[tuple[Mapping, list[Episode]]]:
    """(task, the episode of each of its scripts). Raises RuntimeError where an episode could not be played."""
    engine = ScriptedEngine(chat, lambda job: scripts[job.episode.task_id][job.episode.rollout].actions)
    for start in range(0, len(tasks), BATCH):
        batch = tasks[start : start + BATCH]
        rollouts = len(scripts[batch[0]["id"]])
        episodes, dropped, _ = run_episodes(
            engine, None, chat, Bfcl, batch, rollouts, ROLLOUT, seed=0, step=0, call_timeout_s=60.0
        )
        broken = [
            f"{episode.task_id}: {episode.detail}"
            for episode in episodes
            if episode.ended.startswith("env_") or episode.detail
        ]
        if dropped or broken:
            raise RuntimeError(f"episodes that could not be played: {dict(dropped)} {broken[:3]}")
        for n, task in enumerate(batch):
            yield task, episodes[n * rollouts : (n + 1) * rollouts]


def truth(chat: ChatFormat, tasks: Sequence[Mapping]) -> dict:
    """Valid tasks by category in both ways to play the ground truth, and which are not."""
    scripts = {
        task["id"]: [script.ground_truth(task), script.ground_truth(task, one_call_a_step=True)] for task in tasks
    }
    valid, failed = Counter(), []
    for task, episodes in play(chat, tasks, scripts):
        for name, episode in zip(("together", "apart"), episodes, strict=True):
            valid[f"{task['category']} {name}"] += episode.success
            if not episode.success:
                failed.append(
                    [
                        task["id"],
                        name,
                        max(map(len, script.ground_truth_calls(task))),
                        episode.report.summary.splitlines()[0],
                    ]
                )
    return {"tasks": Counter(task["category"] for task in tasks), "valid": valid, "failed": failed}


def faults(chat: ChatFormat, tasks: Sequence[Mapping], seed: int = 0) -> list[dict]:
    """For each kind of fault: outcomes, and the analyser's steps against the injected one."""
    scripts = {}
    for task in tasks:
        right = script.ground_truth(task, one_call_a_step=True)
        # A task without a place for a fault plays the ground truth, uncounted.
        scripts[task["id"]] = [right, *(script.with_fault(task, kind, seed) or right for kind in script.FAULTS)]
    failed: dict[str, list[tuple[Episode, int]]] = defaultdict(list)
    made = Counter()
    for task, (right, *episodes) in play(chat, tasks, scripts):
        for faulty, episode in zip(scripts[task["id"]][1:], episodes, strict=True):
            if faulty.fault and right.success:  # some tasks cannot be solved one call a step: see `truth`
                made[faulty.fault] += 1
                if not episode.success:
                    failed[faulty.fault].append((episode, faulty.step))
    return [{"fault": kind, "made": made[kind], **attribution(failed[kind])} for kind in script.FAULTS]


def attribution(failed: Sequence[tuple[Episode, int]]) -> dict:
    """How the `environment` analyser's targets meet the injected steps. `failed`: episodes, each with its step."""
    found = ANALYSER.review([episode for episode, _ in failed])
    step_of = {id(episode): step for episode, step in failed}
    for analysis in found.analyses:  # from here on the injected step is what is known of the episode
        analysis.episode.report = Report("injected", (Fault(step_of[id(analysis.episode)], "injected"),))
    apart = [
        [target.step - step_of[id(analysis.episode)] for target in analysis.targets] for analysis in found.analyses
    ]
    nearest = [min(distances, key=abs) for distances in apart if distances]
    return {
        "failed": len(failed),
        "targets": sum(len(analysis.targets) for analysis in found.analyses),
        "later": sum(distance > 0 for distance in nearest),
        "earlier": sum(distance < 0 for distance in nearest),
        "dropped": dict(found.dropped),
        **hindsight_analysis.attribution(found.analyses),
    }


def cost(tasks: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """Mean milliseconds by category: a reset, a call, the end of a user turn (its scoring), the report on an
    episode with a call too few; one thread on one core."""
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for task in tasks:
        seconds, environment = found[task["category"]], Bfcl()
        timed(seconds["reset"], environment.reset, task)
        for action in map(parse_action, script.ground_truth(task).actions):
            calls: list[float] = []
            timed(calls, environment.step, action)
            if action.calls:
                seconds["call"] += [calls[0] / len(action.calls)] * len(action.calls)
            else:
                seconds["scoring"] += calls
        environment.reset(task)
        for action in script.with_fault(task, "dropped_call", 0).actions:
            turn = environment.step(parse_action(action))
            if turn.terminated or turn.truncated:  # one call a step, two tasks end at the benchmark's limit
                break
        timed(seconds["report"], environment.report)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, before)
    return {
        category: {name: 1000 * statistics.fmean(values) for name, values in seconds.items()}
        for category, seconds in found.items()
    }


def timed(into: list[float], function, *args):
    began = time.perf_counter()
    try:
        return function(*args)
    finally:
        into.append(time.perf_counter() - began)


class TimedBfcl(Bfcl):
    """Notes the seconds of each call."""

    seconds: list[float] = []
    actions: list[float] = []

    def reset(self, task):
        return timed(self.seconds, super().reset, task)

    def step(self, action):
        return timed(self.actions, super().step, action)

    def report(self):
        return timed(self.seconds, super().report)


def share() -> dict[str, float]:
    """Seconds of the smoke run's steps and evaluations, those inside the environment, and the actions that were taken."""
    from hintsd_jax import train
    from hintsd_jax.config.build import build
    from hintsd_jax.configs import bfcl_smoke

    config = bfcl_smoke.get_config()
    config.env.name = "benchmarks.bfcl_scripted:TimedBfcl"
    noted = importlib.import_module("benchmarks.bfcl_scripted").TimedBfcl  # this file may be running as __main__
    with tempfile.TemporaryDirectory() as workdir:
        train.train(build(config), workdir)
        rows = read_metrics(Path(workdir) / "metrics.jsonl")
    spent = Counter()
    for row in rows:
        spent.update({name: row.get(f"time/{name}", 0.0) for name in ("step", "rollout", "eval")})
    inside = sum(noted.seconds + noted.actions)
    return {
        "playing": spent["rollout"] + spent["eval"],
        "step": spent["step"],
        "environment": inside,
        "actions": len(noted.actions),
    }


def tables(results: Mapping) -> str:
    """What the kept results say, in Markdown."""
    parts = {"truth": truth_table, "faults": faults_table, "cost": cost_table, "share": share_table}
    return "\n\n".join(
        f"{make(results[name]['result'])}\n\n({results[name]['made']})"
        for name, make in parts.items()
        if name in results
    )


def truth_table(found: Mapping) -> str:
    count, valid = found["tasks"], found["valid"]
    ways = {"together": "all calls of a user turn in one step", "apart": "one call a step"}
    lines = [
        "Ground truth played as text, valid tasks:",
        "",
        f"| category | {' | '.join(ways.values())} |",
        "|---|--:|--:|",
    ]
    for category in count:
        lines.append(
            f"| {category} | " + " | ".join(f"{valid[f'{category} {way}']} of {count[category]}" for way in ways) + " |"
        )
    whole = [sum(valid[f"{category} {way}"] for category in count) for way in ways]
    lines += ["| **all** | " + " | ".join(f"**{number} of {sum(count.values())}**" for number in whole) + " |", ""]
    for task_id, way, calls, said in found["failed"]:
        lines.append(f"- not valid with {ways[way]}: `{task_id}`, up to {calls} calls a user turn; {said}")
    return "\n".join(lines).rstrip()


def faults_table(rows: Sequence[Mapping]) -> str:
    lines = [
        "One fault at a known step, one call a step; the steps that the `environment` analyser (PRIVILEGED) names in the failed episodes:",
        "",
        "| fault | what | tasks | outcome fails | targets an episode | precision | recall | nearest target later / earlier |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        failed = row["failed"]
        rates = [f"{row[name]:.1%}" if name in row else "-" for name in ("precision", "recall")]
        lines.append(
            f"| {row['fault']} | {script.FAULTS[row['fault']]} | {row['made']} | {failed} ({failed / max(row['made'], 1):.1%}) |"
            f" {row['targets'] / max(failed, 1):.2f} | {rates[0]} | {rates[1]} | {row['later']} / {row['earlier']} |"
        )
    drops = {row["fault"]: row["dropped"] for row in rows if row["dropped"]}
    return "\n".join(lines) + (f"\n\nDropped, by reason: {json.dumps(drops)}" if drops else "")


def cost_table(found: Mapping) -> str:
    names = ("reset", "call", "scoring", "report")
    lines = ["Milliseconds on one core, and how many a second:", ""]
    lines += ["| category | reset | call | scoring a user turn | report on a failure |", "|---|--:|--:|--:|--:|"]
    for category, values in found.items():
        lines.append(
            f"| {category} | "
            + " | ".join(f"{values[name]:.3f} ({1000 / values[name]:,.0f}/s)" for name in names)
            + " |"
        )
    return "\n".join(lines)


def share_table(found: Mapping) -> str:
    return (
        f"Two updates of `configs/bfcl_smoke.py` and its evaluations: {found['environment']:.3f} s inside the environment"
        f" ({found['actions']} actions came to it) of {found['playing']:.1f} s of playing ({found['environment'] / found['playing']:.2%});"
        f" the two updates took {found['step']:.1f} s."
    )


def fill(page: Path, text: str) -> None:
    """Puts the tables between the page's markers."""
    begin, end = "<!-- scripted: made by benchmarks/bfcl_scripted.py -->\n", "\n<!-- scripted: end -->"
    head, rest = page.read_text().split(begin)
    page.write_text(head + begin + text + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="assets/desk-policy", help="whose tokenizer and chat template are used")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--categories", default=",".join(CATEGORIES))
    parser.add_argument("--only", default="truth,faults,cost,share")
    arguments = parser.parse_args()
    tasks = all_tasks(arguments.data_dir, arguments.categories.split(","))
    chat = ChatFormat(load_tokenizer(arguments.policy), history="keep")
    parts = {
        "truth": lambda: truth(chat, tasks),
        "faults": lambda: faults(chat, tasks),
        "cost": lambda: cost(tasks),
        "share": share,
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in filter(None, arguments.only.split(",")):
        began = time.monotonic()
        result = parts[name]()
        label = f"{time.strftime('%Y-%m-%d')}, {Bfcl.version()}, {len(tasks)} tasks, {time.monotonic() - began:.0f} s"
        results[name] = {"made": label, "result": result}
        print(json.dumps(results[name]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = tables(results)
    TABLES.write_text(f"# BFCL by scripts\n\n{text}\n")
    fill(PAGE, text)


if __name__ == "__main__":
    main()
