# SPDX-License-Identifier: Apache-2.0

"""A ConfigDict goes in, once; the typed config of a run comes out, and from it the configs of the rooms.

Whatever needs a part of the settings (engine, optimizer, adapter, ...) gets it from here, with or without a run around
it: planner and export need no session.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_origin, get_type_hints

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from hintsd_jax import algorithms
from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.config import lengths, validation
from hintsd_jax.config.edge import by_algorithm, flatten, plain, settings
from hintsd_jax.config.fields import expanded, shown
from hintsd_jax.config.schema import Config, Section
from hintsd_jax.envs import registry
from hintsd_jax.hindsight import prompts, selectors
from hintsd_jax.models.config import LoraConfig
from hintsd_jax.models.sharding import AXES
from hintsd_jax.rollout.collector import RolloutConfig
from hintsd_jax.sampling import EngineConfig, Sampling
from hintsd_jax.texts import did_you_mean
from hintsd_jax.training.state import OptimConfig


def build(edge: ConfigDict | Mapping[str, Any]) -> Config:
    """Checks a config and decides what it leaves to the algorithm, or to be derived (see `lengths`).

    Raises:
      UserError: one line that lists every problem, not only the first.
    """
    tree = plain(edge)
    values = validation.check(tree)
    chosen = algorithms.find(values["algorithm"])
    config = _typed(Config, tree)
    name, options = registry.whole(config.env.name, config.env.options)
    config = config.replaced({"env.name": name, "env.options": options})
    config = lengths.derived(_with_home(_decided(config, chosen)))
    validation.refuse(validation.value_problems(flatten(config.to_dict())))  # what was derived may be beyond all
    selectors.find(config.hindsight.select)  # one of the user's own is looked for now, not after the first rollouts
    prompts.find(config.hindsight.prompts)
    validation.refuse(validation.relation_problems(config) + chosen.problems(config))
    validation.refuse(lengths.problems(config, chosen(config).batch_shapes(AbstractMesh((1, 1, 1), AXES))))
    return config


def _with_home(config: Config) -> Config:
    """The config with the home folder in place of "~" in every path."""
    values = flatten(config.to_dict())
    keys = {name: setting.key for name, setting in settings().items()}
    paths = [name for name, key in keys.items() if key.path or (key.suffix and values[name].endswith(key.suffix))]
    return config.replaced({name: expanded(values[name], name) for name in paths})


def _decided(config: Config, chosen: type[Algorithm]) -> Config:
    """The config with what it leaves open as its `algorithm_defaults` have it, or else the algorithm; what the config
    says itself stands.
    """
    ours = {name: value for name, value in flatten(config.to_dict()).items() if name in by_algorithm()}
    not_ours = sorted(chosen.defaults.keys() - ours.keys())
    problems = [f"algorithm {config.algorithm!r} has a default for {name}, which is not for it" for name in not_ours]
    defaults = {**chosen.defaults, **_defaults_here(config)}
    for name, value in ours.items():
        if value is None and defaults.get(name) is None:
            problems.append(f"algorithm {config.algorithm!r} has no default for {name}, which the config leaves open")
    validation.refuse(problems)
    changes = {name: defaults[name] for name, value in ours.items() if value is None}
    config = config.replaced(changes | {"algorithm_defaults": {}})  # nothing is left to decide
    validation.check(config.to_dict())  # an algorithm's defaults are held to the same ranges
    return config


def _defaults_here(config: Config) -> dict[str, Any]:
    """What `algorithm_defaults` say for the config's algorithm, by dotted key; all of it is checked."""
    problems, chosen = validation.algorithm_defaults_problems(config.algorithm_defaults), {}
    for name, tree in config.algorithm_defaults.items():
        if ":" not in name and name not in algorithms.ALGORITHMS:
            hint = did_you_mean(name, algorithms.ALGORITHMS)
            problems.append(f"algorithm_defaults has the unknown algorithm {shown(name)}: {hint}")
        elif name == config.algorithm and not problems:
            chosen = flatten(tree)
    validation.refuse(problems)
    return chosen


