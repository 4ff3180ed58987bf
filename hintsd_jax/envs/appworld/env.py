# SPDX-License-Identifier: Apache-2.0

"""AppWorld as an environment: a task and actions that are code in, outputs and the benchmark's own tests at the end.

This is the client only. A world lives in a worker, a process of AppWorld's own virtual environment, one for each
environment object, where the model's code runs behind fences; another process, which never runs such code, grades.

Invariants: nothing of the ground truth reaches the agent, and no reward before the task is completed. Whatever a worker
does, it ends this episode at most: it is killed as soon as a call of it fails, when the episode is closed, and when the
object is given up. Every answer is checked before it is believed.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from hintsd_jax.envs.appworld.client import WorkerFailed
from hintsd_jax.envs.appworld.options import Options
from hintsd_jax.envs.appworld.prompt import first_messages, output_message, problem_message
from hintsd_jax.envs.appworld.score import Grading
from hintsd_jax.envs.appworld.tasks import TEST_SPLITS, TRAIN, appworld_tasks
from hintsd_jax.envs.appworld.workers import Worker, Workers
from hintsd_jax.envs.base import Action, Report, Start, StepResult

VERSION = "0.1.3.post1"
ASK_S = 20.0  # seconds for what takes milliseconds
GRACE_S = 10.0  # for the engine to end code by itself, before its worker is given up

_workers: dict[tuple, Workers] = {}
_making = threading.Lock()


def shared_workers(options: Options) -> Workers:
    """The one `Workers` of this process with these options, running.

    Raises:
      UserError: as `Workers.warm`.
    """
    limits = {"require_fences": options.require_fences, "cell_memory_mib": options.memory_mib}
    limits["cell_seconds"] = max(1, int(options.cell_timeout_s))
    limits["quote_failures"] = options.quote_failures
    key = (options.python, options.root, *limits.values())
    with _making:
        if key not in _workers:
            _workers[key] = Workers(os.path.expanduser(options.python), os.path.expanduser(options.root), limits)
            atexit.register(_workers[key].stop)
    _workers[key].warm()
    return _workers[key]


class AppWorld:
    """One AppWorld episode at a time; see the module docstring. Options: `Options`.

    private_texts, aggregate_splits: what the benchmark's licence asks of records (`hintsd_jax.privacy`).
    """

    isolation = "thread"  # the worlds are in processes of their own already
    action_style = "code"
    private_texts = True
    aggregate_splits = TEST_SPLITS
    version = f"appworld {VERSION}"
    benchmark_name = "AppWorld, whose agents write Python code against the APIs of apps"
    kinds_of_mistake = (
        "an API that was called before its documentation was read",
        "wrong arguments or a wrong account",
        "only the first page of a list",
        "a guessed value in place of one that was looked up",
        "a condition of the task that was left out",
        "a change that nobody asked for",
        "the same failing code again",
        "completing the task too early, or with a wrong answer",
    )

    def __init__(self, **options: Any):
        self._options = Options.parse(options)
        self._worker: Worker | None = None
        self._grading: Grading | None = None
        self._release = lambda: None

    @classmethod
    def tasks(cls, split: str, data_dir: str, /, **options: Any) -> Sequence[Mapping[str, Any]]:
        """The tasks of "train", "dev", "test_normal" or "test_challenge".

        Raises:
          UserError: as `appworld_tasks`; or the engine cannot start.
        """
        parsed = Options.parse(options)
        tasks = appworld_tasks(split, data_dir, parsed.root)
        shared_workers(parsed)  # so that what the machine does not allow is said before the first episode
        return tasks

    def reset(self, task: Mapping[str, Any]) -> Start:
        """Opens the task's world in a new worker."""
        self._task_id, self._split, self._completed = task["id"], task["split"], False
        self._workers = shared_workers(self._options)
        try:
            worker = self._worker = self._workers.start(self._task_id)
            self._release = weakref.finalize(self, worker.kill)  # should nobody close this object
            started = worker.task
            if not isinstance(started, dict) or started.get("task_id") != self._task_id:
                raise WorkerFailed("/initialize: another task was opened")
            return Start(first_messages(started))
        except BaseException:
            self.close()
            raise

    def step(self, action: Action) -> StepResult:
        """Runs an action's code; an action without is told so, and nothing is run."""
        if action.code is None:
            return StepResult((problem_message(action.problem or "there is no code"),))
        try:
            output = self._ask("/execute", self._options.cell_timeout_s + GRACE_S, code=action.code)
            if not isinstance(output, str):
                self._unexpected("/execute", output)
            completed = self._ask("/task_completed", ASK_S)
            if not isinstance(completed, bool):
                self._unexpected("/task_completed", completed)
            observation = (output_message(output, self._options.max_observation_chars),)
            if not completed:
                return StepResult(observation)
            self._completed = True
            return StepResult(observation, self._grade().reward(self._options.reward), terminated=True)
        except BaseException:
            self.close()
            raise

    def report(self) -> Report:
        """PRIVILEGED. Which tests failed, in the benchmark's plain words; of an episode that did not complete its task,
        as things stood at its end. It does not say which steps were wrong.
        """
        try:
            traces = self._options.traces_in_report and self._split == TRAIN
            return Report(self._grade().summary(self._task_id, self._split, self._completed, traces))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the worker."""
        self._release()
        self._worker = None

    def _ask(self, path: str, deadline_s: float, **body: Any) -> Any:
        if self._worker is None:
            raise WorkerFailed(f"{path}: the worker is gone")
        return self._worker.request(path, {"task_id": self._task_id, **body}, deadline_s)

    def _grade(self) -> Grading:
        """Once an episode: grading may change the world."""
        if self._grading is None:
            if self._worker is None:
                raise WorkerFailed("the worker is gone, so that nothing can be graded")
            graded = self._workers.grade(self._worker, self._task_id)
            if not isinstance(graded, dict) or graded.get("task_id") != self._task_id:
                raise WorkerFailed("/evaluate: another task was graded")
            self._grading = Grading.read(graded)
            self.close()
        return self._grading

    def _unexpected(self, path: str, output: Any) -> NoReturn:
        raise WorkerFailed(f"{path}: an answer of type {type(output).__name__}")
