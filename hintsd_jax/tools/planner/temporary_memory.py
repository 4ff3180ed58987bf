# SPDX-License-Identifier: Apache-2.0

"""What a program needs beside its arguments, by arithmetic: config, policy's shape, mesh and length in, bytes on one
device out.

B rows, T tokens, M branch tokens, and D, H, K, C, F, V as everywhere are those of one device: heads, ffn and vocabulary
are split by `tensor`, rows by `data` and `fsdp`, as `models.sharding` has it. c: bytes of the compute dtype. N layers.
S: keys that are attended to at once, 1024 of a cache or trunk of more than 2048.

update       (inputs + max(layer, teacher, reference, loss) + gathered + gradients) x gaps
  inputs     N B T D c: of the layers, for the backward pass (where policy.remat is off all that a layer makes, N times)
  layer      B T c (f F + h H C + d D) + scores: one layer computed again, and its gradients
  scores     of attention, those that exist at once, some bytes each: H x 128 x T in a row of more than 4096 tokens,
             H x 9/16 T^2 in a shorter one, none where TPU's kernel takes the row (T a multiple of 1024, from 2048 on).
             More than is needed since rows are attended to in tiles (`models.tiled`): the compilers are to be asked
  teacher    B (T + M) c (f' F + h' H C + d' D) + B H M max(M, S) s: no gradient, but the branches' scores against
             themselves exist all at once; of a batch that no teacher reads (M = 0) nothing
  reference  where a part of the loss needs one, B T c (f' F + h' H C + d' D) and the scores of a row: no gradient
  loss       chunk x V float32 logits, 8 times: of student and teacher, ranked, and their gradients
  gathered   with `fsdp` above 1: one layer's weights twice, and the vocabulary's table
  gradients  where all weights are trained: in float32, on TPU before and after they are summed over devices, and the
             table's whole
prefill      the rows' caches as arrays of N R S K C, for keys and values, what is new of them, and scores
             L x max(L, S); more than is needed since it writes in place (`models.cached_attention`)
decode       logits B V and scores B H S in float32, four times; but on TPU, the cache of one layer, which is copied to
             another layout

The formulas follow the code and the largest buffers of compiled programs; their factors (`_FACTORS`) are fitted to what
the compilers for TPU and GPU said. Compilers reorder and reuse as they see fit: `ERROR` says how far off this was,
docs/plan.md has every case.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.models import attention, splash
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import spec
from hintsd_jax.tools.planner.programs import (
    abstract_cache,
    abstract_weights,
    bytes_on_one_device,
    elements_on_one_device,
)

# At worst, as a share of what the compiler said, by platform and program. What is not here was not compared, or is no
# more than rough.
ERROR = {"gpu": {"prefill": 0.05, "decode": 0.05, "update": 0.10}, "tpu": {"update": 0.31}}

LONG = 4096  # tokens of a row up to which all its scores are counted
_CHUNK = 128  # queries whose scores are counted in longer ones


class _Widths(NamedTuple):
    """How many arrays as wide as the ffn, the query heads and the model are there at once."""

    ffn: float
    heads: float
    model: float


class _Factors(NamedTuple):
    """layer, teacher: see `_Widths`. direct, chunked, branches: bytes a score. rows: copies of the caches that prefill
    reads. gradients, tables: copies in float32 of what is trained on this device, and of the whole table's gradient.
    gaps: by what the update's memory exceeds what is in it.
    """

    layer: _Widths
    teacher: _Widths
    direct: float
    chunked: float
    branches: float
    rows: float
    gradients: float
    tables: float
    gaps: float


_FACTORS = {
    "tpu": _Factors(
        _Widths(4, 4, 4), _Widths(4, 4, 4), direct=8, chunked=24, branches=2.5, rows=1.5, gradients=2, tables=2, gaps=1
    ),
    "gpu": _Factors(
        _Widths(3, 2, 2), _Widths(0, 4, 2), direct=7, chunked=12, branches=6, rows=1, gradients=1, tables=0, gaps=1.05
    ),
}
_LOGITS = 8  # copies of a chunk's logits


class _Layout:
    """Sizes on one device of the activations of `rows` rows."""

    def __init__(self, policy: PolicyConfig, mesh: AbstractMesh, role: str, rows: int):
        self.mesh, self.role, self.rows = mesh, role, rows
        self.ffn = self.width("act_mlp", policy.d_ff)
        self.queries = self.width("act_heads", policy.num_heads)  # query heads of a token
        self.heads = self.queries * policy.head_dim
        self.keys = self.width("act_kv_heads", policy.num_kv_heads) * policy.head_dim
        self.model = self.width("act_embed", policy.d_model)
        self.logits = self.width("act_vocab", policy.vocab_size)

    def width(self, axis: str, number: int) -> int:
        """Of one token in each row: how many of `number` features this device has, times the rows that it has."""
        shape = (self.rows, 1, number)
        return math.prod(
            NamedSharding(self.mesh, spec(shape, ("batch", "length", axis), self.mesh, self.role)).shard_shape(shape)
        )

    def token(self, widths: _Widths) -> float:
        return widths.ffn * self.ffn + widths.heads * self.heads + widths.model * self.model


def update(config: Config, policy: PolicyConfig, mesh: AbstractMesh, platform: str, length: int, pair: int) -> int:
    """Bytes of `training.train_step.accumulate` at a length and a pair of branch and action buckets (its number)."""
    algorithm = build.algorithm(config)
    shapes = algorithm.batch_shapes(mesh)
    factors, c = _factors(platform), _itemsize(policy)
    layout, T, (trunk, M, _) = _Layout(policy, mesh, "train", shapes.batch_size), length, shapes.tokens(length, pair)
    row_scores = layout.queries * _scores(policy, mesh, platform, factors, T)
    layer = T * c * layout.token(factors.layer) + row_scores
    inputs = T * c * layout.model if policy.remat else layer
    logits = _LOGITS * 4 * layout.logits * max(1, config.loss.chunk_tokens // shapes.batch_size)
    teacher = reference = 0.0
    if M:
        scores = layout.queries * M * max(M, _keys_at_once(trunk)) * factors.branches
        teacher = (trunk + M) * c * layout.token(factors.teacher) + scores
    if algorithm.loss.needs_reference:
        reference = T * c * layout.token(factors.teacher) + row_scores
    beside = max(layer, teacher, reference, logits) + _gathered(policy, mesh) + _gradients(policy, mesh, factors)
    return round(factors.gaps * (policy.num_layers * inputs + beside))


def prefill(config: Config, policy: PolicyConfig, mesh: AbstractMesh, platform: str) -> int:
    """Bytes of the largest `sampling.programs.prefill`."""
    engine, factors, c = build.engine_config(config), _factors(platform), _itemsize(policy)
    layout, L = _Layout(policy, mesh, "serve", engine.rows(engine.prefill_buckets[-1])), engine.prefill_buckets[-1]
    cached = 2 * policy.num_layers * c * layout.keys
    scores = 4 * 3 * layout.queries * L * max(L, _keys_at_once(engine.context))
    return round(cached * (factors.rows * engine.context + L) + scores)


def decode(config: Config, policy: PolicyConfig, mesh: AbstractMesh, platform: str) -> int:
    """Bytes of `sampling.programs.decode`."""
    engine = build.engine_config(config)
    layout = _Layout(policy, mesh, "serve", engine.slots)
    copied = 0 if platform == "tpu" else bytes_on_one_device(abstract_cache(config, policy, mesh)[:1])
    return round(4 * 4 * (layout.logits + layout.queries * _keys_at_once(engine.context)) + copied)


def _factors(platform: str) -> _Factors:
    """Those of TPUs, or of what XLA's other compilers do."""
    return _FACTORS["tpu" if platform == "tpu" else "gpu"]