def mesh_sizes(config: Config, kv_heads: int, devices: int, processes: int = 1) -> dict[str, int]:
    """The sizes of data, fsdp and tensor over all devices, as `make_mesh` takes them, with what is 0 chosen.

    A batch has a row for each of data x fsdp, and a training step no more rows than episodes: more devices than that
    would compute padding, so `tensor` takes them, as long as it divides the kv heads and the devices of a process.
    Weights under an adapter are needed whole by every process, to roll out: with a copy in each they are held once.
    """
    mesh, each = config.mesh, max(devices // processes, 1)
    data, tensor = mesh.data, mesh.tensor
    if not tensor:
        rows = config.tasks.tasks_per_step * config.tasks.rollouts // config.batch.rows_per_device
        most = math.gcd(devices // max(data, 1), each, kv_heads) if mesh.fsdp == -1 else 1
        sizes = [size for size in range(1, most + 1) if most % size == 0] or [1]
        tensor = next((size for size in sizes if devices // size <= rows), sizes[-1])
    if not data:
        data = processes if config.lora.rank and mesh.fsdp == -1 and each % tensor == 0 else 1
    return {"data": data, "fsdp": mesh.fsdp, "tensor": tensor}


def algorithm(config: Config) -> Algorithm:
    """The config's algorithm, with its loss and the shapes of its batches."""
    return algorithms.find(config.algorithm)(config)


def engine_config(config: Config) -> EngineConfig:
    """One engine serves rollouts, analysis and evaluation."""
    rollout, hindsight = config.rollout, config.hindsight
    return EngineConfig(
        slots=rollout.slots,
        context=max(rollout.context, hindsight.context),
        max_tokens=max(rollout.max_action_tokens, hindsight.max_tokens),
        prefill_buckets=rollout.prefill_buckets,
        prefill_rows=rollout.prefill_rows,
        refill_fraction=rollout.refill_fraction,
        overlap_env=rollout.overlap_env,
        free_cache=rollout.free_cache,
    )


def rollout_config(config: Config, *, greedy: bool = False) -> RolloutConfig:
    """How episodes are sampled: as configured, or greedily."""
    rollout = config.rollout
    temperature = 0.0 if greedy else rollout.temperature
    sampling = Sampling(temperature, rollout.top_p, rollout.top_k, rollout.max_action_tokens)
    return RolloutConfig(max_steps=rollout.max_steps, context=rollout.context, sampling=sampling)


def answer_sampling(config: Config) -> Sampling:
    """How an analyser's answers are sampled."""
    hindsight = config.hindsight
    return Sampling(hindsight.temperature, hindsight.top_p, 0, hindsight.max_tokens)


def optimizer_config(config: Config) -> OptimConfig:
    """AdamW, its schedule and the teacher's EMA."""
    options = config.optim.to_dict()
    del options["max_nonfinite"]  # the run's affair, not the update's
    return OptimConfig(total_steps=options.pop("steps"), **options)


def keeps_initial_weights(config: Config) -> bool:
    """Whether a run holds the weights that training began with: to analyse with, or to stay near."""
    return config.hindsight.analyser == "initial_policy" or algorithm(config).loss.needs_reference


def lora_config(config: Config) -> LoraConfig | None:
    """The adapter that is trained; None where all weights are."""
    adapter = config.lora
    if not adapter.rank:
        return None
    return LoraConfig(adapter.rank, adapter.alpha, adapter.dropout, adapter.targets, adapter.rslora)


def compute_dtype(config: Config, platform: str | None = None) -> str:
    """What `policy.compute_dtype` means on a platform ("cpu", "gpu", "tpu"), by default this machine's."""
    if config.policy.compute_dtype != "auto":
        return config.policy.compute_dtype
    return default_dtype(platform)


def default_dtype(platform: str | None = None) -> str:
    """In which numbers a platform computes where nobody says it.

    A CPU has no bfloat16 units: its caches in bfloat16 are about 50 times slower.
    """
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def _typed(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """A section with these values: lists as tuples, whole numbers as the numbers that they stand for."""
    kinds = get_type_hints(cls)

    def typed(value: Any, kind: Any) -> Any:
        if isinstance(kind, type) and issubclass(kind, Section):
            return _typed(kind, value)
        if value is None:
            return None
        if get_origin(kind) is tuple:
            return tuple(value)
        if get_origin(kind) is dict:
            return dict(value)
        return kind(value) + 0.0 if kind is float else kind(value)  # -0.0 is 0.0

    return cls(**{field.name: typed(values[field.name], kinds[field.name]) for field in dataclasses.fields(cls)})
