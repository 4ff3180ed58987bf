"""The embedded policy on this device against the CPU in float32: log-probs of played episodes, and greedy generations.
Part of `benchmarks.gpu`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_measuring import Section, emit, guarded
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.models import decoder
from hintsd_jax.models.sharding import make_mesh
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.sampling import Engine, EngineConfig, Sampling
from hintsd_jax.tools.desk_policy.demonstrator import Demonstrator

ROWS, GENERATED = 64, 32


class Greedy:
    """One generation after a prompt; see `sampling.Job`."""

    def __init__(self, prompt: Sequence[int], context: int):
        self.prompt, self.context, self.ids = prompt, context, []
        self.sampling, self.key = Sampling(0.0, 1.0, 0, GENERATED), np.zeros(2, np.uint32)

    def begin(self, slot: int) -> Sequence[int]:
        return self.prompt

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        self.ids = ids

    def collect(self) -> None:
        return None


@partial(jax.jit, static_argnums=1)
def scores(params, policy, tokens_BT):
    """The log-probs of all tokens but the first, and the likeliest ones in their places: [B, T - 1] each."""
    logits_BTV = decoder.project(params, policy, decoder.forward(params, policy, tokens_BT)[:, :-1])
    logp_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    return jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0], jnp.argmax(logp_BTV, axis=-1)


def measure(section: Section, path: Path) -> None:
    rows = 4 if section.sizes.slots < 8 else ROWS
    tokenizer = load_tokenizer(path)
    chat = ChatFormat(tokenizer)
    player = Demonstrator(chat, 0)
    episodes = [player.play(generate_task(0, index, 4, 3)) for index in range(rows)]
    length = max(len(episode.tokens) for episode in episodes)
    tokens_BT = np.zeros((rows, length), np.int32)
    for b, episode in enumerate(episodes):
        tokens_BT[b, : len(episode.tokens)] = episode.tokens
    real_BT = np.arange(1, length)[None] < np.array([len(episode.tokens) for episode in episodes])[:, None]
    prompts = [list(episode.tokens[: step.start]) for episode in episodes for step in episode.steps[::3]]

    def play(device, dtype: str, precision: str | None = None):
        """Log-probs, likeliest tokens, and a greedy generation after every prompt."""
        with (
            jax.default_device(device),
            jax.default_matmul_precision(precision) if precision else contextlib.nullcontext(),
        ):
            mesh = make_mesh(devices=[device])
            policy, params = load_policy(path, mesh, compute_dtype=dtype, remat=False)
            logp_BT, best_BT = map(np.asarray, scores(params, policy, tokens_BT))
            context = -(-(length + GENERATED + 1) // 64) * 64
            engine = Engine(policy, EngineConfig(16, context, GENERATED, prefill_buckets=(256,)), chat.stop_ids, mesh)
            jobs = [Greedy(prompt, context) for prompt in prompts]
            engine.run(params, jobs)
            return logp_BT, best_BT, [job.ids for job in jobs]

    logp_BT, best_BT, ids = play(jax.devices("cpu")[0], "float32")
    emit(
        "reference: CPU, float32",
        note=f"{rows} played Desk episodes, {real_BT.sum():,} tokens;"
        f" {len(prompts)} greedy generations, {sum(map(len, ids)):,} tokens",
    )
    for name, dtype, precision in (
        ("float32", "float32", None),
        ("float32, highest", "float32", "highest"),
        ("bfloat16", "bfloat16", None),
    ):
        with guarded(name):
            other_BT, likeliest_BT, generated = play(jax.devices()[0], dtype, precision)
            off = np.abs(other_BT - logp_BT)[real_BT]
            agree = (likeliest_BT == best_BT)[real_BT].mean()
            same = np.mean([a == b for a, b in zip(ids, generated, strict=True)])
            in_place = [x == y for a, b in zip(ids, generated, strict=True) for x, y in zip(a, b, strict=False)]
            alike = sum(in_place) / sum(map(len, ids))
            emit(
                f"this device, {name}",
                note=f"log-probs apart by {off.max():.1e} at most, {off.mean():.1e} on average; likeliest token the"
                f" same at {agree:.2%}; greedy generations: {same:.1%} the same, {alike:.2%} of their tokens in place",
            )
