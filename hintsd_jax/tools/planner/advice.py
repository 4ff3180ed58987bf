# SPDX-License-Identifier: Apache-2.0

"""What to change so that a run fits, or fits with more room: a plan in, changes of settings out, each with the plan
that comes of it.

Invariant: no change is offered that was not planned with the same `Planner`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.tools.planner.devices import larger
from hintsd_jax.tools.planner.fit import FRACTION_KEY, Plan, Planner, context_settings, shortest_context

WORTH = 0.01  # share of a device's memory that a change must save to be named
MOST = 0.95  # of a GPU: the rest is CUDA's own


class Price(enum.IntEnum):
    """What a change costs besides memory; the cheapest are offered first."""

    NOTHING = 0
    TIME = 1  # fewer slots
    TARGETS = 2  # longer feedback or more targets of an episode no longer fit
    ALGORITHM = 3
    LENGTH = 4
    HARDWARE = 5


@dataclasses.dataclass(frozen=True)
class Change:
    """settings: dotted key -> value. plan: what comes of it."""

    settings: Mapping[str, Any]
    price: Price
    plan: Plan


def single_changes(planner: Planner, plan: Plan) -> list[Change]:
    """Changes that each help by themselves: first those that make it fit, the cheapest first, then the others by what
    they save. Of larger hardware only the smallest that is enough.
    """
    changes = []
    for price, settings in _candidates(planner, plan):
        try:
            change = Change(settings, price, planner.changed(plan, settings))
        except UserError:  # a mesh on which the slots do not lie, say: not a change to offer
            continue
        if plan.share - change.plan.share >= WORTH:
            changes.append(change)
    changes.sort(key=lambda change: (change.price if change.plan.fits else len(Price), change.plan.share))
    hardware = [change for change in changes if change.price is Price.HARDWARE]
    enough = min(hardware, key=lambda change: (not change.plan.fits, change.plan.mesh.size), default=None)
    return [change for change in changes if change.price is not Price.HARDWARE or change is enough]


def combined_change(planner: Planner, plan: Plan) -> Change | None:
    """Several changes at once that make it fit on the same devices, the cheapest first; None where none do."""
    settings: dict[str, Any] = {}
    while not plan.fits:
        changes = [change for change in single_changes(planner, plan) if change.price is not Price.HARDWARE]
        if not changes:
            return None
        change = min(changes, key=lambda change: (change.price, change.plan.share))
        settings, plan = settings | dict(change.settings), change.plan
    return Change(settings, Price.LENGTH, plan)


def _candidates(planner: Planner, plan: Plan) -> Iterator[tuple[Price, dict[str, Any]]]:
    config, devices = plan.config, plan.devices
    yield from _free_candidates(config)
    described_gpu = devices.platform == "gpu" and not devices.here and not config.plan.memory_gib
    if described_gpu and devices.fraction < MOST:
        yield Price.NOTHING, {FRACTION_KEY: MOST}
    yield from ((Price.NOTHING, sizes) for sizes in _other_meshes(plan))
    slots = planner.most_slots(plan) or plan.serving.shape["data"]
    if slots < config.rollout.slots:
        yield Price.TIME, {"rollout.slots": slots}
    if len(config.batch.branch_buckets) > 1:
        names = ("branch_buckets", "action_buckets")
        yield Price.TARGETS, {f"batch.{name}": getattr(config.batch, name)[:-1] for name in names}
    if config.lora.rank == 0:
        yield Price.ALGORITHM, {"lora.rank": 32}
    if config.hindsight.analyser == "initial_policy":
        yield Price.ALGORITHM, {"hindsight.analyser": "ema_teacher"}
    longest = planner.longest_context(plan)
    shorter = longest.context if longest else shortest_context(config)
    if shorter < plan.context:
        yield Price.LENGTH, context_settings(config, shorter)
    if not devices.here:
        sizes = {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": plan.mesh.shape["tensor"]}
        yield from ((Price.HARDWARE, {"plan.devices": name, **sizes}) for name in larger(devices))


def _free_candidates(config: Config) -> Iterator[tuple[Price, dict[str, Any]]]:
    """Settings that cost nothing worth a name."""
    if not config.policy.remat:
        yield Price.NOTHING, {"policy.remat": True}
    if not config.rollout.free_cache:
        yield Price.NOTHING, {"rollout.free_cache": True}
    least = {"rollout.prefill_rows": 1, "batch.rows_per_device": 1, "loss.chunk_tokens": 32}
    now = {
        "rollout.prefill_rows": config.rollout.prefill_rows,
        "batch.rows_per_device": config.batch.rows_per_device,
        "loss.chunk_tokens": config.loss.chunk_tokens,
    }
    yield from ((Price.NOTHING, {name: value}) for name, value in least.items() if now[name] > value)


def _other_meshes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Other ways to use the same devices."""
    count, now = plan.mesh.size, tuple(plan.mesh.shape.values())
    for tensor in (size for size in range(1, count + 1) if count % size == 0 and plan.policy.num_kv_heads % size == 0):
        for data in (size for size in range(1, count // tensor + 1) if count // tensor % size == 0):
            sizes = (data, count // tensor // data, tensor)
            if sizes != now:
                yield dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
