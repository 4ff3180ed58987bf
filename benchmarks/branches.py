"""One pass for all targets of an episode against one row per target: the same gradient, tokens gone through, and time.

  python benchmarks/branches.py --out=benchmarks/results/branches.md

Episodes of random tokens with three targets in their last quarter, gradients of the embedded policy's shape in float32.
The two forms take turns in one process; times are medians, the claim is their ratio.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.models.sharding import make_mesh, put_rows
from hintsd_jax.runs.workdir import versions
from hintsd_jax.training import batching as packing
from hintsd_jax.training import train_step as step
from hintsd_jax.training.batching import Shapes
from hintsd_jax.training.examples import Branch, Row, single
from hintsd_jax.training.losses import LossConfig
from hintsd_jax.training.state import OptimConfig, create

FEEDBACK, ACTION, TARGETS, ROWS = 24, 16, 3, 4


def episode(rng: np.random.Generator, number: int, length: int, vocabulary: int) -> Row:
    """Targets at the end of the fourth quarter's thirds."""
    ids = lambda size: tuple(int(i) for i in rng.integers(1, vocabulary, size))
    tokens, branches = ids(length), []
    for n in range(1, TARGETS + 1):
        stop = length * (9 + n) // 12
        branches.append(Branch(n, stop - ACTION, stop, stop - ACTION - 3, ids(FEEDBACK), (0.0,) * ACTION))
    return Row(number, tokens, tuple(branches))


def measure(policy, state, mesh, length: int, rounds: int, rng) -> dict:
    rows = [episode(rng, n, length, policy.vocab_size) for n in range(ROWS)]
    stream = TARGETS * (FEEDBACK + ACTION)
    forms = {
        "branches": packing.pack(rows, Shapes((length,), (stream,), (TARGETS * ACTION,), rows=ROWS)),
        "rows": packing.pack(
            [one for row in rows for one in single(row)],
            Shapes(
                tuple(length * (9 + n) // 12 for n in range(1, TARGETS + 1)),
                (length + FEEDBACK,),
                (ACTION,),
                rows=ROWS,
                trunk=False,
            ),
        ),
    }
    loss = LossConfig(chunk=128)

    def gradient(packed):
        with jax.set_mesh(mesh):
            accumulator = step.zeros(state.params, loss)
            for batch in packed.batches:
                accumulator, _ = step.accumulate(
                    None, state, accumulator, put_rows(batch, mesh), policy=policy, loss=loss
                )
            return jax.block_until_ready(accumulator)

    results = {name: gradient(packed) for name, packed in forms.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, packed in forms.items():
            began = time.perf_counter()
            gradient(packed)
            seconds[name].append(time.perf_counter() - began)
    apart = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
        for a, b in zip(*(jax.tree.leaves(results[name].grads) for name in forms), strict=True)
    ]
    return {
        "length": length,
        "tokens": {name: packed.passed - packed.padding for name, packed in forms.items()},
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "gradient": max(apart),
        "loss": abs(float(results["branches"].sums["loss"] / results["rows"].sums["loss"]) - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="assets/desk-policy")
    parser.add_argument("--lengths", default="288,1152,2304")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/branches.md"))
    arguments = parser.parse_args()
    policy, params = load_policy(arguments.policy)
    mesh, rng = make_mesh(devices=jax.devices()[:1]), np.random.default_rng(0)
    state = create(params, OptimConfig())
    lines = [
        f"# One pass for all targets against one row per target\n\n{time.strftime('%Y-%m-%d')}. `python benchmarks/branches.py`: {ROWS} episodes,"
        f" {TARGETS} targets each in the last quarter, feedback {FEEDBACK} and action {ACTION} tokens; student's gradient and teacher's scores.\n",
        "| episode | tokens, one pass | tokens, rows | ratio | s, one pass | s, rows | ratio | loss apart | gradient apart |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for length in map(int, arguments.lengths.split(",")):
        found = measure(policy, state, mesh, length, arguments.rounds, rng)
        tokens, seconds = found["tokens"], found["seconds"]
        lines.append(
            f"| {length} | {tokens['branches']:,} | {tokens['rows']:,} | {tokens['rows'] / tokens['branches']:.2f} | {seconds['branches']:.2f} |"
            f" {seconds['rows']:.2f} | {seconds['rows'] / seconds['branches']:.2f} | {found['loss']:.0e} | {found['gradient']:.0e} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(lines) + f"\n\nVersions: {json.dumps(versions())}\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)


if __name__ == "__main__":
    main()
