"""How cost grows with model, context, slots and hosts: the tables of docs/scaling.md.

  python -m benchmarks.scaling_tables              the page from the arithmetic and the results that are there
  python -m benchmarks.scaling_tables --compile    first every case of CROSSINGS that has no result yet (a minute each)

Memory is the planner's, on shapes alone. Time is a floor: what the chips' published rates would take for the bytes and
operations that no implementation can leave out. What crosses devices is counted in the programs that XLA compiles for
so many fake CPU devices, by benchmarks/results/scaling_crossings.jsonl; XLA's CPU compiler computes in float32, so that
elements are counted, and bytes are those of bfloat16.

T tokens of a row, M branch tokens, D model, H query heads, C head dimension, N layers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections import Counter
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: accelerators that are here are not needed, and not taken

from benchmarks.pages import REPO, RESULTS, fill, markdown_table
from benchmarks.plan_tables import configured
from benchmarks.program_report import crossing
from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.models.sharding import make_mesh
from hintsd_jax.tools.planner import devices, plan, topologies
from hintsd_jax.tools.planner.fit import Plan, Planner, context_settings
from hintsd_jax.tools.planner.programs import (
    abstract_cache,
    abstract_weights,
    bytes_on_one_device,
    described_policy,
    programs,
)

PAGE = REPO / "docs" / "scaling.md"
CROSSED = RESULTS / "scaling_crossings.jsonl"
GIB = 2**30
MACHINES = ("v5e-16", "v5p-64", "h100:8")
TITLES = {"qwen3-4b": "Qwen3-4B", "qwen3-32b": "Qwen3-32B"}
POLICIES = tuple(TITLES)
FREED = "with rollout.free_cache"
ADAPTERS = {"LoRA": {}, "all weights": {"lora.rank": 0}}
ADAPTERS |= {f"{name} {FREED}": keys | {"rollout.free_cache": True} for name, keys in ADAPTERS.items()}
REMEDIES = (  # of what does not fit
    ("v5e-16", "qwen3-4b", f"LoRA {FREED}"),
    ("v5e-16", "qwen3-4b", f"all weights {FREED}"),
    ("h100:16", "qwen3-32b", "all weights"),
    ("h100:16", "qwen3-32b", f"all weights {FREED}"),
)
SAMPLED = 4096  # tokens that the policy writes in an episode of the floors below; the rest of it are observations


class Rates(NamedTuple):
    """Of one chip, as published: bfloat16 operations a second, bytes a second of its memory, and bytes a second over
    all its links to other chips (both directions).
    """

    flops: float
    memory: float
    links: float


RATES = {"v5e": Rates(197e12, 819e9, 200e9), "v5p": Rates(459e12, 2765e9, 600e9), "h100": Rates(989e12, 3352e9, 900e9)}

ROW = (4096, 768)  # tokens of a row, and of its branches, in CROSSINGS
# policy, devices, mesh as data x fsdp x tensor, settings
CROSSINGS = [
    ("qwen3-4b", 8, "1x8x1", "LoRA"),
    ("qwen3-4b", 8, "1x1x8", "LoRA"),
    ("qwen3-4b", 8, "2x2x2", "LoRA"),
    ("qwen3-4b", 16, "4x2x2", "LoRA"),
    ("qwen3-4b", 32, "8x1x4", "LoRA"),
    ("qwen3-4b", 8, "1x8x1", "all weights"),
    ("qwen3-4b", 16, "1x8x2", "all weights"),
    ("qwen3-4b", 32, "1x8x4", "all weights"),
]


def planned(machine: str, policy: str, settings: dict[str, Any]) -> Plan:
    config = configured(policy, {"plan.compile": False, **settings})
    return Planner(plan.policy_file(config))(config, devices.find(machine))


def mesh_text(mesh: Any) -> str:
    return " x ".join(str(size) for size in mesh.shape.values())


def fit_table() -> str:
    head = ["", "mesh", "of a process", "weights, train state", "served copy", "cache", "rolling out", "updating"]
    head += ["of a chip", "longest context", "most slots"]
    cases = [(machine, policy, name) for machine in MACHINES for policy in POLICIES for name in ("LoRA", "all weights")]
    lines = []
    for machine, policy, name in (*cases, *REMEDIES):
        here = planned(machine, policy, ADAPTERS[name])
        planner = Planner(plan.policy_file(here.config))
        sizes = {row.name: row for row in here.resident}
        held = sum(row.rollout for row in here.resident if row.name not in ("served copy", "KV slots"))
        longest = planner.longest_context(here)
        gib = [held, sizes["served copy"].rollout, sizes["KV slots"].rollout]
        gib += [here.total("rollout"), here.total("update")]
        lines.append(
            [
                f"{machine}, {TITLES[policy]}, {name}",
                mesh_text(here.mesh),
                mesh_text(here.serving),
                *(f"{size / GIB:.2f}" for size in gib),
                f"{here.share:.0%}" if here.fits else f"**{here.share:.0%}**",
                f"{longest.context:,}" if longest else "none",
                planner.most_slots(here),
            ]
        )
    return markdown_table(head, lines)


def growth_table() -> str:
    """One thing changed at a time; what fits and what does not is the table above."""
    config = configured("qwen3-4b", {})
    slots, more = config.rollout.slots, lambda context: context_settings(config, context)
    base = ("v5p-64", "qwen3-4b", {})
    cases = {
        f"v5p-64, Qwen3-4B, LoRA, {slots} slots of 24,576": base,
        "context 8,192": ("v5p-64", "qwen3-4b", more(8192)),
        "context 16,384": ("v5p-64", "qwen3-4b", more(16384)),
        "context 32,768": ("v5p-64", "qwen3-4b", more(32768)),
        f"{2 * slots} slots": ("v5p-64", "qwen3-4b", {"rollout.slots": 2 * slots}),
        f"{4 * slots} slots": ("v5p-64", "qwen3-4b", {"rollout.slots": 4 * slots}),
        "Qwen3-8B": ("v5p-64", "qwen3-8b", {}),
        "Qwen3-32B": ("v5p-64", "qwen3-32b", {}),
        "1 host (v5p-8)": ("v5p-8", "qwen3-4b", {}),
        "2 hosts (v5p-16)": ("v5p-16", "qwen3-4b", {}),
        "4 hosts (v5p-32)": ("v5p-32", "qwen3-4b", {}),
        "16 hosts (v5p-128)": ("v5p-128", "qwen3-4b", {}),
    }
    head = ["", "mesh", "weights, train state", "cache", "update beside", "a token, ms", "rollouts, s"]
    head += ["batches a step", "update, s"]
    lines = []
    for name, case in cases.items():
        here = planned(*case)
        held = sum(row.update for row in here.resident if row.name not in ("served copy", "KV slots"))
        cache = next(row.rollout for row in here.resident if row.name == "KV slots")
        gib = [f"{size / GIB:.2f}" for size in (held, cache, here.update)]
        floors = Floors(here)
        times = [f"{1000 * floors.token:.2f}", f"{floors.rollouts:.1f}", floors.batches, f"{floors.update:.2f}"]
        lines.append([name, mesh_text(here.mesh), *gib, *times])
    return markdown_table(head, lines)


class Floors:
    """Seconds that a plan's chips need at least, by `RATES`, for a step of which every episode fails and is as long as
    the context.

    token: to decode one token of all episodes of a process: its weights and half of their caches are read once.
    rollouts: SAMPLED tokens one after another, as often as a process must fill its slots.
    batches, update: of a step; operations alone.
    """

    def __init__(self, here: Plan):
        config, policy, rates = here.config, here.policy, RATES[here.devices.kind]
        served = bytes_on_one_device(abstract_weights(policy, here.serving, "serve"))
        cache = bytes_on_one_device(abstract_cache(config, policy, here.serving))
        episodes = config.tasks.tasks_per_step * config.tasks.rollouts
        own, slots = math.ceil(episodes / here.devices.processes), config.rollout.slots
        self.token = (served + cache / 2 * min(own, slots) / slots) / rates.memory
        self.rollouts = SAMPLED * self.token * math.ceil(own / slots)
        shapes = build.algorithm(config).batch_shapes(here.mesh)
        self.batches = math.ceil(episodes / shapes.batch_size)
        rows = shapes.batch_size / (here.mesh.shape["data"] * here.mesh.shape["fsdp"])
        length, pair = shapes.all()[-1]
        branch = shapes.tokens(length, pair)[1]
        flops = update_flops(policy, bool(config.lora.rank), length, branch) * rows / here.mesh.shape["tensor"]
        self.update = self.batches * flops / rates.flops


def update_flops(policy: Any, adapter: bool, T: int, M: int) -> float:
    """Of one row. The student's layers forward, forward again (remat) and backward: with frozen weights their gradient
    is left out; the teacher's forward over row and branches. Logits of the few action tokens are left out.
    """
    D, C, N = policy.d_model, policy.head_dim, policy.num_layers
    HC = policy.num_heads * C
    weights = N * D * (2 * HC + 2 * policy.num_kv_heads * C + 3 * policy.d_ff)
    attention = lambda tokens, keys: 4 * N * HC * tokens * keys  # scores and their sums
    student = (3 if adapter else 4) * 2 * weights * T + 4 * attention(T, T / 2)
    teacher = 2 * weights * (T + M) + attention(T, T / 2) + attention(M, T)
    return student + teacher


def crossed(policy: str, count: int, mesh: str, adapter: str) -> dict[str, Any]:
    """Compiles one case, on `count` fake devices of this process."""
    settings = {"batch.length_buckets": ROW[:1], "batch.branch_buckets": ROW[1:], "batch.action_buckets": (256,)}
    config: Config = configured(policy, settings | ADAPTERS[adapter])
    described = described_policy(config, plan.policy_file(config), platform="cpu")
    data, fsdp, tensor = map(int, mesh.split("x"))
    found = programs(config, described, make_mesh(data, fsdp, tensor))
    program = next(program for program in found if program.kind == "update")
    text = topologies.compiled(program.lower()).as_text() or ""
    elements: Counter[str] = Counter()
    for operation, times in crossing(text).items():
        number = math.prod(int(size) for size in operation.result.partition("[")[2][:-1].split(",") if size)
        elements[operation.kind] += number * times
    return {"case": [policy, count, mesh, adapter], "program": program.name, "elements": dict(elements)}


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CROSSED.read_text().splitlines()] if CROSSED.exists() else []


def crossing_table() -> str:
    head = ["", "mesh", "rows", "gathered", "summed", "moved otherwise", "GiB in all", "of the weights"]
    head += [f"{kind}: {what}, s" for kind in ("v5e", "v5p") for what in ("links", "operations")]
    lines = []
    for row in sorted(rows(), key=lambda row: CROSSINGS.index(tuple(row["case"]))):
        policy, count, mesh, adapter = row["case"]
        elements = row["elements"]
        gathered = elements.get("all-gather", 0)
        summed = elements.get("all-reduce", 0) + elements.get("reduce-scatter", 0)
        other = sum(elements.values()) - gathered - summed
        config = configured(policy, ADAPTERS[adapter])
        described = described_policy(config, plan.policy_file(config))
        weights = abstract_weights(described, devices.find("v5p:1x1x1").layout(), "serve")
        gib = [2 * number / GIB for number in (gathered, summed, other)]
        flops = update_flops(described, adapter == "LoRA", *ROW) / int(mesh.split("x")[2])
        times = [
            seconds
            for rates in (RATES["v5e"], RATES["v5p"])
            for seconds in (sum(gib) * GIB / rates.links, flops / rates.flops)
        ]
        lines.append(
            [
                f"{count} devices, Qwen3-4B, {adapter}",
                mesh.replace("x", " x "),
                row["program"].split()[1],
                *(f"{size:.1f}" for size in (*gib, sum(gib))),
                f"{sum(gib) * GIB / bytes_on_one_device(weights):.1f}",
                *(f"{seconds:.2f}" for seconds in times),
            ]
        )
    return markdown_table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile the cases of CROSSINGS that have no result")
    parser.add_argument("--case", type=int, help="compile this one of them, by its number, and print its result")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(crossed(*CROSSINGS[arguments.case])))
        return
    done = [tuple(row["case"]) for row in rows()]
    for number, case in enumerate(CROSSINGS):
        if arguments.compile and case not in done:
            flags = f"--xla_force_host_platform_device_count={case[1]}"  # jax reads it once: a process for each
            command = [sys.executable, "-m", "benchmarks.scaling_tables", f"--case={number}"]
            out = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, check=True, stdout=subprocess.PIPE)
            with CROSSED.open("ab") as file:
                file.write(out.stdout.splitlines()[-1] + b"\n")
            print(*case, flush=True)
    fill(PAGE, "fit", fit_table())
    fill(PAGE, "growth", growth_table())
    fill(PAGE, "crossing", crossing_table())


if __name__ == "__main__":
    main()
