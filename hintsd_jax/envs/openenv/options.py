# SPDX-License-Identifier: Apache-2.0

"""The `env.options` of openenv, and the package itself: both in, checked, or one line of what is wrong out."""

from __future__ import annotations

import dataclasses
import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hintsd_jax.errors import UserError

SPLITS = ("train", "eval", "test")
LAST, SUM = "last", "sum"
MOST = 1_000_000  # seeds of a split
_SEEDS = 100  # of the options
_SCHEMES = ("http://", "https://", "ws://", "wss://")
_OURS = ("seed", "episode_id")  # of a reset
_MISSING = "environment openenv: its package is not installed: make openenv"
_PARTS = ("generic_client", "env_server.http_server", "env_server.mcp_environment")  # what is needed to play


@dataclasses.dataclass(frozen=True)
class Options:
    """The `env.options` of openenv.

    environment: the URL of a running server, or "package.module:name" of an app or of a class of environments, which is
    then served here. arguments: of such a class. reset: further arguments of every reset. system: a system message.
    field: of an action, that takes the agent's whole text. text: what the agent reads of an observation, "field" or
    "field.within". reward: of an episode, the LAST that a step brought, as in the package's own runner, or the SUM.
    size: tasks of each split. seed: another one gives others.
    """

    environment: str = ""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    reset: dict[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
    field: str = ""
    text: str = ""
    reward: str = LAST
    size: int = 200
    seed: int = 0

    def __post_init__(self):
        if not self.is_remote and not all(self.environment.partition(":")):
            raise UserError(
                f"openenv: env.options.environment = {self.environment!r}: give the URL of a running server"
                " (http://...), or 'package.module:name' of an app or a class that is installed here"
            )
        if self.is_remote and self.arguments:
            raise UserError("openenv: env.options.arguments are for a class, not for a server that runs already")
        if taken := sorted(set(_OURS) & set(self.reset)):
            raise UserError(f"openenv: env.options.reset.{taken[0]} is the task's: leave it out")
        if self.reward not in (LAST, SUM):
            raise UserError(f"openenv: env.options.reward = {self.reward!r}: give {LAST!r} or {SUM!r}")
        for name, least, most in (("size", 1, MOST), ("seed", 0, _SEEDS)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"openenv: env.options.{name} = {getattr(self, name)}: give {least} to {most}")

    @property
    def is_remote(self) -> bool:
        return self.environment.startswith(_SCHEMES)


def _imported() -> Any:
    """The package, imported with this module: then every process of an environment is forked with it, which saves each
    of them seconds. None where it is not installed.
    """
    try:
        package = importlib.import_module("openenv.core")
        for name in _PARTS:
            importlib.import_module(f"openenv.core.{name}")
        for name in ("uvicorn", "httpx", "jsonschema", "websockets.asyncio.client"):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "openenv":
            raise
        return None
    return package


_PACKAGE = _imported()


def package() -> Any:
    """The package `openenv.core`. Raises UserError where it is not installed."""
    if _PACKAGE is None:
        raise UserError(_MISSING)
    return _PACKAGE


def module(name: str) -> Any:
    """A module of the package, or of what it is installed with. Raises UserError where the package is not installed."""
    package()
    return importlib.import_module(name)


def package_version() -> str:
    """Raises UserError where the package is not installed."""
    try:
        return version("openenv")
    except PackageNotFoundError:
        raise UserError(_MISSING) from None
