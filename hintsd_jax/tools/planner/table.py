"""A plan as text: what each device holds in every phase, whether it fits, what would be the longest, and what to
change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from hintsd_jax.session import engine_config, lora_config, update_shapes
from hintsd_jax.tools.planner import aot
from hintsd_jax.tools.planner.fit import CONTEXT_STEP, FRACTION, Change, Plan, Planner, Price
from hintsd_jax.tools.planner.holdings import PHASES

_HEADS = ("rolling out", "updating")
_SHOWN = 8  # pieces of advice


def gib(size: float) -> str:
    """Small policies too have figures."""
    return f"{size / 2**30:.{2 if size >= 2**30 / 10 else 3}f}"


def table(plan: Plan, sources: Mapping[str, str]) -> str:
    """The rows; `sources` says for each of prefill, decode and update where its figure comes from."""
    engine, shapes = engine_config(plan.config), update_shapes(plan.config, plan.mesh)
    held = [
        (holding.name, [getattr(holding, phase) for phase in PHASES], f"exact: {holding.note}")
        for holding in plan.holdings
    ]
    rows = [(name, [gib(size) if size else "" for size in sizes], source) for name, sizes, source in held if any(sizes)]
    larger = max(plan.prefill, plan.decode)
    beside = lambda size: (
        gib(size) if size == larger else f"({gib(size)})"
    )  # one program runs at a time: the larger one counts
    largest = f"{shapes.rows} x {shapes.length_buckets[-1]:,} + {shapes.stream_buckets[-1]:,}"
    rows += [
        (
            f"prefill {engine.prefill_rows} x {engine.prefill_buckets[-1]:,}",
            [beside(plan.prefill), ""],
            sources["prefill"],
        ),
        (f"decode {engine.slots} slots", [beside(plan.decode), ""], sources["decode"]),
        (f"update {largest}", ["", gib(plan.update)], sources["update"]),
        ("total", [gib(plan.total(phase)) for phase in PHASES], ""),
        (
            "of the device",
            [f"{plan.total(phase) / plan.devices.memory:.0%}" for phase in PHASES],
            f"{gib(plan.devices.memory)} GiB: {plan.devices.memory_note}",
        ),
    ]
    first = max(len(name) for name, *_ in rows)
    lines = [f"{'GiB on one device':{first}}  " + "  ".join(f"{head:>11}" for head in _HEADS) + "  from"]
    lines += [
        f"{name:{first}}  " + "  ".join(f"{cell:>11}" for cell in cells) + f"  {source}".rstrip()
        for name, cells, source in rows
    ]
    lines.insert(-2, "-" * len(lines[0]))
    return "\n".join(lines)


def heading(plan: Plan) -> str:
    """What is planned: the policy, what is trained of it, and on which mesh."""
    policy, adapter = plan.policy, lora_config(plan.config)
    weights = aot.abstract_weights(policy, plan.mesh, "serve")
    size = sum(leaf.size for leaf in jax.tree.leaves({name: tree for name, tree in weights.items() if name != "lora"}))
    trained = f"LoRA of rank {adapter.rank}" if adapter else "all weights trained"
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    return (
        f"policy   {size / 1e9:.4g} B weights: {policy.num_layers} layers x {policy.d_model:,}, vocabulary {policy.vocab_size:,}; {trained}; {policy.compute_dtype}\n"
        f"devices  {plan.devices.name}, mesh {mesh}"
    )


def verdict(plan: Plan, off: float = 0.0) -> str:
    """Whether it fits; off: by what share the update's figure may be too small."""
    where = dict(zip(PHASES, ("while rolling out", "while updating"), strict=True))[max(PHASES, key=plan.total)]
    if not plan.fits:
        return f"DOES NOT FIT: {gib(plan.peak)} GiB {where}, the device has {gib(plan.devices.memory)}"
    line = f"FITS: at most {gib(plan.peak)} of {gib(plan.devices.memory)} GiB, {where}"
    if _closely(plan, off):
        line += f"; but closely: the update may take up to {gib(off * plan.update)} GiB more"
    return line


def _closely(plan: Plan, off: float) -> bool:
    return plan.total("update") + off * plan.update > plan.devices.memory


def limits(planner: Planner, plan: Plan) -> list[str]:
    """The longest context with these slots, and the most slots at this context."""
    longest, slots = planner.longest_context(plan), planner.most_slots(plan)
    context, now = engine_config(plan.config).context, plan.config.rollout.slots
    if longest is None:
        lines = [f"longest context with {now} slots: none fits"]
    else:
        reached = engine_config(longest.config).context
        end = ", all positions of the policy" if reached + CONTEXT_STEP > plan.policy.max_positions else ""
        lines = [f"longest context with {now} slots: {reached:,} tokens (updates of that length){end}"]
    episodes = plan.config.tasks.tasks_per_step * plan.config.tasks.rollouts
    beyond = f" (a step has {episodes} episodes: more slots than that stay empty)" if slots > episodes else ""
    return [*lines, f"most slots at {context:,} tokens: {slots:,}{beyond}"]


def advice(plan: Plan, changes: list[Change], together: Change | None, off: float = 0.0) -> list[str]:
    """One line a change: its keys, what it saves of the peak, and what it comes to; off: see `verdict`."""

    def line(settings: Mapping[str, Any], then: Plan) -> str:
        saved = plan.peak - then.peak
        saves = f"{gib(saved)} GiB less, " if saved > 0 else ""
        fits = (", fits closely" if _closely(then, off) else ", fits") if then.fits else ""
        return f"{flags(settings)}: {saves}{gib(then.peak)} of {gib(then.devices.memory)} GiB{fits}"

    lines = [f"  {line(change.settings, change.plan)}" for change in changes[:_SHOWN]]
    if together and not any(change.plan.fits and change.price is not Price.HARDWARE for change in changes):
        lines.append(f"  together: {line(together.settings, together.plan)}")
    return lines or ["  no setting saves enough: a smaller policy, or devices with more memory"]


def flags(settings: Mapping[str, Any]) -> str:
    """As they are written on the command line."""

    def value(setting: Any) -> str:
        text = str(setting).replace(" ", "")
        return f"'{text}'" if isinstance(setting, tuple) else text

    return " ".join(
        f"{'' if key == FRACTION else '--config.'}{key}={value(setting)}" for key, setting in settings.items()
    )
