"""Updates of ours against PyTorch's: the same weights, episode, targets, loss, optimizer and threads.

  .cache/parity-venv/bin/python -m benchmarks.update                      all cases; needs requirements-parity.txt
  python -m benchmarks.update --only=smallest --without-peers             what the test runs

One failed episode with some late targets; reverse KL on the student's top 100 and the tail, gradient, AdamW and EMA.
"rows" is what most trainers do: a row of the student and one of the teacher for every target. "best" is the best that
PyTorch can do with transformers' models: one row of the student for all targets, a row of the teacher for each. The
losses must agree. All take turns in one process; times are medians, the claim is their ratio. Peak memory is what a
process of its own holds at most in its second update, beyond what it held before it loaded the weights. The share of
the matmul rate counts what an update needs (recomputed activations do not count) and the rate of one large product,
taken in the same rounds.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import cases
from benchmarks.pages import markdown_table
from benchmarks.rollout import MEDIUM, TINY
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh
from hintsd_jax.training.batching import BatchShapes, make_batches
from hintsd_jax.training.examples import Branch, Example
from hintsd_jax.training.loss_parts import Divergence
from hintsd_jax.training.losses import Loss
from hintsd_jax.training.state import OptimConfig, create
from hintsd_jax.training.train_step import update

TOP_K, RATE, EMA_DECAY, TARGETS, FEEDBACK, ACTION = 100, 1e-5, 0.999, 3, 24, 32
PEERS = ("rows", "best")


class Case(NamedTuple):
    """An episode of `tokens`, with its targets in the last quarter; `product`: the size of a large matrix."""

    name: str
    policy: PolicyConfig
    tokens: int
    product: int = 2048

    def example(self) -> Example:
        rng = np.random.default_rng(0)
        ids = lambda size: tuple(rng.integers(1, self.policy.vocab_size, size).tolist())
        branches = []
        for number in range(TARGETS):
            stop = self.tokens - (TARGETS - 1 - number) * (self.tokens // (4 * TARGETS))
            start = stop - ACTION
            where = (start - 4, ids(FEEDBACK))
            branches.append(Branch(number + 1, start, stop, *where, (-1.0,) * ACTION, {"divergence": 1.0}))
        return Example(0, ids(self.tokens), tuple(branches))

    def shapes(self) -> BatchShapes:
        branches, actions = TARGETS * (FEEDBACK + ACTION), TARGETS * ACTION
        return BatchShapes((self.tokens,), (branches,), (actions,), batch_size=1)

    def needed_flops(self) -> float:
        """Products of student and teacher: 2 a weight and token forward and 4 backward; 4 a head's channel and pair of
        tokens forward and 10 backward (the scores again, and four products); logits of actions alone.
        """
        cfg, trunk = self.policy, self.tokens
        heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        weights = cfg.num_layers * cfg.d_model * (2 * heads + 2 * kv_heads + 3 * cfg.d_ff)
        head, read = cfg.d_model * cfg.vocab_size, TARGETS * (FEEDBACK + ACTION)
        pairs = trunk * trunk / 2
        past = sum(branch.branch_tokens * branch.prefix_length for branch in self.example().branches)
        student = 6 * (weights * trunk + head * TARGETS * ACTION) + 14 * cfg.num_layers * heads * pairs
        teacher = 2 * (weights * (trunk + read) + head * TARGETS * ACTION)
        return student + teacher + 4 * cfg.num_layers * heads * (pairs + past)


CASES = (
    Case("smallest", dataclasses.replace(TINY, vocab_size=256), 256, 64),
    Case("50M, 2,048 tokens", dataclasses.replace(MEDIUM, remat=True), 2048),
    Case("50M, 4,096 tokens", dataclasses.replace(MEDIUM, remat=True), 4096),
)


class Ours:
    """params: NumPy arrays, of student and teacher."""

    def __init__(self, case: Case, params: Any):
        loss, mesh = Loss((Divergence(top_k=TOP_K),)), make_mesh(devices=jax.devices()[:1])
        optim = OptimConfig(lr=RATE, schedule="constant", ema_decay=EMA_DECAY, clip_norm=1.0)
        self.state = create(jax.device_put(params), optim)
        batches = make_batches([case.example()], case.shapes(), loss).batches
        self._update = functools.partial(
            update, None, batches=batches, policy=case.policy, loss=loss, optim=optim, mesh=mesh
        )

    def run(self) -> float:
        self.state, metrics, _ = self._update(self.state)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def initial(case: Case) -> Any:
    return jax.tree.map(np.asarray, decoder.init_params(case.policy, jax.random.key(0)))


def updates(case: Case, params: Any, names: Sequence[str]) -> dict[str, Callable[[], float]]:
    """By name, each with a state of its own."""
    made: dict[str, Callable[[], float]] = {"ours": Ours(case, params).run} if "ours" in names else {}
    for name in names:
        if name in PEERS:
            from benchmarks import update_peers

            made[name] = getattr(update_peers.Peer(case, params), name)
    return made


def measure(case: Case, rounds: int, with_peers: bool) -> dict:
    names = ("ours", *(PEERS if with_peers else ()))
    runs = updates(case, initial(case), names)
    losses = {name: run() for name, run in runs.items()}  # compiles
    square = jax.random.normal(jax.random.key(1), (case.product, case.product))
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(square))
    runs["product"] = lambda: float(product(square)[0, 0])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    # a ratio of each round, so that all have had the same neighbours
    ratios = {name: float(np.median(np.divide(seconds[name], seconds["ours"]))) for name in names[1:]}
    rates = 2 * case.product**3 / np.array(seconds.pop("product"))
    share = float(np.median(case.needed_flops() / np.array(seconds["ours"]) / rates))
    return {
        "case": case.name,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "ratios": ratios,
        "losses": losses,
        "share_of_matmul_rate": share,
        "matmul_gflops": float(np.median(rates)) / 1e9,
        "gib": {name: _memory_of(case.name, name) for name in names},
        "rounds": rounds,
        "load": os.getloadavg()[0],
    }


def _memory_of(case: str, side: str) -> float:
    """Peak GiB of one side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.update", f"--only={case}", f"--memory-of={side}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(case: Case, side: str) -> float:
    """Peak GiB of this process in its second update, beyond what it held before the weights."""
    if side in PEERS:
        from benchmarks import update_peers  # noqa: F401 - the library itself does not count
    params, before = initial(case), _status("VmRSS")
    run = updates(case, params, [side])[side]
    del params
    run()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again: compiling does not count
    run()
    return (_status("VmHWM") - before) / 2**20


