# SPDX-License-Identifier: Apache-2.0

"""Settings: a ConfigDict at the edge (`base`), checked once, frozen dataclasses after it (`build.build`)."""

from hintsd_jax.config.edge import base

__all__ = ["base"]
