"""One pass for all targets of an episode against one example per target: the same gradient, tokens processed, time.

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
from tabulate import tabulate

from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.models.sharding import make_mesh, put_batch
from hintsd_jax.runs.workdir import versions
from hintsd_jax.training import train_step
from hintsd_jax.training.batching import BatchShapes, make_batches
from hintsd_jax.training.examples import Branch, Example
from hintsd_jax.training.loss_parts import Divergence
from hintsd_jax.training.losses import Loss
from hintsd_jax.training.state import OptimConfig, create

FEEDBACK, ACTION, TARGETS, EPISODES = 24, 16, 3, 4
LOSS = Loss((Divergence(),))


def episode(rng: np.random.Generator, number: int, length: int, vocabulary: int) -> Example:
    """Targets at the end of the fourth quarter's thirds."""
    ids = lambda size: tuple(int(i) for i in rng.integers(1, vocabulary, size))
    tokens, branches = ids(length), []
    for n in range(1, TARGETS + 1):
        stop = length * (9 + n) // 12
        logprobs, weights = (0.0,) * ACTION, {"divergence": 1.0}
        branches.append(Branch(n, stop - ACTION, stop, stop - ACTION - 3, ids(FEEDBACK), logprobs, weights))
    return Example(number, tokens, tuple(branches))


def measure(policy, state, mesh, length: int, rounds: int, rng) -> dict:
    examples = [episode(rng, n, length, policy.vocab_size) for n in range(EPISODES)]
    together = BatchShapes((length,), (TARGETS * (FEEDBACK + ACTION),), (TARGETS * ACTION,), EPISODES)
    lengths = tuple(length * (9 + n) // 12 for n in range(1, TARGETS + 1))
    apart = BatchShapes(lengths, (length + FEEDBACK,), (ACTION,), EPISODES, trunk=False)
    layouts = {
        "branches": make_batches(examples, together, LOSS),
        "separate": make_batches([one for example in examples for one in example.separated()], apart, LOSS),
    }

    def gradient(batches):
        with jax.set_mesh(mesh):
            accumulator = train_step.zeros(state.params, LOSS)
            for batch in batches.batches:
                accumulator, _ = train_step.accumulate(
                    None, state, accumulator, put_batch(batch, mesh), policy=policy, loss=LOSS
                )
            return jax.block_until_ready(accumulator)

    results = {name: gradient(batches) for name, batches in layouts.items()}  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(rounds):
        for name, batches in layouts.items():
            began = time.perf_counter()
            gradient(batches)
            seconds[name].append(time.perf_counter() - began)
    differences = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
        for a, b in zip(*(jax.tree.leaves(results[name].grads) for name in layouts), strict=True)
    ]
    tokens = {name: each.student_tokens + each.teacher_tokens - each.padding_tokens for name, each in layouts.items()}
    return {
        "length": length,
        "tokens": tokens,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "gradient": max(differences),
        "loss": abs(float(results["branches"].sums["loss"] / results["separate"].sums["loss"]) - 1),
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
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        result = measure(policy, state, mesh, length, arguments.rounds, rng)
        tokens, seconds = result["tokens"], result["seconds"]
        cells = [f"{length:,}"]
        for unit, form in ((tokens, ",d"), (seconds, ".2f")):
            ratio = unit["separate"] / unit["branches"]
            cells += [format(unit["branches"], form), format(unit["separate"], form), f"{ratio:.2f}"]
        rows.append([*cells, f"{result['loss']:.0e}", f"{result['gradient']:.0e}"])
        print(*rows[-1], flush=True)
    columns = ["episode", "tokens, one pass", "tokens, separate", "ratio", "s, one pass", "s, separate", "ratio"]
    columns += ["loss apart", "gradient apart"]
    lines = [
        f"# One pass for all targets against one example per target\n\n{time.strftime('%Y-%m-%d')}."
        f" `python -m benchmarks.branches`: {EPISODES} episodes, {TARGETS} targets each in the last quarter, feedback"
        f" {FEEDBACK} and action {ACTION} tokens; student's gradient and teacher's scores.\n",
        tabulate(rows, columns, tablefmt="pipe", disable_numparse=True, stralign="right"),
    ]
    text = "\n".join(lines) + f"\n\nVersions: {json.dumps(versions())}\n"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)


if __name__ == "__main__":
    main()
