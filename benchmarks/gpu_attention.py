"""Attention alone, at the shapes of a policy: what runs on this device, the plain forms, and cuDNN's through jax.
Part of `benchmarks.gpu`.

`jax.nn.dot_product_attention(implementation="cudnn")` needs an NVIDIA GPU; elsewhere its rows fail, and say so.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_work as work
from benchmarks.gpu_measuring import GIB, Section, compiled, emit, guarded, median_ms, note
from hintsd_jax.models import attention, cached_attention
from hintsd_jax.tools.planner.compiler import temporary_bytes

OURS, PLATFORM = "models.attention", "models.cached_attention"


def calls(program: jax.stages.Compiled) -> str:
    """What a compiled program calls from outside XLA's own code."""
    targets = sorted(set(re.findall(r'custom_call_target="([^"]+)"', program.as_text() or "")))
    return f"calls {', '.join(targets)}" if targets else "calls nothing beyond XLA's own code"


def measure(section: Section) -> None:
    policy, heads = section.policy, (section.policy.num_heads, section.policy.num_kv_heads)
    one = work.mixing(policy, 1) // policy.num_layers  # operations of a (query, key) pair in one layer
    cudnn = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    for length in section.sizes.lengths:
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(1, length, number, policy.head_dim) for number in (heads[0], heads[1], heads[1], heads[0])]
        q, k, v, pull = (
            jax.random.normal(key, shape, policy.compute_dtype) for key, shape in zip(keys, shapes, strict=True)
        )
        ours: dict[str, Any] = {}
        for name, attend in {OURS: attention.attend_causal, "cudnn": cudnn}.items():
            kinds = {
                "forward": (attend, 1, (q, k, v)),
                "forward + backward": (_with_gradient(attend), 3, (q, k, v, pull)),
            }
            for kind, (call, times, arguments) in kinds.items():
                what = f"causal, 1 x {length:,}, {kind}, {name}"
                with guarded(what):
                    program, seconds = compiled(jax.jit(call).lower(*arguments))
                    ms = median_ms(partial(program, *arguments))
                    rate = times * one * work.causal(length) / ms / 1e9
                    out = program(*arguments)
                    mixed = out if kind == "forward" else out[1]
                    apart = "" if kind not in ours else f"apart from {OURS} by {_apart(mixed, ours[kind]):.1e} at most"
                    ours.setdefault(kind, mixed)
                    values = {"TFLOP/s": rate, "of ceiling": section.of_ceiling(rate, "bfloat16"), "compile s": seconds}
                    about = note(calls(program), f"{temporary_bytes(program) / GIB:.2f} GiB left to it", apart)
                    emit(what, ms=ms, **values, note=about)
    _measure_cached(section)
    _measure_chunks(section)


def _with_gradient(attend):
    def both(q, k, v, pull):
        out, back = jax.vjp(attend, q, k, v)
        return out, back(pull)

    return both


