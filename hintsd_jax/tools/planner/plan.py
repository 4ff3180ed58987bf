"""`--mode=plan`: will it fit? A config, a policy's shape and devices, here or not, in; what each device will hold out,
before anything is loaded.

What stays on a device is exact, from the shapes and layouts of the run. What programs need beside it is the compiler's
own figure where there is a compiler for the devices (TPUs by name, accelerators of this machine), else stated
arithmetic (`planning.temporaries`). No weights are read: `policy.path` may be a Hugging Face directory, one with
nothing but its config.json, or such a file itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from hintsd_jax.methods import resolved
from hintsd_jax.tools.planner import compiler, table, temporaries
from hintsd_jax.tools.planner.devices import find
from hintsd_jax.tools.planner.fit import Plan, Planner


class Made(NamedTuple):
    """sources: where the figures of prefill, decode and update come from. off: by what share the update's may be too
    small. note: one line.
    """

    planner: Planner
    plan: Plan
    sources: dict[str, str]
    off: float
    note: str


def plan(config: ConfigDict) -> bool:
    """Prints the plan; returns whether it fits.

    Raises:
      UserError: unknown devices, a mesh that does not lie on them, no config.json, no compiler.
    """
    planner, found, sources, off, note = make(config)
    print(f"{table.heading(found)}\n\n{table.table(found, sources)}\n\n{table.verdict(found, off)}")
    print(*table.limits(planner, found), note, sep="\n")
    if not found.fits:
        print(
            "what would help, the best first:",
            *table.advice(found, planner.advice(found), planner.together(found), off),
            sep="\n",
        )
    return found.fits


def make(config: ConfigDict) -> Made:
    """The plan of a config, by the compiler where there is one and it is wanted."""
    config = resolved(config)
    devices = find(config.plan.devices, config.plan.memory_gib)
    planner = Planner(shape_file(config))
    by_arithmetic = planner(config, devices)
    if not (config.plan.compile and devices.compiler):
        off = temporaries.ERROR.get(devices.platform, {})
        sources = {
            kind: "arithmetic, " + (f"up to {off[kind]:.0%} off" if kind in off else "rough")
            for kind in ("prefill", "decode", "update")
        }
        return Made(planner, by_arithmetic, sources, off.get("update", 0.0), "arithmetic: see docs/plan.md")
    answers = compiler.ask(config, by_arithmetic.policy, devices)
    planner = Planner(planner.shape, scales(by_arithmetic, answers))
    sources = {
        answer.kind: _source(answer) for answer in reversed(answers)
    }  # the largest update comes first: its word is the last
    lengths = " and ".join(
        f"{length:,}" for length in sorted(answer.length for answer in answers if answer.kind == "update")
    )
    note = f"other lengths, slots and settings: by arithmetic, scaled to the compiler's updates at {lengths} tokens, its prefill and its decode"
    return Made(planner, planner(config, devices), sources, 0.0, note)


def scales(plan: Plan, answers: list[compiler.Answer]) -> dict[str, Callable[[int], float]]:
    """By what the arithmetic is to be multiplied so that it says what the compiler said; linear in an update's length
    in between.
    """
    config, policy, mesh, platform = plan.config, plan.policy, plan.mesh, plan.devices.platform
    arithmetic = {
        "prefill": temporaries.prefill(config, policy, mesh, platform),
        "decode": temporaries.decode(config, policy, mesh, platform),
    }
    found = {answer.kind: answer.temp / arithmetic[answer.kind] for answer in answers if answer.kind != "update"}
    points = sorted(
        (answer.length, answer.temp / temporaries.update(config, policy, mesh, platform, answer.length, answer.pair))
        for answer in answers
        if answer.kind == "update"
    )

    def update(length: int) -> float:
        (low, first), (high, last) = points[0], points[-1]
        share = min(max((length - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        return first + share * (last - first)

    return {kind: lambda _, ratio=ratio: ratio for kind, ratio in found.items()} | {"update": update}


def shape_file(config: ConfigDict) -> Path:
    """The config.json of the policy: of a directory, or the file itself."""
    path = Path(config.policy.path)
    return path if path.suffix == ".json" else path / "config.json"


def _source(answer: compiler.Answer) -> str:
    return "compiler, which refuses it: it asks for as much" if answer.refused else "compiler"
