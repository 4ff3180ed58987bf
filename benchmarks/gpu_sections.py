"""The sections of `benchmarks.gpu`, one to a process: a policy's shape and what the card can do in, measured rows out
on stdout.

Programs, layouts and shapes are a run's own, and so is what else lies on the device meanwhile: weights, adapter and its
EMA, the optimizer's moments, the cache of all slots.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import re
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_work as work
from benchmarks.gpu import MARK, REPO
from hintsd_jax.checkpoints.safetensors import read_json
from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import LoraConfig, PolicyConfig
from hintsd_jax.models.sharding import make_mesh, put_rows
from hintsd_jax.sampling import programs
from hintsd_jax.sampling.serving import ServingLayout
from hintsd_jax.training import batching as packing
from hintsd_jax.training import state
from hintsd_jax.training import train_step as step
from hintsd_jax.training.losses import LossConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens, as in `hintsd_jax.config`. fills: of each slot when it decodes. prefills: (bucket, tokens before it).
    updates: (length, stream, actions). lengths: rows of attention alone. repeats: decoded tokens of one timed call."""

    slots: int = 8
    context: int = 24_576
    fills: tuple[int, ...] = (1000, 8000, 24_000)
    many: tuple[int, int, tuple[int, ...]] = (32, 4096, (1000, 3800))
    prefills: tuple[tuple[int, int], ...] = ((1024, 0), (1024, 8000), (256, 0), (256, 8000), (4096, 0))
    updates: tuple[tuple[int, int, int], ...] = (
        (8192, 768, 256),
        (24_576, 3072, 1536),
        (4096, 768, 256),
        (8192, 3072, 1536),
    )
    lengths: tuple[int, ...] = (4096, 8192, 24_576)
    actions: int = 1024
    decoded: int = 16
    square: int = 8192
    copied: int = 2 * GIB


SMALL = Sizes(
    slots=2, context=96, fills=(16, 64), many=(3, 64, (32,)), prefills=((16, 0), (16, 24)), updates=((64, 48, 16), (96, 48, 16)),
    lengths=(64, 96), actions=32, decoded=4, square=256, copied=2**20,
)  # fmt: skip
STREAM_TARGETS = 2  # that share the stream of an update; as many words of feedback each as remain


def emit(what: str, **row: Any) -> None:
    print(MARK + json.dumps({"what": what, **row}), flush=True)


@contextlib.contextmanager
def guarded(what: str):
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
        began = time.perf_counter()
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


def temp(program: jax.stages.Compiled) -> int:
    """Bytes beside the arguments."""
    sizes = program.memory_analysis()
    return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def memory(program: jax.stages.Compiled | None = None) -> str:
    """GiB given out now and at most so far (a CPU does not count), and what a program takes beside its arguments."""
    found = jax.devices()[0].memory_stats() or {}
    parts = (
        [f"held {found['bytes_in_use'] / GIB:.2f} GiB, peak {found['peak_bytes_in_use'] / GIB:.2f}"] if found else []
    )
    return note(*parts, f"{temp(program) / GIB:.2f} left to the program" if program else "")


def note(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def random_like(tree: Any, dtype: str, seed: int = 0) -> Any:
    """Random weights for a tree of shapes, made on the device in their last dtype: norms are float32 ones, the rest has
    unit gain.
    """

    @partial(jax.jit, static_argnums=(1, 2))
    def normal(key, shape, fan_in):
        return (jax.random.normal(key, shape, jnp.bfloat16) * fan_in**-0.5).astype(dtype)

    def make(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, jnp.float32)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(jax.tree_util.keystr(path).encode()))
        return normal(key, leaf.shape, leaf.shape[-1] if path[-1].key == "embedding" else leaf.shape[-2])

    return jax.tree_util.tree_map_with_path(make, tree)


