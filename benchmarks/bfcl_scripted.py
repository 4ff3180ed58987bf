"""BFCL without a model: known answers through the whole loop, faults at known steps, and what the environment costs.

  python -m benchmarks.bfcl_scripted                        all (about 15 minutes), then the tables of docs/bfcl.md
  python -m benchmarks.bfcl_scripted --only=truth,faults    some parts: truth, faults, cost, share

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
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.injected_faults import inject, play_scripts, scripts_of
from benchmarks.pages import REPO, fill, markdown_table
from benchmarks.pages import RESULTS as FOLDER
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.envs.bfcl import Bfcl, script
from hintsd_jax.envs.bfcl.tasks import CATEGORIES, bfcl_tasks
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.hindsight import analysis as hindsight_analysis
from hintsd_jax.hindsight.analyser import EnvironmentAnalyser
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.runs.metrics import read_metrics

RESULTS, TABLES, PAGE = FOLDER / "bfcl_scripted.json", FOLDER / "bfcl_scripted.md", REPO / "docs/bfcl.md"
ANALYSER = EnvironmentAnalyser(lambda episode: np.zeros(2, np.uint32), "hindsight", max_targets=3)  # the released limit


def all_tasks(data_dir: str, categories: Sequence[str] = CATEGORIES) -> list[Mapping]:
    """The 800 tasks, or those of some categories, by category and index."""
    tasks = [task for split in ("train", "eval", "test") for task in bfcl_tasks(split, data_dir, categories=categories)]
    return sorted(tasks, key=lambda task: (CATEGORIES.index(task["category"]), int(task["id"].rsplit("_", 1)[1])))


def truth(chat: ChatFormat, tasks: Sequence[Mapping]) -> dict:
    """Valid tasks by category in both ways to play the ground truth, and which are not."""
    actions = {
        task["id"]: [script.ground_truth(task, one_call_a_step=apart).actions for apart in (False, True)]
        for task in tasks
    }
    valid, failed = Counter(), []
    for task, episodes in play_scripts(chat, Bfcl, tasks, actions):
        for name, episode in zip(("together", "apart"), episodes, strict=True):
            valid[f"{task['category']} {name}"] += episode.success
            if not episode.success:
                calls, report = max(map(len, script.ground_truth_calls(task))), episode.report
                failed.append([task["id"], name, calls, report.summary.splitlines()[0] if report else ""])
    return {"tasks": Counter(task["category"] for task in tasks), "valid": valid, "failed": failed}


def faults(chat: ChatFormat, tasks: Sequence[Mapping], seed: int = 0) -> list[dict]:
    """For each kind of fault: outcomes, and the analyser's steps against the injected one."""
    cases, counts = inject(chat, Bfcl, tasks, scripts_of("bfcl", chat.style), seed)
    failed = {kind: [(case.episode, case.step) for case in cases if case.fault == kind] for kind in script.FAULTS}
    return [{"fault": kind, "made": counts[kind]["injected"], **attribution(failed[kind])} for kind in script.FAULTS]


def attribution(failed: Sequence[tuple[Episode, int]]) -> dict:
    """How the `environment` analyser's targets meet the injected steps. `failed`: episodes, each with its step."""
    hindsight = ANALYSER.review([episode for episode, _ in failed])
    step_of = {id(episode): step for episode, step in failed}
    for analysis in hindsight.analyses:  # from here on the injected step is what is known of the episode
        analysis.episode.report = Report("injected", (Fault(step_of[id(analysis.episode)], "injected"),))
    distances = [
        [target.step - step_of[id(analysis.episode)] for target in analysis.targets] for analysis in hindsight.analyses
    ]
    nearest = [min(of_episode, key=abs) for of_episode in distances if of_episode]
    return {
        "failed": len(failed),
        "targets": sum(len(analysis.targets) for analysis in hindsight.analyses),
        "later": sum(distance > 0 for distance in nearest),
        "earlier": sum(distance < 0 for distance in nearest),
        "dropped": dict(hindsight.dropped),
        **hindsight_analysis.attribution(hindsight.analyses),
    }


