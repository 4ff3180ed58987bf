"""Every compiled program of a run from shapes alone: config, policy shape and mesh in, programs to lower and compile
out.

No weights and no devices are needed: a mesh of a described topology does (see `topology` and `gpu_topology`), so what a
pod will hold and do can be read off the real compiler's result on any machine. Invariant: these are the functions and
layouts that a run uses, not copies of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from hintsd_jax.checkpoints.safetensors import read_json
from hintsd_jax.errors import UserError
from hintsd_jax.methods import resolved
from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh, shardings, spec
from hintsd_jax.sampling import programs as sampling
from hintsd_jax.session import engine_config, lora_config, loss_config, optim_config, update_shapes
from hintsd_jax.tools.planner import hlo
from hintsd_jax.training import batching as packing
from hintsd_jax.training import train_step as step
from hintsd_jax.training.state import abstract

HBM = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}  # GiB that the compiler lets a program have on one chip
# What XLA's GPU compiler asks of a GPU that is not here. Clock and bandwidth only order its schedules.
_AMPERE = {
    "cuda_compute_capability": "8.0", "core_count": 108, "fpus_per_core": 64, "shared_memory_per_core": 167936, "shared_memory_per_block_optin": 166912,
    "l2_cache_size": 41943040, "clock_rate_ghz": 1.41,
}  # fmt: skip
_HOPPER = {
    "cuda_compute_capability": "9.0", "core_count": 132, "fpus_per_core": 128, "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448,
    "l2_cache_size": 52428800, "clock_rate_ghz": 1.98,
}  # fmt: skip
GPU_TARGETS = {
    "a100-40gb": {**_AMPERE, "memory_bandwidth": 1555 * 10**9},
    "a100-80gb": {**_AMPERE, "memory_bandwidth": 2039 * 10**9},
    "h100": {**_HOPPER, "memory_bandwidth": 3352 * 10**9},
    "h200": {**_HOPPER, "memory_bandwidth": 4800 * 10**9},
}
_GPU_COMMON = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152, "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
}  # fmt: skip
GPU_OPTIONS = {"xla_gpu_autotune_level": "0"}  # tuning would run kernels on a GPU
_SMALLEST = {"1x1": "2x2", "1x1x1": "2x2x1"}  # of one host
_LIBTPU = Path(__file__).parents[3] / ".cache" / "libtpu" / "libtpu" / "libtpu.so"  # where `make libtpu` puts it


@dataclasses.dataclass(frozen=True)
class Program:
    """name; lower: traces and lowers it under its mesh; held: bytes of its weights (and of the train state) on one
    device.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    held: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a program. Bytes are those of one device; `alias` is the output that is written over
    arguments.

    flops: of one device, loop bodies counted once. seconds: of lowering and compiling. collectives: inside its loops.
    """

    arguments: int
    temp: int
    output: int
    alias: int
    flops: float
    seconds: float
    collectives: Counter[hlo.Operation]
    text: str = dataclasses.field(repr=False)

    @property
    def total(self) -> int:
        """Bytes of the device's memory while it runs."""
        return self.arguments + self.temp + self.output - self.alias


def compiled(lowered: jax.stages.Lowered, options: Mapping[str, str] | None = None) -> jax.stages.Compiled:
    """Without jax's cache of compiled programs: it would take one for a topology in, but cannot give it back. options:
    the compiler's.

    Raises jax.errors.JaxRuntimeError with RESOURCE_EXHAUSTED where the program does not fit the memory of the described
    chip.
    """
    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it looks at the setting once
        return lowered.compile(compiler_options=options and dict(options))
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def report(program: Program) -> Report:
    """Compiles it; see `compiled`."""
    began = time.perf_counter()
    executable = compiled(program.lower())
    memory, text = executable.memory_analysis(), executable.as_text()
    return Report(
        arguments=memory.argument_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        flops=(executable.cost_analysis() or {}).get("flops", math.nan),
        seconds=time.perf_counter() - began,
        collectives=hlo.collectives(text),
        text=text,
    )


