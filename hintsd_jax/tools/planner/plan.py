# SPDX-License-Identifier: Apache-2.0

"""`--mode=plan`: will it fit? A config, a policy's shape and devices, here or not, in; what each device will hold out,
before anything is loaded.

What stays on a device is exact, from the shapes and layouts of the run. What programs need beside it is the compiler's
own figure where there is a compiler for the devices (TPUs by name, accelerators of this machine), else stated
arithmetic (`temporary_memory`). No weights are read: `policy.path` may be a Hugging Face directory, one with nothing
but its config.json, or such a file itself; of a model by name that file alone is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hintsd_jax.config.schema import Config
from hintsd_jax.policies import pinned
from hintsd_jax.storage import AnyPath, located
from hintsd_jax.tools.planner import advice, compiler, table, temporary_memory
from hintsd_jax.tools.planner.devices import find
from hintsd_jax.tools.planner.fit import Plan, Planner

PROGRAMS = ("prefill", "decode", "update")


class Planned(NamedTuple):
    """sources: where the figures of `PROGRAMS` come from. error: by what share the update's may be too small. note: one
    line about everything else.
    """

    planner: Planner
    plan: Plan
    sources: dict[str, str]
    error: float
    note: str


def plan(config: Config) -> bool:
    """Prints the plan; returns whether it fits.

    Raises:
      UserError: unknown devices, a mesh that does not lie on them, no config.json, no compiler.
    """
    planner, planned, sources, error, note = make_plan(config)
    print(table.heading(planned), table.memory_table(planned, sources), table.verdict(planned, error), sep="\n\n")
    print(*table.limits(planner, planned), note, sep="\n")
    if not planned.fits:
        changes, combined = advice.single_changes(planner, planned), advice.combined_change(planner, planned)
        print("what would help, the best first:", *table.advice(planned, changes, combined, error), sep="\n")
    return planned.fits


def make_plan(config: Config) -> Planned:
    """The plan of a config, by the compiler where there is one and it is wanted."""
    devices = find(config.plan.devices, config.plan.memory_gib)
    config = pinned(config, only_config=True)
    planner = Planner(policy_file(config))
    by_arithmetic = planner(config, devices)
    if not (config.plan.compile and devices.has_compiler):
        errors = {} if by_arithmetic.policy.experts else temporary_memory.ERROR.get(devices.platform, {})
        accuracy = {kind: f"up to {errors[kind]:.0%} off" if kind in errors else "rough" for kind in PROGRAMS}
        sources = {kind: f"arithmetic, {text}" for kind, text in accuracy.items()}
        return Planned(planner, by_arithmetic, sources, errors.get("update", 0.0), "arithmetic: see docs/plan.md")
    answers = compiler.ask(config, by_arithmetic.policy, devices)
    planner = Planner(planner.policy_file, scales(by_arithmetic, answers))
    sources = {answer.kind: _source(answer) for answer in reversed(answers)}  # the largest update, the first, stands
    lengths = sorted(answer.length for answer in answers if answer.kind == "update")
    note = (
        "other lengths, slots and settings: by arithmetic, scaled to the compiler's updates at"
        f" {' and '.join(f'{length:,}' for length in lengths)} tokens, its prefill and its decode"
    )
    return Planned(planner, planner(config, devices), sources, 0.0, note)


def scales(plan: Plan, answers: Sequence[compiler.Answer]) -> dict[str, Callable[[int], float]]:
    """By what the arithmetic is to be multiplied so that it says what the compiler said; linear in an update's length
    in between.
    """
    of_run = (plan.config, plan.policy, plan.mesh, plan.devices.platform)
    of_rollout = (plan.config, plan.policy, plan.serving, plan.devices.platform)
    arithmetic = {"prefill": temporary_memory.prefill(*of_rollout), "decode": temporary_memory.decode(*of_rollout)}
    ratios = {answer.kind: answer.temporary / arithmetic[answer.kind] for answer in answers if answer.kind != "update"}
    points = sorted(
        (answer.length, answer.temporary / temporary_memory.update(*of_run, answer.length, answer.pair))
        for answer in answers
        if answer.kind == "update"
    )

    def update(length: int) -> float:
        (low, first), (high, last) = points[0], points[-1]
        share = min(max((length - low) / (high - low), 0.0), 1.0) if high > low else 0.0
        return first + share * (last - first)

    return {kind: lambda _, ratio=ratio: ratio for kind, ratio in ratios.items()} | {"update": update}


def policy_file(config: Config) -> AnyPath:
    """The config.json of the policy: of a directory, or the file itself."""
    path = located(config.policy.location)
    return path if path.suffix == ".json" else path / "config.json"


def _source(answer: compiler.Answer) -> str:
    return "compiler, which refuses it: it asks for as much" if answer.refused else "compiler"
