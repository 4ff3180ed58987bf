# SPDX-License-Identifier: Apache-2.0

"""Which steps of an episode feedback is asked for: an episode goes in, step numbers come out.

In the method the analyser itself names the steps ("hindsight"). The others are the controls for *where*: they give the
steps, and the analyser is asked only how those should have gone.

A selector of one's own is a function with the signature of `Selector`, named in the config as "package.module:name". It
gets the episode without the environment's report, which knows the ground truth.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np

from hintsd_jax.errors import UserError
from hintsd_jax.plugins import load
from hintsd_jax.rollout.episode import Episode

# (episode, raw key of its questions, most targets of an episode) -> steps, 1-based, ascending, different.
Selector = Callable[[Episode, np.ndarray, int], list[int]]


def first(episode: Episode, key: np.ndarray, max_targets: int) -> list[int]:
    return [1]


def last(episode: Episode, key: np.ndarray, max_targets: int) -> list[int]:
    return [len(episode.steps)]


def random_steps(episode: Episode, key: np.ndarray, max_targets: int) -> list[int]:
    """`max_targets` different steps (all where there are fewer), which follow from the key."""
    steps = range(1, len(episode.steps) + 1)
    return sorted(random.Random(key.tobytes()).sample(steps, min(max_targets, len(steps))))


def all_steps(episode: Episode, key: np.ndarray, max_targets: int) -> list[int]:
    return list(range(1, len(episode.steps) + 1))


def oracle(episode: Episode, key: np.ndarray, max_targets: int) -> list[int]:
    """PRIVILEGED: the steps that the environment knows to be wrong, earliest first; none where it does not say."""
    faults = () if episode.report is None else episode.report.faults or ()
    return sorted({fault.step for fault in faults})[:max_targets]


HINDSIGHT = "hindsight"  # the analyser names the steps: no selector
SELECTORS: dict[str, Selector] = {
    "first": first,
    "last": last,
    "random": random_steps,
    "all": all_steps,
    "oracle": oracle,
}
PRIVILEGED_SELECTORS = ("oracle",)


def find(name: str) -> Selector | None:
    """The selector of a name, or at a path "package.module:function"; None where the analyser names the steps.

    Raises UserError for an unknown name, and for a path that leads to no function; one of somebody's own raises it too,
    where it gives steps that the episode does not have.
    """
    if name == HINDSIGHT:
        return None
    if name in SELECTORS:
        return SELECTORS[name]
    selector: Selector = load(name, "selector", (HINDSIGHT, *SELECTORS))
    if not callable(selector):
        raise UserError(f"selector {name!r} is no function of (episode, key, max_targets)")

    def checked(episode: Episode, key: np.ndarray, max_targets: int) -> list[int]:
        # Without the report: what reads the ground truth must be labelled so, and only ours are.
        steps = list(selector(dataclasses.replace(episode, report=None), key, max_targets))
        if steps != sorted(set(steps)) or not all(1 <= step <= len(episode.steps) for step in steps):
            count = len(episode.steps)
            raise UserError(
                f"selector {name!r} gave {steps} of {count} steps: give different ones, from 1 on, ascending"
            )
        return steps

    return checked