def described_policy(config: ConfigDict, shape: Path, layers: int | None = None, platform: str = "tpu") -> PolicyConfig:
    """The policy of a Hugging Face config.json alone, as the config's run has it on `platform`; `layers` cuts it short."""
    dtype = config.policy.compute_dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    policy = PolicyConfig.from_hf(
        read_json(shape), compute_dtype=dtype, remat=config.policy.remat, lora=lora_config(config)
    )
    return dataclasses.replace(policy, num_layers=layers or policy.num_layers)


def topology(name: str, **sizes: int) -> Mesh:
    """A mesh (`make_mesh` with `sizes`) of a TPU topology such as "v5e:2x4" or "v5p:2x2x2", of which no chip is here.
    "v5e:1x1" and "v5p:1x1x1" are one chip of the smallest topology that the compiler describes.

    libtpu, the compiler, is that of the environment variable TPU_LIBRARY_PATH, else an installed one, else the
    checkout's.

    Raises:
      UserError: there is no libtpu, or it does not know the topology.
    """
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        if not _LIBTPU.exists():
            raise UserError(
                f"libtpu, the TPU compiler, is neither installed nor at {_LIBTPU}: run `make libtpu`, or set TPU_LIBRARY_PATH (a plan can do without: plan.compile = False)"
            )
        os.environ["TPU_LIBRARY_PATH"] = str(_LIBTPU)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault(
        "TPU_ACCELERATOR_TYPE", "v5litepod-8"
    )  # of the machine that libtpu believes it is on; any will do
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # one process at a time may use a chip, but none is used here
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    kind, _, dims = name.partition(":")
    single = set(dims) == {"1", "x"}
    try:
        described = topologies.get_topology_desc(f"{kind}:{_SMALLEST[dims]}" if single else name, "tpu")
    except Exception as error:  # libtpu reports both by RuntimeError or ValueError of several kinds
        raise UserError(
            f"TPU topology {name!r} cannot be described ({error}): name one such as v5e:2x4 or v5p:2x2x1"
        ) from error
    return make_mesh(**sizes, devices=described.devices[: 1 if single else None])


