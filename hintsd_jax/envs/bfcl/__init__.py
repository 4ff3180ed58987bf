# SPDX-License-Identifier: Apache-2.0

"""BFCL v3 multi-turn as an environment: the benchmark's tools and checkers, our own instances and dispatch."""

from hintsd_jax.envs.bfcl.env import Bfcl

__all__ = ["Bfcl"]
