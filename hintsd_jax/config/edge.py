# SPDX-License-Identifier: Apache-2.0

"""The edge of the schema: a ConfigDict with every key for config files and flags, and one line about a key that the
schema lacks.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_type_hints

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError, placeholder

from hintsd_jax.config.fields import Key, shown
from hintsd_jax.config.schema import FREE, Config, Section
from hintsd_jax.errors import UserError

# Keys of earlier versions -> what they are called now.
RENAMED = {
    "method": "algorithm",
    "history": "chat.history",
    "enable_thinking": "chat.enable_thinking",
    "template_kwargs": "chat.template_kwargs",
    "rollout.refill": "rollout.refill_fraction",
    "rollout.overlap": "rollout.overlap_env",
    "grpo.mask_cut_episodes": "rollout.mask_cut_episodes",
    "hindsight.place": "hindsight.feedback_position",
    "hindsight.clip_chars": "hindsight.max_trajectory_chars",
    "distill.policy_weight": "loss.policy_gradient_weight",
    "distill.chunk": "loss.chunk_tokens",
    "distill.form": "batch.layout",
    "distill.stream_buckets": "batch.branch_buckets",
    "distill.episode_pair": "batch.whole_episode_buckets",
    **{f"distill.{name}": f"batch.{name}" for name in ("length_buckets", "action_buckets", "rows_per_device")},
    **{f"distill.{name}": f"loss.{name}" for name in ("divergence", "support", "top_k", "alpha", "importance_clip")},
    **{f"distill.{name}": f"loss.{name}" for name in ("clip_low", "clip_high", "mean_of_micro_means")},
}
# (key, value) of earlier versions -> the value now.
RENAMED_VALUES = {
    ("algorithm", "dense"): "openclaw_rl",
    ("algorithm", "sharpen"): "self_training",
    ("hindsight.analyser", "policy_ema"): "ema_teacher",
    ("hindsight.analyser", "policy"): "student",
    ("hindsight.analyser", "policy_initial"): "initial_policy",
    ("batch.layout", "rows"): "separate",
    ("alarms.action", "note"): "warn",
}
# Groups whose keys a flag may bring: what stands in them is not known here, a misspelt name is refused by who reads it.
OPEN_TO_FLAGS = ("env.options", "endpoint.extra_body", "endpoint.headers_env")

_LONGEST = 80  # characters of a key in a message
# Likeness of names (see difflib), in [0, 1]: of a misspelt name in its own section, and in any other.
_ALIKE, _SAME = 0.7, 0.85


class Setting:
    """One key of the schema: its dotted name, its type ("int", "float", "bool", "str", "tuple[int, ...]", ...), its
    default (None where the algorithm decides) and its `Key`.
    """

    def __init__(self, name: str, kind: Any, default: Any, key: Key):
        self.name, self.kind, self.default, self.key = name, kind, default, key


@functools.cache
def settings() -> dict[str, Setting]:
    """Every key of the schema by its dotted name, in order."""
    return {setting.name: setting for setting in _settings(Config, "")}


def by_algorithm() -> set[str]:
    """The keys that the algorithm decides where the config leaves them open."""
    return {name for name, setting in settings().items() if setting.key.by_algorithm}


def sections() -> dict[str, str]:
    """Section -> what it is about, in order; "" for the keys that stand in none."""
    docs = {"": "The run as a whole."}
    for field in dataclasses.fields(Config):
        if "key" not in field.metadata:
            docs[field.name] = " ".join((field.default_factory.__doc__ or "").split())
    return docs


def _settings(cls: type[Section], prefix: str) -> Iterator[Setting]:
    kinds = get_type_hints(cls)
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType] - every section is a dataclass
        if "key" in field.metadata:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield Setting(prefix + field.name, kinds[field.name], default, field.metadata["key"])
        else:
            yield from _settings(kinds[field.name], f"{prefix}{field.name}.")


def base() -> ConfigDict:
    """All keys with their defaults, for config files; None where the algorithm decides. Locked but for `FREE`."""
    tree: dict[str, Any] = {}
    for setting in settings().values():
        group, _, last = setting.name.rpartition(".")
        node = tree.setdefault(group, {}) if group else tree
        node[last] = placeholder(setting.kind) if setting.key.by_algorithm else setting.default
    config = ConfigDict(tree).lock()
    for name in FREE:
        group, _, last = name.rpartition(".")
        getattr(getattr(config, group) if group else config, last).unlock()
    return config


def plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain dicts of a config, its references resolved. Raises UserError where they have no value or no end."""
    if not isinstance(config, ConfigDict):
        return dict(config)
    try:
        tree = config.copy_and_resolve_references().to_dict()
        flatten(tree)
        return tree
    except RequiredValueError as error:
        raise UserError("a required placeholder of the config has no value: give it one") from error
    except RecursionError as error:
        raise UserError("the config holds itself, or mappings too deep in each other") from error


