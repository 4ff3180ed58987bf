"""One pass for all targets of an episode against one pass for each: the same gradient, tokens gone through, and time.

  python -m benchmarks.branches --out=benchmarks/results/branches.md

Episodes of random tokens with three targets in their last quarter, gradients of the embedded policy's shape in float32.
The two layouts take turns in one process; times are medians, the claim is their ratio.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.pages import RESULTS, markdown_table
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh, put_batch
from hintsd_jax.runs.workdir import versions
from hintsd_jax.training import train_step
from hintsd_jax.training.batching import Batches, BatchShapes, make_batches
from hintsd_jax.training.examples import Branch, Example
from hintsd_jax.training.loss_parts import Divergence
from hintsd_jax.training.losses import Loss
from hintsd_jax.training.state import OptimConfig, TrainState, create

FEEDBACK, ACTION, TARGETS, EPISODES = 24, 16, 3, 4
LOSS = Loss((Divergence(),), chunk_tokens=128)


def example(rng: np.random.Generator, number: int, length: int, vocabulary: int) -> Example:
    """An episode with targets at the end of the fourth quarter's thirds."""
    ids = lambda size: tuple(int(i) for i in rng.integers(1, vocabulary, size))
    tokens, branches = ids(length), []
    for n in range(1, TARGETS + 1):
        stop = length * (9 + n) // 12
        weights = {"divergence": 1.0}
        branches.append(Branch(n, stop - ACTION, stop, stop - ACTION - 3, ids(FEEDBACK), (0.0,) * ACTION, weights))
    return Example(number, tokens, tuple(branches))


def layouts(examples: list[Example], length: int) -> dict[str, Batches]:
    """The examples with a shared trunk ("branches"), and one for each target ("separate")."""
    shared = BatchShapes(
        (length,), (TARGETS * (FEEDBACK + ACTION),), (TARGETS * ACTION,), batch_size=EPISODES, packed=False
    )
    lengths = tuple(length * (9 + n) // 12 for n in range(1, TARGETS + 1))
    alone = BatchShapes(lengths, (length + FEEDBACK,), (ACTION,), batch_size=EPISODES, trunk=False, packed=False)
    separate = [one for example in examples for one in example.separated()]
    return {"branches": make_batches(examples, shared, LOSS), "separate": make_batches(separate, alone, LOSS)}


def measure(
    policy: PolicyConfig, state: TrainState, mesh: Mesh, length: int, rounds: int, rng: np.random.Generator
) -> dict:
    by_layout = layouts([example(rng, n, length, policy.vocab_size) for n in range(EPISODES)], length)

    def gradient(batches: Batches) -> train_step.Accumulator:
        with jax.set_mesh(mesh):
            accumulator = train_step.zeros(state.params, LOSS)
            for batch in batches.batches:
                on_device = put_batch(batch, mesh)
                accumulator, _ = train_step.accumulate(None, state, accumulator, on_device, policy=policy, loss=LOSS)
            return jax.block_until_ready(accumulator)

    results = {name: gradient(batches) for name, batches in by_layout.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in by_layout}
    for _ in range(rounds):
        for name, batches in by_layout.items():
            began = time.perf_counter()
            gradient(batches)
            seconds[name].append(time.perf_counter() - began)
    pairs = zip(*(map(np.asarray, jax.tree.leaves(results[name].grads)) for name in by_layout), strict=True)
    losses = [float(result.sums["loss"]) for result in results.values()]
    passed = lambda batches: batches.student_tokens + batches.teacher_tokens - batches.padding_tokens
    return {
        "tokens": {name: passed(batches) for name, batches in by_layout.items()},
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "gradient": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs),
        "loss": abs(losses[0] / losses[1] - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="assets/desk-policy")
    parser.add_argument("--lengths", default="288,1152,2304")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "branches.md")
    arguments = parser.parse_args()
    policy, params = load_policy(arguments.policy)
    mesh, rng = make_mesh(devices=jax.devices()[:1]), np.random.default_rng(0)
    state = create(params, OptimConfig())
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        result = measure(policy, state, mesh, length, arguments.rounds, rng)
        (shared, alone), (fast, slow) = result["tokens"].values(), result["seconds"].values()
        tokens = [f"{shared:,}", f"{alone:,}", f"{alone / shared:.2f}"]
        times = [f"{fast:.2f}", f"{slow:.2f}", f"{slow / fast:.2f}"]
        rows.append([length, *tokens, *times, f"{result['loss']:.0e}", f"{result['gradient']:.0e}"])
        print(*rows[-1], sep="  ", flush=True)
    head = ["episode", "tokens, one pass", "tokens, separate", "ratio", "s, one pass", "s, separate", "ratio"]
    table = markdown_table([*head, "loss apart", "gradient apart"], rows, left=())
    text = (
        f"# One pass for all targets against one pass for each\n\n{time.strftime('%Y-%m-%d')}."
        f" `python -m benchmarks.branches`: {EPISODES} episodes, {TARGETS} targets each in the last quarter, feedback"
        f" {FEEDBACK} and action {ACTION} tokens; student's gradient and teacher's scores.\n\n{table}\n\n"
        f"Versions: {json.dumps(versions())}\n"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)


if __name__ == "__main__":
    main()
