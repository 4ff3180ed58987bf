# SPDX-License-Identifier: Apache-2.0

"""What hindsight hands to distillation: a step of a failed episode and how it should have gone."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Target:
    """`step` is 1-based, as in all text that people and the analyser read; `feedback` is never empty."""

    step: int
    feedback: str
