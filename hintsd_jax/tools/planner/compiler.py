# SPDX-License-Identifier: Apache-2.0

"""What the compiler says of the programs that decide whether a run fits: config, policy and devices in, their temporary
memory out.

Asked are the largest prefill, decode, and the update at its largest length and at the one before. Answers are kept in a
folder, under a key of the lowered program itself, the devices and the compiler. Invariant: a refusal for want of memory
is an answer, with the bytes that the compiler asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.tools.planner import topologies
from hintsd_jax.tools.planner.devices import Devices
from hintsd_jax.tools.planner.programs import Program, programs

_REFUSED = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of|allocate ([\d.]+)([KMGT])iB")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MINUTES = {"prefill": "1", "decode": "1 to 3", "update": "2 to 6"}  # on two cores


@dataclasses.dataclass(frozen=True)
class Answer:
    """kind: "prefill", "decode" or "update". length: of an update's rows, else 0. temporary: bytes beside the arguments
    on one device, refused or not.
    """

    kind: str
    length: int
    pair: int
    temporary: int
    refused: bool


def ask(config: Config, policy: PolicyConfig, devices: Devices) -> list[Answer]:
    """Compiles what is not kept yet, one line on stderr before each.

    Raises:
      UserError: there is no compiler for these devices, or the folder to keep answers in cannot be written.
    """
    mesh = devices.mesh(**devices.sizes(config, policy))
    chosen = deciding_programs(config, policy, mesh, devices.platform)
    return [_answer(config, program, mesh, devices) for program in chosen]


def deciding_programs(config: Config, policy: PolicyConfig, mesh: Mesh, platform: str = "tpu") -> list[Program]:
    """The largest prefill, decode, and the update at its two largest lengths, the largest first."""
    by_kind: dict[str, list[Program]] = {}
    for program in programs(config, policy, mesh, platform=platform):
        by_kind.setdefault(program.kind, []).append(program)
    longest = {program.length: program for program in by_kind["update"]}  # of each length the last pair: the largest
    lengths = sorted(longest, reverse=True)[:2]
    return [by_kind["prefill"][-1], *by_kind["decode"], *(longest[length] for length in lengths)]


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program takes beside its arguments on one device: temporaries, and outputs that are no argument's."""
    memory = topologies.memory_of(compiled)
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _answer(config: Config, program: Program, mesh: Mesh, devices: Devices) -> Answer:
    lowered = program.lower()
    folder = config.plan.cache_dir
    file = Path(folder) / f"{_key(lowered, mesh, devices.compiler_options)}.json" if folder else None
    if file and file.exists():
        kept = json.loads(file.read_text())
    else:
        minutes = _MINUTES[program.kind]
        print(f"compiling {program.name} for {devices.name}: about {minutes} min", file=sys.stderr, flush=True)
        temporary, refused = _compile(lowered, devices)
        kept = {"program": program.name, "devices": devices.name, "temporary": temporary, "refused": refused}
        if file:
            _keep(file, kept)
    return Answer(program.kind, program.length, program.pair, kept["temporary"], kept["refused"])


def _compile(lowered: jax.stages.Lowered, devices: Devices) -> tuple[int, bool]:
    try:
        return temporary_bytes(topologies.compiled(lowered, devices.compiler_options)), False
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = _REFUSED.search(str(error))
        number, unit = [part for part in match.groups() if part] if match else ("0", "K")
        return max(int(float(number) * _UNITS[unit]), devices.memory), True


def _key(lowered: jax.stages.Lowered, mesh: Mesh, options: Mapping[str, str] | None) -> str:
    device = mesh.devices.flat[0]
    compiler = [
        device.device_kind,
        device.client.platform_version,
        importlib.metadata.version("jaxlib"),
        dict(options or {}),
    ]
    return hashlib.sha256(json.dumps([lowered.as_text(), compiler]).encode()).hexdigest()[:32]


def _keep(file: Path, kept: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept) + "\n")
    except OSError as error:
        raise UserError(
            f"plan.cache_dir = {str(file.parent)!r} cannot be written ({error.strerror}): name another, or '' for none"
        ) from error
