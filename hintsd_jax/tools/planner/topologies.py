# SPDX-License-Identifier: Apache-2.0

"""Devices that are not here, described to XLA's compilers: a topology's name in, a mesh to compile programs for out.

TPUs need libtpu, their compiler (`make libtpu`), and no TPU; GPUs need jax's CUDA plugin and no GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from hintsd_jax.errors import UserError
from hintsd_jax.models.sharding import make_mesh

# What XLA's GPU compiler asks of a GPU that is not here. Clock and bandwidth only order its schedules.
_ANY_GPU = (
    "threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048"
    " block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536"
    " registers_per_block_limit: 65536"
)
_AMPERE = (
    f"{_ANY_GPU} cuda_compute_capability {{ major: 8 minor: 0 }} core_count: 108 fpus_per_core: 64"
    " shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 l2_cache_size: 41943040 clock_rate_ghz: 1.41"
)
_HOPPER = (
    f"{_ANY_GPU} cuda_compute_capability {{ major: 9 minor: 0 }} core_count: 132 fpus_per_core: 128"
    " shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 l2_cache_size: 52428800 clock_rate_ghz: 1.98"
)
GPU_TARGETS = {
    "a100-40gb": f"{_AMPERE} memory_bandwidth: {1555 * 10**9}",
    "a100-80gb": f"{_AMPERE} memory_bandwidth: {2039 * 10**9}",
    "h100": f"{_HOPPER} memory_bandwidth: {3352 * 10**9}",
    "h200": f"{_HOPPER} memory_bandwidth: {4800 * 10**9}",
}
GPU_OPTIONS = {"xla_gpu_autotune_level": "0"}  # tuning would run kernels on a GPU
_ONE_HOST = (2, 4, 1)  # chips of the host that a slice of eight v5e or v6e is; others have what libtpu takes for given
_SMALLEST = {"1x1": "2x2", "1x1x1": "2x2x1"}  # topology of one host, of which one chip is taken
_LIBTPU = Path(__file__).parents[3] / ".cache" / "libtpu" / "libtpu" / "libtpu.so"  # where `make libtpu` puts it
# What libtpu asks of the machine; any answer will do, because no chip is used.
_LIBTPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def tpu_mesh(name: str, data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A mesh (see `make_mesh`) of a TPU topology such as "v5e:2x4" or "v5p:2x2x2"; "v5e:1x1" and "v5p:1x1x1"
    are one chip of the smallest topology that the compiler describes.

    libtpu is that of the environment variable TPU_LIBRARY_PATH, else an installed one, else the checkout's.

    Raises:
      UserError: there is no libtpu, or it does not know the topology.
    """
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        if not _LIBTPU.exists():
            raise UserError(
                f"libtpu, the TPU compiler, is neither installed nor at {_LIBTPU}: run `make libtpu`, or set"
                " TPU_LIBRARY_PATH (a plan can do without: plan.compile = False)"
            )
        os.environ["TPU_LIBRARY_PATH"] = str(_LIBTPU)
    for variable, value in _LIBTPU_VARIABLES.items():
        os.environ.setdefault(variable, value)
    kind, _, shape = name.partition(":")
    single = shape in _SMALLEST
    try:
        hosts = {"chips_per_host_bounds": _ONE_HOST} if shape == "2x4" else {}
        described = topologies.get_topology_desc(f"{kind}:{_SMALLEST[shape]}" if single else name, "tpu", **hosts)
    except Exception as error:  # libtpu reports both by RuntimeError or ValueError of several kinds
        raise UserError(
            f"TPU topology {name!r} cannot be described ({error}): name one such as v5e:2x4 or v5p:2x2x1"
        ) from error
    return make_mesh(data, fsdp, tensor, devices=described.devices[: 1 if single else None])


def can_compile_for_gpus() -> bool:
    """Whether jax's CUDA plugin is installed, which compiles for GPUs that are not here."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def gpu_mesh(kind: str, count: int, memory: int, data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A mesh (see `make_mesh`) of `count` GPUs of a kind in `GPU_TARGETS` in one machine. memory: bytes of
    one; the compiler's scheduler looks at it. Programs must be compiled with `GPU_OPTIONS`.

    Raises:
      UserError: jax's CUDA plugin does not make one.
    """
    target = f"gpu_device_info {{ {GPU_TARGETS[kind]} device_memory_size: {memory} }}"
    target += ' platform_name: "CUDA" dnn_version_info { major: 9 }'
    # By its name jax knows what its kernels may use there.
    target += f' device_description_str: "NVIDIA {kind.split("-")[0].upper()}"'
    try:
        described = topologies.get_topology_desc(kind, "cuda", target_config=target, topology=f"1x1x{count}")
    except Exception as error:  # the plugin reports by several kinds
        raise UserError(
            f"{count} x {kind} cannot be described to XLA ({error}): set plan.compile = False, or install"
            " requirements-cuda.txt"
        ) from error
    return make_mesh(data, fsdp, tensor, devices=described.devices)


def compiled(lowered: jax.stages.Lowered, options: Mapping[str, str] | None = None) -> jax.stages.Compiled:
    """Compiles without jax's cache of compiled programs, which takes one for a described topology in but cannot give it
    back. options: the compiler's.

    Raises jax.errors.JaxRuntimeError with RESOURCE_EXHAUSTED where the program does not fit the memory of the described
    device.
    """
    enabled = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it looks at the setting once
        return lowered.compile(compiler_options=dict(options) if options else None)
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def memory_of(program: jax.stages.Compiled) -> Any:
    """What the compiler says of a program's memory: `temp_size_in_bytes` and so on, of one device."""
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("this compiler says nothing of a program's memory")
    return memory
