# SPDX-License-Identifier: Apache-2.0

"""Environments of the package `verifiers`: its tasksets, its tools and its rewards, with the policy as its model."""

from hintsd_jax.envs.verifiers.env import Verifiers

__all__ = ["Verifiers"]
