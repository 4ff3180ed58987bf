"""Whether a run fits: config and devices in; phase totals, the longest context, the most slots, and changes that help
out.

Everything here asks the same `Planner`: advice is never given that was not tried. Where the compiler has been asked,
its figures stand for the config as it is, and the arithmetic, scaled to them, for every other (`Planner.scales`).
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from hintsd_jax.errors import UserError
from hintsd_jax.methods import resolved
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.session import engine_config, update_shapes
from hintsd_jax.tools.planner import aot, temporaries
from hintsd_jax.tools.planner.devices import Devices, find, larger
from hintsd_jax.tools.planner.holdings import PHASES, Holding, holdings

CONTEXT_STEP = 1024  # tokens; TPU's attention kernel takes whole ones
WORTH = 0.01  # share of a device's memory that a change must save to be named
FRACTION = "XLA_CLIENT_MEM_FRACTION"  # an environment variable, among the settings of a change
MOST = 0.95  # of a GPU: the rest is CUDA's own


@dataclasses.dataclass(frozen=True)
class Plan:
    """holdings: what stays. prefill, decode, update: bytes that the largest program of the kind has beside it, on one
    device.
    """

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
        beside = {"rollout": max(self.prefill, self.decode), "update": self.update}
        return sum(getattr(holding, phase) for holding in self.holdings) + beside[phase]

    @property
    def peak(self) -> int:
        return max(map(self.total, PHASES))

    @property
    def share(self) -> float:
        """Of the device's memory, at the peak."""
        return self.peak / self.devices.memory

    @property
    def fits(self) -> bool:
        return self.peak <= self.devices.memory


class Price(enum.IntEnum):
    """What a change costs besides memory; the cheapest are offered first."""

    NOTHING = 0
    TIME = 1  # fewer slots
    TARGETS = 2  # longer feedback or more targets of an episode no longer fit
    METHOD = 3
    LENGTH = 4
    HARDWARE = 5


