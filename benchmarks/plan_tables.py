"""What --mode=plan says of Qwen3 policies on GPUs and TPUs, and how far its arithmetic is from the compilers.

  python -m benchmarks.plan_tables                   docs/plan.md from the results and the plans
  python -m benchmarks.plan_tables --calibrate       first every case of CASES that has no result yet (minutes each)
  python -m benchmarks.plan_tables --calibrate h100  of these, those whose devices begin so

TPU cases need libtpu (`make libtpu`), GPU cases jax's CUDA plugin (requirements-cuda.txt); neither needs the devices.
Every finished case is a line of benchmarks/results/plan_programs.jsonl. The TPU programs of
benchmarks/results/tpu_programs.jsonl count as cases too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: a TPU that is here is not needed, and not taken

from benchmarks.pages import REPO, fill, markdown_table
from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.configs import bfcl_qwen3_4b
from hintsd_jax.tools.planner import devices, plan, topologies
from hintsd_jax.tools.planner.compiler import temporary_bytes
from hintsd_jax.tools.planner.fit import Planner
from hintsd_jax.tools.planner.programs import described_policy, programs

RESULTS = REPO / "benchmarks" / "results" / "plan_programs.jsonl"
TPU_RESULTS = REPO / "benchmarks" / "results" / "tpu_programs.jsonl"
PAGE = REPO / "docs" / "plan.md"
# GiB that a described device is given in a case: more than any has, so that want of memory changes no schedule
ROOM = 186.0
ACTIONS = {768: 256, 3072: 1536}  # branch tokens -> action tokens, as in the config


class Case(NamedTuple):
    """devices: as in plan.devices. policy: a file of assets/shapes. program: how its name begins. settings: config
    keys; the update's one length and its branch tokens are `length` and `branches`.
    """

    devices: str
    policy: str
    program: str
    length: int
    branches: int
    settings: dict

    @property
    def config(self) -> Config:
        buckets = {
            "batch.length_buckets": (self.length,),
            "batch.branch_buckets": (self.branches,),
            "batch.action_buckets": (ACTIONS[self.branches],),
        }
        return configured(self.policy, buckets | self.settings)


def _update(devices: str, policy: str, length: int, branches: int, **settings) -> Case:
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    return Case(devices, policy, "update", length, branches, keys)


CASES = [
    _update("h100", "qwen3-4b", 4096, 768),
    _update("h100", "qwen3-4b", 8192, 3072),
    _update("h100", "qwen3-4b", 16384, 768),
    _update("h100", "qwen3-4b", 24576, 3072),
    Case("h100", "qwen3-4b", "prefill 1 x 1024", 24576, 3072, {}),
    Case("h100", "qwen3-4b", "decode", 24576, 3072, {}),
    _update("h100:8", "qwen3-4b", 24576, 3072),
    _update("h100:8", "qwen3-4b", 4096, 768, lora__rank=0),
    _update("h100:4", "qwen3-4b", 24576, 3072, mesh__fsdp=2, mesh__tensor=2),
    _update("h100:8", "qwen3-32b", 24576, 3072),
    _update("h100", "qwen3-8b", 24576, 3072),
    _update("h100", "qwen3-4b", 4096, 768, policy__remat=False),
    _update("h100", "qwen3-4b", 8192, 768, batch__rows_per_device=2),
    _update("h100:8", "qwen3-4b", 24576, 3072, lora__rank=0),
    Case("h100", "qwen3-8b", "decode", 24576, 3072, {}),
    _update("v5p:1x1x1", "qwen3-4b", 4608, 768),
    _update("v5p:1x1x1", "qwen3-4b", 24064, 3072),
    _update("v5p-64", "qwen3-4b", 24576, 3072),
    _update("v5p-64", "qwen3-4b", 16384, 3072),
    Case("v5p-64", "qwen3-4b", "prefill 1 x 1024", 24576, 3072, {}),
    Case("v5p-64", "qwen3-4b", "decode", 24576, 3072, {}),
]

PLANS = {  # the compiler's, unless plan.compile says otherwise
    "Qwen3-4B, LoRA, one H100 of 80 GB, by arithmetic": ("qwen3-4b", {"plan.devices": "h100:1", "plan.compile": False}),
    "Qwen3-4B, LoRA, one H100 of 80 GB, by XLA's GPU compiler": ("qwen3-4b", {"plan.devices": "h100:1"}),
    "Qwen3-4B, LoRA, one H200 of 141 GB, by arithmetic": (
        "qwen3-4b",
        {"plan.devices": "h200:1", "plan.compile": False},
    ),
    "Qwen3-4B, LoRA, v5e-8": ("qwen3-4b", {"plan.devices": "v5e-8"}),
    "Qwen3-4B, LoRA, v5p-64, by arithmetic": ("qwen3-4b", {"plan.devices": "v5p-64", "plan.compile": False}),
    "Qwen3-4B, all weights, v5e-8, by arithmetic": (
        "qwen3-4b",
        {"plan.devices": "v5e-8", "lora.rank": 0, "plan.compile": False},
    ),
    "Qwen3-8B, LoRA, v5e-8, by arithmetic": ("qwen3-8b", {"plan.devices": "v5e-8", "plan.compile": False}),
    "Qwen3-32B, LoRA, two H100, by arithmetic": ("qwen3-32b", {"plan.devices": "h100:2", "plan.compile": False}),
    "Qwen3-32B, LoRA, v5p-64, by arithmetic": ("qwen3-32b", {"plan.devices": "v5p-64", "plan.compile": False}),
}


def configured(policy: str, settings: dict) -> Config:
    path = str(REPO / "assets" / "shapes" / f"{policy}.json")
    return build.build(bfcl_qwen3_4b.get_config()).replaced({"policy.path": path} | settings)


def calibrate(only: str) -> Iterator[dict]:
    """A row for every case that has none yet."""
    done = [_case(row) for row in rows(RESULTS)]
    for case in CASES:
        if not case.devices.startswith(only):
            continue
        config, target = case.config, devices.find(case.devices, ROOM)
        if not target.has_compiler:
            print(f"no compiler for {case.devices}: left out", flush=True)
            continue
        policy = described_policy(config, Path(config.policy.path), platform=target.platform)
        sizes = target.sizes(config, policy)
        case = case._replace(settings={f"mesh.{axis}": size for axis, size in sizes.items()} | case.settings)
        if case in done:
            continue
        candidates = programs(config, policy, target.mesh(**sizes), platform=target.platform)
        program = next(program for program in candidates if program.name.startswith(case.program))
        began = time.perf_counter()
        temp = temporary_bytes(topologies.compiled(program.lower(), target.compiler_options))
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        yield {
            "case": case,
            "program": program.name,
            "temp": temp,
            "seconds": round(time.perf_counter() - began, 1),
            "versions": versions,
        }


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def compared() -> Iterator[tuple[Case, str, int, int]]:
    """Case, program, what the compiler said, what the arithmetic says: of the kept results that this code can still
    make.
    """
    for row in rows(RESULTS):
        case = _case(row)
        if case.program == "update" or devices.find(case.devices).processes == 1:  # else it no longer rolls out so
            yield _compare(case, row["program"], row["temp"])
    for row in rows(TPU_RESULTS):
        kind, *numbers = re.findall(r"\d+|^\w+", row["program"])
        if kind not in ("update", "prefill", "decode") or row["program"].startswith(
            ("prefill 1 x 64", "prefill 1 x 256")
        ):
            continue
        data, fsdp, tensor = map(int, row["mesh"].split("x"))
        settings = {
            "mesh.data": data,
            "mesh.fsdp": fsdp,
            "mesh.tensor": tensor,
            "lora.rank": 32 if row["adapter"] == "lora" else 0,
        }
        length, branches = map(int, numbers[-2:]) if kind == "update" else (24576, 3072)
        asked = re.search(r"temporaries \(([\d.]+)G\)", row.get("refused", ""))
        temp = int(float(asked[1]) * 2**30) if asked else row["temp"] + row["output"] - row["alias"]
        yield _compare(Case(row["topology"], "qwen3-4b", kind, length, branches, settings), row["program"], temp)


def _case(row: dict) -> Case:
    """Of a kept result; keys of earlier versions by their names of today."""
    devices, policy, program, length, branches, settings = row["case"]
    settings = {key.replace("distill.rows_per_device", "batch.rows_per_device"): settings[key] for key in settings}
    settings = {"mesh.data": 1, "mesh.tensor": 1} | settings  # what was taken where nothing was said
    return Case(devices, policy, program, length, branches, settings)


def _compare(case: Case, program: str, said: int) -> tuple[Case, str, int, int]:
    config = case.config
    planned = Planner(plan.policy_file(config))(config, devices.find(case.devices))
    return case, program, said, getattr(planned, program.split()[0])


def calibration_table() -> str:
    usual = {"lora.rank": 32, "mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 1}
    lines, errors = [], {}
    for case, program, said, computed in compared():
        settings = ", ".join(f"{key} = {value}" for key, value in case.settings.items() if usual.get(key) != value)
        figures = (f"{said / 2**30:.2f}", f"{computed / 2**30:.2f}", f"{computed / said:.2f}")
        lines.append([case.devices, case.policy, program, settings, *figures])
        kind = (devices.find(case.devices).platform, program.split()[0])
        errors.setdefault(kind, []).append(abs(computed / said - 1))
    head = ["devices", "policy", "program", "settings", "compiler", "arithmetic", "ratio"]
    notes = [
        f"\n{kind} on {platform}: {len(off)} cases,"
        f" typically {statistics.median(off):.0%} off, at worst {max(off):.0%}."
        for (platform, kind), off in sorted(errors.items())
    ]
    return "\n".join([markdown_table(head, lines, left=range(4)), *notes])


def plan_tables() -> str:
    parts = []
    for title, (policy, settings) in PLANS.items():
        config, text = configured(policy, settings), io.StringIO()
        if config.plan.compile and not devices.find(config.plan.devices).has_compiler:
            raise SystemExit(
                f"error: {title}: no compiler for {config.plan.devices} here: install requirements-cuda.txt"
            )
        with contextlib.redirect_stdout(text):
            plan.plan(config)
        flags = " ".join(f"--config.{key}={value}" for key, value in settings.items())
        parts.append(f"### {title}\n\n`{flags}`, `{policy}.json`\n\n```\n{text.getvalue().rstrip()}\n```")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--calibrate", nargs="?", const="", help="compile the cases without a result, or those of devices that begin so"
    )
    arguments = parser.parse_args()
    for row in calibrate(arguments.calibrate) if arguments.calibrate is not None else ():
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*row["case"][:3], f"{row['temp'] / 2**30:.2f} GiB in {row['seconds']:.0f} s", flush=True)
    fill(PAGE, "plans", plan_tables())
    fill(PAGE, "calibration", calibration_table())


if __name__ == "__main__":
    main()
