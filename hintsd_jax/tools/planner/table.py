# SPDX-License-Identifier: Apache-2.0

"""A plan as text: what each device holds in every phase, whether it fits, what would be the longest, and what to
change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from tabulate import SEPARATING_LINE, tabulate

from hintsd_jax.config import build
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.tools.planner.advice import Change, Price
from hintsd_jax.tools.planner.fit import CONTEXT_STEP, FINE_STEP, FRACTION_KEY, Plan, Planner
from hintsd_jax.tools.planner.programs import abstract_weights
from hintsd_jax.tools.planner.resident import PHASES

_HEADS = ("GiB on one device", "rolling out", "updating", "from")
_MOST_CHANGES = 8  # that are named


def gib(size: float) -> str:
    """Small policies too have figures."""
    return f"{size / 2**30:.{2 if size >= 2**30 / 10 else 3}f}"


def memory_table(plan: Plan, sources: Mapping[str, str]) -> str:
    """The rows; `sources` says for each of prefill, decode and update where its figure comes from."""
    engine, shapes = build.engine_config(plan.config), build.algorithm(plan.config).batch_shapes(plan.mesh)
    rows: list[Any] = []
    for name, *sizes, note in plan.resident:
        if any(sizes):
            rows.append([name, *(gib(size) if size else "" for size in sizes), f"exact: {note}"])
    # One program runs at a time: of the two that roll out the larger one counts, the other stands in brackets.
    larger = max(plan.prefill, plan.decode)
    beside = lambda size: gib(size) if size == larger else f"({gib(size)})"
    prefill = f"prefill {engine.rows(engine.prefill_buckets[-1])} x {engine.prefill_buckets[-1]:,}"
    update = f"update {shapes.batch_size} x {shapes.length_buckets[-1]:,} + {shapes.branch_buckets[-1]:,}"
    memory = f"{gib(plan.devices.memory)} GiB: {plan.devices.memory_note}"
    rows += [
        [prefill, beside(plan.prefill), "", sources["prefill"]],
        [f"decode {engine.slots} slots", beside(plan.decode), "", sources["decode"]],
        [update, "", gib(plan.update), sources["update"]],
        SEPARATING_LINE,
        ["total", *(gib(plan.total(phase)) for phase in PHASES), ""],
        ["of the device", *(f"{plan.total(phase) / plan.devices.memory:.0%}" for phase in PHASES), memory],
    ]
    align = ("left", "right", "right", "left")
    text = tabulate(rows, _HEADS, tablefmt="simple", colalign=align, disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def heading(plan: Plan) -> str:
    """What is planned: the policy, what is trained of it, and on which mesh."""
    policy, adapter = plan.policy, build.lora_config(plan.config)
    weights = abstract_weights(policy, plan.mesh, "serve")
    size = sum(leaf.size for leaf in jax.tree.leaves({name: tree for name, tree in weights.items() if name != "lora"}))
    active = f", {_active(policy, size) / 1e9:.4g} B of them for a token" if policy.experts else ""
    trained = f"LoRA of rank {adapter.rank}" if adapter else "all weights trained"
    mesh, serving = (" x ".join(f"{axis} {size}" for axis, size in m.shape.items()) for m in (plan.mesh, plan.serving))
    if plan.serving.shape != plan.mesh.shape:
        of_each = f" in each of {plan.devices.processes} processes" if plan.devices.processes > 1 else ""
        mesh += f"; rolling out{of_each}: {serving}"
    return (
        f"policy   {size / 1e9:.4g} B weights{active}: {policy.num_layers} layers x {policy.d_model:,},"
        f" vocabulary {policy.vocab_size:,}; {trained}; {policy.compute_dtype}\n"
        f"devices  {plan.devices.name}, mesh {mesh}"
    )


def _active(policy: PolicyConfig, weights: int) -> int:
    """Of so many weights those that take part in one token's logits: each is a multiplication and an addition."""
    one = policy.experts
    if one is None:
        return weights
    return weights - 3 * policy.num_layers * (one.number - one.per_token) * policy.d_model * one.d_ff


def verdict(plan: Plan, error: float = 0.0) -> str:
    """Whether it fits; error: by what share the update's figure may be too small."""
    phase = {"rollout": "while rolling out", "update": "while updating"}[max(PHASES, key=plan.total)]
    if not plan.fits:
        return f"DOES NOT FIT: {gib(plan.peak)} GiB {phase}, the device has {gib(plan.devices.memory)}"
    line = f"FITS: at most {gib(plan.peak)} of {gib(plan.devices.memory)} GiB, {phase}"
    if _closely(plan, error):
        line += f"; but closely: the update may take up to {gib(error * plan.update)} GiB more"
    return line


def _closely(plan: Plan, error: float) -> bool:
    return plan.total("update") + error * plan.update > plan.devices.memory


def limits(planner: Planner, plan: Plan) -> list[str]:
    """The longest context with these slots, and the most slots at this context."""
    longest, slots = planner.longest_context(plan), planner.most_slots(plan)
    now = plan.config.rollout.slots
    if longest is None:
        first = f"longest context with {now} slots: none fits"
    else:
        step = FINE_STEP if longest.context % CONTEXT_STEP else CONTEXT_STEP
        whole = longest.context + step > plan.policy.max_positions
        end = ", all positions of the policy" if whole else ""
        first = f"longest context with {now} slots: {longest.context:,} tokens (updates of that length){end}"
    episodes = -(-plan.config.tasks.tasks_per_step * plan.config.tasks.rollouts // plan.devices.processes)
    where = "a step has" if plan.devices.processes == 1 else "a process has in a step"
    beyond = f" ({where} {episodes} episodes: more slots than that stay empty)" if slots > episodes else ""
    return [first, f"most slots at {plan.context:,} tokens: {slots:,}{beyond}"]


def advice(plan: Plan, changes: list[Change], combined: Change | None, error: float = 0.0) -> list[str]:
    """One line a change: its keys, what it saves of the peak, and what it comes to; error: see `verdict`."""

    def line(settings: Mapping[str, Any], then: Plan) -> str:
        saved = plan.peak - then.peak
        saves = f"{gib(saved)} GiB less, " if saved > 0 else ""
        fits = (", fits closely" if _closely(then, error) else ", fits") if then.fits else ""
        return f"{flags(settings)}: {saves}{gib(then.peak)} of {gib(then.devices.memory)} GiB{fits}"

    lines = [f"  {line(change.settings, change.plan)}" for change in changes[:_MOST_CHANGES]]
    if combined and not any(change.plan.fits and change.price is not Price.HARDWARE for change in changes):
        lines.append(f"  together: {line(combined.settings, combined.plan)}")
    return lines or ["  no setting saves enough: a smaller policy, or devices with more memory"]


def flags(settings: Mapping[str, Any]) -> str:
    """As they are written on the command line."""

    def value(setting: Any) -> str:
        text = str(setting).replace(" ", "")
        return f"'{text}'" if isinstance(setting, tuple) else text

    prefix = lambda key: "" if key == FRACTION_KEY else "--config."
    return " ".join(f"{prefix(key)}{key}={value(setting)}" for key, setting in settings.items())
