# SPDX-License-Identifier: Apache-2.0

"""TextWorld as an environment: the package's own quests, interpreter and scores."""

from hintsd_jax.envs.textworld.env import TextWorld

__all__ = ["TextWorld"]
