"""What the TPU compiler says of every program of a run: memory, FLOPs and collectives, without a TPU.

  python -m benchmarks.tpu_programs                   everything that is not in the results yet, then docs/tpu.md
  python -m benchmarks.tpu_programs --only nothing    docs/tpu.md from the results as they are
  python -m benchmarks.tpu_programs --topology v5e:2x4=1x8x1 --adapter lora --only decode --only "update 8 x 24576"

Every finished program is a line of benchmarks/results/tpu_programs.jsonl, so that it can be stopped at any moment and
started again. A program takes seconds to minutes to compile, all of them hours. The tables of docs/tpu.md stand between
its markers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: a TPU that is here is not needed, and not taken

import jax

from benchmarks.pages import REPO, fill, markdown_table
from benchmarks.program_report import report
from hintsd_jax.config import build
from hintsd_jax.configs import bfcl_qwen3_4b
from hintsd_jax.models.sharding import AXES
from hintsd_jax.tools.planner import topologies
from hintsd_jax.tools.planner.devices import TPUS
from hintsd_jax.tools.planner.programs import Program, described_policy, programs

RESULTS = REPO / "benchmarks" / "results" / "tpu_programs.jsonl"
PAGE = REPO / "docs" / "tpu.md"
SHAPE = REPO / "assets" / "shapes" / "qwen3-4b.json"
TOPOLOGIES = ("v5e:2x4=1x8x1", "v5p:2x2x1=1x4x1")  # =data x fsdp x tensor
ADAPTERS = ("lora", "full")
GIB = 2**30
KEY = ("topology", "mesh", "adapter", "layers", "program")


def compile_all(arguments: argparse.Namespace) -> Iterator[dict]:
    """A row for every program asked for that has none yet."""
    done = {tuple(row[name] for name in KEY) for row in rows()}
    for adapter in arguments.adapter or ADAPTERS:
        for topology, _, mesh in (choice.partition("=") for choice in arguments.topology or TOPOLOGIES):
            config = build.build(bfcl_qwen3_4b.get_config())
            if adapter == "full":
                config = config.replaced({"lora.rank": 0})
            policy = described_policy(config, SHAPE, arguments.layers)
            sizes = dict(zip(AXES, map(int, mesh.split("x")), strict=True))
            for program in programs(config, policy, topologies.tpu_mesh(topology, **sizes)):
                key = dict(zip(KEY, (topology, mesh, adapter, policy.num_layers, program.name), strict=True))
                if tuple(key.values()) not in done and any(part in program.name for part in arguments.only or ("",)):
                    about = {"versions": versions(), "date": time.strftime("%Y-%m-%d")}
                    yield {**key, "held": program.weight_bytes, **compile_one(program), **about}


def compile_one(program: Program) -> dict:
    try:
        compiled = report(program)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": str(error)[:1000]}
    counts = sorted(compiled.collectives.items(), key=lambda item: -item[0].size)
    numbers = {name: getattr(compiled, name) for name in ("arguments", "temp", "output", "alias", "total", "flops")}
    collectives = [[*operation, number] for operation, number in counts]
    return {**numbers, "seconds": round(compiled.seconds, 1), "collectives": collectives}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}


def rows() -> list[dict]:
    """The results so far, the last of each program."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return list({tuple(row[name] for name in KEY): row for row in map(json.loads, lines)}.values())


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def share(size: float, topology: str) -> str:
    return f"{100 * size / GIB / TPUS[topology.partition(':')[0]].memory_gib:.0f} %"


def looped(row: dict) -> str:
    """The collectives of the loops in decode and update."""
    if row["program"].split()[0] not in ("decode", "update"):
        return ""
    largest = max((size for _, _, size, _ in row["collectives"]), default=0)
    counts = {kind: sum(n for other, _, _, n in row["collectives"] if other == kind) for kind, *_ in row["collectives"]}
    listed = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    return f"in loops: {listed}; the largest {largest / 1024:,.0f} KiB"


