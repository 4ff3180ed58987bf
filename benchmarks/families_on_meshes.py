"""Every family on 8 made-up devices beside one: an update of all weights, and greedy decoding beside transformers'.

  python -m benchmarks.families_on_meshes --out=benchmarks/results/families_on_meshes.md

For each checkpoint under tests/fixtures, loaded straight to a mesh of 2 x 2 x 2 and to one device: two failed episodes
in a row, reverse KL, AdamW and EMA; then 64 tokens after each of transformers' ragged prompts. A weight whose gradient
is nothing but rounding may step either way, so the largest difference of weights is given in steps (learning rates).
Needs no accelerator and no torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.pages import REPO, markdown_table
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh, serving_mesh
from hintsd_jax.runs.workdir import versions
from hintsd_jax.sampling import Engine, EngineConfig, Generation, Sampling
from hintsd_jax.training.batching import BatchShapes, make_batches
from hintsd_jax.training.examples import Branch, Example
from hintsd_jax.training.loss_parts import Divergence
from hintsd_jax.training.losses import Loss
from hintsd_jax.training.state import OptimConfig, create
from hintsd_jax.training.train_step import update

FIXTURES = REPO / "tests" / "fixtures"
MESHES = ((1, 1, 1), (2, 2, 2))
LOSS = Loss((Divergence(top_k=5),), chunk_tokens=16)
OPTIM = OptimConfig(lr=3e-4, schedule="constant", ema_decay=0.9)
HEAD = ["checkpoint", "loss, one device", "loss apart", "weights apart, steps", "EMA apart, steps", "tokens as there"]


def batches(vocab_size: int) -> list[Any]:
    """Eight episodes with two targets each, which a teacher reads with some tokens of feedback."""
    rng = np.random.default_rng(0)
    ids = lambda size: tuple(int(i) for i in rng.integers(1, vocab_size, size))

    def example(n: int) -> Example:
        late = int(rng.integers(20, 30))
        branches = [
            Branch(step, start, stop, start - 2, ids(5), (-1.0,) * (stop - start), {"divergence": 1.0})
            for step, (start, stop) in enumerate(((9, 12), (late, late + 4)), 1)
        ]
        return Example(n, ids(40), tuple(branches), key=(n, 7))

    return make_batches([example(n) for n in range(8)], BatchShapes((72,), (48,), (16,), batch_size=8), LOSS).batches


def on(sizes: tuple[int, int, int], path: Path) -> dict[str, Any]:
    """What a mesh of these sizes computes: tokens, then loss, weights and EMA after an update."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    policy, params = load_policy(path, mesh)
    greedy = decoded(policy, params, mesh, dict(np.load(path / "expected.npz")))
    state, metrics, _ = update(
        None, create(params, OPTIM), batches(policy.vocab_size), policy=policy, loss=LOSS, optim=OPTIM, mesh=mesh
    )
    host = lambda tree: [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return {"loss": float(metrics["loss"]), "weights": host(state.params), "ema": host(state.ema), "tokens": greedy}


def decoded(policy: PolicyConfig, params: Any, mesh: jax.sharding.Mesh, expected: dict[str, np.ndarray]) -> str:
    """How many of transformers' greedy tokens come, up to the first other one of each row."""
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=64)
    prompts = [ids[len(ids) - n :] for ids, n in zip(expected["input_ids"], expected["lengths"], strict=True)]
    jobs = [Generation(tuple(map(int, ids)), np.zeros(2, np.uint32), sampling, 128) for ids in prompts]
    shapes = EngineConfig(slots=8, context=128, max_tokens=64, prefill_buckets=(16,), prefill_rows=8)
    serving = serving_mesh(mesh, policy.num_kv_heads)
    Engine(policy, shapes, (policy.vocab_size,), serving).run(params, jobs)  # no token stops it, as there
    same = [np.cumprod(np.equal(job.ids, row)).sum() for job, row in zip(jobs, expected["greedy"], strict=True)]
    return f"{sum(same)} of {expected['greedy'].size}"


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> str:
    return f"{max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True)) / OPTIM.lr:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a checkpoint's name, default all")
    parser.add_argument("--out", type=Path, help="a page; default: none, it is printed")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all of the time is compiling
    rows = []
    for path in sorted(path.parent for path in FIXTURES.glob("*/expected.npz")):
        if arguments.only and path.name not in arguments.only:
            continue
        one, eight = (on(sizes, path) for sizes in MESHES)
        rows.append(
            [path.name, f"{one['loss']:.5f}", f"{abs(one['loss'] - eight['loss']):.0e}"]
            + [apart(one["weights"], eight["weights"]), apart(one["ema"], eight["ema"]), eight["tokens"]]
        )
        print(*rows[-1], sep="  ", flush=True)
        jax.clear_caches()  # each is another model
    if arguments.out:
        text = f"# Families on 8 devices\n\n`python -m benchmarks.families_on_meshes`: {versions()}.\n\n"
        arguments.out.write_text(text + markdown_table(HEAD, rows, left=(0,)) + "\n")


if __name__ == "__main__":
    main()
