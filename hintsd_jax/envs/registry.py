# SPDX-License-Identifier: Apache-2.0

"""Environments by name: the `env.name` of a config goes in, the environment's class comes out.

A name is registered here ("desk") or a path "package.module:Class". Nothing is imported before it is resolved, so that
an environment whose packages are not installed is in nobody's way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.base import Environment
from hintsd_jax.errors import UserError
from hintsd_jax.plugins import load

METHODS = ("tasks", "reset", "step", "report", "close")

_PATHS = {
    "desk": "hintsd_jax.envs.desk:Desk",
    "bfcl": "hintsd_jax.envs.bfcl:Bfcl",
    "appworld": "hintsd_jax.envs.appworld:AppWorld",
    "textarena": "hintsd_jax.envs.textarena:TextArena",
    "textworld": "hintsd_jax.envs.textworld:TextWorld",
    "openenv": "hintsd_jax.envs.openenv:OpenEnv",
    "verifiers": "hintsd_jax.envs.verifiers:Verifiers",
}
# Registered names that play what another package has -> the option that says what. "openenv:URL" names both.
_PARTS = {"verifiers": "taskset", "openenv": "environment"}


def register(name: str, path: str) -> None:
    """Makes the class at `path` ("package.module:Class") known as `name`. It is imported when it is resolved.

    Raises:
      UserError: the name has a colon or is empty, it stands for another path already, or the path has no colon.
    """
    if ":" in name or not name:
        raise UserError(f"environment name {name!r}: use a plain word without a colon")
    if ":" not in path:
        raise UserError(f"environment {path!r}: write it as 'package.module:Class'")
    if _PATHS.get(name, path) != path:
        raise UserError(f"environment name {name!r} already stands for {_PATHS[name]!r}: choose another name")
    _PATHS[name] = path


def path_of(name_or_path: str) -> str:
    """The path "package.module:Class" of a registered name; a path as it is."""
    return _PATHS.get(name_or_path, name_or_path)


def whole(name: str, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and options where a name may hold an option: "verifiers:ID" is verifiers with {"taskset": ID}, and
    "openenv:URL or app" is openenv with {"environment": URL or app}; any other name is as it was.

    Raises:
      UserError: nothing stands after the colon, or the options say otherwise.
    """
    word, colon, part = name.partition(":")
    if not colon or word not in _PARTS:
        return name, options
    option = _PARTS[word]
    if not part:
        raise UserError(f"env.name = {name!r}: name the {option} after the colon, or leave the colon out")
    if options.get(option, part) != part:
        raise UserError(f"env.name = {name!r}, but env.options.{option} = {options[option]!r}: give one of the two")
    return word, {**options, option: part}


def resolve(name_or_path: str) -> type[Environment]:
    """The environment class of a registered name or of a path "package.module:Class".

    Raises:
      UserError: an unknown name, a module that cannot be imported, a missing class, or a class that lacks a method of
        the protocol.
    """
    env_class = load(path_of(name_or_path), "environment", _PATHS)
    if not isinstance(env_class, type):
        raise UserError(f"environment {name_or_path!r} is {type(env_class).__name__}, not a class")
    missing = [method for method in METHODS if not callable(getattr(env_class, method, None))]
    missing += sorted(getattr(env_class, "__abstractmethods__", ()))  # of a `ToolEnv`
    if missing:
        raise UserError(f"environment {name_or_path!r}: class {env_class.__name__!r} lacks {', '.join(missing)}")
    return env_class
