"""Does targeted hindsight teach Desk, and is it the targets that do it? Trains every arm from the same policy on the same tasks.

  python benchmarks/desk_arms.py --seeds=0,1,2 --jobs=2 --workdir=runs/desk_arms --out=benchmarks/results/desk_arms

Every arm is `configs/desk.py` plus overrides, in a process of its own. Held-out success is measured with the same sampling keys before
and after, on the same tasks for every arm. Differences are paired by task; 95 % intervals come from a bootstrap over tasks of
the mean over seeds and rollouts, and each seed's own figure stands beside it. A finished workdir is read, not run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from hintsd_jax.evaluate import interval
from hintsd_jax.runs.metrics import read_metrics

ARMS = {
    "hint_sd": ("HINT-SD, policy's own hindsight, up to 3 targets", []),
    "single": ("the same, 1 target", ["hindsight.max_targets=1"]),
    "random": ("random step, the same analyser's feedback, 1 target", ["hindsight.max_targets=1", "hindsight.select=random"]),
    "environment": ("PRIVILEGED: the environment's report, up to 3 targets", ["hindsight.analyser=environment"]),
    "sharpen": ("its own unselected samples (pure sharpening)", ["method=sharpen"]),
    "lr0": ("learning rate 0, 5 updates", ["optim.lr=0.0", "optim.steps=5"]),
}
CONTRASTS = (("single", "random"), ("hint_sd", "sharpen"), ("environment", "hint_sd"))


def run(config: str, workdir: Path, arm: str, seed: int, threads: int, extra: list[str]) -> dict:
    """One arm with one seed: held-out results before and after, and the metrics of its steps."""
    folder = workdir / f"{arm}-{seed}"
    result = folder / "held_out.json"
    if not result.exists():
        overrides = [f"--config.{override}" for override in (*ARMS[arm][1], f"seed={seed}", *extra)]
        command = [sys.executable, "-m", "hintsd_jax.main", f"--config={config}", f"--workdir={folder}", "--mode=train", *overrides]
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"} if threads == 1 else None
        began = time.monotonic()
        with open(folder / "log.txt", "a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
        print(f"{arm} seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    return json.loads(result.read_text()) | {"rows": read_metrics(folder / "metrics.jsonl")}


def success(results: list[dict], when: str, greedy: bool = False) -> np.ndarray:
    """[seeds, tasks]: mean success of a task's rollouts, or its greedy success."""
    return np.array([result[when]["greedy"] if greedy else np.mean(result[when]["success"], axis=1) for result in results])


def points(values_SN: np.ndarray) -> str:
    low, high = interval(values_SN.mean(axis=0))
    seeds = ", ".join(f"{100 * value:+.1f}" for value in values_SN.mean(axis=1))
    return f"{100 * values_SN.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] ({seeds})"


def table(runs: dict[str, list[dict]]) -> str:
    lines = ["| arm | Avg@4 before | Avg@4 after | change [95 %] (seeds) | greedy before | greedy after | greedy change | precision | recall |"]
    lines += ["|---|--:|--:|---|--:|--:|---|--:|--:|"]
    for arm, results in runs.items():
        before, after = success(results, "before"), success(results, "after")
        greedy_before, greedy_after = success(results, "before", greedy=True), success(results, "after", greedy=True)
        rates = [
            np.mean([row[key] for result in results for row in result["rows"] if row.get(key) is not None] or [np.nan])
            for key in ("hindsight/precision", "hindsight/recall")
        ]
        cells = [ARMS[arm][0], f"{100 * before.mean():.1f}", f"{100 * after.mean():.1f}", points(after - before)]
        cells += [f"{100 * greedy_before.mean():.1f}", f"{100 * greedy_after.mean():.1f}", points(greedy_after - greedy_before)]
        cells += ["" if np.isnan(rate) else f"{rate:.2f}" for rate in rates]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for better, worse in CONTRASTS:
        if better in runs and worse in runs:
            seeds = min(len(runs[better]), len(runs[worse]))
            difference = success(runs[better][:seeds], "after") - success(runs[worse][:seeds], "after")
            lines.append(f"- Avg@4 after, `{better}` minus `{worse}`: {points(difference)} points")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/desk.py")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--once", default="", help="arms to run with the first seed only")
    parser.add_argument("--read", action="store_true", help="run nothing: only read the workdirs that are finished")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time; with more than 1, one thread each")
    parser.add_argument("--workdir", type=Path, default=Path("runs/desk_arms"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/desk_arms"))
    parser.add_argument("overrides", nargs="*", help="further overrides for every arm, such as optim.steps=40")
    arguments = parser.parse_args()
    arms, seeds = arguments.arms.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    once = arguments.once.split(",")
    threads = 1 if arguments.jobs > 1 else 0
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {
            (arm, seed): pool.submit(run, arguments.config, arguments.workdir, arm, seed, threads, arguments.overrides)
            for seed in seeds
            for arm in arms
            if (seed in seeds[:1] or arm not in once)
            and (not arguments.read or (arguments.workdir / f"{arm}-{seed}" / "held_out.json").exists())
        }
        runs = {arm: [futures[arm, seed].result() for seed in seeds if (arm, seed) in futures] for arm in arms}
    first = runs[arms[0]][0]
    versions = json.loads((arguments.workdir / f"{arms[0]}-{seeds[0]}" / "config.json").read_text())["versions"][-1]
    tasks = len(first["before"]["success"])
    head = f"# Desk: arms\n\n{time.strftime('%Y-%m-%d')}. `{arguments.config}` {' '.join(arguments.overrides)}, seeds {arguments.seeds}, {tasks} test tasks"
    text = f"{head} x {len(first['before']['success'][0])} rollouts; success in %.\n\n{table(runs)}\nVersions: {json.dumps(versions)}\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(text)
    kept = {arm: [{key: result[key] for key in ("before", "after")} for result in results] for arm, results in runs.items()}
    arguments.out.with_suffix(".json").write_text(json.dumps(kept) + "\n")
    print(text)


if __name__ == "__main__":
    main()
