# SPDX-License-Identifier: Apache-2.0

"""Whether a run fits: config and devices in; totals of each phase, the longest context and the most slots out.

Where the compiler has been asked, its figures stand for the config as it is, and the arithmetic, scaled to them, for
every other (`Planner.scales`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import AbstractMesh

from hintsd_jax.config import build
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import abstract_mesh, serving_sizes
from hintsd_jax.storage import AnyPath
from hintsd_jax.tools.planner import temporary_memory
from hintsd_jax.tools.planner.devices import Devices, find
from hintsd_jax.tools.planner.programs import abstract_cache, bytes_on_one_device, described_policy
from hintsd_jax.tools.planner.resident import PHASES, Resident, resident_arrays

CONTEXT_STEP = 1024  # tokens; TPU's attention kernel takes whole ones
FINE_STEP = 64  # tokens, for devices or policies that hold no whole CONTEXT_STEP
FRACTION_KEY = "XLA_CLIENT_MEM_FRACTION"  # an environment variable, among the settings of a change


@dataclasses.dataclass(frozen=True)
class Plan:
    """mesh, serving: all devices as training uses them, and those of one process, which roll out (each process has
    `rollout.slots` of its own). resident: what stays. prefill, decode, update: bytes that the largest program of the
    kind has beside it, on one device.
    """

    config: Config
    policy: PolicyConfig
    mesh: AbstractMesh
    serving: AbstractMesh
    devices: Devices
    resident: tuple[Resident, ...]
    prefill: int
    decode: int
    update: int

    def total(self, phase: str) -> int:
        """Bytes of one device in a phase. One program runs at a time."""
        beside = {"rollout": max(self.prefill, self.decode), "update": self.update}
        return sum(getattr(row, phase) for row in self.resident) + beside[phase]

    @property
    def context(self) -> int:
        """Positions of a slot: those of episodes or of analysis, whichever are more."""
        return build.engine_config(self.config).context

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


@dataclasses.dataclass(frozen=True)
class Planner:
    """`planner(config, devices)` -> Plan. policy_file: the policy's config.json.

    scales: program kind -> a function of the update's length (0 for the others) by which the arithmetic is multiplied,
    so that it meets the compiler where it was asked; {}: the arithmetic alone.
    """

    policy_file: AnyPath
    scales: Mapping[str, Callable[[int], float]] = dataclasses.field(default_factory=dict)

    def __call__(self, config: Config, devices: Devices) -> Plan:
        """Raises UserError where the run itself would refuse these: a mesh that is none, slots that `data` does not
        divide, ...
        """
        platform = devices.platform
        policy = described_policy(config, self.policy_file, platform=platform)
        mesh = devices.layout(**devices.sizes(config, policy))
        serving = abstract_mesh(serving_sizes(mesh, policy.num_kv_heads, devices.processes))
        engine = build.engine_config(config)
        if engine.slots % serving.shape["data"]:
            raise UserError(
                f"rollout.slots = {engine.slots} must be a multiple of the {serving.shape['data']} copies of the model"
                " that mesh.data puts on the devices of a process"
            )
        if engine.context > policy.max_positions:
            raise UserError(
                f"rollout.context or hindsight.context = {engine.context} exceeds the {policy.max_positions} positions"
                f" of {self.policy_file}: lower it"
            )
        of_update, of_rollout = (config, policy, mesh, platform), (config, policy, serving, platform)
        scale = lambda kind, length=0: self.scales[kind](length) if kind in self.scales else 1.0
        shapes = build.algorithm(config).batch_shapes(mesh).all()
        updates = [
            scale("update", length) * temporary_memory.update(*of_update, length, pair) for length, pair in shapes
        ]
        return Plan(
            config,
            policy,
            mesh,
            serving,
            devices,
            tuple(resident_arrays(config, policy, mesh, serving, platform)),
            prefill=round(scale("prefill") * temporary_memory.prefill(*of_rollout)),
            decode=round(scale("decode") * temporary_memory.decode(*of_rollout)),
            update=round(max(updates)),
        )

    def changed(self, plan: Plan, settings: Mapping[str, Any]) -> Plan:
        """The plan with other settings; `plan.devices` among them moves it to other devices, FRACTION_KEY gives a GPU's
        run more of it.
        """
        devices, keys = plan.devices, dict(settings)
        if fraction := keys.pop(FRACTION_KEY, None):
            memory = round(devices.memory / devices.fraction * fraction)
            devices = dataclasses.replace(devices, memory=memory, fraction=fraction)
        if "plan.devices" in keys:
            devices = find(keys["plan.devices"], plan.config.plan.memory_gib)
        return self(plan.config.replaced(keys), devices)

    def longest_context(self, plan: Plan) -> Plan | None:
        """The plan with the longest context that fits, a multiple of CONTEXT_STEP where one fits, else of FINE_STEP, or
        the plan itself where nothing longer does; None where none fits.
        """
        at = lambda context: self.changed(plan, context_settings(plan.config, context))
        first, last = shortest_context(plan.config) // CONTEXT_STEP, plan.policy.max_positions // CONTEXT_STEP
        # Up to LONG tokens of a trunk branches attend to all of it at once, so that there a shorter row may take more
        # than a longer one; beyond, never.
        low = max(first, temporary_memory.LONG // CONTEXT_STEP + 1)
        if low <= last and at(low * CONTEXT_STEP).fits:
            while low < last:
                middle = (low + last + 1) // 2
                low, last = (middle, last) if at(middle * CONTEXT_STEP).fits else (low, middle - 1)
            found = at(low * CONTEXT_STEP)
        else:
            found = _first_that_fits(at, min(low - 1, last), first, CONTEXT_STEP)
        if found is None:
            end, begin = min(first * CONTEXT_STEP, plan.policy.max_positions), shortest_context(plan.config, FINE_STEP)
            found = _first_that_fits(at, end // FINE_STEP, begin // FINE_STEP, FINE_STEP)
        return plan if plan.fits and (found is None or found.context < plan.context) else found

    def most_slots(self, plan: Plan) -> int:
        """The most slots that fit at this context; 0 where not even one (for each part of `mesh.data`) does.

        Tried from above: a number that the mesh divides may take less than a smaller one that it does not.
        """
        data, cache = plan.serving.shape["data"], lambda slots: _cache_bytes(plan, slots)
        beside = plan.total("rollout") if plan.config.rollout.free_cache else plan.peak
        room = max(plan.devices.memory - beside + cache(plan.config.rollout.slots), 0)
        least = (
            cache(data * plan.serving.size) / plan.serving.size
        )  # bytes of `data` slots on one device, evenly laid out
        for slots in range(int(room / least) * data, 0, -data):
            if cache(slots) <= room and self.changed(plan, {"rollout.slots": slots}).fits:
                return slots
        return 0


def context_settings(config: Config, context: int) -> dict[str, Any]:
    """The settings that make episodes and analysis so long, and the update's rows with them."""
    lengths = (*(length for length in config.batch.length_buckets if length < context), context)
    settings = {"rollout.context": context, "hindsight.context": context, "batch.length_buckets": lengths}
    prefill = tuple(length for length in config.rollout.prefill_buckets if length <= context)
    return settings if prefill == config.rollout.prefill_buckets else settings | {"rollout.prefill_buckets": prefill}


def shortest_context(config: Config, step: int = CONTEXT_STEP) -> int:
    """The first multiple of `step` that leaves a prompt something beside what may be sampled."""
    rollout, hindsight = config.rollout, config.hindsight
    sampled = max(rollout.max_action_tokens, hindsight.max_tokens, *config.batch.action_buckets)
    return max(sampled, rollout.prefill_buckets[0]) // step * step + step


def _first_that_fits(at: Callable[[int], Plan], last: int, first: int, step: int) -> Plan | None:
    """The longest context from `last` down to `first`, counted in steps."""
    return next((tried for steps in range(last, first - 1, -1) if (tried := at(steps * step)).fits), None)


def _cache_bytes(plan: Plan, slots: int) -> int:
    config = plan.config.replaced({"rollout.slots": slots})
    return bytes_on_one_device(abstract_cache(config, plan.policy, plan.serving)[:1]) * plan.policy.num_layers
