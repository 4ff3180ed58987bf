"""What a person meets who opens reports in a browser: runs in, a line for each check out.

  cd benchmarks/browser && npm install   # once: headless Chromium, puppeteer-core and axe-core
  python -m benchmarks.report_browser runs/desk runs/a-0,runs/a-1,runs/b-0 --screenshots=/tmp/shots

Makes a report of each argument (a comma: several runs in one), and of runs that are odd: one that is going on,
with a torn last line; one that has just begun; texts that are HTML and script; texts of other scripts, and very long
ones; 5,000 episodes. `benchmarks/browser/check.mjs` opens them all and says what is wrong. What it prints is
benchmarks/results/report_browser.txt.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import REPO
from hintsd_jax.tools.report.command import report

RESULT = REPO / "benchmarks" / "results" / "report_browser.txt"
HOSTILE = '</script><img src=x onerror="window.hit=1"><script>window.hit=1</script>\'"&<!-- {{SCRIPT}} =cmd()'
SCRIPTS = "漢字かな交じり文 العربية עברית ภาษาไทย हिन्दी 🧑🏽‍🚀 e\u0301 \u202eright to left\u202c a\u0000b \u2028 ﷽"
LONG = "Ein sehr langer Text ohne Ende. " * 8_000  # 250,000 characters
UNBROKEN = "x" * 3_000


def write_run(path: Path, rows: Iterable[Mapping], steps: Mapping[str, Sequence[Mapping]], planned: int) -> Path:
    """A workdir as a run leaves it behind; `steps` maps a file's name to its records."""
    (path / "episodes").mkdir(parents=True)
    config = {"seed": 0, "algorithm": "hint_sd", "env": {"name": "desk"}, "optim": {"steps": planned}}
    (path / "config.json").write_text(json.dumps({"config": config, "versions": [{"jax": "0"}]}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, records in steps.items():
        (path / "episodes" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(count: int) -> list[dict[str, Any]]:
    """Of training steps: small times, a series that never changes, and one that is 0."""
    return [
        {
            "step": n,
            "time/step": 0.5,
            "time/rollout": 0.2,
            "time/update": 0.3,
            "train/loss": 0.0,
            "train/grad_norm": 1e-7,
        }
        | {"rollout/success": (n % 5) / 5, "rollout/tokens": 900, "train/entropy": 0.25, "hindsight/targets": n % 4}
        for n in range(1, count + 1)
    ]


def episode(text: str, n: int, length: int = 4) -> dict[str, Any]:
    """A failed episode in which every text is `text`, with a target and its tokens."""
    steps = [
        {"start": 9 * k, "stop": 9 * k + 3, "text": text, "observation": f"{text}\nuser: {text}"} for k in range(length)
    ]
    target = {"step": n % length + 1, "feedback": text}
    span = {"step": target["step"], "pieces": [text[:40], "\n", "x"], "divergence": [0.1, 2.5, 0.0]}
    span |= {"teacher_gap": [-1.0, 0.5, 0.0], "teacher_best": [text[:30], "\n", "y"]}
    return {
        "task_id": text[:200] + f" {n // 4}",
        "rollout": n % 4,
        "success": n % 3 == 0,
        "ended": "terminated" if n % 2 else text[:60],
        "detail": text,
        "prompt_messages": [{"role": "system", "content": text}, {"role": "user", "content": text}],
        "steps": steps,
        "report": {"summary": text, "faults": [{"step": 2, "feedback": text}]},
        "hindsight": None
        if n % 3 == 0 or n % 7 == 1
        else {"analyser": "ema_teacher", "answer": text, "problem": text if n % 5 == 2 else None}
        | {"targets": [] if n % 5 == 2 else [target]},
        "trained": [] if n % 3 == 0 or n % 7 == 1 or n % 5 == 2 else [span],
    }


def odd_runs(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """By name: a run, and how its report is made."""
    few = lambda text, count=8: {f"step_{s:06d}": [episode(text, n) for n in range(count)] for s in (1, 2)}
    held_out = {name: [episode("Take it.", n) for n in range(8)] for name in ("before_000000", "after_000002")}
    held_out["after_000002"] = [each | {"success": True} for each in copy.deepcopy(held_out["after_000002"])]
    many = {f"step_{s:06d}": [episode(f"Turn {s}: take lamp {n}.", n, 12) for n in range(100)] for s in range(1, 51)}
    runs = {
        "going_on": write_run(folder / "going_on", rows(2), few("Open the door.") | held_out, 9),
        "just_begun": write_run(folder / "just_begun", [], {}, 9),
        "no_episodes": write_run(folder / "no_episodes", rows(3), {}, 3),
        "hostile": write_run(folder / HOSTILE.replace("/", "|"), rows(2), few(HOSTILE), 2),
        "other_scripts": write_run(folder / "文字", rows(2), few(SCRIPTS), 2),
        "long_texts": write_run(
            folder / "long_texts", rows(2), few(LONG, 2) | {"step_000003": [episode(UNBROKEN, 2)]}, 2
        ),
        "many": write_run(folder / "many", rows(300), many, 300),
    }
    with open(runs["going_on"] / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "time/st')
    more: dict[str, dict[str, Any]] = {"going_on": {"live": 1.5}, "many": {"episodes": 5_000}}
    return {name: (path, more.get(name, {})) for name, path in runs.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and keeps the result; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs; those that a comma joins in one report")
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures of every page")
    flags = parser.parse_args(argv)
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pages"
        pages: dict[str, tuple[list[Path], dict[str, Any]]] = {}
        for argument in flags.runs:
            paths = [Path(each) for each in argument.split(",")]
            name = paths[0].name if len(paths) == 1 else f"{len(paths)}_runs_{paths[0].name}"
            pages[f"run_{name}"] = (paths, {})
        for name, (path, how) in odd_runs(Path(temporary) / "runs").items():
            pages[f"odd_{name}"] = ([path], how)
        for name, (paths, how) in pages.items():
            began = time.monotonic()
            size = report(paths, folder / f"{name}.html", **how)
            lines.append(f"{name}.html: {size / 1e6:.2f} MB, made in {time.monotonic() - began:.1f} s")
        command = [
            "node",
            "check.mjs",
            str(folder),
            *([str(flags.screenshots.absolute())] if flags.screenshots else []),
        ]
        done = subprocess.run(command, cwd=REPO / "benchmarks" / "browser", capture_output=True, text=True, check=False)
        lines.append(done.stdout + done.stderr)
    text = "\n".join(lines).replace(temporary, "...")
    print(text)
    RESULT.write_text(text)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