@dataclasses.dataclass(frozen=True)
class Change:
    """settings: dotted key -> value. plan: what comes of it."""

    settings: Mapping[str, Any]
    price: Price
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Planner:
    """`planner(config, devices)` -> Plan. shape: the policy's config.json.

    scales: program kind -> a function of the update's length (0 for the others) by which the arithmetic is multiplied,
    so that it meets the compiler where it was asked; {}: the arithmetic alone.
    """

    shape: Path
    scales: Mapping[str, Callable[[int], float]] = dataclasses.field(default_factory=dict)

    def __call__(self, config: ConfigDict, devices: Devices) -> Plan:
        """Raises UserError where the run itself would refuse these: a mesh that is none, slots that `data` does not
        divide, ...
        """
        config = resolved(config)
        mesh, platform = devices.layout(**config.mesh), devices.platform
        policy = aot.described_policy(config, self.shape, platform=platform)
        engine, shapes = engine_config(config), update_shapes(config, mesh)
        if engine.slots % mesh.shape["data"]:
            raise UserError(f"rollout.slots = {engine.slots} must be a multiple of mesh.data = {mesh.shape['data']}")
        if engine.context > policy.max_positions:
            raise UserError(
                f"rollout.context or hindsight.context = {engine.context} exceeds the {policy.max_positions} positions of {self.shape}: lower it"
            )
        scale = lambda kind, length=0: self.scales[kind](length) if kind in self.scales else 1.0
        update = lambda length, pair: (
            scale("update", length) * temporaries.update(config, policy, mesh, platform, length, pair)
        )
        return Plan(
            config,
            policy,
            mesh,
            devices,
            tuple(holdings(config, policy, mesh)),
            prefill=round(scale("prefill") * temporaries.prefill(config, policy, mesh, platform)),
            decode=round(scale("decode") * temporaries.decode(config, policy, mesh, platform)),
            update=round(max(update(*shape) for shape in shapes.all())),
        )

    def changed(self, plan: Plan, settings: Mapping[str, Any]) -> Plan:
        """The plan with other settings; `plan.devices` among them moves it to other devices, FRACTION gives a GPU's run
        more of it.
        """
        config, devices = copy.deepcopy(plan.config), plan.devices
        for key, value in settings.items():
            if key == FRACTION:
                devices = dataclasses.replace(
                    devices, memory=round(devices.memory / devices.fraction * value), fraction=value
                )
                continue
            group, _, name = key.rpartition(".")
            config[group][name] = value
            if key == "plan.devices":
                devices = find(value, config.plan.memory_gib)
        return self(config, devices)

    def longest_context(self, plan: Plan) -> Plan | None:
        """The plan with the longest context that fits, a multiple of CONTEXT_STEP; None where none does."""
        at = lambda steps: self.changed(plan, context_settings(plan.config, steps * CONTEXT_STEP))
        first, last = _least(plan.config) // CONTEXT_STEP + 1, plan.policy.max_positions // CONTEXT_STEP
        # Up to LONG tokens all scores of a row exist at once, so that there a shorter row may take more than a longer
        # one; beyond, never.
        low = max(first, temporaries.LONG // CONTEXT_STEP + 1)
        if low <= last and at(low).fits:
            while low < last:
                middle = (low + last + 1) // 2
                low, last = (middle, last) if at(middle).fits else (low, middle - 1)
            return at(low)
        return next((tried for steps in range(min(low - 1, last), first - 1, -1) if (tried := at(steps)).fits), None)

    def most_slots(self, plan: Plan) -> int:
        """The most slots that fit at this context; 0 where not even one (for each part of `mesh.data`) does.

        Tried from above: a number that the mesh divides may take less than a smaller one that it does not.
        """
        data = plan.mesh.shape["data"]
        cache = functools.partial(_cache, plan)
        room = max(
            plan.devices.memory - max(plan.total(phase) for phase in PHASES) + cache(plan.config.rollout.slots), 0
        )
        evenly = cache(data * plan.mesh.size) / plan.mesh.size  # bytes of `data` slots on one device, at the least
        for slots in range(int(room / evenly) * data, 0, -data):
            if cache(slots) <= room and self.changed(plan, {"rollout.slots": slots}).fits:
                return slots
        return 0

    def advice(self, plan: Plan) -> list[Change]:
        """Single changes that help: first those that make it fit, the cheapest first, then the others by what they
        save.
        """
        found = []
        for price, settings in self._candidates(plan):
            try:
                change = Change(settings, price, self.changed(plan, settings))
            except UserError:  # a mesh on which the slots do not lie, say: not a change to offer
                continue
            if plan.share - change.plan.share >= WORTH:
                found.append(change)
        found.sort(
            key=lambda change: (
                (change.price, change.plan.share) if change.plan.fits else (len(Price), change.plan.share)
            )
        )
        several = [change for change in found if change.price is Price.HARDWARE]
        enough = min(several, key=lambda change: (not change.plan.fits, change.plan.mesh.size), default=None)
        return [change for change in found if change.price is not Price.HARDWARE or change is enough]

    def together(self, plan: Plan) -> Change | None:
        """Several changes at once that make it fit on the same devices, the cheapest first; None where all of them do
        not.
        """
        settings: dict[str, Any] = {}
        while not plan.fits:
            steps = [change for change in self.advice(plan) if change.price is not Price.HARDWARE]
            if not steps:
                return None
            step = min(steps, key=lambda change: (change.price, change.plan.share))
            settings, plan = settings | step.settings, step.plan
        return Change(settings, Price.LENGTH, plan)

    def _candidates(self, plan: Plan) -> Iterator[tuple[Price, dict[str, Any]]]:
        config, context = plan.config, engine_config(plan.config).context
        if not config.policy.remat:
            yield Price.NOTHING, {"policy.remat": True}
        if config.rollout.prefill_rows > 1:
            yield Price.NOTHING, {"rollout.prefill_rows": 1}
        if config.batch.rows_per_device > 1:
            yield Price.NOTHING, {"batch.rows_per_device": 1}
        if config.loss.chunk_tokens > 32:
            yield Price.NOTHING, {"loss.chunk_tokens": 32}
        if (
            plan.devices.platform == "gpu"
            and not plan.devices.here
            and not config.plan.memory_gib
            and plan.devices.fraction < MOST
        ):
            yield Price.NOTHING, {FRACTION: MOST}
        yield from ((Price.NOTHING, sizes) for sizes in _meshes(plan))
        slots = self.most_slots(plan) or plan.mesh.shape["data"]
        if slots < config.rollout.slots:
            yield Price.TIME, {"rollout.slots": slots}
        if len(config.batch.branch_buckets) > 1:
            yield (
                Price.TARGETS,
                {
                    key: tuple(config.distill[key.partition(".")[2]][:-1])
                    for key in ("batch.branch_buckets", "batch.action_buckets")
                },
            )
        if config.lora.rank == 0:
            yield Price.METHOD, {"lora.rank": 32}
        if config.hindsight.analyser == "initial_policy":
            yield Price.METHOD, {"hindsight.analyser": "ema_teacher"}
        longest = self.longest_context(plan)
        shorter = engine_config(longest.config).context if longest else _least(config) + CONTEXT_STEP
        if shorter < context:
            yield Price.LENGTH, context_settings(config, shorter)
        if not plan.devices.here:
            axes = {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": plan.mesh.shape["tensor"]}
            yield from ((Price.HARDWARE, {"plan.devices": name, **axes}) for name in larger(plan.devices))


def context_settings(config: ConfigDict, context: int) -> dict[str, Any]:
    """The settings that make episodes and reviews so long, and the update's rows with them."""
    lengths = (*(length for length in config.batch.length_buckets if length < context), context)
    settings = {"rollout.context": context, "hindsight.context": context, "batch.length_buckets": lengths}
    prefill = tuple(length for length in config.rollout.prefill_buckets if length <= context)
    return (
        settings
        if prefill == tuple(config.rollout.prefill_buckets)
        else settings | {"rollout.prefill_buckets": prefill}
    )


def _least(config: ConfigDict) -> int:
    """Every context is longer than this: else no prompt is left beside what may be sampled."""
    needed = max(
        config.rollout.max_action_tokens,
        config.hindsight.max_tokens,
        *config.batch.action_buckets,
        config.rollout.prefill_buckets[0],
    )
    return needed // CONTEXT_STEP * CONTEXT_STEP


def _cache(plan: Plan, slots: int) -> int:
    config = copy.deepcopy(plan.config)
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
