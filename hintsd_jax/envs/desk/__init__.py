# SPDX-License-Identifier: Apache-2.0

"""The embedded environment: an office of files, mail, calendar and contacts, its tasks and its demonstrations."""

from hintsd_jax.envs.desk.env import Desk

__all__ = ["Desk"]
