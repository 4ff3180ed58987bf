# SPDX-License-Identifier: Apache-2.0

"""What it costs to have environments in processes of their own: Desk and BFCL, in threads and in processes.

  python -m benchmarks.isolation

Prints a Markdown table: milliseconds of an episode's reset (the last one's close with it) and of a step, and megabytes
that one more environment takes (private memory of its process; in a thread it is not told apart). One episode after the
other, so no cores are shared.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.pages import markdown_table
from hintsd_jax.envs.base import Action
from hintsd_jax.envs.registry import resolve
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.rollout.env_host import EnvWorker
from hintsd_jax.rollout.env_pool import EnvPool
from hintsd_jax.rollout.env_process import ProcessHost, host_for

EPISODES, STEPS = 60, 3
ACTIONS = {"desk": '{"name": "list_files", "arguments": {}}', "bfcl": '{"name": "ls", "arguments": {"a": true}}'}


def measure(name: str, isolation: str) -> list[str]:
    """A row of the table."""
    env_class = resolve(name)
    tasks = env_class.tasks("train", "data")
    host = host_for(env_class, name, {}, isolation, 4.0)
    action: Action = parse_action(f"<tool_call>{ACTIONS[name]}</tool_call>")
    with EnvPool(host, 1, 60.0) as pool:
        began = time.perf_counter()
        pool.reset(0, tasks[0]).result()
        first, resets, steps = time.perf_counter() - began, 0.0, 0.0
        for n in range(EPISODES):
            began = time.perf_counter()
            pool.reset(0, tasks[n]).result()
            resets += time.perf_counter() - began
            for _ in range(STEPS):
                began = time.perf_counter()
                pool.step(0, action).result()
                steps += time.perf_counter() - began
        worker = pool._workers[0]
        assert isinstance(worker, EnvWorker)
        memory = _private(worker.pid) if isinstance(host, ProcessHost) else "-"
    host.close()
    per_step = 1e3 * steps / EPISODES / STEPS
    return [name, isolation, f"{1e3 * first:.0f}", f"{1e3 * resets / EPISODES:.1f}", f"{per_step:.2f}", memory]


def _private(pid: int) -> str:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return f"{kilobytes / 1e3:.1f}"


def main() -> None:
    """The command; see the module."""
    rows = [measure(name, isolation) for name in ACTIONS for isolation in ("thread", "process")]
    header = ["environment", "isolation", "first reset, ms", "reset, ms", "step, ms", "MB each"]
    print(markdown_table(header, rows, left=(0, 1)))


if __name__ == "__main__":
    main()
