# SPDX-License-Identifier: Apache-2.0

"""The `env.options` of openenv, and the package itself: both in, checked, or one line of what is wrong out."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from hintsd_jax.envs.packages import Package
from hintsd_jax.errors import UserError

SPLITS = ("train", "eval", "test")
LAST, SUM = "last", "sum"
MOST = 1_000_000  # seeds of a split
_SEEDS = 100  # of the options
_SCHEMES = ("http://", "https://", "ws://", "wss://")
_OURS = ("seed", "episode_id")  # of a reset
PACKAGE = Package("openenv")
_PARTS = (  # what is needed to play
    "openenv.core.generic_client",
    "openenv.core.env_server.http_server",
    "openenv.core.env_server.mcp_environment",
    "uvicorn",
    "httpx",
    "jsonschema",
    "websockets.asyncio.client",
)


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


_OPENENV = PACKAGE.imported("openenv.core", *_PARTS)


def package() -> Any:
    """The package `openenv.core`. Raises UserError where it is not installed."""
    if _OPENENV is None:
        raise PACKAGE.missing
    return _OPENENV


def module(name: str) -> Any:
    """A module of the package, or of what it is installed with. Raises UserError where the package is not installed."""
    package()
    return importlib.import_module(name)
