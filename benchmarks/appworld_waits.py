"""How long does an episode of AppWorld wait for its world, and what do resets ahead of need change?

  python -m benchmarks.appworld_waits [--episodes 64] [--slots 8] [--round 1.0] [--ahead 0,1,2,4]

Reference solutions go through the collector. `--round`: seconds in which a policy would write an action for every slot;
meanwhile the machine is free. A wait is the time from when a slot is free for an episode until its first messages are
there. The first episodes, for which all slots are free at once, are told apart. Written to
benchmarks/results/appworld_waits.md.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks import hindsight_setup
from benchmarks.pages import RESULTS, markdown_table
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.appworld import AppWorld, script
from hintsd_jax.rollout import collector
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_call import Call
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.env_pool import EnvPool, Key
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import EngineConfig, Sampling

POLICY = "hintsd_jax/assets/desk-policy"  # its tokenizer alone is used
LONG = 1 << 30


class Worlds(AppWorld):
    """Counts the worlds that are open at once, those in their reset among them."""

    lock, open_now, most = threading.Lock(), 0, 0

    def reset(self, task: Mapping[str, Any]) -> Any:
        self._count(1)
        return super().reset(task)

    def close(self) -> None:
        if self._worker is not None:
            self._count(-1)
        super().close()

    @classmethod
    def _count(cls, change: int) -> None:
        with cls.lock:
            cls.open_now += change
            cls.most = max(cls.most, cls.open_now)


class Waited(EnvPool):
    """An EnvPool that notes how long its resets are waited for."""

    seconds: dict[int, float] = {}  # by how many were asked before

    def reset(self, slot: int, task: Mapping[str, Any], key: Key = ()) -> Call:
        asked, call = time.perf_counter(), super().reset(slot, task, key)
        number = len(self.seconds)
        self.seconds[number] = 0.0

        def wait() -> None:
            call.result()
            self.seconds[number] = time.perf_counter() - asked

        threading.Thread(target=wait, daemon=True).start()
        return call


def measure(chat: ChatFormat, arguments: argparse.Namespace, options: Mapping[str, Any], ahead: int) -> list[str]:
    """A row of the table."""
    known = list(AppWorld.tasks("train", arguments.data_dir, **options))
    tasks = [known[n % len(known)] for n in range(arguments.episodes)]

    def play(job: Any) -> Iterator[str]:
        for action in script.ground_truth(tasks[job.episode.group], arguments.root).actions:
            time.sleep(arguments.round / arguments.slots)
            yield action

    engine: Any = ScriptedEngine(chat, play, EngineConfig(arguments.slots, LONG, LONG))
    config, began = RolloutConfig(40, LONG, Sampling(0.0, 1.0, 0, LONG)), time.perf_counter()
    Waited.seconds, Worlds.open_now, Worlds.most = {}, 0, 0
    host = ThreadHost(lambda: Worlds(**options))
    played = run_episodes(
        engine, None, chat, host, tasks, 1, config, seed=0, step=0, call_timeout_s=180.0, resets_ahead=ahead
    )
    whole = time.perf_counter() - began
    assert len(played.episodes) == len(tasks) and all(episode.success for episode in played.episodes), played.failures
    waits = np.array(list(Waited.seconds.values()))
    first, later = waits[: arguments.slots], waits[arguments.slots :]
    numbers = [1000 * np.median(first), 1000 * np.median(later), 1000 * np.quantile(later, 0.95), 1000 * later.max()]
    return [f"{ahead}", f"{len(tasks)}", *(f"{number:.0f}" for number in numbers), f"{Worlds.most}", f"{whole:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=".cache/appworld-root")
    parser.add_argument("--python", default=".cache/appworld-venv/bin/python")
    parser.add_argument("--data_dir", default="data", help="where task sets are kept")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--round", type=float, default=1.0)
    parser.add_argument("--ahead", default="0,1,2,4")
    arguments = parser.parse_args()
    collector.EnvPool = Waited
    chat = ChatFormat(load_tokenizer(POLICY), history="keep", call_style="code")
    options = {"root": arguments.root, "python": arguments.python}
    rows = [measure(chat, arguments, options, int(ahead)) for ahead in arguments.ahead.split(",")]
    head = [
        "resets ahead",
        "episodes",
        f"wait of the first {arguments.slots}, median, ms",
        "wait of the others, median",
    ]
    table = markdown_table([*head, "95 %", "longest", "worlds at most", "whole, s"], rows, left=())
    page = (
        f"# Waiting for a world of AppWorld\n\n{time.strftime('%Y-%m-%d')}, `python -m benchmarks.appworld_waits"
        f" --episodes {arguments.episodes} --slots {arguments.slots} --round {arguments.round:g} --ahead"
        f" {arguments.ahead}`, the invented world, 2 busy CPU cores.\n\n{table}\n"
    )
    (RESULTS / "appworld_waits.md").write_text(page)
    print(page)


if __name__ == "__main__":
    hindsight_setup.guarded(main)