def _status(name: str) -> int:
    """KiB, of this process."""
    (kib,) = re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kib)


def table(results: list[dict]) -> str:
    sides = ("ours", *PEERS)
    head = ["case", *(f"{name} s" for name in sides), *(f"{name} / ours" for name in PEERS)]
    head += [*(f"{name} GiB" for name in sides), "share of matmul rate", "rounds", "load"]
    cell = lambda values, name: f"{values[name]:.2f}" if name in values else ""
    rows = [
        [row["case"], *(cell(row["seconds"], name) for name in sides), *(cell(row["ratios"], name) for name in PEERS)]
        + [*(cell(row["gib"], name) for name in sides), f"{row['share_of_matmul_rate']:.0%}"]
        + [row["rounds"], f"{row['load']:.0f}"]
        for row in results
    ]
    return markdown_table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cases.parser(__doc__ or "", "update", [case.name for case in CASES], rounds=3)
    parser.add_argument("--memory-of", choices=["ours", *PEERS], help="print that side's peak memory, nothing else")
    chosen = parser.parse_args(arguments)
    if chosen.memory_of:
        (case,) = (case for case in CASES if [case.name] == chosen.only)
        print(memory(case, chosen.memory_of))
        return
    cases.measure_all(chosen, CASES, measure, table)


if __name__ == "__main__":
    main()
