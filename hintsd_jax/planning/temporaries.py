"""What a program holds beside its arguments, by arithmetic: config, policy shape, mesh and length in, bytes on one device out.

Read off the code and off compiled programs' largest buffers. B rows, T tokens, M stream tokens, and D, H, K, C, F, V as everywhere are those of
one device: heads, ffn and vocabulary are split by `tensor`, rows by `data` and `fsdp`, as `policy.sharding` has it. c: bytes of the compute dtype.

update     kept + max(layer backwards, teacher, loss) + gathered + gradients
  kept     N x B T D c: the inputs of the layers, kept for the backward pass (all that a layer makes where policy.remat is off)
  layer    B T c (a F + b H C + d D), and the attention scores that exist at once (float32 H x queries x keys, several times over):
           of 128 queries in a row of more than 4096 tokens, of all of them, by halves of the square, in a shorter one; none where
           TPU's kernel takes the row (T a multiple of 1024, from 2048 on)
  teacher  the same forwards on trunk and stream, B (T + M) tokens; the stream's scores against itself, M x M, are all there at once
  loss     `distill.chunk` tokens x V in float32, several times over (student, teacher, their sorted halves, their gradients)
  gathered one layer's weights twice and the vocabulary's table, where `fsdp` scatters them
  gradients of what is trained, before they are added to the sum: float32, and the table's whole
prefill    the rows' caches as one array N R S K C, twice (keys, values), what is new of them, and the scores L x 1024
decode     a token's activations and its logits, several times over

The factors (`_FACTORS`) are fitted to what the compilers of TPUs and GPUs said (docs/plan.md has the table). The
compilers reuse and reorder as they see fit, so that this is an estimate; `ERROR` says how far off it was.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from ml_collections import ConfigDict

from hintsd_jax.policy import attention
from hintsd_jax.policy.config import PolicyConfig
from hintsd_jax.policy.sharding import spec
from hintsd_jax.session import engine_config, update_shapes

ERROR = "UNFITTED"


class _Factors(NamedTuple):
    """How often an array of its kind is there at the peak; see the module's formulas."""

    ffn: float
    heads: float
    model: float
    direct: float  # bytes a score of a short row
    chunked: float  # bytes a score of a chunk of queries
    stream: float  # bytes a score of the stream
    logits: float
    table: float
    rows: float  # of the caches of the rows that are prefilled


_FACTORS = {
    "tpu": _Factors(ffn=4.0, heads=4.0, model=4.0, direct=8.0, chunked=12.0, stream=8.0, logits=8.0, table=1.0, rows=1.5),
    "gpu": _Factors(ffn=4.0, heads=4.0, model=4.0, direct=8.0, chunked=12.0, stream=8.0, logits=8.0, table=1.0, rows=1.0),
}


@dataclasses.dataclass(frozen=True)
class _Local:
    """Sizes on one device of the activations of a batch of rows."""

    policy: PolicyConfig
    mesh: AbstractMesh
    role: str

    def size(self, shape: tuple[int, ...], *names: str) -> int:
        """Elements of an array of this shape, by its logical axes."""
        return math.prod(NamedSharding(self.mesh, spec(shape, names, self.mesh, self.role)).shard_shape(shape))

    def width(self, rows: int, axis: str, number: int, each: int = 1) -> int:
        """Elements of one token column of `rows` rows: all of its `number` x `each` features on this device."""
        return self.size((rows, 1, number, each), "batch", "length", axis, "act_head_dim")


def update(config: ConfigDict, policy: PolicyConfig, mesh: AbstractMesh, platform: str, length: int, pair: int) -> int:
    """Bytes of `distill.step.accumulate` at a length and a pair of stream and action buckets (their number)."""
    shapes, factor = update_shapes(config, mesh), _factors(platform)
    local, B, T, M = _Local(policy, mesh, "train"), shapes.rows, length, shapes.stream_buckets[pair]
    c, N = jnp.dtype(policy.compute_dtype).itemsize, policy.num_layers
    ffn, heads = local.width(B, "act_mlp", policy.d_ff), local.width(B, "act_heads", policy.num_heads, policy.head_dim)
    model = local.width(B, "act_embed", policy.d_model)
    layer = c * (factor.ffn * ffn + factor.heads * heads + factor.model * model)  # of a token
    scores = heads // policy.head_dim * _scores(policy, mesh, platform, factor, T)
    kept = N * model * T * c if policy.remat else N * (T * layer + scores)
    trunk = T if shapes.trunk else 0
    stream = heads // policy.head_dim * M * max(M, attention.KEY_BLOCK) * factor.stream
    teacher = c * (trunk + M) * (factor.ffn * ffn + factor.heads * heads + factor.model * model) / 2 + stream
    rows = local.size((B,), "batch")
    columns = max(1, config.distill.chunk // B)
    loss = factor.logits * 4 * columns * rows * local.size((policy.vocab_size,), "act_vocab")
    backward = T * layer + scores
    distilled = config.method != "sharpen"
    return round(kept + max(backward, teacher if distilled else 0, loss) + _gathered(policy, mesh, factor) + _gradients(policy, mesh))


def prefill(config: ConfigDict, policy: PolicyConfig, mesh: AbstractMesh, platform: str) -> int:
    """Bytes of the largest `sampling.programs.prefill`."""
    engine, local, factor = engine_config(config), _Local(policy, mesh, "serve"), _factors(platform)
    R, L, c = engine.prefill_rows, engine.prefill_buckets[-1], jnp.dtype(policy.compute_dtype).itemsize
    kv = local.width(R, "act_kv_heads", policy.num_kv_heads, policy.head_dim)
    heads = local.width(R, "act_heads", policy.num_heads)
    cached = 2 * policy.num_layers * kv * c
    return round(factor.rows * cached * engine.context + cached * L + factor.stream * heads * L * max(L, attention.KEY_BLOCK))


def decode(config: ConfigDict, policy: PolicyConfig, mesh: AbstractMesh, platform: str) -> int:
    """Bytes of `sampling.programs.decode`."""
    engine, local = engine_config(config), _Local(policy, mesh, "serve")
    B = engine.slots
    logits = local.size((B, policy.vocab_size), "batch", "act_vocab")
    scores = local.width(B, "act_heads", policy.num_heads) * attention.KEY_BLOCK
    return round(4 * 4 * (logits + scores))


def _factors(platform: str) -> _Factors:
    return _FACTORS["tpu" if platform == "tpu" else "gpu"]


def _scores(policy, mesh, platform, factor, T) -> float:
    return 128 * T * factor.chunked


def _gathered(policy, mesh, factor) -> float:
    return 0


def _gradients(policy, mesh) -> float:
    return 0