def cost(tasks: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """Mean milliseconds by category: a reset, a call, the end of a user turn (its scoring), the report on an
    episode with a call too few; one thread on one core."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    by_category: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for task in tasks:
        seconds, environment = by_category[task["category"]], Bfcl()
        timed(seconds["reset"], environment.reset, task)
        for action in map(parse_action, script.ground_truth(task).actions):
            calls: list[float] = []
            timed(calls, environment.step, action)
            if action.calls:
                seconds["call"] += [calls[0] / len(action.calls)] * len(action.calls)
            else:
                seconds["scoring"] += calls
        environment.reset(task)
        faulty = script.with_fault(task, "dropped_call", 0)
        for action in faulty.actions if faulty else ():
            result = environment.step(parse_action(action))
            if result.terminated or result.truncated:  # one call a step, two tasks end at the benchmark's limit
                break
        timed(seconds["report"], environment.report)
    if cores:
        os.sched_setaffinity(0, cores)
    return {
        category: {name: 1000 * statistics.fmean(values) for name, values in seconds.items()}
        for category, seconds in by_category.items()
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
    """Seconds of the smoke run's steps and evaluations, those inside the environment, and the actions taken."""
    from hintsd_jax import train
    from hintsd_jax.config import build
    from hintsd_jax.configs import bfcl_smoke

    config = build.build(bfcl_smoke.get_config()).replaced({"env.name": "benchmarks.bfcl_scripted:TimedBfcl"})
    timed_class = importlib.import_module("benchmarks.bfcl_scripted").TimedBfcl  # this file may run as __main__
    with tempfile.TemporaryDirectory() as workdir:
        train.train(config, workdir)
        rows = read_metrics(Path(workdir) / "metrics.jsonl")
    spent = Counter()
    for row in rows:
        spent.update({name: row.get(f"time/{name}", 0.0) for name in ("step", "rollout", "eval")})
    inside = sum(timed_class.seconds + timed_class.actions)
    return {
        "playing": spent["rollout"] + spent["eval"],
        "step": spent["step"],
        "environment": inside,
        "actions": len(timed_class.actions),
    }


def tables(results: Mapping) -> str:
    """What the kept results say, in Markdown."""
    parts = {"truth": truth_table, "faults": faults_table, "cost": cost_table, "share": share_table}
    return "\n\n".join(
        f"{make(results[name]['result'])}\n\n({results[name]['made']})"
        for name, make in parts.items()
        if name in results
    )


def truth_table(result: Mapping) -> str:
    count, valid = result["tasks"], result["valid"]
    ways = {"together": "all calls of a user turn in one step", "apart": "one call a step"}
    lines = [[category, *(f"{valid[f'{category} {way}']} of {count[category]}" for way in ways)] for category in count]
    whole = [sum(valid[f"{category} {way}"] for category in count) for way in ways]
    lines.append(["**all**", *(f"**{number} of {sum(count.values())}**" for number in whole)])
    table = markdown_table(["category", *ways.values()], lines)
    notes = [
        f"- not valid with {ways[way]}: `{task_id}`, up to {calls} calls a user turn; {said}"
        for task_id, way, calls, said in result["failed"]
    ]
    return "\n".join(["Ground truth played as text, valid tasks:", "", table, "", *notes]).rstrip()


def faults_table(rows: Sequence[Mapping]) -> str:
    lines = []
    for row in rows:
        failed, injected = row["failed"], row["made"]
        rates = [f"{row[name]:.1%}" if name in row else "-" for name in ("precision", "recall")]
        outcome = f"{failed} ({failed / max(injected, 1):.1%})"
        nearest = f"{row['later']} / {row['earlier']}"
        targets = f"{row['targets'] / max(failed, 1):.2f}"
        lines.append([row["fault"], script.FAULTS[row["fault"]], injected, outcome, targets, *rates, nearest])
    head = ["fault", "what", "tasks", "outcome fails", "targets an episode", "precision", "recall"]
    head.append("nearest target later / earlier")
    drops = {row["fault"]: row["dropped"] for row in rows if row["dropped"]}
    return (
        "One fault at a known step, one call a step; the steps that the `environment` analyser (PRIVILEGED) names in"
        f" the failed episodes:\n\n{markdown_table(head, lines, left=(0, 1))}"
        + (f"\n\nDropped, by reason: {json.dumps(drops)}" if drops else "")
    )


def cost_table(result: Mapping) -> str:
    names = ("reset", "call", "scoring", "report")
    lines = [
        [category, *(f"{values[name]:.3f} ({1000 / values[name]:,.0f}/s)" for name in names)]
        for category, values in result.items()
    ]
    head = ["category", "reset", "call", "scoring a user turn", "report on a failure"]
    return f"Milliseconds on one core, and how many a second:\n\n{markdown_table(head, lines)}"


def share_table(result: Mapping) -> str:
    inside, playing = result["environment"], result["playing"]
    return (
        f"Two updates of `configs/bfcl_smoke.py` and its evaluations: {inside:.3f} s inside the environment"
        f" ({result['actions']} actions came to it) of {playing:.1f} s of playing ({inside / playing:.2%});"
        f" the two updates took {result['step']:.1f} s."
    )


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
    fill(PAGE, "scripted", text)


if __name__ == "__main__":
    main()
