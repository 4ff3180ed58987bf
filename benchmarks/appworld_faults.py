"""AppWorld's engine on its worst days: reference solutions with cells in between that hang, die or take all they can.

  python -m benchmarks.appworld_faults [--episodes 200] [--share 0.2] [--slots 8] [--seed 0]

Scripts go through the collector, so many worlds at once as slots. It prints how each kind of fault ended, that begun =
played + dropped, and what is left behind: worker processes, sockets, open files. Exit status 1 if an episode without a
fault was lost, a task was marked solved by a fault, or anything is left. Written to
benchmarks/results/appworld_faults.md.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import hindsight_setup
from benchmarks.pages import RESULTS, markdown_table
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.appworld import AppWorld, script
from hintsd_jax.envs.appworld.prompt import render_code
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import EngineConfig, Sampling

POLICY = "hintsd_jax/assets/desk-policy"  # its tokenizer alone is used
SPLITS = ("train", "dev", "test_normal", "test_challenge")
LONG = 1 << 30
# What a cell does before the reference goes on.
FAULTS = {
    "swallows its time-out": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "one long C call": "x = 10**10**8",
    "takes all memory": "x = 'a' * 10**10\nprint(len(x))",
    "interrupts": "raise KeyboardInterrupt",
    "exits": "raise SystemExit(1)",
    "threads without end": "import threading\nwhile True:\n    threading.Thread(target=lambda: None).start()",
    "an endless output": "while True:\n    print('x' * 1000)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=".cache/appworld-root")
    parser.add_argument("--python", default=".cache/appworld-venv/bin/python")
    parser.add_argument("--data_dir", default="data", help="where task sets are kept")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = {"root": arguments.root, "python": arguments.python, "cell_timeout_s": 2.0, "memory_mib": 256}
    known = [task for split in SPLITS for task in AppWorld.tasks(split, arguments.data_dir, **options)]
    rng = random.Random(arguments.seed)
    tasks = [rng.choice(known) for _ in range(arguments.episodes)]
    faults = [rng.choice(list(FAULTS)) if rng.random() < arguments.share else "" for _ in tasks]

    def play(job: Any) -> list[str]:
        task, fault = tasks[job.episode.group], faults[job.episode.group]
        actions = list(script.ground_truth(task, arguments.root).actions)
        return [*actions[:1], *([render_code("A fault.", FAULTS[fault])] if fault else []), *actions[1:]]

    chat = ChatFormat(load_tokenizer(POLICY), history="keep", call_style="code")
    engine: Any = ScriptedEngine(chat, play, EngineConfig(arguments.slots, LONG, LONG))
    host = ThreadHost(lambda: AppWorld(**options))
    AppWorld(**options).close()
    config = RolloutConfig(40, LONG, Sampling(0.0, 1.0, 0, LONG))
    before, began = _left_behind(), time.monotonic()
    played = run_episodes(engine, None, chat, host, tasks, 1, config, seed=arguments.seed, step=0, call_timeout_s=60.0)
    seconds = time.monotonic() - began
    ends: Counter[tuple[str, str]] = Counter()
    for episode in played.episodes:
        ends[faults[episode.group] or "none", "success" if episode.success else f"no success, {episode.ended}"] += 1
    lost = {episode.group: episode.ended for episode in played.lost}
    for group, ended in lost.items():
        ends[faults[group] or "none", f"dropped: {ended}"] += 1
    time.sleep(2)
    after = _left_behind()
    details = sorted({f"{failure.call.partition(' ')[0]}: {failure.detail}"[:160] for failure in played.failures})
    wrong = [fault for (fault, end), _ in ends.items() if fault == "none" and end != "success"]
    good = not wrong and after == before and played.begun == len(tasks)
    rows = [[fault, end, f"{number}"] for (fault, end), number in sorted(ends.items())]
    page = (
        f"# AppWorld with faults\n\n{time.strftime('%Y-%m-%d')}, `python -m benchmarks.appworld_faults --episodes"
        f" {arguments.episodes} --share {arguments.share:g} --slots {arguments.slots} --seed {arguments.seed}`, the"
        f" invented world, {seconds:.0f} s.\n\nBegun {played.begun} = played {len(played.episodes)} + dropped"
        f" {dict(played.dropped)}. Left behind (worker processes, sockets, open files): {after}; before: {before}."
        f"\n\n{markdown_table(('fault in a cell', 'the episode', 'number'), rows, left=(0, 1))}\n\nWhat failed calls"
        " say:\n\n" + "\n".join(f"- {detail}" for detail in details) + "\n"
    )
    (RESULTS / "appworld_faults.md").write_text(page)
    print(page)
    sys.exit(not good)


def _left_behind() -> tuple[int, int, int]:
    """Processes below this one but for the engine's warm one and those that are always there, sockets of the engine,
    and files that this process has open.
    """
    children = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.name != str(os.getpid()):
            try:
                children += b"appworld" in (folder / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
    sockets = sum("appworld" in line for line in Path("/proc/net/unix").read_text().splitlines())
    return children, sockets, len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    hindsight_setup.guarded(main)
