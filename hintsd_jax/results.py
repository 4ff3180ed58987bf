# SPDX-License-Identifier: Apache-2.0

"""What training and evaluating give back to who calls them: numbers, and where everything else lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hintsd_jax.jsonl import read_jsonl
from hintsd_jax.runs.metrics import read_metrics
from hintsd_jax.storage import AnyPath, entries


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run. workdir: its folder. step: updates made. before, after: held-out metrics of the starting policy
    and of the trained one (`test/avg@4` and so on, see docs/metrics.md); {} where `eval.test_tasks` is 0.
    """

    workdir: AnyPath
    step: int
    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: 0 before training, then one a step."""
        return read_metrics(self.workdir / "metrics.jsonl")

    @property
    def table(self) -> str:
        """result.md: before and after, side by side."""
        return (self.workdir / "result.md").read_text(encoding="utf-8")

    @property
    def checkpoints(self) -> AnyPath:
        """The folder of the checkpoints; `hintsd-jax export` makes Hugging Face directories of them."""
        return self.workdir / "checkpoints"

    def episodes(self, step: int) -> list[dict[str, Any]]:
        """The records of a training step's episodes (counted from 1): steps, tokens, targets and feedback. Raises
        KeyError for a step that the run does not have.
        """
        return _episodes(self.workdir, f"step_{step:06d}.jsonl")


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """An evaluated policy. step: updates that it had had. metrics: `<split>/avg@k` and so on. success: of each task,
    for each rollout 1 or 0, None where the environment failed; [] where results by task are not allowed.
    """

    workdir: AnyPath
    step: int
    metrics: Mapping[str, float]
    success: list[list[int | None]]

    def episodes(self) -> list[dict[str, Any]]:
        """The records of the sampled episodes, where they may be kept."""
        return _episodes(self.workdir, f"evaluation_{self.step:06d}.jsonl")


def _episodes(workdir: AnyPath, name: str) -> list[dict[str, Any]]:
    path = workdir / "episodes" / name
    if path.name not in [each.name for each in entries(path.parent)]:
        raise KeyError(f"{path} is not there")
    return [line.value for line in read_jsonl(path, "an episode's record")]
