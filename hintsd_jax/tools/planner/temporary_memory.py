# SPDX-License-Identifier: Apache-2.0

"""What a program needs beside its arguments, by arithmetic: config, policy's shape, mesh and length in, bytes on one
device out.

B rows, T tokens, M branch tokens, and D, H, K, C, F, V as everywhere are those of one device: heads, ffn and vocabulary
are split by `tensor`, rows by `data` and `fsdp`, as `models.sharding` has it. c: bytes of the compute dtype. N layers.
S: keys that are attended to at once: at most 1024 of a cache, and of a trunk of more than 2048.

update       (inputs + max(layer, teacher, reference, loss) + gathered + gradients) x gaps
  inputs     N B T D c: of the layers, for the backward pass (where policy.remat is off all that a layer makes, N times)
  layer      B T c (f F + h H C + d D) + scores: one layer computed again, and its gradients
  scores     of attention, those of one tile of H x 512 x 512, some bytes each; none where TPU's kernel takes the row
             (`models.splash`)
  teacher    B (T + M) c (f' F + h' H C + d' D) + B H M max(M, S) s: no gradient, but the branches' scores against
             themselves exist all at once; of a batch that no teacher reads (M = 0) nothing
  reference  where a part of the loss needs one, B T c (f' F + h' H C + d' D) and the scores of a row: no gradient
  loss       chunk x V float32 logits, 8 times: of student and teacher, ranked, and their gradients
  gathered   with `fsdp` above 1: one layer's weights twice, and the vocabulary's table; on TPU the table once more
             without it, too
  gradients  where all weights are trained: in float32, on TPU before and after they are summed over devices, and the
             table's whole
experts      (`models.experts`) in place of F, of the X tokens of the devices that share E experts, k for each: for each
             expert that is here C rows of what it reads and writes, 2 D + 3 F, and the choices' k X D; with
             gradients twice
prefill      what the GPU's kernel (`models.cache_kernels`) leaves of each part of the keys and makes of it, R L H C in
             float32; elsewhere the scores of one row's block of keys, H L S, in float32 and in c, and on a GPU that
             has no kernel for the shapes the empty sums of every layer, N R L H C in float32
decode       logits B V in float32, some times; where no kernel takes the cache (`models.cache_kernels`) a block of
             keys and values of all slots, B S K C each, and its scores

The formulas follow the code and the largest buffers of compiled programs; their factors (`_FACTORS`) are fitted to what
the compilers for TPU and GPU said. Compilers reorder and reuse as they see fit: `ERROR` says how far off this was,
docs/plan.md has every case.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.models import attention, cache_kernels, cached_attention, experts, splash
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.expert_rounds import rows_of_expert
from hintsd_jax.models.sharding import spec
from hintsd_jax.tools.planner.programs import (
    abstract_cache,
    abstract_weights,
    bytes_on_one_device,
    elements_on_one_device,
)

# At worst, as a share of what the compiler said, by platform and program. What is not here was not compared, or is no
# more than rough.
ERROR = {"gpu": {"prefill": 0.05, "decode": 0.05, "update": 0.13}, "tpu": {"update": 0.29}}

LONG = 2 * attention.KEY_BLOCK  # tokens of a trunk up to which branches attend to all of it at once
_TILE = 512  # queries, and keys, of a tile: see `attention.attend_causal`


class _Widths(NamedTuple):
    """How many arrays as wide as the ffn, the query heads and the model are there at once."""

    ffn: float
    heads: float
    model: float


class _Factors(NamedTuple):
    """layer, teacher: see `_Widths`; kept: of a layer that is not computed again. tile, branches: bytes a score.
    sums: bytes of prefill's empty ones a feature. logits: copies of decoding's. gradients, tables: copies in float32 of
    what is trained on this device, and of the whole table's gradient. gaps: by what the update's memory exceeds what is
    in it.
    """

    layer: _Widths
    teacher: _Widths
    kept: _Widths
    tile: float
    branches: float
    sums: float
    logits: float
    gradients: float
    tables: float
    gaps: float


_FACTORS = {
    "tpu": _Factors(
        _Widths(4, 4, 4),
        _Widths(4, 4, 4),
        _Widths(4, 4, 4),
        tile=24,
        branches=2.5,
        sums=0,
        logits=10,
        gradients=2,
        tables=2,
        gaps=1,
    ),
    "gpu": _Factors(
        _Widths(3, 9, 2),
        _Widths(0, 4, 2),
        _Widths(4, 11, 6),
        tile=16,
        branches=6,
        sums=4,
        logits=2.28,
        gradients=1,
        tables=0,
        gaps=1.05,
    ),
}
_LOGITS = 8  # copies of a chunk's logits


class _Layout:
    """Sizes on one device of the activations of `rows` rows."""

    def __init__(self, policy: PolicyConfig, mesh: AbstractMesh, role: str, rows: int):
        self.mesh, self.role, self.rows = mesh, role, rows
        self.ffn = 0 if policy.experts else self.width("act_mlp", policy.d_ff)
        self.queries = self.width("act_heads", policy.num_heads)  # query heads of a token
        self.heads = self.queries * policy.head_dim
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
    of_experts = partial(_experts, policy, mesh, "train", shapes.batch_size)
    layer = T * c * layout.token(factors.layer) + row_scores + 2 * of_experts(T)
    inputs = T * c * (layout.model if policy.remat else layout.token(factors.kept))
    logits = _LOGITS * 4 * layout.logits * max(1, config.loss.chunk_tokens // shapes.batch_size)
    teacher = reference = 0.0
    if M:
        scores = layout.queries * M * max(M, _keys_at_once(trunk)) * factors.branches
        teacher = (trunk + M) * c * layout.token(factors.teacher) + scores + of_experts(trunk + M)
    if algorithm.loss.needs_reference:
        reference = T * c * layout.token(factors.teacher) + row_scores + of_experts(T)
    beside = (
        max(layer, teacher, reference, logits) + _gathered(policy, mesh, platform) + _gradients(policy, mesh, factors)
    )
    return round(factors.gaps * (policy.num_layers * inputs + beside))


def prefill(config: Config, policy: PolicyConfig, mesh: AbstractMesh, platform: str) -> int:
    """Bytes of the largest `sampling.programs.prefill`."""
    engine, factors = build.engine_config(config), _factors(platform)
    L = engine.prefill_buckets[-1]
    rows, row = (_Layout(policy, mesh, "serve", number) for number in (engine.rows(L), 1))
    beside = _experts(policy, mesh, "serve", engine.rows(L), L)
    keys, _ = abstract_cache(config, policy, mesh)[0]
    if platform == "gpu" and _kernel_takes(keys, platform):
        parts = -(-engine.context // cache_kernels.part_of(L * policy.num_heads // policy.num_kv_heads, engine.context))
        return round(max(4 * L * rows.heads * (parts + 1), beside))
    sums = factors.sums * policy.num_layers * L * rows.heads
    scores = (4 + _itemsize(policy)) * row.queries * L * min(engine.context, cached_attention.BLOCK)
    return round(sums + max(scores, beside))


def decode(config: Config, policy: PolicyConfig, mesh: AbstractMesh, platform: str) -> int:
    """Bytes of `sampling.programs.decode`."""
    engine, factors = build.engine_config(config), _factors(platform)
    layout, (keys, _) = _Layout(policy, mesh, "serve", engine.slots), abstract_cache(config, policy, mesh)[0]
    beside, at_once = 0.0, min(engine.context, cached_attention.BLOCK)
    if not _kernel_takes(keys, platform):
        block = bytes_on_one_device(keys) * at_once / engine.context
        beside = 2 * block + (4 + _itemsize(policy)) * layout.queries * at_once
    beside = max(beside, _experts(policy, mesh, "serve", engine.slots, 1))
    return round(4 * factors.logits * layout.logits + beside)


def _kernel_takes(keys: Any, platform: str) -> bool:
    """Whether a kernel reads the cache, of which these are a layer's keys."""
    return (cache_kernels.fits_tpu if platform == "tpu" else cache_kernels.fits_gpu)(keys, keys)


