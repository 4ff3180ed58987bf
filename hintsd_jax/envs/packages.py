# SPDX-License-Identifier: Apache-2.0

"""Packages that play an environment and are installed beside the others: a name in; the module, its version, or one
line that says how to install it out.
"""

from __future__ import annotations

import dataclasses
import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from hintsd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Package:
    """name: of the package, of its environment and of the make target that installs it."""

    name: str

    def version(self) -> str:
        """Raises UserError where the package is not installed."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            raise self.missing from None

    def imported(self, *modules: str) -> ModuleType | None:
        """The first of these modules of the package, with all of them imported; None where it is not installed.

        A module of an environment that calls this where it is imported itself saves each process of the environment the
        time: those are forked with it.
        """
        try:
            first, *_ = (importlib.import_module(module) for module in modules)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != self.name:
                raise
            return None
        return first

    @property
    def missing(self) -> UserError:
        return UserError(f"environment {self.name}: its package is not installed: make {self.name}")
