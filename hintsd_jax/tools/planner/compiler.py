"""What the compiler says of the programs that decide whether a run fits. Config, policy, devices in; their temporaries
out.

Asked are the largest prefill, decode, and the update at its largest length and at another. What it said is kept in a
folder, under a key of all that decides what is compiled: settings, policy, mesh, versions and this package's own
source. Invariant: a refusal for want of memory is an answer, with the bytes that the compiler asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hintsd_jax.config.schema import NOT_OF_A_RUN, flatten
from hintsd_jax.errors import UserError
from hintsd_jax.methods import resolved
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.session import engine_config, update_shapes
from hintsd_jax.tools.planner import aot
from hintsd_jax.tools.planner.devices import Devices

_PACKAGE = Path(__file__).parents[2]
_ASKED = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of|allocate ([\d.]+)([KMGT])iB")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_MINUTES = {"prefill": "1", "decode": "1 to 3", "update": "2 to 6"}  # of two cores


@dataclasses.dataclass(frozen=True)
class Answer:
    """kind: "prefill", "decode" or "update". length: of an update's rows, else 0. temp: bytes beside the arguments on
    one device, refused or not.
    """

    kind: str
    length: int
    pair: int
    temp: int
    refused: bool


def ask(config: ConfigDict, policy: PolicyConfig, devices: Devices) -> list[Answer]:
    """Compiles what is not kept yet, one line on stderr before each.

    Raises:
      UserError: there is no compiler for these devices, or the folder to keep answers in cannot be written.
    """
    config = resolved(config)
    mesh = devices.mesh(**config.mesh)
    names = _wanted(config, policy, mesh)
    folder = Path(config.plan.cache_dir) if config.plan.cache_dir else None
    made = {program.name: program for program in aot.programs(config, policy, mesh)}
    answers = []
    for (kind, length, pair), name in names.items():
        file = folder and folder / f"{_key(config, policy, mesh, name)}.json"
        if file and file.exists():
            kept = json.loads(file.read_text())
        else:
            print(f"compiling {name} for {devices.name}: about {_MINUTES[kind]} min", file=sys.stderr, flush=True)
            temp, refused = _temp(made[name], devices)
            kept = {"program": name, "devices": devices.name, "temp": temp, "refused": refused}
            if file:
                _keep(file, kept)
        answers.append(Answer(kind, length, pair, kept["temp"], kept["refused"]))
    return answers


def _wanted(config: ConfigDict, policy: PolicyConfig, mesh: Mesh) -> dict[tuple[str, int, int], str]:
    """(kind, length, pair) -> the program's name in `aot.programs`."""
    engine, shapes = engine_config(config), update_shapes(config, mesh)
    longest, pair = shapes.length_buckets[-1], len(shapes.stream_buckets) - 1
    lengths = (longest, *shapes.length_buckets[-2:-1])
    return {
        ("prefill", 0, 0): f"prefill {engine.prefill_rows} x {engine.prefill_buckets[-1]}",
        ("decode", 0, 0): f"decode {engine.slots} slots x {engine.context}",
        **{
            ("update", length, pair): f"update {shapes.rows} x {length} + {shapes.stream_buckets[pair]}"
            for length in lengths
        },
    }


def _temp(program: aot.Program, devices: Devices) -> tuple[int, bool]:
    try:
        memory = aot.compiled(program.lower(), devices.options).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _ASKED.search(str(error))
        number, unit = [part for part in found.groups() if part] if found else ("0", "K")
        return max(int(float(number) * _UNITS[unit]), devices.memory), True
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes, False


def _key(config: ConfigDict, policy: PolicyConfig, mesh: Mesh, name: str) -> str:
    aside = (*NOT_OF_A_RUN, "env.", "tasks.", "eval.", "checkpoint.", "alarms.", "endpoint.", "policy.path", "seed")
    settings = {key: str(value) for key, value in flatten(config).items() if not key.startswith(aside)}
    device = mesh.devices.flat[0]
    parts = [
        name,
        settings,
        repr(policy),
        dict(mesh.shape),
        device.device_kind,
        device.client.platform_version,
        jax.__version__,
        jaxlib.__version__,
        _source(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _source() -> str:
    """A digest of what is traced into programs."""
    digest = hashlib.sha256()
    for file in sorted(_sources()):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    yield from (_PACKAGE / name for name in ("tools/planner/aot.py", "session.py"))
    for room in ("models", "sampling", "training"):
        yield from (_PACKAGE / room).glob("*.py")


def _keep(file: Path, kept: dict) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept) + "\n")
    except OSError as error:
        raise UserError(
            f"plan.cache_dir = {str(file.parent)!r} cannot be written ({error.strerror}): name another, or '' for none"
        ) from error
