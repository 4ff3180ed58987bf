"""What an analyser is asked and what it answers, whoever it is."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from hintsd_jax.envs.base import Message


@dataclasses.dataclass(frozen=True)
class Question:
    """One request to an analyser. name: unique within a training step, such as "<task id>/<rollout>/<step or 'episode'>"."""

    name: str
    messages: tuple[Message, ...]
    key: np.ndarray  # uint32 [2]


@dataclasses.dataclass
class Answers:
    """texts: one a question, in order; None where there is none, counted in `dropped` by reason. tokens: generated for them."""

    texts: list[str | None]
    dropped: Counter
    tokens: int = 0