def gpu_compiler() -> bool:
    """Whether jax's CUDA plugin is installed, which can compile for GPUs that are not here."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def gpu_topology(kind: str, count: int, memory: int, **sizes: int) -> Mesh:
    """A mesh (`make_mesh` with `sizes`) of `count` GPUs of a kind in `GPU_TARGETS` in one machine, none of which is
    here. memory: bytes of one; the compiler's scheduler looks at it. Programs must be compiled with `GPU_OPTIONS`.

    Raises:
      UserError: jax's CUDA plugin does not make one.
    """
    facts = {**_GPU_COMMON, **GPU_TARGETS[kind], "device_memory_size": memory}
    text = (
        "gpu_device_info {"
        + " ".join(f"{name}: {value}" for name, value in facts.items())
        + '} platform_name: "CUDA" dnn_version_info { major: 9 }'
    )
    text = re.sub(r"cuda_compute_capability: (\d+)\.(\d+)", r"cuda_compute_capability { major: \1 minor: \2 }", text)
    try:
        described = topologies.get_topology_desc(kind, "cuda", target_config=text, topology=f"1x1x{count}")
    except Exception as error:  # the plugin reports by several kinds
        raise UserError(
            f"{count} x {kind} cannot be described to XLA ({error}): set plan.compile = False, or install requirements-cuda.txt"
        ) from error
    return make_mesh(**sizes, devices=described.devices)


def programs(
    config: ConfigDict, policy: PolicyConfig, mesh: Mesh, stop_ids: tuple[int, ...] = (0,)
) -> Iterator[Program]:
    """The engine's programs (rollout, analysis and evaluation are the same three on other weights), then those of the
    update.
    """
    config = resolved(config)
    engine, B = engine_config(config), config.rollout.slots
    served, cache = abstract_weights(policy, mesh, "serve"), abstract_cache(config, policy, mesh)
    everywhere = partial(_array, mesh=mesh, names=None)
    R, A = engine.prefill_rows, engine.max_tokens
    ids = everywhere((R,), "int32")
    for L in engine.prefill_buckets:
        lower = partial(sampling.prefill.lower, served, policy, cache, everywhere((R, L), "int32"), ids, ids)
        yield Program(f"prefill {R} x {L}", _under(mesh, lower), held(served))
    yield Program("copy", _under(mesh, partial(sampling.copy_slots.lower, cache, ids, ids)), 0)
    dtypes = ("int32", "int32", "bool", "int32", "int32", "int32", "float32", "uint32", "float32", "float32", "int32")
    widths = ((), (), (), (), (), (A,), (A,), (2,), (), (), ())
    state = sampling.DecodeState(*(everywhere((B, *width), dtype) for dtype, width in zip(dtypes, widths, strict=True)))
    decode = partial(sampling.decode.lower, served, policy, stop_ids, cache, state, everywhere((), "int32"))
    yield Program(f"decode {B} slots x {engine.context}", _under(mesh, decode), held(served))

    weights = abstract_weights(policy, mesh, "train")
    frozen, trained = (weights, weights.pop("lora")) if policy.lora else (None, weights)
    state = abstract(trained, optim_config(config))
    loss, shapes = loss_config(config), update_shapes(config, mesh)
    scalar = everywhere((), "float32")
    accumulator = step.Accumulator(grads=state.params, sums=dict.fromkeys(loss.sum_names, scalar))
    size = held(weights) + held(state)
    for length, pair in shapes.all():
        blank = packing.blank_batch(shapes, length, pair)
        batch = jax.tree.map(
            lambda leaf: _array(leaf.shape, leaf.dtype, mesh, ("batch",) + ("length",) * (leaf.ndim - 1), "train"),
            blank,
        )
        lower = partial(step.accumulate.lower, frozen, state, accumulator, batch, policy=policy, loss=loss)
        name = f"update {shapes.rows} x {length} + {shapes.stream_buckets[pair]}"
        yield Program(name, _under(mesh, lower), size)
    yield Program(
        "apply", _under(mesh, partial(step.apply.lower, state, accumulator, optim=optim_config(config))), size
    )


def abstract_weights(policy: PolicyConfig, mesh: Mesh | AbstractMesh, role: str) -> Any:
    """Shapes, dtypes and layouts of all weights: what is trained in float32, what is served or frozen in the compute
    dtype, but for norms.
    """
    return dict(_laid_out(policy, mesh, role))


@functools.cache
def _laid_out(policy: PolicyConfig, mesh: Mesh | AbstractMesh, role: str) -> Any:
    weights, axes = _shapes(policy)

    def lay(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        trained = policy.lora is None or path[0].key == "lora"
        full = path[-1].key == "scale" or (trained and role == "train")
        return jax.ShapeDtypeStruct(leaf.shape, "float32" if full else policy.compute_dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(lay, weights, shardings(weights, axes, mesh, role))


@functools.cache
def _shapes(policy: PolicyConfig) -> tuple[Any, Any]:
    """All weights and their logical axes; traced once, because a plan asks for many layouts."""
    weights, axes = (
        jax.eval_shape(partial(decoder.init_params, policy), jax.random.key(0)),
        decoder.logical_axes(policy),
    )
    if policy.lora:
        weights["lora"] = jax.eval_shape(partial(lora.init_adapter, policy), jax.random.key(0))
        axes["lora"] = lora.logical_axes(policy)
    return weights, axes


def abstract_cache(config: ConfigDict, policy: PolicyConfig, mesh: Mesh | AbstractMesh) -> decoder.Cache:
    """The cache of all slots, as `decoder.init_cache` makes it."""
    engine = engine_config(config)
    shape = (engine.slots, engine.context, policy.num_kv_heads, policy.head_dim)
    layer = _array(shape, policy.compute_dtype, mesh, decoder.CACHE_AXES)
    return [(layer, layer)] * policy.num_layers


def held(tree: Any) -> int:
    """Bytes of laid out arrays, abstract or not, on one device."""
    return sum(_elements(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def elements(tree: Any) -> int:
    """Their number of entries on one device."""
    return sum(map(_elements, jax.tree.leaves(tree)))


def _elements(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _under(mesh: Mesh, lower: Callable) -> Callable:
    def call():
        with jax.set_mesh(mesh):
            return lower()

    return call


def _at(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _array(
    shape: tuple[int, ...], dtype: Any, mesh: Mesh, names: tuple[str, ...] | None, role: str = "serve"
) -> jax.ShapeDtypeStruct:
    where = PartitionSpec() if names is None else spec(shape, names, mesh, role)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, where))
