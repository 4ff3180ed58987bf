"""What real models learn on TextWorld: the tables of docs/textworld.md, from the folders of the runs.

  python -m benchmarks.textworld_runs runs/textworld/untouched runs/textworld/hint_sd-0 ... --episodes=RUN:STEP

curves:    success of the rollouts of each step.
held-out:  before and after on the test split, and the change, paired over tasks. What a run did not evaluate itself
           (`eval.test_tasks`) is what `hintsd-jax evaluate` left in its folder; before may be that of another run that
           began with the same weights on the same quests.
cost:      seconds of a step, and what hindsight found, as medians and sums over steps.
episodes:  failed episodes of one step with the named steps, the words, and the divergence of each token.

Writes benchmarks/results/textworld_runs.json (all that the tables need; folders that are not named stay in it) and the
page's tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import REPO, RESULTS, fill, markdown_table
from benchmarks.rates import percent, ratio
from hintsd_jax.runs.metrics import read_metrics
from hintsd_jax.statistics import DIFFERENCE

PAGE, KEPT = REPO / "docs" / "textworld.md", RESULTS / "textworld_runs.json"
LEAST_TASKS = 10  # an evaluation of fewer is not one
SHOWN = 3  # episodes
CURVES = ["rollout/success", "hindsight/targets", "hindsight/questions", "hindsight/readable_answers"]
CURVES += ["hindsight/precision", "train/loss", "time/step", "time/rollout", "time/analysis", "time/update"]


def described(config: Mapping[str, Any]) -> str:
    """What tells one run from another, of its stored config."""
    parts, hindsight = [config["algorithm"]], config["hindsight"]
    if "hint_sd" in config["algorithm"]:
        words = {"environment": "PRIVILEGED: the environment's words"}
        parts.append(words.get(hindsight["analyser"], "its own hindsight"))
        if hindsight["select"] != "hindsight":
            parts.append(f"{hindsight['select']} steps")
    if fork := (config.get("fork") or {}).get("path"):
        parts.append(f"from {Path(fork).name}")
    parts.append(Path(config["policy"]["path"]).name)
    if (length := config["env"]["options"].get("quest_length", 1)) != 1:
        parts.append(f"quests of {length}")
    return ", ".join(parts)


def start(folder: Path, config: Mapping[str, Any]) -> str:
    """What a run begins with, and where it plays: runs that have this in common have the same success before."""
    weights = Path(config["policy"]["path"]).name
    if (file := folder / "fork.json").exists():
        forked = json.loads(file.read_text())
        weights = f"step {forked['step']} of {Path(forked['path']).name}"
    return f"{weights}, {json.dumps(config['env']['options'], sort_keys=True)}"


def read(folder: Path) -> dict[str, Any]:
    """What the tables say of a run. before, after: success of the test's tasks and rollouts, where it was measured."""
    config = json.loads((folder / "config.json").read_text())["config"]
    metrics = folder / "metrics.jsonl"
    rows = [row for row in (read_metrics(metrics) if metrics.exists() else []) if row["step"]]
    found: dict[str, Any] = {
        "what": described(config),
        "start": start(folder, config),
        "seed": config["seed"],
        "lr": config["optim"]["lr"],
        "rollouts": [config["tasks"]["tasks_per_step"], config["tasks"]["rollouts"]],
        "steps": [{name: row.get(name) for name in CURVES} for row in rows],
    }
    if (file := folder / "held_out.json").exists():
        played = json.loads(file.read_text())
        found |= {when: played[when]["success"] for when in ("before", "after") if when in played}
    if (file := folder / "evaluation.json").exists():
        evaluation = json.loads(file.read_text())
        found["after" if evaluation["step"] else "before"] = evaluation["success"]
    return {key: value for key, value in found.items() if key not in ("before", "after") or len(value) >= LEAST_TASKS}


def curves(runs: Mapping[str, Mapping]) -> str:
    success_of = {name: [row["rollout/success"] for row in run["steps"]] for name, run in runs.items()}
    played = {name: success for name, success in success_of.items() if any(value is not None for value in success)}
    longest, lines = max(map(len, played.values()), default=0), []
    for name, success in played.items():
        cells = ["-" if value is None else f"{100 * value:.0f}" for value in success]
        lines.append([name, runs[name]["what"], *cells, *[""] * (longest - len(cells))])
    return markdown_table(["run", "what", *map(str, range(1, longest + 1))], lines, left=(0, 1))


