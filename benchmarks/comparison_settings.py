"""What an arm of a comparison really is: a config and overrides in, the settings that a run of them has out, whoever
decided them: the schema, the config file, its `algorithm_defaults`, the algorithm or the arm. Starts no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh

from benchmarks.pages import markdown_table
from hintsd_jax import algorithms
from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.config import flags
from hintsd_jax.config.build import build
from hintsd_jax.config.edge import flatten, plain
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError
from hintsd_jax.models.sharding import AXES

_SECTIONS = ("algorithm", "tasks.", "rollout.", "hindsight.", "loss.", "grpo.", "batch.", "optim.")
# Settings that do nothing without an analyser, without a teacher, or without the part of the loss.
_ANALYSER = ("hindsight.",)
_TEACHER = ("hindsight.feedback_position", "optim.ema_decay")
_PARTS = {
    "divergence": ("loss.divergence", "loss.support", "loss.top_k", "loss.alpha", "loss.importance_clip"),
    "policy_gradient": ("loss.clip_low", "loss.clip_high", "loss.policy_gradient_weight", "grpo."),
}
_NOT_SHOWN = ("algorithm",)  # the arm's overrides say it

Setting = dict[str, Any]


def config_of(config: str, overrides: Mapping[str, str]) -> Config:
    """The config of a run. Raises SystemExit, with the line that a run would end with, where it is none."""
    try:
        return build(edge_of(config, overrides))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def settings_of(config: str, overrides: Mapping[str, str]) -> dict[str, Setting]:
    """The settings of a run that have an effect on what it learns.

    Returns:
      key -> {"value": ...}, and "own": what the algorithm would have had, where the config file's `algorithm_defaults`
      say something else. "loss" and "batch shapes" stand beside the config's keys. Values are those of JSON.
    """
    run = config_of(config, overrides)
    chosen = algorithms.find(run.algorithm)
    algorithm = chosen(run)
    unused = _unused(algorithm)
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in flatten(run.to_dict()).items()
        if key.startswith(_SECTIONS) and not key.startswith(unused)
    }
    shapes = algorithm.batch_shapes(AbstractMesh((1, 1, 1), AXES))
    branches = [f"{branch}+{action}" for branch, action in zip(shapes.branch_buckets, shapes.action_buckets)]
    values["loss"] = " + ".join(part.name for part in algorithm.loss.parts)
    values["batch shapes"] = f"{'/'.join(map(str, shapes.length_buckets))}, teacher+actions {'/'.join(branches)}"
    edge = edge_of(config, overrides)
    by_file, given = flatten(edge["algorithm_defaults"].get(run.algorithm, {})), flatten(edge)
    decided = {key for key in by_file if given.get(key) is None}
    return {
        key: {"value": value}
        | ({"own": chosen.defaults[key]} if key in decided and chosen.defaults[key] != value else {})
        for key, value in values.items()
    }


def edge_of(config: str, overrides: Mapping[str, str]) -> dict[str, Any]:
    """The config before anything is decided."""
    words = [f"--config={config}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    return plain(flags.parse(words).config or {})


def _unused(algorithm: Algorithm) -> tuple[str, ...]:
    """Beginnings of keys that do nothing here."""
    parts = {part.name for part in algorithm.loss.parts}
    prefixes = [prefix for part, keys in _PARTS.items() if part not in parts for prefix in keys]
    prefixes += [] if algorithm.uses_analyser else _ANALYSER
    return (*prefixes, *([] if algorithm.loss.needs_teacher else _TEACHER))


def table(arms: Mapping[str, Mapping[int, Mapping]], labels: Mapping[str, str]) -> str:
    """The settings in which arms differ, an arm a row. Runs of earlier versions, which kept none, have empty rows.

    arms: arm -> seed -> run; every seed of an arm has the same settings.
    """
    settings = {arm: next(iter(seeds.values())).get("resolved", {}) for arm, seeds in arms.items()}
    keys = list(dict.fromkeys(key for of_arm in settings.values() for key in of_arm))
    shown = {arm: {key: _shown(of_arm.get(key)) for key in keys} for arm, of_arm in settings.items() if of_arm}
    differ = [key for key in keys if key not in _NOT_SHOWN and len({of_arm[key] for of_arm in shown.values()}) > 1]
    if not differ:
        return ""
    rows = [[labels.get(arm, arm), *(shown.get(arm, {}).get(key, "") for key in differ)] for arm in settings]
    return markdown_table(["arm", *(f"`{key}`" for key in differ)], rows)


def _shown(setting: Mapping[str, Any] | None) -> str:
    if setting is None:
        return ""
    value = setting["value"]
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text} (config; the algorithm's own: {setting['own']})" if "own" in setting else text
