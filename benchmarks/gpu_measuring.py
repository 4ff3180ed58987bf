"""What the sections of `benchmarks.gpu` measure with: rows on stdout, times, memory, random weights, the sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import MARK
from hintsd_jax.checkpoints.safetensors import read_json
from hintsd_jax.models.config import LoraConfig, PolicyConfig
from hintsd_jax.models.sharding import make_mesh
from hintsd_jax.tools.planner.compiler import temporary_bytes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens, as in the config. decodes: (slots, context, tokens in each slot), the last one of `slots` and `context`,
    which all other sections have. prefills: (bucket, tokens before it). updates: (length, branch tokens, action
    tokens). lengths: rows of attention alone. decoded: tokens of one timed call.
    """

    slots: int = 8
    context: int = 24_576
    decodes: tuple[tuple[int, int, tuple[int, ...]], ...] = (
        (16, 8704, (1000, 8000)),
        (64, 2560, (2000,)),
        (8, 24_576, (24_000,)),
    )
    prefills: tuple[tuple[int, int], ...] = ((1024, 0), (1024, 8000), (256, 0), (256, 8000))
    updates: tuple[tuple[int, int, int], ...] = ((4096, 768, 256), (8192, 3072, 1536))
    lengths: tuple[int, ...] = (4096, 8192)
    actions: int = 1024
    decoded: int = 256
    square: int = 8192
    copied: int = 2 * GIB


SMALL = Sizes(
    slots=2,
    context=96,
    decodes=((3, 64, (32,)), (2, 96, (16, 64))),
    prefills=((16, 0), (16, 24)),
    updates=((64, 48, 16), (96, 48, 16)),
    lengths=(64, 96),
    actions=32,
    decoded=4,
    square=256,
    copied=2**20,
)


class Section:
    """What every section knows: the policy's shape, the sizes, and what the card can do."""

    def __init__(self, shape: Path, ceilings: dict[str, float], sizes: Sizes):
        self.shape, self.sizes, self.ceilings = shape, sizes, ceilings
        adapter = LoraConfig(32, 64.0, 0.05)
        self.policy = PolicyConfig.from_hf(read_json(shape), compute_dtype="bfloat16", lora=adapter)
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.rng = np.random.default_rng(0)

    def of_ceiling(self, rate: float, ceiling: str) -> float | None:
        return rate / self.ceilings[ceiling] if ceiling in self.ceilings else None


def emit(what: str, **row: Any) -> None:
    print(MARK + json.dumps({"what": what, **row}), flush=True)


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """A measurement that fails is a row that says so; the next ones go on. Out of memory is the likeliest."""
    try:
        yield
    except Exception as error:
        emit(what, error=f"{type(error).__name__}: {error}".splitlines()[0][:300])


def median_ms(call: Callable[[], Any], inner: int = 1) -> float:
    """Milliseconds of one of `inner` calls: medians of 5 rounds, after one that is not counted; of 2 where one takes
    more than 3 s.
    """
    seconds: list[float] = []
    jax.block_until_ready(call())
    while len(seconds) < (5 if not seconds or seconds[0] < 3 else 2):
        began, out = time.perf_counter(), None
        for _ in range(inner):
            out = call()
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - began) / inner)
    return 1e3 * float(np.median(seconds))


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """And the seconds it took."""
    began = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - began


def memory(program: jax.stages.Compiled | None = None) -> str:
    """GiB given out now and at most so far (a CPU does not count), and what a program takes beside its arguments."""
    stats = jax.devices()[0].memory_stats() or {}
    now = f"in use {stats['bytes_in_use'] / GIB:.2f} GiB, peak {stats['peak_bytes_in_use'] / GIB:.2f}" if stats else ""
    return note(now, f"{temporary_bytes(program) / GIB:.2f} left to the program" if program else "")


def note(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def random_like(tree: Any, dtype: str, seed: int = 0) -> Any:
    """Random weights for a tree of shapes, made on the device in their last dtype: norms are float32 ones, the rest has
    unit gain.
    """

    @partial(jax.jit, static_argnums=(1, 2))
    def normal(key, shape, fan_in):
        return (jax.random.normal(key, shape, jnp.bfloat16) * fan_in**-0.5).astype(dtype)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, jnp.float32)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(jax.tree_util.keystr(path).encode()))
        return normal(key, leaf.shape, leaf.shape[-1] if path[-1].key == "embedding" else leaf.shape[-2])

    return jax.tree_util.tree_map_with_path(draw, tree)
