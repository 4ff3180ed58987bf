"""Rollouts of ours against PyTorch's: the same weights, prompts, observations, lengths and threads.

  .cache/parity-venv/bin/python -m benchmarks.rollout                      all cases; needs requirements-parity.txt
  python -m benchmarks.rollout --only=smallest --without-peers             what the test runs

Dialogues of some turns: a prompt, then actions of a fixed number of tokens at temperature 1, each answered by an
observation. "per turn" is what most trainers do: transformers' `generate` on the whole context of every turn. "kept
cache" is the best that PyTorch can do with transformers' models: one batch whose cache is kept from turn to turn.
What we sample is scored by the peer's model: the log-probabilities must agree. All take turns in one process; times are
medians, the claim is their ratio.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import cases
from benchmarks.pages import markdown_table
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.sampling import Engine, EngineConfig, Sampling

_REST = {"rope_theta": 1e4, "norm_eps": 1e-6, "tie_embeddings": True, "max_positions": 32768, "remat": False}
EMBEDDED = PolicyConfig(
    vocab_size=1024, num_layers=4, d_model=96, num_heads=2, num_kv_heads=1, head_dim=64, d_ff=256, **_REST
)  # as assets/desk-policy
MEDIUM = PolicyConfig(
    vocab_size=4096, num_layers=12, d_model=512, num_heads=8, num_kv_heads=4, head_dim=64, d_ff=2048, **_REST
)
TINY = dataclasses.replace(EMBEDDED, vocab_size=64, num_layers=2, d_model=32, head_dim=16, d_ff=48)


class Case(NamedTuple):
    """`slots` dialogues at once; the number of tokens of prompt, action and observation."""

    name: str
    policy: PolicyConfig
    slots: int
    turns: int
    prompt: int
    action: int
    observation: int
    buckets: tuple[int, ...]
    rows: int

    @property
    def context(self) -> int:
        return self.prompt + self.turns * self.action + (self.turns - 1) * self.observation

    def texts(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Prompts, and the observations of every dialogue, different ones."""
        draw = lambda *shape: np.random.default_rng(0).integers(1, self.policy.vocab_size, shape).tolist()
        return draw(self.slots, self.prompt), draw(self.slots, self.turns - 1, self.observation)


CASES = (
    Case("smallest", TINY, 2, 2, 9, 3, 4, (4, 16), 2),
    Case("embedded", EMBEDDED, 16, 8, 130, 32, 48, (16, 64), 16),
    Case("50M", MEDIUM, 16, 8, 130, 32, 48, (16, 64), 16),
    Case("50M, 2 turns", MEDIUM, 16, 2, 130, 32, 48, (16, 64), 16),
    Case("50M, 4,000 tokens", MEDIUM, 16, 2, 4000, 32, 48, (16, 64, 256), 16),
)


class Dialogue:
    """A job of the engine, see `sampling.jobs.Job`."""

    def __init__(self, case: Case, number: int, prompt: Sequence[int], observations: Sequence[Sequence[int]]):
        self.context, self.sampling = case.context + 1, Sampling(1.0, 1.0, 0, case.action)
        self.key = np.asarray(jax.random.key_data(jax.random.key(number)))
        self.tokens, self.logprobs, self.sampled = list(prompt), [], []
        self._observations = list(observations)

    def begin(self, slot: int) -> Sequence[int]:
        return tuple(self.tokens)

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        self.sampled += range(len(self.tokens), len(self.tokens) + len(ids))
        self.tokens += ids
        self.logprobs += logprobs

    def collect(self) -> Sequence[int] | None:
        if not self._observations:
            return None
        self.tokens += self._observations[0]
        return self._observations.pop(0)


def measure(case: Case, rounds: int, with_peers: bool) -> dict:
    params = jax.tree.map(np.asarray, decoder.init_params(case.policy, jax.random.key(0)))
    engine = Engine(
        case.policy,
        EngineConfig(case.slots, case.context + 1, case.action, case.buckets, case.rows, refill_fraction=1.0),
        stop_ids=(),
    )
    weights, (prompts, observations) = jax.device_put(params), case.texts()

    def ours() -> list[Dialogue]:
        jobs = [Dialogue(case, n, *texts) for n, texts in enumerate(zip(prompts, observations, strict=True))]
        engine.run(weights, jobs)
        return jobs

    runs: dict[str, Callable[[], object]] = {"ours": ours}
    result: dict = {"case": case.name, "sampled": case.slots * case.turns * case.action}
    jobs = ours()  # compiles
    if with_peers:
        from benchmarks import rollout_peers

        peer = rollout_peers.Peer(case, params)
        result["logprob_difference"] = peer.difference(jobs[0].tokens, jobs[0].sampled, jobs[0].logprobs)
        runs |= {"per turn": peer.per_turn, "kept cache": peer.kept_cache}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    # a ratio of each round, so that both have had the same neighbours
    ratios = {name: float(np.median(np.divide(seconds[name], seconds["ours"]))) for name in runs if name != "ours"}
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {**result, "seconds": medians, "ratios": ratios, "rounds": rounds, "load": os.getloadavg()[0]}


def table(results: list[dict]) -> str:
    peers = ("per turn", "kept cache")
    head = ["case", "ours s", *(f"{name} s" for name in peers), *(f"{name} / ours" for name in peers), "rounds", "load"]
    cell = lambda values, name: f"{values[name]:.2f}" if name in values else ""
    rows = [
        [row["case"], *(cell(row["seconds"], name) for name in ("ours", *peers))]
        + [cell(row["ratios"], name) for name in peers]
        + [row["rounds"], f"{row['load']:.0f}"]
        for row in results
    ]
    return markdown_table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cases.parser(__doc__ or "", "rollout", [case.name for case in CASES], rounds=5)
    cases.measure_all(parser.parse_args(arguments), CASES, measure, table)


if __name__ == "__main__":
    main()
