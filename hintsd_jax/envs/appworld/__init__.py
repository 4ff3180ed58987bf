# SPDX-License-Identifier: Apache-2.0

"""AppWorld as an environment: the benchmark's engine in worker processes of its own virtual environment."""

from hintsd_jax.envs.appworld.env import AppWorld

__all__ = ["AppWorld"]