def _measure_cached(section: Section) -> None:
    """One query of every slot against its cache, in one layer: as decoding does it, and the plain form."""
    policy, sizes = section.policy, section.sizes
    fills = (sizes.context // 24, sizes.context - 8)
    shapes = [(1, policy.num_heads), (sizes.context, policy.num_kv_heads), (sizes.context, policy.num_kv_heads)]
    q, k, v = (
        jax.random.normal(key, (sizes.slots, *shape, policy.head_dim), policy.compute_dtype)
        for key, shape in zip(jax.random.split(jax.random.key(1), 3), shapes, strict=True)
    )

    def of_jax(implementation: Any):
        def call(q, k, v, last_B1):
            ones = jnp.ones(last_B1.shape[0], jnp.int32)
            lengths = {"query_seq_lengths": ones, "key_value_seq_lengths": last_B1[:, 0] + 1}
            return jax.nn.dot_product_attention(q, k, v, **lengths, implementation=implementation)

        return call

    def of_ours(attend, q_BTHC, k_BKSC, v_BKSC, last_B1):
        q_BKGTC = q_BTHC.reshape(len(q_BTHC), policy.num_kv_heads, -1, 1, policy.head_dim) * policy.head_dim**-0.5
        mixed_BKGTC = attend(q_BKGTC, k_BKSC, v_BKSC, jnp.arange(len(q_BTHC)), last_B1 + 1)
        return mixed_BKGTC.reshape(q_BTHC.shape).astype(q_BTHC.dtype)

    ours: list[Any] = []
    by_heads = tuple(jnp.swapaxes(x, 1, 2) for x in (k, v))  # as our cache is kept
    plain, ours_now = (partial(of_ours, getattr(cached_attention, f"attend_{kind}")) for kind in ("all_slots", "slots"))
    attends = {OURS: plain, PLATFORM: ours_now, "xla": of_jax("xla"), "cudnn": of_jax("cudnn")}
    for name, attend in attends.items():
        with guarded(f"cached, {name}"):
            last = lambda fill: jnp.full((sizes.slots, 1), fill - 1, jnp.int32)
            keys_values = by_heads if name in (OURS, PLATFORM) else (k, v)
            program, seconds = compiled(jax.jit(attend).lower(q, *keys_values, last(fills[0])))
            for n, fill in enumerate(fills):
                arguments = (q, *keys_values, last(fill))
                ms, out = median_ms(partial(program, *arguments), inner=20), program(*arguments)
                rate = 2 * 2 * sizes.slots * fill * policy.num_kv_heads * policy.head_dim / ms / 1e6
                apart = f"apart by {_apart(out, ours[n]):.1e} at most" if name != OURS and n < len(ours) else ""
                if name == OURS:
                    ours.append(out)
                values = {"GB/s": rate, "of ceiling": section.of_ceiling(rate, "copy"), "compile s": seconds}
                what = f"cached, {sizes.slots} slots x {sizes.context:,}, {fill:,} tokens, one layer, {name}"
                emit(what, ms=ms, **values, note=note(calls(program), apart))
                seconds = None


def _measure_chunks(section: Section) -> None:
    """A chunk of a prompt after what its slot has, in one layer: as prefill does it, and the plain form."""
    policy, sizes = section.policy, section.sizes
    K, C, S = policy.num_kv_heads, policy.head_dim, sizes.context
    attends = {
        "plain": partial(cached_attention.by_row, cached_attention.BLOCK),
        PLATFORM: cached_attention.attend_rows,
    }
    for length, before in sizes.prefills:
        keys = jax.random.split(jax.random.key(2), 3)
        shapes = [(1, K, policy.num_heads // K, length, C), (sizes.slots, K, S, C), (sizes.slots, K, S, C)]
        q, k, v = (jax.random.normal(key, shape, policy.compute_dtype) for key, shape in zip(keys, shapes, strict=True))
        arguments = (q * C**-0.5, k, v, jnp.zeros(1, jnp.int32), before + 1 + jnp.arange(length, dtype=jnp.int32)[None])
        plain = None
        for name, attend in attends.items():
            what = f"chunk of {length:,} after {before:,}, one layer, {name}"
            with guarded(what):
                program, seconds = compiled(jax.jit(attend).lower(*arguments))
                ms, out = median_ms(partial(program, *arguments), inner=20), program(*arguments)
                rate = work.mixing(policy, 1) // policy.num_layers * work.causal(length, before) / ms / 1e9
                apart = "" if plain is None else f"apart by {_apart(out, plain):.1e} at most"
                plain = out if plain is None else plain
                values = {"TFLOP/s": rate, "of ceiling": section.of_ceiling(rate, "bfloat16"), "compile s": seconds}
                emit(what, ms=ms, **values, note=note(calls(program), apart))


def _apart(a: Any, b: Any) -> float:
    """The largest difference of two trees of arrays."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)))) for x, y in pairs)