def cases(results: list[dict]) -> dict[tuple, list[dict]]:
    """Rows at full depth by (topology, mesh, adapter)."""
    full = [row for row in results if row["layers"] == json.loads(SHAPE.read_text())["num_hidden_layers"]]
    by_case = {}
    for row in full:
        by_case.setdefault((row["topology"], row["mesh"], row["adapter"]), []).append(row)
    return dict(sorted(by_case.items(), key=lambda item: (*item[0][:2], ADAPTERS.index(item[0][2]))))


def trained(adapter: str) -> str:
    return "LoRA" if adapter == "lora" else "all weights"


def program_tables(results: list[dict]) -> str:
    head = ["program", "arguments", "temp", "total", "of HBM", "GFLOP, loops once", "compiled in", "on", "notes"]
    parts = []
    for (topology, mesh, adapter), rows_of_case in cases(results).items():
        lines = []
        for row in sorted(rows_of_case, key=lambda row: order(row["program"])):
            if "refused" in row:
                lines.append(
                    [row["program"], "", "", "", "**does not fit**", "", "", date(row), row["refused"].splitlines()[0]]
                )
                continue
            sizes = [gib(row[name]) for name in ("arguments", "temp", "total")]
            cost = [f"{row['flops'] / 1e9:,.0f}", f"{row['seconds']:.0f} s", date(row)]
            lines.append([row["program"], *sizes, share(row["total"], topology), *cost, looped(row)])
        parts.append(f"### {topology}, mesh {mesh}, {trained(adapter)}\n\n{markdown_table(head, lines, left=(0, 8))}")
    return "\n\n".join(parts)


def date(row: dict) -> str:
    """When it was compiled; results before 2026-11-27 do not say so."""
    return row.get("date", "before")


def order(program: str) -> tuple:
    """Programs in the order of a step, sizes ascending."""
    kinds = ("prefill", "copy", "decode", "update", "apply")
    return kinds.index(program.split()[0]), [int(number) for number in re.findall(r"\d+", program)]


def run_table(results: list[dict]) -> str:
    """The whole run: a program's memory and what else lies on the chip meanwhile."""
    head = ["", "weights, train state", "served weights, cache", "all while decoding"]
    head += ["largest update", "its temp", "all while updating", "of HBM"]
    lines = []
    for (topology, mesh, adapter), rows_of_case in cases(results).items():
        decode = [row for row in rows_of_case if row["program"].startswith("decode")]
        updates = [row for row in rows_of_case if row["program"].startswith("update")]
        if not decode or not updates:
            continue
        update, engine = max(updates, key=lambda row: order(row["program"])), decode[0]["arguments"]
        name = f"{topology} {mesh}, {trained(adapter)}: {update['program']}"
        sizes = [update["held"], engine, decode[0]["total"] + update["held"]]
        if "refused" in update:
            lines.append([name, *map(gib, sizes), "", "", "", "**does not fit**"])
            continue
        whole = engine + update["total"]
        sizes += [update["total"], update["temp"], whole]
        lines.append([name, *map(gib, sizes), share(whole, topology)])
    return markdown_table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--topology", action="append", help=f"with its mesh, data x fsdp x tensor; default {' and '.join(TOPOLOGIES)}"
    )
    parser.add_argument("--adapter", action="append", choices=ADAPTERS, help="default both")
    parser.add_argument("--only", action="append", help="programs whose name holds this; default all")
    parser.add_argument(
        "--layers", type=int, help="fewer layers than the policy has, for a quick look; not on the page"
    )
    for row in compile_all(parser.parse_args()):
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        outcome = row["refused"] if "refused" in row else f"{gib(row['total'])} GiB in {row['seconds']:.0f} s"
        print(*(row[name] for name in KEY), outcome, flush=True)
    results = rows()
    fill(PAGE, "run", run_table(results))
    fill(PAGE, "programs", program_tables(results))


if __name__ == "__main__":
    main()
