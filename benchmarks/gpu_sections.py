"""The sections of `benchmarks.gpu`, one to a process: a policy's shape and what the card can do in, measured rows out
on stdout.

Programs, layouts and shapes are a run's own, and so is what else lies on the device meanwhile: weights, adapter and its
EMA, the optimizer's moments, the cache of all slots.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_attention, gpu_precision
from benchmarks import gpu_work as work
from benchmarks.gpu_measuring import (
    GIB,
    SMALL,
    Section,
    Sizes,
    compiled,
    emit,
    guarded,
    median_ms,
    memory,
    note,
    random_like,
)
from benchmarks.pages import REPO
from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.configs import bfcl_qwen3_4b
from hintsd_jax.models import decoder, lora
from hintsd_jax.models.sharding import put_batch
from hintsd_jax.sampling import programs
from hintsd_jax.sampling.serving import ServingLayout
from hintsd_jax.tools.planner.devices import find
from hintsd_jax.tools.planner.fit import Plan, Planner
from hintsd_jax.training import state, train_step
from hintsd_jax.training.batching import Batch, make_batches
from hintsd_jax.training.examples import Branch, Example

TARGETS = 2  # that share the branch tokens of an update; as many tokens of feedback each as remain


class RunSection(Section):
    """What a run holds on the device, and the sections that use it."""

    optim = state.OptimConfig()

    @property
    def config(self) -> Config:
        """Of a run with these sizes."""
        lengths, branches, actions = (tuple(sorted(set(part))) for part in zip(*self.sizes.updates, strict=True))
        settings = {
            "rollout.slots": self.sizes.slots,
            "rollout.context": self.sizes.context,
            "hindsight.context": self.sizes.context,
            "rollout.prefill_buckets": tuple(sorted({bucket for bucket, _ in self.sizes.prefills})),
            "batch.length_buckets": lengths,
            "batch.branch_buckets": branches,
            "batch.action_buckets": actions,
        }
        return build.build(bfcl_qwen3_4b.get_config()).replaced(settings)

    def plan(self) -> Plan:
        """The arithmetic of `--mode=plan` for one GPU, at these sizes."""
        return Planner(self.shape)(self.config, find("h100:1"))

    def hold(self, slots: int, context: int) -> None:
        """Weights, train state and a full cache, all random."""
        policy = self.policy
        shapes = decoder.abstract_params(policy)
        self.frozen = jax.device_put(random_like(shapes, policy.compute_dtype), jax.NamedSharding(self.mesh, jax.P()))
        adapter = jax.eval_shape(partial(lora.init_adapter, policy), jax.random.key(0))
        self.state = state.create(random_like(adapter, "float32", 1), self.optim)
        self.served = ServingLayout(policy, self.mesh)(lora.attach(self.frozen, self.state.params))
        self.fill_cache(slots, context)

    def fill_cache(self, slots: int, context: int) -> None:
        """Another cache in place of the one that was there."""
        self.cache: decoder.Cache = []
        policy = self.policy
        (layer, _), *_ = jax.eval_shape(partial(decoder.init_cache, policy, slots, context))
        fill = jax.jit(lambda key: jax.random.normal(key, layer.shape, layer.dtype))
        keys = jax.random.split(jax.random.key(2), 2 * policy.num_layers)
        self.cache = [(fill(keys[2 * n]), fill(keys[2 * n + 1])) for n in range(policy.num_layers)]

    def compile_all(self, lowered: dict[Any, jax.stages.Lowered]) -> dict[Any, tuple[jax.stages.Compiled, float]]:
        """Side by side: a compiler keeps few cores busy. One that fails is left out, with a row."""
        with ThreadPoolExecutor() as pool:
            futures = {name: pool.submit(compiled, one) for name, one in lowered.items()}
        compiled_programs = {}
        for name, future in futures.items():
            with guarded(f"compiling {name}"):
                compiled_programs[name] = future.result()
        return compiled_programs

    # what the card can do

    def measure_ceilings(self) -> None:
        device = jax.devices()[0]
        about = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
        about["python"] = sys.version.split()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
        platform = device.client.platform_version.splitlines()[0]
        emit("device", card=device.device_kind, versions=about, note=f"{limit / GIB:.1f} GiB for jax; {platform}")
        square = self.sizes.square
        for name, dtype, precision in (
            ("bfloat16", "bfloat16", None),
            ("float32 (as jax has it: TF32 on this card)", "float32", None),
            ("float32, highest", "float32", "highest"),
        ):
            with guarded(f"product {name}"):
                a, b = (jax.random.normal(jax.random.key(n), (square, square), dtype) for n in range(2))
                product = jax.jit(partial(jnp.matmul, precision=precision))
                ms = median_ms(partial(product, a, b), inner=10)
                rate = 2 * square**3 / ms / 1e9
                emit(f"product of {square:,} x {square:,}, {name}", ms=ms, **{"TFLOP/s": rate}, ceiling={name: rate})
        x = jax.random.bits(jax.random.key(0), (self.sizes.copied // 4,), "uint32")
        for name, call in (("copy", jnp.copy), ("elementwise kernel", lambda x: x ^ 1)):
            with guarded(name):
                ms = median_ms(partial(jax.jit(call), x), inner=10)
                rate = 2 * x.nbytes / ms / 1e6
                ceiling = {"copy": rate} if name == "copy" else {}
                emit(f"{name} of {x.nbytes / GIB:.3g} GiB, read and written", ms=ms, **{"GB/s": rate}, ceiling=ceiling)

    # serving

    def decode_state(self, slots: int, context: int, fill: int) -> programs.DecodeState:
        """All slots sample as many tokens as a timed call has, at the settings of a rollout."""
        A, ids = self.sizes.actions, lambda *shape: self.rng.integers(1, self.policy.vocab_size, shape).astype(np.int32)
        full = lambda value, dtype: np.full(slots, value, dtype)
        arrays: dict[str, Any] = {
            "pending_B": ids(slots),
            "position_B": full(fill, np.int32),
            "active_B": full(True, bool),
            "limit_B": full(self.sizes.decoded, np.int32),
            "tokens_BA": ids(slots, A),
            "logprobs_BA": self.rng.normal(size=(slots, A)).astype(np.float32),
            "key_B2": self.rng.integers(1, 2**31, (slots, 2)).astype(np.uint32),
            "temperature_B": full(0.6, np.float32),
        }
        return programs.idle_state(slots, context, A)._replace(**arrays)

    def measure_decode(self) -> None:
        self.hold(*self.sizes.decodes[0][:2])
        for slots, context, fills in self.sizes.decodes:
            with guarded(f"decode, {slots} slots x {context:,}"):
                self._measure_decode(slots, context, fills)
        with guarded("plan while rolling out"):
            plan = self.plan()
            parts = f"decode {plan.decode / GIB:.2f}, prefill {plan.prefill / GIB:.2f}"
            emit("memory while rolling out", note=note(memory(), f"plan {plan.total('rollout') / GIB:.2f}: {parts}"))

    def _measure_decode(self, slots: int, context: int, fills: tuple[int, ...]) -> None:
        self.fill_cache(slots, context)
        with jax.set_mesh(self.mesh):
            first = self.decode_state(slots, context, fills[0])
            program, seconds = compiled(
                programs.decode.lower(self.served, self.policy, (), self.cache, first, np.int32(slots))
            )
            for fill in fills:
                with guarded(f"decode at {fill:,}"):
                    decode_state = self.decode_state(slots, context, fill)

                    def call(decode_state=decode_state):
                        self.cache, _, steps = program(self.served, self.cache, decode_state, np.int32(slots))
                        return steps

                    steps = int(call())
                    ms = median_ms(call) / steps
                    needed = work.decode_bytes(self.policy, [fill + steps // 2] * slots)
                    rate = needed / ms / 1e6
                    values = {"tokens/s": slots * 1e3 / ms, "GB/s": rate}
                    values |= {"of ceiling": self.of_ceiling(rate, "copy"), "compile s": seconds}
                    about = note(f"ms a token of every slot; {needed / GIB:.2f} GiB to read", memory(program))
                    what = f"decode, {slots} slots x {context:,}, {fill:,} tokens in each"
                    emit(what, ms=ms, **values, note=about)
                    seconds = None

    def measure_prefill(self) -> None:
        slots, context = self.sizes.slots, self.sizes.context
        self.hold(slots, context)
        with jax.set_mesh(self.mesh):
            buckets = list(dict.fromkeys(bucket for bucket, _ in self.sizes.prefills))
            ids = {L: self.rng.integers(1, self.policy.vocab_size, (1, L)).astype(np.int32) for L in buckets}
            at = lambda n: np.full(1, n, np.int32)
            lower = partial(programs.prefill.lower, self.served, self.policy, self.cache)
            by_bucket = self.compile_all({L: lower(ids[L], at(0), at(0)) for L in buckets})
            for bucket, start in self.sizes.prefills:
                with guarded(f"prefill of {bucket:,} after {start:,}"):
                    program, seconds = by_bucket[bucket]

                    def call(program=program, tokens=ids[bucket], start=start):
                        self.cache = program(self.served, self.cache, tokens, at(start), at(slots - 1))
                        return self.cache

                    ms = median_ms(call)
                    rate = work.prefill(self.policy, 1, bucket, start) / ms / 1e9
                    values = {"tokens/s": bucket * 1e3 / ms, "TFLOP/s": rate}
                    values |= {"of ceiling": self.of_ceiling(rate, "bfloat16"), "compile s": seconds}
                    emit(f"prefill of 1 x {bucket:,} after {start:,}", ms=ms, **values, note=memory(program))

    # training

    def batch(self, length: int, branch_tokens: int, action_tokens: int) -> Batch:
        """One episode that fills all of a bucket, its targets towards the end."""
        algorithm = build.algorithm(self.config)
        ids = lambda size: tuple(int(i) for i in self.rng.integers(1, self.policy.vocab_size, size))
        size, feedback = action_tokens // TARGETS, (branch_tokens - action_tokens) // TARGETS
        stops = [length - (TARGETS - 1 - n) * (size + 8) for n in range(TARGETS)]
        weights = {part.name: 1.0 for part in algorithm.loss.parts}
        branches = tuple(
            Branch(n + 1, stop - size, stop, stop - size - 4, ids(feedback), (-1.0,) * size, weights)
            for n, stop in enumerate(stops)
        )
        buckets = {"length_buckets": (length,), "branch_buckets": (branch_tokens,), "action_buckets": (action_tokens,)}
        shapes = dataclasses.replace(algorithm.batch_shapes(self.mesh), **buckets)
        batches = make_batches([Example(0, ids(length), branches, key=(1, 2))], shapes, algorithm.loss)
        if batches.padding_tokens or len(batches.batches) != 1:
            raise ValueError(
                f"a batch of {length} + {branch_tokens} has {batches.padding_tokens} tokens of padding in"
                f" {len(batches.batches)} parts"
            )
        return put_batch(batches.batches[0], self.mesh)

    def measure_update(self) -> None:
        self.hold(self.sizes.slots, self.sizes.context)
        loss, policy = build.algorithm(self.config).loss, self.policy
        with jax.set_mesh(self.mesh):
            batches = {sizes: self.batch(*sizes) for sizes in self.sizes.updates}
            accumulator = train_step.zeros(self.state.params, loss)
            lower = partial(train_step.accumulate.lower, self.frozen, self.state, accumulator)
            for sizes in sorted(batches):  # the allocator's peak only grows: short ones first
                length, branch_tokens, action_tokens = sizes
                name = f"update of 1 x {length:,} + {branch_tokens:,}"
                with guarded(name):  # one after the other: a section that is cut has the short ones
                    program, seconds = compiled(lower(batches[sizes], policy=policy, loss=loss))
                    accumulator = train_step.zeros(self.state.params, loss)

                    def call(program=program, batch=batches[sizes]):
                        nonlocal accumulator
                        accumulator, tokens = program(self.frozen, self.state, accumulator, batch)
                        return accumulator, tokens

                    ms = median_ms(call)
                    if not math.isfinite(float(accumulator.sums["loss"])):
                        raise ValueError(f"the loss is {float(accumulator.sums['loss'])}")
                    size = branch_tokens // TARGETS
                    prefixes = dict.fromkeys(np.asarray(batches[sizes].prefix_stop_BM)[0].tolist())
                    passes = work.update(policy, length, [(int(n), size) for n in prefixes], action_tokens)
                    rate = passes / ms / 1e9
                    values = {"tokens/s": (2 * length + branch_tokens) * 1e3 / ms, "TFLOP/s": rate}
                    values |= {"of ceiling": self.of_ceiling(rate, "bfloat16"), "compile s": seconds}
                    emit(name, ms=ms, **values, note=note(memory(program), self.logits(program, length)))
            with guarded("apply"):
                copy = partial(jax.tree.map, jnp.copy, self.state)
                when = train_step.When.at()
                apply = lambda: train_step.apply(copy(), accumulator, when, loss=loss, optim=self.optim)
                emit("apply, and a copy of the state", ms=median_ms(apply))
        with guarded("plan while updating"):
            plan = self.plan()
            about = f"plan {plan.total('update') / GIB:.2f}: update {plan.update / GIB:.2f}"
            emit("memory while updating", note=note(memory(), about))

    def logits(self, program: jax.stages.Compiled, length: int) -> str:
        """The largest array along the vocabulary in a compiled program, but for the table itself."""
        V, D = self.policy.vocab_size, self.policy.d_model
        arrays = re.findall(rf"\[((?:\d+,)*{V}(?:,\d+)*)\]", program.as_text() or "")
        shapes = {tuple(map(int, array.split(","))) for array in arrays}
        most = max((math.prod(shape) // V for shape in shapes if D not in shape), default=0)
        at_once, of_all = 4 * most * V / GIB, 4 * length * V / GIB
        return f"at most {most:,} tokens x {V:,} at once ({at_once:.2f} GiB; of all tokens {of_all:.2f})"

    # in modules of their own

    def measure_attention(self) -> None:
        gpu_attention.measure(self)

    def measure_precision(self) -> None:
        gpu_precision.measure(self, REPO / "assets" / "desk-policy")


def main(section: str, shape: str, ceilings: str, *rest: str) -> None:
    with guarded(section):
        run_section = RunSection(Path(shape), json.loads(ceilings), SMALL if "--small" in rest else Sizes())
        getattr(run_section, f"measure_{section}")()


if __name__ == "__main__":
    main(*sys.argv[1:])