def _itemsize(policy: PolicyConfig) -> int:
    return jnp.dtype(policy.compute_dtype).itemsize


def _keys_at_once(keys: int) -> int:
    """Keys of a cache, or of a trunk, that are attended to at once."""
    return keys if keys <= 2 * attention.KEY_BLOCK else attention.KEY_BLOCK


def _scores(policy: PolicyConfig, mesh: AbstractMesh, platform: str, factors: _Factors, T: int) -> float:
    """Bytes of the scores of one query head in the causal attention of a row; see `attention.attend_causal`."""
    numbers = (policy.num_heads, policy.num_kv_heads)
    heads: Any = [jax.ShapeDtypeStruct((mesh.size, T, n, policy.head_dim), policy.compute_dtype) for n in numbers]
    with jax.sharding.use_abstract_mesh(mesh):
        if platform == "tpu" and splash.fits(*heads):
            return 0.0
    return factors.chunked * _CHUNK * T if T > LONG else factors.direct * 9 / 16 * T * T


def _gathered(policy: PolicyConfig, mesh: AbstractMesh) -> int:
    """What the layers and the embedding read whole of weights that training scatters."""
    if mesh.shape["fsdp"] == 1:
        return 0
    scattered = abstract_weights(policy, mesh, "train")
    whole = lambda tree: elements_on_one_device(tree) * mesh.shape["fsdp"] * _itemsize(policy)
    tables = 1 if policy.lora else 2  # student's and teacher's are not the same then
    return round(2 * whole(scattered["layers"]) / policy.num_layers + tables * whole(scattered["embed"]))


def _gradients(policy: PolicyConfig, mesh: AbstractMesh, factors: _Factors) -> float:
    if policy.lora:
        return 0.0
    weights = abstract_weights(policy, mesh, "train")
    table = bytes_on_one_device(weights["embed"]) * mesh.shape["fsdp"]
    return factors.gradients * bytes_on_one_device(weights) + factors.tables * table
