"""The words of hindsight on true faults, from the episodes that runs kept: how often they are, to the letter, those of
the environment's report.

  python -m benchmarks.hindsight_words runs/compare_desk --out=benchmarks/results/hindsight_words_desk.md

Each argument is a folder of runs named <arm>-<seed>, as `compare_algorithms` leaves them. A fault counts once for each
target at its step, over all training steps of all runs of an arm.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.pages import markdown_table


def spoken(episode: Mapping) -> Iterator[tuple[str, str | None]]:
    """(what hindsight said, what the report says of that step) for each target; None where the step was no fault."""
    report, hindsight = episode["report"] or {}, episode["hindsight"] or {}
    known = {fault["step"]: fault["feedback"] for fault in report.get("faults") or ()}
    for target in hindsight.get("targets", ()):
        yield target["feedback"], known.get(target["step"])


def counted(folder: Path) -> dict[str, tuple[int, int, int, Counter]]:
    """arm -> (runs, targets, of them in the report's words, what else was said of faults)."""
    found = {}
    runs = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if match := re.fullmatch(r"(.+)-\d+", path.name):
            runs[match[1]].append(path)
    for arm, paths in runs.items():
        lines = (line for path in paths for file in path.glob("episodes/step_*.jsonl") for line in file.open())
        pairs = [pair for line in lines for pair in spoken(json.loads(line))]
        same = sum(said == known for said, known in pairs)
        other = Counter(said for said, known in pairs if known not in (None, said))
        found[arm] = len(paths), len(pairs), same, other
    return found


def table(found: Mapping[str, tuple[int, int, int, Counter]]) -> str:
    rows = []
    for arm, (runs, targets, same, other) in found.items():
        faults = same + other.total()
        if faults:
            ((most, times),) = other.most_common(1) or [("", 0)]
            share = f"{100 * times / faults:.0f}: {most}"
            rows.append([arm, runs, targets, faults, f"{100 * same / faults:.0f}", share])
    head = ["arm", "runs", "targets", "on true faults", "in the report's words, %", "most often otherwise, %"]
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if missing := [str(folder) for folder in arguments.folders if not folder.is_dir()]:
        raise SystemExit(f"error: {missing[0]} is no folder of runs")
    parts = [f"`{folder}`\n\n{table(counted(folder))}" for folder in arguments.folders]
    text = "\n\n".join(["# The words of hindsight on true faults", *parts]) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