def add_option(config: ConfigDict, key: str, text: str) -> bool:
    """Sets `<group>.<name>`, of one of `OPEN_TO_FLAGS`, from a flag, where the config has no such key yet whose type
    the flag could follow: a Python literal, or else the text itself. Returns whether it did.
    """
    group, _, name = key.rpartition(".")
    section, _, last = group.partition(".")
    options: Any = getattr(config.get(section), last, None) if group in OPEN_TO_FLAGS else None
    if not isinstance(options, ConfigDict) or options.get(name) is not None:
        return False
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    with options.unlocked():
        options[name] = value
    return True


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a dotted key, whatever its type so far."""
    *parents, last = key.split(".")
    section: Any = config
    for parent in parents:
        section = section[parent]
    with section.unlocked(), section.ignore_type():
        section[last] = value


def change_environment(config: ConfigDict, name: str | None) -> None:
    """Before an override of `env.name`, if there is one: the options of the config's own environment go with it, unless
    it is the same one ("openenv:URL" of "openenv").
    """
    env: Any = config.env
    if name not in (None, env.name) and not str(name).startswith(f"{env.name}:"):
        env.options = ConfigDict()
        env.options.unlock()


def flatten(tree: Mapping | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {"dotted.key": value}; an empty mapping is a value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping | ConfigDict) and len(value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unknown_key(key: str, known: Iterable[str] | None = None) -> str | None:
    """One line about a dotted key that the schema lacks, with its new or the nearest name; None for a key that it has.

    `known` are the dotted keys to compare with, the schema's by default; any key under those of `FREE` passes.
    """
    known = list(settings() if known is None else known)
    groups = {name.rsplit(".", 1)[0] for name in known if "." in name}
    if key in known or key in groups or key.startswith(tuple(f"{group}." for group in FREE)):
        return None
    key = key if key.isprintable() and len(key) <= _LONGEST else shown(key)
    for old, new in RENAMED.items():
        if f"{key}.".startswith(f"{old}."):
            return f"config key {key} is now called {new}{key.removeprefix(old)}"
    if key == "distill":
        return "the config keys under distill are now under loss and batch: see docs/config.md"
    near = _nearest(key.lower(), known)
    group = key.lower().rpartition(".")[0]
    own = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group] if group in groups else []
    elsewhere = near is not None and near.rpartition(".")[0] != group
    says = [f"did you mean {near}?"] if near else []
    says += [f"{group} has {', '.join(own)}"] if own and (near is None or elsewhere) else []
    return f"unknown config key {key}: {' '.join(says) or '`hintsd-jax --help` lists all'}"


def _nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that a misspelt one (in lower case) means; None where none is near.

    The last parts must be alike, or one a piece of the other ("r", "save_every"); in another section nearly the same.
    """
    group, _, last = key.rpartition(".")

    def closeness(name: str) -> tuple[float, float]:
        other_group, _, other = name.rpartition(".")
        here = group == other_group or not group
        alike, as_a_whole = _likeness(last, other), _likeness(key, name)
        cut_short = other.startswith(last) and (bool(group) or len(last) > 1)
        pieces = cut_short or not set(other.split("_")).isdisjoint(last.split("_"))
        elsewhere = group != other_group and (alike >= _SAME or as_a_whole >= _SAME)
        if elsewhere or (here and (alike >= _ALIKE or pieces)):
            return max(alike, _ALIKE if pieces else 0.0), as_a_whole
        return 0.0, 0.0

    nearest = max(known, key=closeness)
    return nearest if closeness(nearest)[0] else None


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
