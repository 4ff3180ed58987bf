"""Training attention on this machine by size of tile, forward and backward: time and temporary memory beside that of
the whole square.

  python -m benchmarks.causal_attention
  python -m benchmarks.causal_attention --shape 1,4096,8,4,64 --out runs/one_shape

Forms take turns in one process; the claim is the ratio of their medians. Shape: rows, tokens, heads, kv heads, head
dimension. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pages import RESULTS, markdown_table
from hintsd_jax.models import attention, tiled
from hintsd_jax.runs.workdir import versions
from hintsd_jax.tools.planner.compiler import temporary_bytes

MIB = 2**20
# Of the embedded policy in its warm-up and in training, of SmolLM2-135M, Qwen2.5-0.5B and Qwen3-0.6B.
SHAPES = ("10,1024,2,1,64", "8,504,2,1,64", "8,512,9,3,64", "2,2048,9,3,64", "1,4096,14,2,64", "1,4096,16,8,128")


def forms(tiles: tuple[int, ...], length: int) -> dict[str, Callable[..., jax.Array]]:
    whole = lambda q, k, v: attention.attend(q, k, v, jnp.tri(length, dtype=bool)[None])
    sized = {f"tiles of {tile}": partial(tiled.attend_causal, first_BT=None, largest=tile) for tile in tiles}
    return {"whole square": whole, **sized, "attend_causal": attention.attend_causal}


def measure(shape: tuple[int, int, int, int, int], tiles: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A row for each form: median milliseconds, MiB beside arguments, how far it is from the whole square."""
    B, T, H, K, C = shape
    rng = np.random.default_rng(0)
    q, k, v, pull = (jnp.asarray(rng.normal(size=(B, T, n, C)), jnp.float32) for n in (H, K, K, H))

    def both(attend, q, k, v, pull):
        mixed, back = jax.vjp(attend, q, k, v)
        return mixed, *back(pull)

    programs = {
        name: jax.jit(partial(both, attend)).lower(q, k, v, pull).compile() for name, attend in forms(tiles, T).items()
    }
    expected = programs["whole square"](q, k, v, pull)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    rows = {}
    for name, program in programs.items():
        pairs = zip(program(q, k, v, pull), expected, strict=True)
        apart = max(float(jnp.abs(a - b).max()) for a, b in pairs)
        rows[name] = {"form": name, "MiB": temporary_bytes(program) / MIB, "apart": apart}
    for _ in range(rounds):
        for name, program in programs.items():
            jax.block_until_ready(program(q, k, v, pull))  # fetches from the system what another form gave back
            began = time.perf_counter()
            jax.block_until_ready(program(q, k, v, pull))
            seconds[name].append(time.perf_counter() - began)
    return [{**row, "ms": 1e3 * float(np.median(seconds[name]))} for name, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"default {' '.join(SHAPES)}")
    parser.add_argument("--tiles", default="64,128,256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "causal_attention", help="without .json and .md")
    arguments = parser.parse_args()
    results = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg(), "versions": versions(), "shapes": {}}
    lines = []
    for text in arguments.shape or SHAPES:
        shape = tuple(map(int, text.split(",")))
        if len(shape) != 5:
            parser.error(f"--shape {text}: five numbers, rows,tokens,heads,kv heads,head dimension")
        rows = measure(shape, tuple(map(int, arguments.tiles.split(","))), arguments.rounds)
        results["shapes"][text] = rows
        for row in rows:
            ratio = rows[0]["ms"] / row["ms"]
            lines.append(
                [text, row["form"], f"{row['ms']:.1f}", f"{ratio:.2f}", f"{row['MiB']:.0f}", f"{row['apart']:.0e}"]
            )
            print(*lines[-1], sep="  ", flush=True)
    head = ["shape", "form", "ms", "times as fast as the whole square", "MiB", "apart"]
    table = markdown_table(head, lines, left=(0, 1))
    load = ", ".join(f"{value:.1f}" for value in results["load"])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_name(f"{arguments.out.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_name(f"{arguments.out.name}.md").write_text(
        f"# Training attention in tiles\n\n{results['date']}, `python -m benchmarks.causal_attention`: forward and"
        f" backward in float32, medians of {arguments.rounds} in turns, load {load}: ratios only.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
