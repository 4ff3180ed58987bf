# SPDX-License-Identifier: Apache-2.0

"""TextArena as an environment: the package's own games for one player, their texts and their rewards."""

from hintsd_jax.envs.textarena.env import TextArena

__all__ = ["TextArena"]
