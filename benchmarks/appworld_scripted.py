"""Does AppWorld's loop hold? Reference solutions go through the whole of it (text, tokens, code, engine, tests,
scores): all must succeed; doing nothing, and references with a fault, must not.

  python -m benchmarks.appworld_scripted                                       the invented root
  python -m benchmarks.appworld_scripted --root=data/appworld --references     AppWorld's own data, references alone

Prints by split how many tasks succeed by their reference, by doing nothing and by each fault, TGC and SGC of the
references, and what calls take. Exit status 1 if a reference fails. Of the benchmark's own data only train and dev have
reference solutions; nothing is written anywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks import hindsight_setup
from benchmarks.injected_faults import play_scripts
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.appworld import AppWorld, script
from hintsd_jax.envs.appworld.prompt import render_code
from hintsd_jax.evaluate import Scores
from hintsd_jax.rollout.chat import ChatFormat

POLICY = "hintsd_jax/assets/desk-policy"  # its tokenizer alone is used
NOTHING = (render_code("I do nothing.", "apis.supervisor.complete_task()"),)


class Clocked(AppWorld):
    """An AppWorld that notes how long its calls take."""

    seconds: dict[str, list[float]] = {}

    def reset(self, task: Mapping[str, Any]) -> Any:
        return self._clocked("reset", super().reset, task)

    def step(self, action: Any) -> Any:
        result = self._clocked("step", super().step, action)
        if result.terminated:
            self.seconds.setdefault("step with grading", []).append(self.seconds["step"].pop())
        return result

    def _clocked(self, name: str, call: Any, *args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result


def play(
    chat: ChatFormat, tasks: Sequence[Mapping], root: str, options: Mapping[str, Any], seed: int, references: bool
) -> bool:
    """Plays a split and prints what came of it; whether every reference succeeded. references: nothing but those."""
    actions, kinds = {}, ["reference", *([] if references else ["nothing", *script.FAULTS])]
    absent: Counter[str] = Counter()
    for task in tasks:
        right = script.ground_truth(task, root).actions
        faulty = {kind: script.with_fault(task, kind, seed, root) for kind in script.FAULTS}
        absent.update(kind for kind, each in faulty.items() if each is None)
        # A task without a place for a fault plays the reference once more, uncounted.
        actions[task["id"]] = [right, NOTHING, *(each.actions if each else right for each in faulty.values())][
            : len(kinds)
        ]
    success: Counter[str] = Counter()
    succeeded = []
    for task, episodes in play_scripts(chat, partial(Clocked, **options), tasks, actions, seed):
        succeeded.append(episodes[0].success)
        if not episodes[0].success:
            print(f"  {task['id']}: the reference fails: {episodes[0].report and episodes[0].report.summary}")
        for kind, episode in zip(kinds, episodes, strict=True):
            success[kind] += episode.success
    scenarios = tuple(task["scenario"] for task in tasks)
    categories = tuple(task["category"] for task in tasks)
    scores = Scores(np.array(succeeded, dtype=float)[:, None], 0, {}, categories, {}, scenarios)
    for kind in kinds:
        extra = success[kind] - absent[kind] if absent[kind] else success[kind]
        print(f"  {kind:16} {extra} of {len(tasks) - absent[kind]} succeed")
    for name, value in scores.metrics("reference").items():
        print(f"  {name:40} {value:.4g}")
    return all(succeeded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=".cache/appworld-root")
    parser.add_argument("--python", default=".cache/appworld-venv/bin/python")
    parser.add_argument("--splits", default="train,dev")
    parser.add_argument("--data_dir", default="data", help="where task sets are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--references", action="store_true", help="play nothing but the references")
    arguments = parser.parse_args()
    options = {"root": arguments.root, "python": arguments.python}
    chat = ChatFormat(load_tokenizer(POLICY), history="keep", call_style="code")
    start, good = time.perf_counter(), True
    for split in arguments.splits.split(","):
        tasks = AppWorld.tasks(split, arguments.data_dir, **options)
        if start:
            print(f"the engine is ready after {time.perf_counter() - start:.1f} s")
            start = 0.0
        print(f"{split}: {len(tasks)} tasks")
        good &= play(chat, list(tasks), arguments.root, options, arguments.seed, arguments.references)
    for name, seconds in Clocked.seconds.items():
        median, slowest = 1000 * np.median(seconds), 1000 * max(seconds)
        print(f"{name:18} {len(seconds)} calls, median {median:.0f} ms, slowest {slowest:.0f} ms")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    hindsight_setup.guarded(main)
