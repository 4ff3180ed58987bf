# SPDX-License-Identifier: Apache-2.0

"""Environments of OpenEnv: behind a running server, or of a package that is installed here."""

from hintsd_jax.envs.openenv.env import OpenEnv

__all__ = ["OpenEnv"]
