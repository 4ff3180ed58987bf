# SPDX-License-Identifier: Apache-2.0

"""Grading: a process with the ground truth, which never runs a model's code. It reads the state that a world has saved,
and answers `/evaluate`.
"""

from __future__ import annotations

from typing import Any

from appworld.evaluator import evaluate_task  # pyright: ignore[reportMissingImports] - the second environment has it


def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the tests of a task say: task_id, success, difficulty, num_tests, passes, failures.

    Raises:
      Exception: whatever is wrong with the request.
    """
    if path != "/evaluate":
        raise ValueError(f"no endpoint {path}")
    tracker = evaluate_task(body["task_id"], body["experiment_name"], suppress_errors=True, save_report=False)
    return {"task_id": body["task_id"], **tracker.to_dict(stats_only=False)}
