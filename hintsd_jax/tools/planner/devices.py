# SPDX-License-Identifier: Apache-2.0

"""Devices by name, here or not: "v5e-8", "v5p:2x2x1", "h100:8" or "" (this machine) in; their number, kind and memory
out.

Sources: TPU memory is what libtpu's compiler lets one program have (it says so when a program is too large); GPU memory
is what CUDA gives, of which jax takes the share that its allocator is told to take. v5e and v6e are named by chips, v5p
by cores, two a chip, as Google Cloud does.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import abstract_mesh, make_mesh, mesh_sizes
from hintsd_jax.texts import did_you_mean
from hintsd_jax.tools.planner import topologies

GIB = 2**30


class TpuKind(NamedTuple):
    """memory_gib: that the compiler lets a program have on one chip. cores: that a chip counts for in the name of a
    slice. slices: chips -> the topology of such a slice, as Google Cloud makes it. alone: the most chips of one host;
    larger slices have hosts of four.
    """

    memory_gib: float
    cores: int
    slices: Mapping[int, str]
    alone: int


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
TPUS = {
    "v5e": TpuKind(15.75, 1, _FLAT, 8),
    "v5p": TpuKind(95.74, 2, {**_CUBES, 1024: "8x8x16"}, 4),
    "v6e": TpuKind(31.25, 1, _FLAT, 8),
}
# GiB that CUDA reports as the total; a driver's version and ECC move the last digit.
GPUS = {"a10g": 22.0, "a100-40gb": 39.4, "a100-80gb": 79.1, "b200": 178.3, "h100": 79.1, "h200": 139.8}
GPUS |= {"l4": 22.0, "l40s": 44.4}
FRACTION = 0.75  # of a GPU's memory that jax takes unless it is told otherwise
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the old name


@dataclasses.dataclass(frozen=True)
class Devices:
    """kind: "v5e", "h100", or jax's name of a local device. memory: bytes of one that a run may have, and `memory_note`
    says of what. topology: what describes them to a compiler though they are not here; None where nothing does. here:
    whether they are this machine's. fraction: the share of a GPU that `memory` is. processes: of the run, one a host.
    """

    kind: str
    platform: str
    count: int
    memory: int
    memory_note: str
    topology: str | None = None
    here: bool = False
    fraction: float = 1.0
    processes: int = 1

    @property
    def name(self) -> str:
        return f"{self.count} x {self.kind}" + (
            f" ({self.topology})" if self.platform == "tpu" and self.topology else ""
        )

    def sizes(self, config: Config, policy: PolicyConfig) -> dict[str, int]:
        """Those of the config's mesh over them, as `layout` and `mesh` take them."""
        return build.mesh_sizes(config, policy.num_kv_heads, self.count, self.processes)

    @property
    def has_compiler(self) -> bool:
        """Whether a compiler for them is at hand: they are here, or something describes them to one."""
        return self.platform in ("tpu", "gpu") and (self.here or self.topology is not None)

    @property
    def compiler_options(self) -> Mapping[str, str] | None:
        return topologies.GPU_OPTIONS if self.platform == "gpu" and not self.here else None

    def layout(self, data: int = 1, fsdp: int = -1, tensor: int = 1) -> AbstractMesh:
        """The mesh of `config.mesh` over them, for shapes and shardings. Raises UserError as `make_mesh` does."""
        return abstract_mesh(mesh_sizes(data, fsdp, tensor, count=self.count))

    def mesh(self, data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
        """The same mesh for the compiler; only where `has_compiler`."""
        if self.here:
            return make_mesh(data, fsdp, tensor)
        if self.platform == "gpu":
            return topologies.gpu_mesh(self.kind, self.count, self.memory, data, fsdp, tensor)
        return topologies.tpu_mesh(str(self.topology), data, fsdp, tensor)


def find(name: str, memory_gib: float = 0.0) -> Devices:
    """The devices of a name; `memory_gib`, if not 0, is taken for the memory of each. GPUs are thought to be eight to a
    host.

    Raises:
      UserError: nobody knows the name.
    """
    devices = _local() if not name else _tpus(name.lower()) or _gpus(name.lower())
    if devices is None:
        known = f"name TPUs such as v5e-8, v5p-64 or v5e:2x4, or GPUs: {', '.join(GPUS)}, with a number as in h100:8"
        hint = did_you_mean(name, [*(f"{kind}-8" for kind in TPUS), *GPUS], known)
        raise UserError(f"plan.devices = {name!r} is unknown: {hint}")
    if memory_gib:
        return dataclasses.replace(devices, memory=int(memory_gib * GIB), memory_note="plan.memory_gib")
    return devices


def larger(devices: Devices) -> list[str]:
    """Names of two, four and eight times as many, where there are such."""
    counts = [devices.count * times for times in (2, 4, 8)]
    if devices.platform == "gpu":
        return [f"{devices.kind}:{count}" for count in counts]
    tpu = TPUS[devices.kind]
    return [f"{devices.kind}-{count * tpu.cores}" for count in counts if count in tpu.slices]


def memory_fraction() -> float:
    """The share of a GPU that jax takes, by its environment variables. Raises UserError where one is no number."""
    for variable in FRACTION_VARIABLES:
        if text := os.environ.get(variable):
            try:
                return float(text)
            except ValueError:
                raise UserError(
                    f"{variable} = {text!r} is no number: give the share of a GPU's memory that jax may take,"
                    " such as 0.9"
                ) from None
    return FRACTION


def _tpus(name: str) -> Devices | None:
    match = re.fullmatch(r"(v\d\w)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
    if match is None or match[1] not in TPUS:
        return None
    kind, number, topology = match.groups()
    tpu = TPUS[kind]
    if number:
        chips = int(number) / tpu.cores
        if chips not in tpu.slices:
            names = ", ".join(f"{kind}-{count * tpu.cores}" for count in tpu.slices)
            raise UserError(
                f"plan.devices = {name!r} is no slice of {kind}: choose one of {names}, or a topology such as"
                f" {kind}:{tpu.slices[8]}"
            )
        topology = tpu.slices[int(chips)]
    elif topology.count("x") != tpu.slices[8].count("x"):
        raise UserError(f"plan.devices = {name!r}: a topology of {kind} looks like {kind}:{tpu.slices[8]}")
    count, memory = math.prod(map(int, topology.split("x"))), int(tpu.memory_gib * GIB)
    return Devices(
        kind,
        "tpu",
        count,
        memory,
        "what its compiler lets a program have",
        f"{kind}:{topology}",
        processes=1 if count <= tpu.alone else max(count // 4, 1),
    )


def _gpus(name: str) -> Devices | None:
    kind, _, number = name.partition(":")
    if kind not in GPUS or (number and not re.fullmatch("[1-9][0-9]*", number)):
        return None
    topology = name if kind in topologies.GPU_TARGETS and topologies.can_compile_for_gpus() else None
    fraction = memory_fraction()
    note = f"{fraction:.0%} of {GPUS[kind]} GiB, the share that jax takes"
    count, memory = int(number or 1), int(GPUS[kind] * fraction * GIB)
    processes = count // 8 if count % 8 == 0 else 1
    return Devices(kind, "gpu", count, memory, note, topology, fraction=fraction, processes=processes)


def _local() -> Devices:
    devices = jax.devices()
    kind, platform, count = devices[0].device_kind, devices[0].platform, len(devices)
    if platform == "cpu":  # they share the machine's memory
        memory, note = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // count, "this machine's memory"
    else:
        memory, note = devices[0].memory_stats()["bytes_limit"], "what jax has of it"
    return Devices(kind, platform, count, memory, note, here=True, processes=jax.process_count())
