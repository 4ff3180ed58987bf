"""Whether a run fits: config and devices in; phase totals, the longest context, the most slots, and changes that help out.

Everything here asks the same `Planner`: advice is never given that was not tried. Where the compiler has been asked, its figures stand for
the config as it is, and the arithmetic, scaled to them, for every other (`Planner.scales`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from hintsd_jax import aot
from hintsd_jax.errors import UserError
from hintsd_jax.planning import temporaries
from hintsd_jax.planning.devices import Devices, find, larger
from hintsd_jax.planning.holdings import PHASES, Holding, holdings
from hintsd_jax.policy.config import PolicyConfig
from hintsd_jax.session import engine_config, update_shapes

CONTEXT_STEP = 1024  # tokens; TPU's attention kernel takes whole ones
WORTH = 0.01  # share of a device's memory that a change must save to be named


@dataclasses.dataclass(frozen=True)
class Plan:
    """holdings: what stays. prefill, decode, update: bytes that the largest program of the kind has beside it, on one device."""

    config: ConfigDict
    policy: PolicyConfig
    mesh: AbstractMesh
    devices: Devices
    holdings: tuple[Holding, ...]
    prefill: int
    decode: int
    update: int

    def total(self, phase: str) -> int:
        """Bytes of one device in a phase. One program runs at a time."""
        beside = {"rollout": max(self.prefill, self.decode), "update": self.update, "resume": 0}
        return sum(getattr(holding, phase) for holding in self.holdings) + beside[phase]

    @property
    def peak(self) -> int:
        return max(map(self.total, PHASES))

    @property
    def fits(self) -> bool:
        return self.peak <= self.devices.memory


@dataclasses.dataclass(frozen=True)
class Change:
    """settings: dotted key -> value. plan: what comes of it."""

    settings: Mapping[str, Any]
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Planner:
    """`planner(config, devices)` -> Plan. shape: the policy's config.json.

    scales: program kind -> a function of the update's length (0 for the others) by which the arithmetic is multiplied, so that it
    meets the compiler where it was asked; {}: the arithmetic alone.
    """

    shape: Path
    scales: Mapping[str, Callable[[int], float]] = dataclasses.field(default_factory=dict)

    def __call__(self, config: ConfigDict, devices: Devices) -> Plan:
        """Raises UserError where the run itself would refuse these: a mesh that is none, slots that `data` does not divide, ..."""
        mesh = devices.layout(**config.mesh)
        policy = aot.described_policy(config, self.shape, platform=devices.platform)
        engine, shapes = engine_config(config), update_shapes(config, mesh)
        if engine.slots % mesh.shape["data"]:
            raise UserError(f"rollout.slots = {engine.slots} must be a multiple of mesh.data = {mesh.shape['data']}")
        if engine.context > policy.max_positions:
            raise UserError(
                f"rollout.context or hindsight.context = {engine.context} exceeds the {policy.max_positions} positions of {self.shape}: lower it"
            )
        scale = lambda kind, length=0: self.scales[kind](length) if kind in self.scales else 1.0
        update = lambda length, pair: scale("update", length) * temporaries.update(config, policy, mesh, devices.platform, length, pair)
        return Plan(
            config,
            policy,
            mesh,
            devices,
            tuple(holdings(config, policy, mesh)),
            prefill=round(scale("prefill") * temporaries.prefill(config, policy, mesh, devices.platform)),
            decode=round(scale("decode") * temporaries.decode(config, policy, mesh, devices.platform)),
            update=round(max(update(*shape) for shape in shapes.all())),
        )

    def changed(self, plan: Plan, settings: Mapping[str, Any]) -> Plan:
        """The plan with other settings; `plan.devices` among them moves it to other devices."""
        config = plan.config.copy_and_resolve_references()
        for key, value in settings.items():
            group, _, name = key.rpartition(".")
            config[group][name] = value
        moved = "plan.devices" in settings
        return self(config, find(config.plan.devices, config.plan.memory_gib) if moved else plan.devices)

    def longest_context(self, plan: Plan) -> Plan | None:
        """The plan with the longest context that fits, a multiple of CONTEXT_STEP; None where none does.

        Every one is tried from above: short rows have their scores at once and may take more than longer ones, which have chunks.
        """
        for context in range(plan.policy.max_positions // CONTEXT_STEP * CONTEXT_STEP, _least(plan.config), -CONTEXT_STEP):
            tried = self.changed(plan, context_settings(plan.config, context))
            if tried.fits:
                return tried
        return None

    def most_slots(self, plan: Plan) -> int:
        """The most slots that fit at this context; 0 where not even one (for each part of `mesh.data`) does."""
        data = plan.mesh.shape["data"]
        cache = functools.partial(_cache, plan)
        room = plan.devices.memory - (plan.peak - cache(plan.config.rollout.slots))
        whole = cache(data * plan.mesh.size) // plan.mesh.size  # bytes of `data` slots that lie on all devices evenly
        for slots in range(max(room, 0) // max(whole, 1) * data, 0, -data):
            if cache(slots) <= room and self.changed(plan, {"rollout.slots": slots}).fits:
                return slots
        return 0

    def advice(self, plan: Plan) -> list[Change]:
        """Single changes that lower the peak, those that make it fit first, and then by what they save."""
        found = []
        for settings in self._candidates(plan):
            try:
                change = Change(settings, self.changed(plan, settings))
            except UserError:  # a mesh on which the slots do not lie, say: not a change to offer
                continue
            if plan.peak - change.plan.peak >= WORTH * plan.devices.memory:
                found.append(change)
        return sorted(found, key=lambda change: (not change.plan.fits, change.plan.peak))

    def together(self, plan: Plan) -> Change | None:
        """Several changes at once that make it fit, the one that saves most first, on the same devices; None where all do not."""
        settings: dict[str, Any] = {}
        while not plan.fits:
            steps = [change for change in self.advice(plan) if "plan.devices" not in change.settings]
            if not steps:
                return None
            settings |= steps[0].settings
            plan = steps[0].plan
        return Change(settings, plan)

    def _candidates(self, plan: Plan) -> Iterator[dict[str, Any]]:
        config = plan.config
        if (slots := self.most_slots(plan)) and slots < config.rollout.slots:
            yield {"rollout.slots": slots}
        elif config.rollout.slots > plan.mesh.shape["data"]:
            yield {"rollout.slots": plan.mesh.shape["data"]}
        longest = self.longest_context(plan)
        context = engine_config(config).context
        shorter = engine_config(longest.config).context if longest else _least(config) + CONTEXT_STEP
        if shorter < context:
            yield context_settings(config, shorter)
        if config.lora.rank == 0:
            yield {"lora.rank": 32}
        if not config.policy.remat:
            yield {"policy.remat": True}
        if config.distill.rows_per_device > 1:
            yield {"distill.rows_per_device": 1}
        if len(config.distill.stream_buckets) > 1:
            yield {"distill.stream_buckets": tuple(config.distill.stream_buckets[:-1]), "distill.action_buckets": tuple(config.distill.action_buckets[:-1])}
        if config.distill.chunk > 32:
            yield {"distill.chunk": 32}
        if config.rollout.prefill_rows > 1:
            yield {"rollout.prefill_rows": 1}
        if config.hindsight.analyser == "policy_initial":
            yield {"hindsight.analyser": "policy_ema"}
        yield from _meshes(plan)
        if not plan.devices.here:
            for name in larger(plan.devices):
                yield {"plan.devices": name, "mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": plan.mesh.shape["tensor"]}


def context_settings(config: ConfigDict, context: int) -> dict[str, Any]:
    """The settings that make episodes and reviews so long, and the update's rows with them."""
    lengths = (*(length for length in config.distill.length_buckets if length < context), context)
    settings = {"rollout.context": context, "hindsight.context": context, "distill.length_buckets": lengths}
    prefill = tuple(length for length in config.rollout.prefill_buckets if length <= context)
    return settings if prefill == tuple(config.rollout.prefill_buckets) else settings | {"rollout.prefill_buckets": prefill}


def _least(config: ConfigDict) -> int:
    """Every context is longer than this: else no prompt is left beside what may be sampled."""
    needed = max(config.rollout.max_action_tokens, config.hindsight.max_tokens, *config.distill.action_buckets, config.rollout.prefill_buckets[0])
    return needed // CONTEXT_STEP * CONTEXT_STEP


def _cache(plan: Plan, slots: int) -> int:
    config = plan.config.copy_and_resolve_references()
    config.rollout.slots = slots
    return aot.held(aot.abstract_cache(config, plan.policy, plan.mesh)[:1]) * plan.policy.num_layers


def _meshes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Other ways to use the same devices."""
    count, now = plan.mesh.size, tuple(plan.mesh.shape.values())
    for tensor in (size for size in range(1, count + 1) if count % size == 0 and plan.policy.num_kv_heads % size == 0):
        for data in (size for size in range(1, count // tensor + 1) if count // tensor % size == 0):
            sizes = (data, count // tensor // data, tensor)
            if sizes != now:
                yield dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
