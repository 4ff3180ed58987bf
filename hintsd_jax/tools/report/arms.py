# SPDX-License-Identifier: Apache-2.0

"""Several runs in, arms out: runs that differ in their seed alone are one arm, and arms are compared with the first
one, paired by seed and task.

The mean of an arm is over its seeds and tasks. From `statistics.MIN_SEEDS` seeds on intervals are over seeds and tasks
(`statistics.crossed_interval`): what to expect of another seed. Of fewer they are over tasks alone, and say so. A
difference takes the seeds that both arms have, because a seed decides the tasks of training and the random numbers of
held-out rollouts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hintsd_jax.config import continuing
from hintsd_jax.config.schema import Config
from hintsd_jax.statistics import DIFFERENCE, MIN_SEEDS, SHARE, Span, crossed_interval, interval
from hintsd_jax.tools.report import results
from hintsd_jax.tools.report.reading import Run, flat

# Settings that runs of one arm may differ in, beside those that change nothing of what is learnt: a warm start may be
# of a seed's own.
_OF_A_SEED = ("seed", "fork.path", "fork.checkpoint")
_ENDS = "-_./ 0123456789"  # of the names of runs of one arm: what is left of their seeds
# What decides which held-out tasks are played, and how often.
_TASKS = ("env.name", "tasks.test_split", "eval.test_tasks", "eval.rollouts")


@dataclasses.dataclass
class Arm:
    """name: for people, unique. runs: their places in the report. seeds: of each."""

    name: str
    runs: list[int]
    seeds: list[Any]


def group(runs: Sequence[Run]) -> list[Arm]:
    """The arms, in the order of their first runs. Two runs of the same settings and seed are two arms: no seed counts
    twice.
    """
    defaults = flat(json.loads(json.dumps(dataclasses.asdict(Config()))))  # of settings younger than a run
    arms: dict[tuple, Arm] = {}
    for n, run in enumerate(runs):
        config, seed = defaults | run.config, run.config.get("seed")
        same = tuple(sorted((key, repr(value)) for key, value in config.items() if not _may_differ(key)))
        again = 0
        while seed in (arm := arms.setdefault((same, again), Arm("", [], []))).seeds:
            again += 1
        arm.runs.append(n)
        arm.seeds.append(seed)
    for arm in arms.values():
        first = runs[arm.runs[0]].name
        shared = _same_start([runs[n].name for n in arm.runs]).rstrip(_ENDS)
        arm.name = first if len(arm.runs) == 1 else shared or first
    names = [arm.name for arm in arms.values()]
    for arm in arms.values():
        if names.count(arm.name) > 1:
            arm.name = runs[arm.runs[0]].name  # which is unique
    return list(arms.values())


def compare(runs: Sequence[Run]) -> dict[str, Any] | None:
    """What a page shows of several runs: `{"arms": [{"name", "runs", "seeds"}], "measures": [{"name", "arms"}]}`. Each
    measure has for each arm `{"before", "after", "change", "against"}`: values with intervals and "seeds", how many
    they are of, or None. "against": after training, minus the first arm; "why": why there is none.

    None where there is but one run.
    """
    if len(runs) < 2:
        return None
    arms, measured = group(runs), [_measures(run) for run in runs]
    names = list(dict.fromkeys(name for each in measured for when in ("after", "before") for name in each[when]))
    return {
        "arms": [dataclasses.asdict(arm) for arm in arms],
        "measures": [
            {"name": name, "arms": [_line(name, arm, arms[0], runs, measured) for arm in arms]} for name in names
        ],
    }


def _line(name: str, arm: Arm, first: Arm, runs: Sequence[Run], measured: Sequence[Mapping]) -> dict[str, Any]:
    before = [measured[n]["before"].get(name) for n in arm.runs]
    after = [measured[n]["after"].get(name) for n in arm.runs]
    line = {
        "before": over_seeds(before, SHARE),
        "after": over_seeds(after, SHARE),
        "change": over_seeds([results.difference(*ends) for ends in zip(before, after, strict=True)], DIFFERENCE),
        "against": None,
        "why": "",
    }
    if arm is first:
        return line
    pairs = [(n, first.runs[first.seeds.index(seed)]) for n, seed in zip(arm.runs, arm.seeds) if seed in first.seeds]
    if not pairs:
        return line | {"why": "no seed in common"}
    if any(_tasks(runs[n]) != _tasks(runs[other]) for n, other in pairs):
        return line | {"why": "other tasks"}
    ends = [(measured[other]["after"].get(name), measured[n]["after"].get(name)) for n, other in pairs]
    return line | {"against": over_seeds([results.difference(*pair) for pair in ends], DIFFERENCE)}


def over_seeds(values: Sequence[np.ndarray | None], span: Span) -> dict[str, Any] | None:
    """The mean of what each seed has for each task [N], with its 95 % interval, and of how many seeds it is. Seeds
    without a value, and tasks that not every seed has played, are left out; None where nothing is left.
    """
    measured = [values_N for values_N in values if values_N is not None and np.isfinite(values_N).any()]
    if not measured or len({len(values_N) for values_N in measured}) > 1:
        return None
    values_SN = np.stack(measured)
    values_SN = values_SN[:, np.isfinite(values_SN).all(axis=0)]
    if not values_SN.size:
        return None
    enough = len(values_SN) >= MIN_SEEDS
    ends = crossed_interval(values_SN, span=span) if enough else interval(values_SN.mean(axis=0), span=span)
    return {**results.value(values_SN.mean(), ends), "seeds": len(values_SN)}


def _same_start(names: Sequence[str]) -> str:
    """What all names begin with, letter by letter."""
    shared = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names))
    return "".join(letters[0] for letters in shared)


def _measures(run: Run) -> dict[str, dict[str, np.ndarray]]:
    split, held_out = str(run.config.get("tasks.test_split", "test")), run.held_out or {}
    return {when: results.measures(held_out.get(when) or {}, split) for when in ("before", "after")}


def _tasks(run: Run) -> list:
    options = {key: value for key, value in run.config.items() if key.startswith("env.options")}
    benchmark = ((run.held_out or {}).get("after") or {}).get("benchmark", "")
    return [*(run.config.get(key) for key in _TASKS), options, benchmark]


def _may_differ(key: str) -> bool:
    return key in _OF_A_SEED or (continuing.may_differ(key) and key != "optim.steps")
