# SPDX-License-Identifier: Apache-2.0

"""Orbax, imported so that logging stays as it is.

It logs a line while it is imported, and absl gives a root logger without any handler one for that: a program that uses
this package as a library could then not set up logging of its own by `logging.basicConfig`.
"""

from __future__ import annotations

import logging

_nothing = logging.NullHandler()
logging.getLogger().addHandler(_nothing)
try:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy
finally:
    logging.getLogger().removeHandler(_nothing)

__all__ = ["ocp", "preservation_policy"]
