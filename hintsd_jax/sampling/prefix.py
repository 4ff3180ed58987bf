# SPDX-License-Identifier: Apache-2.0

"""What two sequences of tokens or characters begin with in common: two sequences in, a length out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items `a` and `b` begin with in common: between 0 and the shorter one's length."""
    shorter = min(len(a), len(b))
    return next((n for n in range(shorter) if a[n] != b[n]), shorter)
