"""What the compiler says of a program: its memory, its operations, collectives inside loops, arrays copied to another
layout. A program of `tools.planner.programs` goes in, a report comes out.

Collectives and layouts are read off the text of the compiled program: counters of operations with their bytes on one
device. A computation belongs to a loop where it is a while body or condition, or is called by one through any chain of
fusions, conditionals and asynchronous wrappers.

Invariant: what runs in a loop counts once, however often and deeply it is called; an array of an unknown type is an
error, not nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from hintsd_jax.tools.planner.programs import Program
from hintsd_jax.tools.planner.topologies import compiled, memory_of

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BYTES = {"pred": 1, "bf16": 2} | {f"{kind}{bits}": bits / 8 for kind in "suf" for bits in (4, 8, 16, 32, 64)}

_HEADER = re.compile(r"^(?:ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT\s+)?%?[\w.\-]+\s*=\s*(.*)$")
# The kind is the first word before a bracket: layouts are T(8,128), S(1), in capitals.
_KIND = re.compile(r"(?<![\w.%\-])([a-z][a-z0-9\-]*)\(")
_LOOP = re.compile(r"\b(?:body|condition)=%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_MANY = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)(?:e[0-9]m[0-9]\w*)?\[([0-9,]*)\]")  # f8e4m3fn counts as f8


class Operation(NamedTuple):
    """kind: "all-gather", "copy", ...; result: its largest array, such as "bf16[8,2560]"; size: bytes of that array on
    one device.
    """

    kind: str
    result: str
    size: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes are those of one device; `alias` is the output that is written over arguments. flops: of one device, loop
    bodies counted once. seconds: of lowering and compiling. collectives: inside its loops. text: of the program.
    """

    arguments: int
    temp: int
    output: int
    alias: int
    flops: float
    seconds: float
    collectives: Counter[Operation]
    text: str = dataclasses.field(repr=False)

    @property
    def total(self) -> int:
        """Bytes of the device's memory while it runs."""
        return self.arguments + self.temp + self.output - self.alias


def report(program: Program) -> Report:
    """Compiles it. Raises what `topologies.compiled` raises."""
    began = time.perf_counter()
    executable = compiled(program.lower())
    memory, text = memory_of(executable), executable.as_text() or ""
    return Report(
        arguments=memory.argument_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        flops=(executable.cost_analysis() or {}).get("flops", math.nan),
        seconds=time.perf_counter() - began,
        collectives=collectives(text),
        text=text,
    )


def collectives(text: str, inside_loops: bool = True) -> Counter[Operation]:
    """How many of each there are in the program's text, by default only of those inside loops. A loop's body counts
    once.
    """
    return _count(text, (*COLLECTIVES, *(f"{kind}-start" for kind in COLLECTIVES)), inside_loops)


def crossing(text: str) -> Counter[Operation]:
    """How often each collective runs in a program for CPU devices, loops counted by the turns that XLA knows of; one of
    which it knows none (decoding, until all slots are done) counts as one turn.

    Of TPU programs it would be wrong: their loops say no number, and one collective stands in several fusions.
    """
    computations = _computations(text)
    callers: dict[str, list[tuple[str, int]]] = {}
    for caller, operations in computations.items():
        for _, kind, line in operations:
            turns = re.search(r"known_trip_count\W+n\W+(\d+)", line) if kind == "while" else None
            for name in _callees(line):
                callers.setdefault(name, []).append((caller, int(turns[1]) if turns else 1))
    times = functools.cache(lambda name: sum(n * times(caller) for caller, n in callers.get(name, ())) or 1)
    crossed: Counter[Operation] = Counter()
    for name, operations in computations.items():
        for result, kind, _ in operations:
            if kind.removesuffix("-start") in COLLECTIVES:
                size, array = max((_size(dtype, dims), f"{dtype}[{dims}]") for dtype, dims in _ARRAY.findall(result))
                crossed[Operation(kind.removesuffix("-start"), array, size)] += times(name)
    return crossed


def _callees(line: str) -> list[str]:
    many = [one.strip().lstrip("%") for names in _CALLED_MANY.findall(line) for one in names.split(",")]
    return _CALLED.findall(line) + many


def layout_copies(text: str, at_least: int, others: Collection[str] = ()) -> Counter[Operation]:
    """Copies in another layout, and transpositions, that yield arrays of so many bytes, anywhere in the program; and
    `others`, such as "slice".

    Asynchronous copies are not among them: they fetch an array as it is into on-chip memory.
    """
    copies = _count(text, ("copy", "transpose", *others), inside_loops=False)
    return Counter({operation: number for operation, number in copies.items() if operation.size >= at_least})


def _count(text: str, kinds: Collection[str], inside_loops: bool) -> Counter[Operation]:
    computations = _computations(text)
    counts: Counter[Operation] = Counter()
    for name in _looping(computations) if inside_loops else computations:
        for result, kind, _ in computations[name]:
            if kind in kinds:
                size, array = max((_size(dtype, dims), f"{dtype}[{dims}]") for dtype, dims in _ARRAY.findall(result))
                counts[Operation(kind.removesuffix("-start"), array, size)] += 1
    return counts


def _size(dtype: str, dims: str) -> int:
    return math.ceil(BYTES[dtype] * math.prod(int(dim) for dim in dims.split(",") if dim))


def _computations(text: str) -> dict[str, list[tuple[str, str, str]]]:
    """Computation -> (result's type, kind, the whole right-hand side) of its operations."""
    computations: dict[str, list[tuple[str, str, str]]] = {}
    current: list[tuple[str, str, str]] | None = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[1], [])
        elif line.startswith("}"):
            current = None
        elif current is None or not (operation := _OPERATION.match(line)):
            continue
        elif kind := _KIND.search(operation[1]):
            current.append((operation[1][: kind.start()], kind[1], operation[1]))
    return computations


def _looping(computations: dict[str, list[tuple[str, str, str]]]) -> set[str]:
    """The computations that run in some loop."""
    loops = [line for operations in computations.values() for _, kind, line in operations if kind == "while"]
    waiting = [name for line in loops for name in _LOOP.findall(line)]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in reached and name in computations:
            reached.add(name)
            for _, _, line in computations[name]:
                waiting += _callees(line)
    return reached