def _factors(platform: str) -> _Factors:
    """Those of TPUs, or of what XLA's other compilers do."""
    return _FACTORS["tpu" if platform == "tpu" else "gpu"]


def _itemsize(policy: PolicyConfig) -> int:
    return jnp.dtype(policy.compute_dtype).itemsize


def _keys_at_once(keys: int) -> int:
    """Keys of a trunk that a branch attends to at once."""
    return keys if keys <= LONG else attention.KEY_BLOCK


def _scores(policy: PolicyConfig, mesh: AbstractMesh, platform: str, factors: _Factors, T: int) -> float:
    """Bytes of the scores of one query head in the causal attention of a row; see `attention.attend_causal`."""
    numbers = (policy.num_heads, policy.num_kv_heads)
    heads: Any = [jax.ShapeDtypeStruct((mesh.size, T, n, policy.head_dim), policy.compute_dtype) for n in numbers]
    with jax.sharding.use_abstract_mesh(mesh):
        if platform == "tpu" and splash.fits(*heads):
            return 0.0
    return factors.tile * min(T, _TILE) ** 2


def _experts(policy: PolicyConfig, mesh: AbstractMesh, role: str, rows: int, T: int) -> float:
    """Bytes of the experts' part of a layer on one device, of `rows` rows of T tokens, without gradients."""
    one = policy.experts
    if one is None:
        return 0.0
    kernel = (one.number, policy.d_model, one.d_ff)
    here, _, width = NamedSharding(mesh, spec(kernel, experts.AXES["gate"], mesh, role)).shard_shape(kernel)
    tokens = (rows, T, policy.d_model)
    X = T * NamedSharding(mesh, experts.gathered_rows(kernel, tokens, mesh, role)).shard_shape(tokens)[0]
    per_expert = rows_of_expert(X, one.per_token, one.number, experts.FEW)
    read_and_written = here * per_expert * (2 * policy.d_model + 3 * width)
    return _itemsize(policy) * (read_and_written + one.per_token * X * policy.d_model)


def _gathered(policy: PolicyConfig, mesh: AbstractMesh, platform: str) -> int:
    """What the layers and the embedding read whole of weights that training scatters."""
    scattered = abstract_weights(policy, mesh, "train")
    if mesh.shape["fsdp"] == 1:
        return elements_on_one_device(scattered["embed"]) * _itemsize(policy) if platform == "tpu" else 0
    whole = lambda tree: elements_on_one_device(tree) * mesh.shape["fsdp"] * _itemsize(policy)
    tables = 1 if policy.lora else 2  # student's and teacher's are not the same then
    if policy.experts is not None:  # they stay where they are
        router = {"router": scattered["layers"]["mlp"]["router"]}
        scattered["layers"] = scattered["layers"] | {"mlp": router}
    return round(2 * whole(scattered["layers"]) / policy.num_layers + tables * whole(scattered["embed"]))


def _gradients(policy: PolicyConfig, mesh: AbstractMesh, factors: _Factors) -> float:
    if policy.lora:
        return 0.0
    weights = abstract_weights(policy, mesh, "train")
    table = bytes_on_one_device(weights["embed"]) * mesh.shape["fsdp"]
    return factors.gradients * bytes_on_one_device(weights) + factors.tables * table
