"""What benchmarks of named cases against peers share: their arguments, and how results are kept.

A case that is not run keeps the result it has, so that one of them can be measured again by itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import REPO, RESULTS, fill
from hintsd_jax.runs.workdir import versions

PAGE = REPO / "docs" / "performance.md"


def parser(text: str, name: str, cases: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The arguments: which cases, how often, with or without peers, and where results go (by default NAME.json and
    NAME.md among the results, and the table to docs/performance.md).
    """
    arguments = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", action="append", choices=cases, help="default all but smallest")
    arguments.add_argument("--rounds", type=int, default=rounds)
    arguments.add_argument("--without-peers", action="store_true", help="ours alone: needs no PyTorch")
    arguments.add_argument("--out", type=Path, default=RESULTS / name, help="with .json and .md")
    return arguments


def measure_all(
    chosen: argparse.Namespace, cases: Sequence[Any], measure: Callable[..., dict], table: Callable[[list[dict]], str]
) -> None:
    """Measures what `chosen` asks for, each by `measure(case, rounds, with_peers)`, and writes the results, old and
    new, in the order of `cases`, which have a `name` each.
    """
    path = chosen.out.with_suffix(".json")
    results = {row["case"]: row for row in json.loads(path.read_text())["results"]} if path.exists() else {}
    for case in cases:
        if case.name in chosen.only if chosen.only else case.name != "smallest":
            about = {"date": time.strftime("%Y-%m-%d"), "versions": versions()}
            results[case.name] = measure(case, chosen.rounds, not chosen.without_peers) | about
            print(json.dumps(results[case.name]), flush=True)
    rows = [results[case.name] for case in cases if case.name in results]
    path.write_text(json.dumps({"results": rows}, indent=1) + "\n")
    chosen.out.with_suffix(".md").write_text(f"{table(rows)}\n")
    if chosen.out.parent == RESULTS:
        fill(PAGE, chosen.out.name, table(rows))
