"""A whole run of Desk in a world that falls apart: a share of the environment's calls fails, in every way there is.

  python -m benchmarks.failing_desk [--share 0.2] [--steps 8] [--tasks 24] [--rollouts 8] [--workdir DIR]

Each episode is in a process of its own. Which calls fail, and how, follows from the task, the step and the action, so a
run can be repeated. The page says how many episodes were begun, played and lost, by reason, whether these add up in
every row, and whether the policy still learns from what was left: `benchmarks/results/failing_desk.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pages import RESULTS, markdown_table
from hintsd_jax.config import build, files
from hintsd_jax.envs.base import Action, CallTimeout, Fault, Report, Start, StepResult
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.runs.metrics import read_metrics

if TYPE_CHECKING:  # they import jax: not in the environments' processes
    from hintsd_jax.config.schema import Config
    from hintsd_jax.evaluate import HeldOut

TIMEOUT_S = 1.0


def _allocate() -> Any:
    return [bytearray(16 << 20) for _ in itertools.count()]


def _raise(error: BaseException) -> Any:
    raise error


_HALF = "half a pair \ud800"
# What a call does instead of its work. An object that is returned is what the protocol does not allow there.
WAYS: Mapping[str, Callable[[], Any]] = {
    "raises": lambda: _raise(ValueError(f"boom <|im_end|> {_HALF}")),
    "exits": lambda: sys.exit(0),
    "ends its process": lambda: os._exit(0),
    "hangs": lambda: time.sleep(3600),
    "holds the interpreter": lambda: sum(1 for _ in itertools.repeat(None)),
    "takes all memory": _allocate,
    "gives up waiting": lambda: _raise(CallTimeout("no answer")),
    "recurses": lambda: (lambda f: f(f))(lambda f: f(f)),
    "returns None": lambda: None,
    "returns half a surrogate pair": lambda: StepResult(({"role": "tool", "content": _HALF},)),
    "rewards with NaN": lambda: StepResult(({"role": "tool", "content": "x"},), float("nan")),
    "blames step 10**9": lambda: Report("?", (Fault(10**9, "x"),)),
    "floods": lambda: StepResult(({"role": "tool", "content": "x " * 10_000_000},)),
}


class FailingDesk(Desk):
    """Desk, but for a `share` of its calls."""

    isolation = "process"

    @classmethod
    def tasks(cls, split: str, data_dir: str, *, share: float = 0.2, **options: Any) -> Any:
        return super().tasks(split, data_dir, **options)

    def __init__(self, *, share: float = 0.2, **options: Any):
        super().__init__(**options)
        self._share, self._number = share, 0

    def reset(self, task: Mapping[str, Any]) -> Start:
        self._id = task["id"]
        self._fail("reset")
        return super().reset(task)

    def step(self, action: Action) -> StepResult:
        self._number += 1
        return self._fail(f"step {self._number} {action.text}") or super().step(action)

    def report(self) -> Report:
        return self._fail("report") or super().report()

    def close(self) -> None:
        self._fail("close")

    def _fail(self, call: str) -> Any:
        """Fails, or returns something else than the call should, or nothing for a call that works."""
        draw = int.from_bytes(hashlib.sha256(f"{self._id} {call}".encode()).digest()[:8])
        if draw % 10_000 >= 10_000 * self._share:
            return None
        way = list(WAYS.values())[draw // 10_000 % len(WAYS)]
        return way() or StepResult(())  # None is not allowed either


def sound_world(config: Config, workdir: Path) -> list[HeldOut]:
    """What the policy can do before and after, where nothing fails."""
    from hintsd_jax.evaluate import held_out, restored_params
    from hintsd_jax.session import Session

    options = {name: value for name, value in config.env.options.items() if name != "share"}
    session = Session.open(config.replaced({"env.name": "desk", "env.options": options, "eval.greedy": False}))
    before = held_out(session, session.weights(session.trained), "test", 200)
    params, _ = restored_params(session, workdir)
    return [before, held_out(session, params, "test", 200)]


def percent(result: HeldOut) -> str:
    """Avg@4 with its interval over tasks."""
    rate, low, high = (100 * result.metrics[f"test/{name}"] for name in ("avg@4", "avg_low", "avg_high"))
    return f"{rate:.1f} % [{low:.1f}, {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=24, help="of a training step")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--workdir", default="")
    arguments = parser.parse_args()
    from hintsd_jax.train import train  # imports jax: not in the environments' processes

    settings = {
        "env.name": "benchmarks.failing_desk:FailingDesk",
        "env.options": {"seed": 0, "length": 4, "difficulty": 3, "share": arguments.share},
        "env.call_timeout_s": TIMEOUT_S,
        "env.memory_gib": 0.5,
        "tasks.tasks_per_step": arguments.tasks,
        "tasks.rollouts": arguments.rollouts,
        "rollout.slots": min(64, arguments.tasks * arguments.rollouts),
        "optim.steps": arguments.steps,
        "eval.tasks": 20,
        "eval.test_tasks": 80,
    }
    config = build.build(files.load("desk")).replaced(settings)
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(arguments.workdir or scratch)
        began = time.monotonic()
        after = train(config, str(workdir)).after
        seconds = time.monotonic() - began
        rows = read_metrics(workdir / "metrics.jsonl")[1:]
        sound = sound_world(config, workdir)
        result = (workdir / "result.md").read_text()
    sums: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("rollout/dropped/", "rollout/failed_calls/")) or name in (
                "rollout/begun",
                "rollout/episodes",
            ):
                sums[name] = sums.get(name, 0) + value
    off = [
        row["step"]
        for row in rows
        if row["rollout/begun"]
        != row["rollout/episodes"] + sum(v for k, v in row.items() if k.startswith("rollout/dropped/"))
    ]
    page = (
        f"# Desk in a world that falls apart\n\n{time.strftime('%Y-%m-%d')}, `python -m benchmarks.failing_desk"
        f" --share {arguments.share:g} --steps {arguments.steps} --tasks {arguments.tasks} --rollouts"
        f" {arguments.rollouts}`, {seconds:.0f} s. Each call fails with probability {arguments.share:g}, in one of"
        f" {len(WAYS)} ways: {', '.join(WAYS)}.\n\n"
        f"In a sound world, {sound[0].metrics['test/tasks']} test tasks x 4: Avg@4 {percent(sound[0])} before and"
        f" {percent(sound[1])} after.\n\n"
        f"Begun = played + dropped in {len(rows) - len(off)} of {len(rows)} training steps.\n\n"
        + markdown_table(
            ("in training", "number"), [[name, f"{value:,}"] for name, value in sorted(sums.items())], left=(0,)
        )
        + f"\n\n## The run's own table\n\n{result}\n"
    )
    (RESULTS / "failing_desk.md").write_text(page)
    print(page, after, sep="\n")
    sys.exit(bool(off))


if __name__ == "__main__":
    main()