class Section:
    """What a run holds on the device, and the sections that use it."""

    optim = state.OptimConfig()

    def __init__(self, shape: Path, ceilings: dict[str, float], sizes: Sizes):
        self.shape, self.sizes, self.ceilings = shape, sizes, ceilings
        adapter = LoraConfig(32, 64.0, 0.05)
        self.policy = PolicyConfig.from_hf(read_json(shape), compute_dtype="bfloat16", lora=adapter)
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.rng = np.random.default_rng(0)

    def of_ceiling(self, rate: float, ceiling: str) -> float | None:
        return rate / self.ceilings[ceiling] if ceiling in self.ceilings else None

    def hold(self, slots: int, context: int) -> None:
        """Weights, train state and a full cache, all random."""
        policy = self.policy
        shapes = jax.eval_shape(partial(decoder.init_params, policy), jax.random.key(0))
        self.frozen = jax.device_put(random_like(shapes, policy.compute_dtype), jax.NamedSharding(self.mesh, jax.P()))
        self.state = state.create(
            random_like(jax.eval_shape(partial(lora.init_adapter, policy), jax.random.key(0)), "float32", 1), self.optim
        )
        self.served = ServingLayout(policy, self.mesh)(lora.attach(self.frozen, self.state.params))
        fill = jax.jit(
            lambda key: jax.random.normal(
                key, (slots, context, policy.num_kv_heads, policy.head_dim), policy.compute_dtype
            )
        )
        keys = jax.random.split(jax.random.key(2), 2 * policy.num_layers)
        self.cache = [(fill(keys[2 * n]), fill(keys[2 * n + 1])) for n in range(policy.num_layers)]

    # ceilings

    def measure_ceilings(self) -> None:
        device = jax.devices()[0]
        about = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")} | {
            "python": sys.version.split()[0]
        }
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
        emit(
            "device",
            card=device.device_kind,
            versions=about,
            note=f"{limit / GIB:.1f} GiB for jax; {device.client.platform_version.splitlines()[0]}",
        )
        square = self.sizes.square
        for name, dtype, precision in (
            ("bfloat16", "bfloat16", None),
            ("float32 (as jax has it: TF32 on this card)", "float32", None),
            ("float32, highest", "float32", "highest"),
        ):
            with guarded(f"product {name}"):
                a, b = (jax.random.normal(jax.random.key(n), (square, square), dtype) for n in range(2))
                product = jax.jit(partial(jnp.matmul, precision=precision))
                ms = median_ms(lambda: product(a, b), inner=10)
                rate = 2 * square**3 / ms / 1e9
                emit(f"product of {square:,} x {square:,}, {name}", ms=ms, **{"TFLOP/s": rate}, ceiling={name: rate})
        x = jax.random.bits(jax.random.key(0), (self.sizes.copied // 4,), "uint32")
        for name, call in (("copy", jnp.copy), ("elementwise kernel", lambda x: x ^ 1)):
            with guarded(name):
                run = jax.jit(call)
                ms = median_ms(lambda: run(x), inner=10)
                rate = 2 * x.nbytes / ms / 1e6
                ceiling = {"copy": rate} if name == "copy" else {}
                emit(f"{name} of {x.nbytes / GIB:.3g} GiB, read and written", ms=ms, **{"GB/s": rate}, ceiling=ceiling)

    # serving

    def lanes(self, slots: int, fill: int) -> programs.DecodeState:
        """All slots sample as many tokens as a timed call has, at the settings of a rollout."""
        A, ids = self.sizes.actions, lambda *shape: self.rng.integers(1, self.policy.vocab_size, shape).astype(np.int32)
        full = lambda value, dtype: np.full(slots, value, dtype)
        return programs.DecodeState(
            pending_B=ids(slots), position_B=full(fill, np.int32), active_B=full(True, bool), count_B=full(0, np.int32),
            limit_B=full(self.sizes.decoded, np.int32), tokens_BA=ids(slots, A), logprobs_BA=self.rng.normal(size=(slots, A)).astype(np.float32),
            key_B2=self.rng.integers(1, 2**31, (slots, 2)).astype(np.uint32), temperature_B=full(0.6, np.float32),
            top_p_B=full(1.0, np.float32), top_k_B=full(0, np.int32),
        )  # fmt: skip

    def measure_decode(
        self, slots: int | None = None, context: int | None = None, fills: tuple[int, ...] | None = None
    ) -> None:
        slots, context, fills = slots or self.sizes.slots, context or self.sizes.context, fills or self.sizes.fills
        self.hold(slots, context)
        with jax.set_mesh(self.mesh):
            program, seconds = compiled(
                programs.decode.lower(
                    self.served, self.policy, (), self.cache, self.lanes(slots, fills[0]), np.int32(slots)
                )
            )
            for fill in fills:
                with guarded(f"decode at {fill:,}"):
                    lanes = self.lanes(slots, fill)

                    def call():
                        self.cache, _, steps = program(self.served, self.cache, lanes, np.int32(slots))
                        return steps

                    taken = int(call())
                    ms = median_ms(call) / taken
                    needed = work.decode_bytes(self.policy, [fill + taken // 2] * slots)
                    rate = needed / ms / 1e6
                    values = {
                        "tokens/s": slots * 1e3 / ms,
                        "GB/s": rate,
                        "of ceiling": self.of_ceiling(rate, "copy"),
                        "compile s": seconds,
                    }
                    emit(
                        f"decode, {slots} slots x {context:,}, {fill:,} tokens in each", ms=ms, **values,
                        note=note(f"ms a token of every slot; {needed / GIB:.2f} GiB to read", memory(program)),
                    )  # fmt: skip
                    seconds = None
        if fills is self.sizes.fills:
            with guarded("plan while rolling out"):
                plan = self.plan()
                emit(
                    "memory while rolling out",
                    note=note(
                        memory(),
                        f"plan {plan.total('rollout') / GIB:.2f}: decode {plan.decode / GIB:.2f}, prefill {plan.prefill / GIB:.2f}",
                    ),
                )

    def measure_many(self) -> None:
        self.measure_decode(*self.sizes.many)

    def measure_prefill(self) -> None:
        slots, context = self.sizes.slots, self.sizes.context
        self.hold(slots, context)
        with jax.set_mesh(self.mesh):
            buckets = list(dict.fromkeys(bucket for bucket, _ in self.sizes.prefills))
            ids = {L: self.rng.integers(1, self.policy.vocab_size, (1, L)).astype(np.int32) for L in buckets}
            at = lambda n: np.full(1, n, np.int32)
            made = self.compile_all(
                {L: programs.prefill.lower(self.served, self.policy, self.cache, ids[L], at(0), at(0)) for L in buckets}
            )
            for bucket, start in self.sizes.prefills:
                with guarded(f"prefill of {bucket:,} after {start:,}"):
                    program, seconds = made[bucket]

                    def call():
                        self.cache = program(self.served, self.cache, ids[bucket], at(start), at(slots - 1))
                        return self.cache

                    ms = median_ms(call)
                    rate = work.prefill(self.policy, 1, bucket, start) / ms / 1e9
                    values = {
                        "tokens/s": bucket * 1e3 / ms,
                        "TFLOP/s": rate,
                        "of ceiling": self.of_ceiling(rate, "bfloat16"),
                        "compile s": seconds,
                    }
                    emit(f"prefill of 1 x {bucket:,} after {start:,}", ms=ms, **values, note=memory(program))

    # training

    def compile_all(self, lowered: dict[Any, jax.stages.Lowered]) -> dict[Any, tuple[jax.stages.Compiled, float]]:
        """Side by side: a compiler keeps few cores busy. One that fails is left out, with a row."""
        with ThreadPoolExecutor() as pool:
            futures = {name: pool.submit(compiled, one) for name, one in lowered.items()}
        made = {}
        for name, future in futures.items():
            with guarded(f"compiling {name}"):
                made[name] = future.result()
        return made

    def batch(self, length: int, stream: int, actions: int) -> packing.Batch:
        """One episode that fills all of a bucket, its targets towards the end."""
        ids = lambda size: tuple(int(i) for i in self.rng.integers(1, self.policy.vocab_size, size))
        size, words = actions // STREAM_TARGETS, (stream - actions) // STREAM_TARGETS
        stops = [length - (STREAM_TARGETS - 1 - n) * (size + 8) for n in range(STREAM_TARGETS)]
        branches = tuple(
            packing.Branch(n + 1, stop - size, stop, stop - size - 4, ids(words), (-1.0,) * size)
            for n, stop in enumerate(stops)
        )
        row = packing.Row(0, ids(length), branches, key=(1, 2))
        packed = packing.pack([row], packing.Shapes((length,), (stream,), (actions,), rows=1))
        if packed.padding or len(packed.batches) != 1:
            raise ValueError(
                f"a batch of {length} + {stream} has {packed.padding} tokens of padding in {len(packed.batches)} parts"
            )
        return put_rows(packed.batches[0], self.mesh)

    def measure_update(self) -> None:
        self.hold(self.sizes.slots, self.sizes.context)
        loss, policy = LossConfig(), self.policy
        with jax.set_mesh(self.mesh):
            batches = {sizes: self.batch(*sizes) for sizes in self.sizes.updates}
            total = step.zeros(self.state.params, loss)
            lower = partial(step.accumulate.lower, self.frozen, self.state)
            made = self.compile_all(
                {sizes: lower(total, batch, policy=policy, loss=loss) for sizes, batch in batches.items()}
            )
            for sizes in sorted(made):  # the allocator's peak only grows: short ones first
                length, stream, actions = sizes
                name = f"update of 1 x {length:,} + {stream:,}"
                with guarded(name):
                    program, seconds = made[sizes]
                    accumulator = step.zeros(self.state.params, loss)

                    def call():
                        nonlocal accumulator
                        accumulator = program(self.frozen, self.state, accumulator, batches[sizes])
                        return accumulator

                    ms = median_ms(call)
                    if not math.isfinite(float(accumulator.sums["loss"])):
                        raise ValueError(f"the loss is {float(accumulator.sums['loss'])}")
                    size = stream // STREAM_TARGETS
                    seen = [int(n) for n in dict.fromkeys(np.asarray(batches[sizes].prefix_length_BM)[0].tolist())]
                    rate = work.update(policy, length, [(n, size) for n in seen], actions) / ms / 1e9
                    values = {
                        "tokens/s": (2 * length + stream) * 1e3 / ms,
                        "TFLOP/s": rate,
                        "of ceiling": self.of_ceiling(rate, "bfloat16"),
                    }
                    emit(
                        name,
                        ms=ms,
                        **values,
                        **{"compile s": seconds},
                        note=note(memory(program), self.logits(program, length)),
                    )
            with guarded("apply"):
                call = lambda: step.apply(jax.tree.map(jnp.copy, self.state), accumulator, optim=self.optim)
                emit("apply, and a copy of the state", ms=median_ms(call))
        with guarded("plan while updating"):
            plan = self.plan()
            emit(
                "memory while updating",
                note=note(memory(), f"plan {plan.total('update') / GIB:.2f}: update {plan.update / GIB:.2f}"),
            )

    def logits(self, program: jax.stages.Compiled, length: int) -> str:
        """The largest array along the vocabulary in a compiled program, but for the table itself."""
        V, D = self.policy.vocab_size, self.policy.d_model
        shapes = {
            tuple(map(int, found.split(",")))
            for found in re.findall(rf"\[((?:\d+,)*{V}(?:,\d+)*)\]", program.as_text())
        }
        most = max((math.prod(shape) // V for shape in shapes if D not in shape), default=0)
        return f"at most {most:,} tokens x {V:,} at once ({4 * most * V / GIB:.2f} GiB; of all tokens {4 * length * V / GIB:.2f})"

    def plan(self):
        """The arithmetic of `--mode=plan` for one GPU, at these shapes. Needs ml_collections."""
        from hintsd_jax.configs import bfcl_qwen3_4b
        from hintsd_jax.tools.planner.devices import find
        from hintsd_jax.tools.planner.fit import Planner

        config, sizes = bfcl_qwen3_4b.get_config(), self.sizes
        config.rollout.slots, config.rollout.context, config.hindsight.context = (
            sizes.slots,
            sizes.context,
            sizes.context,
        )
        config.rollout.prefill_buckets = tuple(sorted({bucket for bucket, _ in sizes.prefills}))
        lengths, streams, actions = (tuple(sorted(set(part))) for part in zip(*sizes.updates, strict=True))
        config.batch.length_buckets, config.batch.branch_buckets, config.batch.action_buckets = (
            lengths,
            streams,
            actions,
        )
        return Planner(self.shape)(config, find("h100:1"))

    # attention alone

    def measure_attention(self) -> None:
        from benchmarks.gpu_attention import measure

        measure(self)

    def measure_precision(self) -> None:
        from benchmarks.gpu_precision import measure

        measure(self, REPO / "assets" / "desk-policy")


def main(section: str, shape: str, ceilings: str, *rest: str) -> None:
    with guarded(section):
        found = Section(Path(shape), json.loads(ceilings), SMALL if "--small" in rest else Sizes())
        getattr(found, f"measure_{section}")()


if __name__ == "__main__":
    main(*sys.argv[1:])