def held_out(runs: Mapping[str, Mapping]) -> str:
    starts = {run["start"]: run["before"] for run in runs.values() if run.get("before")}
    lines = []
    for name, run in runs.items():
        before = run.get("before") or starts.get(run["start"])
        after, change = run.get("after"), None
        if before and after:
            change = ratio(np.mean(after, axis=1) - np.mean(before, axis=1), span=DIFFERENCE)
        rates = [ratio(np.mean(success, axis=1)) if success else None for success in (before, after)]
        if after:
            steps = len(run["steps"])
            cells = [percent(rates[0]), percent(rates[1]), percent(change, sign=True)]
            lines.append([name, run["what"], run["seed"], f"{len(after)} x {len(after[0])}", steps, *cells])
    head = ["run", "what", "seed", "quests x rollouts", "steps", "before", "after", "change"]
    return markdown_table(head, lines, left=(0, 1))


def costs(runs: Mapping[str, Mapping]) -> str:
    lines = []
    for name, run in runs.items():
        column = lambda key, run=run: [row[key] for row in run["steps"] if row.get(key) is not None]
        seconds = [column(f"time/{phase}") for phase in ("step", "rollout", "analysis", "update")]
        if not seconds[0]:
            continue
        asked, readable, targets = (
            sum(column(f"hindsight/{key}")) for key in ("questions", "readable_answers", "targets")
        )
        precision = column("hindsight/precision")
        cells = [f"{statistics.median(values):.0f}" if values else "-" for values in seconds]
        found = [f"{readable} of {asked}", targets, f"{100 * statistics.mean(precision):.0f}" if precision else "-"]
        lines.append([name, *cells, *(found if asked else ["-"] * 3)])
    head = ["run", "a step, s", "rollout", "analysis", "update", "reviews read", "targets", "of them faults, %"]
    return markdown_table(head, lines)


def episodes(folder: Path, step: int) -> str:
    """The first failed episodes of a step that were trained on, action by action."""
    lines = (folder / "episodes" / f"step_{step:06d}.jsonl").read_text().splitlines()
    failed = [episode for episode in map(json.loads, lines) if not episode["success"] and episode["trained"]]
    parts, seen = [], set()
    for episode in failed:
        if len(parts) < SHOWN and episode["task_id"] not in seen:
            seen.add(episode["task_id"])
            parts.append("\n".join(_episode(episode, len(parts) + 1)))
    return "\n\n".join([f"Step {step} of `{folder.name}`.", *parts])


def _episode(episode: Mapping[str, Any], number: int) -> Iterator[str]:
    goal = episode["prompt_messages"][-1]["content"].partition("\n")[0]
    words = {target["step"]: target["feedback"] for target in episode["hindsight"]["targets"]}
    truth = {fault["step"]: fault["feedback"] for fault in (episode["report"] or {}).get("faults") or ()}
    trained = {span["step"]: span for span in episode["trained"]}
    yield f'**Episode {number}.** "{goal}"\n'
    for n, step in enumerate(episode["steps"], 1):
        yield f"{n}. `{_inline(step['text'])}`"
        if n in words:
            yield f'   - feedback: "{_inline(words[n])}" (the report: "{_inline(truth.get(n, "not a fault"))}")'
        if n in trained:
            span = trained[n]
            tokens = zip(span["pieces"], span["divergence"], span["teacher_best"], strict=True)
            said = [f"`{_inline(piece)}` {nats:.2f}" + _wanted(piece, best) for piece, nats, best in tokens]
            yield f"   - divergence, nats: {', '.join(said)}"


def _wanted(piece: str, best: str) -> str:
    return "" if piece == best else f" (the teacher: `{_inline(best)}`)"


def _inline(text: str) -> str:
    return text.strip("\n").replace("\n", " / ").replace("`", "'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="workdirs")
    parser.add_argument("--episodes", help="RUN:STEP, whose episodes the page shows")
    arguments = parser.parse_args()
    runs: dict[str, dict] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    runs |= {folder.name: read(folder) for folder in arguments.runs}
    KEPT.write_text(json.dumps(runs) + "\n")
    for mark, text in (("curves", curves(runs)), ("held-out", held_out(runs)), ("costs", costs(runs))):
        fill(PAGE, mark, text)
        print(text, end="\n\n")
    if arguments.episodes:
        folder, _, step = arguments.episodes.rpartition(":")
        fill(PAGE, "episodes", episodes(Path(folder), int(step)))


if __name__ == "__main__":
    main()
