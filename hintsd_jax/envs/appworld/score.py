# SPDX-License-Identifier: Apache-2.0

"""What the grading of an episode says: the grader's answer in, reward and words out.

PRIVILEGED: the failed requirements are plain English; the traces behind them hold the evaluator's source and the ground
truth. Both may be told of tasks of the train split only, traces where that is asked for.
"""

import dataclasses
from typing import Any

from hintsd_jax.envs.appworld.client import WorkerFailed
from hintsd_jax.envs.appworld.options import SPARSE
from hintsd_jax.envs.appworld.tasks import TRAIN

MAX_TRACE_CHARS = 2_000


@dataclasses.dataclass(frozen=True)
class Failure:
    """A test that did not pass. trace: holds the ground truth."""

    requirement: str
    trace: str


@dataclasses.dataclass(frozen=True)
class Grading:
    """tests: of the task; failures: those that did not pass."""

    tests: int
    failures: tuple[Failure, ...]

    @classmethod
    def read(cls, answer: Any) -> "Grading":
        """Of the answer to a grading.

        Raises:
          WorkerFailed: it is not what it should be, or contradicts itself.
        """
        try:
            tests, passes = answer["num_tests"], answer["passes"]
            failures = tuple(Failure(_text(each["requirement"]), _text(each["trace"])) for each in answer["failures"])
            success = answer["success"]
        except (TypeError, KeyError) as error:
            raise WorkerFailed(f"a grading that cannot be read: {type(error).__name__}: {error}") from None
        passed = passes if type(passes) is int else len(passes) if isinstance(passes, list) else -1
        if type(tests) is not int or tests < 1 or passed + len(failures) != tests or success is not (not failures):
            told = [value if isinstance(value, bool | int) else type(value).__name__ for value in (tests, success)]
            raise WorkerFailed(
                f"a grading that contradicts itself: {told[0]} tests, {passed} passed, {len(failures)} failed, success"
                f" {told[1]}"
            )
        return cls(tests, failures)

    @property
    def success(self) -> bool:
        """Whether every test passes."""
        return not self.failures

    def reward(self, kind: str) -> float:
        """1 for a success; else, as `Options.reward` says, 0 or the share of tests that pass."""
        return float(self.success) if kind == SPARSE else (self.tests - len(self.failures)) / self.tests

    def summary(self, task_id: str, split: str, completed: bool, traces: bool) -> str:
        """PRIVILEGED: the report's text."""
        passed = self.tests - len(self.failures)
        head = f"{task_id}: {'completed' if completed else 'not completed'}, {passed} of {self.tests} tests pass."
        if split != TRAIN:
            return f"{head} What failed is told of tasks of the train split only."
        lines = [head]
        for failure in self.failures:
            lines.append(f"- failed: {' '.join(failure.requirement.split())}")
            if traces and failure.trace:
                lines.append(f"  {failure.trace[:MAX_TRACE_CHARS]}")
        return "\n".join(lines)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of text")
    return value
