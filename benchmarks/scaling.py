"""How the cost of a decoding step and of a prefill grows: with the history, the size of a slot, the slots, and with one
long slot among short ones.

  python -m benchmarks.scaling                  all; --smallest for what the test runs

Times in turns in one process, medians. An exponent is the slope of log(time) against log(size), first to last size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.pages import REPO, RESULTS, fill, markdown_table
from benchmarks.rollout import MEDIUM, TINY
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.runs.workdir import versions
from hintsd_jax.sampling import programs

STEPS = 8  # decoding steps of a call
SHALLOW = dataclasses.replace(MEDIUM, num_layers=2)  # cost is the same in every layer, and caches are large


class Served:
    """Weights and a cache, and calls of the engine's programs on them. tokens: in each slot."""

    def __init__(self, policy: PolicyConfig, weights: decoder.Params, positions: int, tokens: Sequence[int]):
        self.policy, self.weights, self.positions, self.tokens = policy, weights, positions, tokens
        self.cache = decoder.init_cache(policy, len(tokens), positions)

    def decode(self) -> float:
        """Seconds of a step."""
        B = len(self.tokens)
        state = programs.idle_state(B, self.positions, STEPS)._replace(
            active_B=np.ones(B, bool),
            position_B=np.asarray(self.tokens, np.int32),
            limit_B=np.full(B, STEPS, np.int32),
            temperature_B=np.ones(B, np.float32),
        )
        began = time.perf_counter()
        self.cache, _, steps = programs.decode(self.weights, self.policy, (), self.cache, state, np.int32(B))
        jax.block_until_ready((self.cache, steps))
        return (time.perf_counter() - began) / STEPS

    def prefill(self) -> float:
        """Seconds of one chunk of 16 tokens behind the tokens of slot 0."""
        ids, at = np.ones((1, 16), np.int32), np.asarray(self.tokens[:1], np.int32)
        began = time.perf_counter()
        self.cache = jax.block_until_ready(
            programs.prefill(self.weights, self.policy, self.cache, ids, at, np.zeros(1, np.int32))
        )
        return time.perf_counter() - began


def cases(smallest: bool) -> dict[str, dict[int, tuple[str, int, list[int]]]]:
    """What grows -> its size -> (program, positions of a slot, tokens in each slot)."""
    slots, short, sizes = (2, 20, (64, 128)) if smallest else (16, 100, (1024, 4096, 8192))
    room = max(sizes)
    few = (1, 2) if smallest else (4, 16, 64)
    return {
        "decode: history": {size: ("decode", room, [size - 30] * slots) for size in sizes},
        "decode: size of a slot": {size: ("decode", size, [short] * slots) for size in sizes},
        "decode: slots": {number: ("decode", sizes[0], [sizes[0] - 30] * number) for number in few},
        "decode: one long among short": {size: ("decode", room, [size - 30, *[short] * (slots - 1)]) for size in sizes},
        "prefill: size of a slot": {size: ("prefill", size, [short] * slots) for size in sizes},
        "prefill: history": {size: ("prefill", room, [size - 30] * slots) for size in sizes},
    }


def measure(policy: PolicyConfig, rounds: int, smallest: bool) -> list[dict]:
    weights = decoder.by_layer(decoder.init_params(policy, jax.random.key(0)))
    results = []
    for name, by_size in cases(smallest).items():
        calls: dict[int, Callable[[], float]] = {}
        for size, (program, positions, tokens) in by_size.items():
            calls[size] = getattr(Served(policy, weights, positions, tokens), program)
            calls[size]()  # compiles
        turns = [[call() for call in calls.values()] for _ in range(rounds)]
        times = dict(zip(calls, map(float, np.median(turns, axis=0)), strict=True))
        first, last = min(times), max(times)
        exponent = float(np.log(times[last] / times[first]) / np.log(last / first))
        ms = {size: round(1e3 * seconds, 3) for size, seconds in times.items()}
        results.append({"what": name, "ms": ms, "exponent": exponent, "rounds": rounds, "load": os.getloadavg()[0]})
        print(json.dumps(results[-1]), flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling", help="with .json and .md")
    chosen = parser.parse_args(arguments)
    results = measure(TINY if chosen.smallest else SHALLOW, chosen.rounds, chosen.smallest)
    rows = [
        [row["what"], ", ".join(f"{size:,}: {ms:.1f}" for size, ms in row["ms"].items()), f"{row['exponent']:.2f}"]
        for row in results
    ]
    chosen.out.with_suffix(".json").write_text(json.dumps({"results": results, "versions": versions()}, indent=1))
    table = markdown_table(["", "ms by size", "exponent"], rows, left=(0, 1))
    chosen.out.with_suffix(".md").write_text(f"{table}\n")
    if chosen.out.parent == RESULTS:
        fill(REPO / "docs" / "performance.md", "scaling", table)


if __name__ == "__main__":
    main()
