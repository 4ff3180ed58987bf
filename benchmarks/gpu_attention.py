"""Attention alone, at the shapes of a policy: what runs on this device, and beside it cuDNN's, which is not wired in.
Part of `benchmarks.gpu`.

`jax.nn.dot_product_attention(implementation="cudnn")` needs an NVIDIA GPU; elsewhere its rows fail, and say so.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_work as work
from benchmarks.gpu_sections import GIB, compiled, emit, guarded, median_ms, note, temp
from hintsd_jax.models import attention

if TYPE_CHECKING:
    from benchmarks.gpu_sections import Section


def calls(program: jax.stages.Compiled) -> str:
    """What a compiled program calls from outside XLA's own code."""
    found = sorted(set(re.findall(r'custom_call_target="([^"]+)"', program.as_text())))
    return f"calls {', '.join(found)}" if found else "calls nothing beyond XLA's own code"


def measure(section: Section) -> None:
    policy, rng = section.policy, jax.random.key(0)
    heads, kv, C = policy.num_heads, policy.num_kv_heads, policy.head_dim
    one = work.mixing(policy, 1) // policy.num_layers  # operations of a (query, key) pair in one layer
    cudnn = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    ways = {"policy.attention": attention.attend_causal, "cudnn": cudnn}
    for length in section.sizes.lengths:
        draw = lambda n, number: jax.random.normal(
            jax.random.fold_in(rng, n), (1, length, number, C), policy.compute_dtype
        )
        q, k, v, pull = draw(0, heads), draw(1, kv), draw(2, kv), draw(3, heads)
        mixed = {}
        for name, way in ways.items():

            def both(q, k, v, pull, way=way):
                out, back = jax.vjp(way, q, k, v)
                return out, back(pull)

            for kind, call, times, arguments in (
                ("forward", way, 1, (q, k, v)),
                ("forward + backward", both, 3, (q, k, v, pull)),
            ):
                what = f"causal, 1 x {length:,}, {kind}, {name}"
                with guarded(what):
                    program, seconds = compiled(jax.jit(call).lower(*arguments))
                    ms = median_ms(lambda: program(*arguments))
                    rate = times * one * work.causal(length) / ms / 1e9
                    out = program(*arguments)
                    mixed[name, kind] = out if kind == "forward" else out[1]
                    other = mixed.get(("policy.attention", kind))
                    off = (
                        ""
                        if name == "policy.attention" or other is None
                        else f"apart from policy.attention by {apart(mixed[name, kind], other):.1e} at most"
                    )
                    emit(
                        what, ms=ms, **{"TFLOP/s": rate, "of ceiling": section.of_ceiling(rate, "bfloat16"), "compile s": seconds},
                        note=note(calls(program), f"{temp(program) / GIB:.2f} GiB left to it", off),
                    )  # fmt: skip
    decoding(section)


def decoding(section: Section) -> None:
    """One query of every slot against its cache, in one layer."""
    policy, sizes, rng = section.policy, section.sizes, jax.random.key(1)
    draw = lambda n, *shape: jax.random.normal(
        jax.random.fold_in(rng, n), (sizes.slots, *shape, policy.head_dim), policy.compute_dtype
    )
    q, k, v = (
        draw(0, 1, policy.num_heads),
        draw(1, sizes.context, policy.num_kv_heads),
        draw(2, sizes.context, policy.num_kv_heads),
    )

    def given(implementation: str):
        def call(q, k, v, last_B1):
            ones = jnp.ones(last_B1.shape[0], jnp.int32)
            return jax.nn.dot_product_attention(
                q, k, v, query_seq_lengths=ones, key_value_seq_lengths=last_B1[:, 0] + 1, implementation=implementation
            )

        return call

    first = None
    for name, way in {
        "policy.attention": attention.attend_cached,
        "xla": given("xla"),
        "cudnn": given("cudnn"),
    }.items():
        with guarded(f"cached, {name}"):
            last = lambda fill: np.full((sizes.slots, 1), fill - 1, np.int32)
            program, seconds = compiled(jax.jit(way).lower(q, k, v, last(sizes.fills[0])))
            outs = []
            for fill in sizes.fills:
                at = jnp.asarray(last(fill))
                ms = median_ms(lambda: program(q, k, v, at), inner=20)
                outs.append(program(q, k, v, at))
                rate = 2 * 2 * sizes.slots * fill * policy.num_kv_heads * policy.head_dim / ms / 1e6
                off = "" if first is None else f"apart by {apart(outs[-1], first[len(outs) - 1]):.1e} at most"
                emit(
                    f"cached, {sizes.slots} slots x {sizes.context:,}, {fill:,} tokens, one layer, {name}", ms=ms,
                    **{"GB/s": rate, "of ceiling": section.of_ceiling(rate, "copy"), "compile s": seconds}, note=note(calls(program), off),
                )  # fmt: skip
                seconds = None
            first = outs if first is None else first


def apart(a, b) -> float:
    """The largest difference of two trees of arrays."""
    return max(
        float(jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
