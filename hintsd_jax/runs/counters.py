# SPDX-License-Identifier: Apache-2.0

"""What a run remembers from step to step beside its train state."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Counters:
    """What travels with a checkpoint beside the state. step: completed. seconds, tokens: spent and sampled so far.
    episodes, lost_episodes: begun so far, and taken by environments' failures. targets, checked_targets, true_targets:
    named so far, those of episodes whose faults the environment knows, and the faults among these. empty_updates: that
    had nothing to train on. skipped_updates: that met a number that is not finite; nonfinite_updates: the last ones in
    a row. before: the held-out result before training. lr_scale: what alarms made of the learning rate. alarms,
    endpoint: what these two remember. rows: the digest of metrics.jsonl; dialogues: that of the file that an offline
    algorithm learns from; tasks: see `Session.tasks_digest`, "" where an earlier version wrote none.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    episodes: int = 0
    lost_episodes: int = 0
    targets: int = 0
    checked_targets: int = 0
    true_targets: int = 0
    empty_updates: int = 0
    skipped_updates: int = 0
    nonfinite_updates: int = 0
    before: dict[str, Any] | None = None
    lr_scale: float = 1.0
    alarms: dict[str, Any] = dataclasses.field(default_factory=dict)
    endpoint: dict[str, int] = dataclasses.field(default_factory=dict)
    rows: str = ""
    dialogues: str = ""
    tasks: str = ""
