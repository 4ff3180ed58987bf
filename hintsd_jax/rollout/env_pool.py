# SPDX-License-Identifier: Apache-2.0

"""Environment calls beside the host loop: slots in which one episode is played after the other, with a time limit for
every call.

`EnvPool.step(slot, action)` starts a call and returns a `Call`; `Call.result()` waits for it and gives the value,
checked by `envs.protocol`, or a `CallFailure`.

Invariants: no environment can end or hang the run (see `rollout.env_host`). An episode has an environment of its own,
made at its "reset" once the slot's last one is closed, so that nothing of one episode is left for another.

Resets run ahead of need: of the episodes that are announced, the next few are reset before a slot is free for them, so
that an episode finds its world open. What an episode is does not depend on it: a reset reads the task alone.

A time-out and the death of a process are the results that depend on the clock and the machine. With a journal they are
written down before anybody sees them; where one is there already, because a run that was killed does a step again, the
call fails at once and the environment is not called.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from hintsd_jax.envs.base import Action, Report, Start, StepResult
from hintsd_jax.rollout.env_call import Call, CallFailure
from hintsd_jax.rollout.env_host import Host, Worker

Key = tuple[str | int, ...]


class CallJournal(Protocol):
    """Where time-outs and deaths are kept, so that a step that is done again has the same ones (see
    `runs.journal.Journal`).
    """

    def get(self, *key: str | int) -> Any:
        """The JSON value under a key, or None."""

    def put(self, *key: str | int, value: Any) -> None:
        """Keeps a JSON value under a new key; on return it is on disk."""


class EnvPool:
    """`size` slots, one environment each; every call under the same limit in seconds, counted from when a worker begins
    it.

    `journal` keeps time-outs and deaths under `(*key, call)`, where `key` is that of the slot's last "reset", and the
    call is "reset", "step 1", "step 2", ..., "report" or "close": the keys must tell the episodes apart.

    `ahead` episodes of those announced have an environment before they have a slot: `size + ahead` exist at most.

    Call `close()` at the end, or use the pool in a `with` statement; the host is its owner's to close.

    Raises ValueError for a size below 1, a limit that is not positive, or less than none ahead.
    """

    def __init__(self, host: Host, size: int, limit_seconds: float, journal: CallJournal | None = None, ahead: int = 0):
        if size < 1 or not limit_seconds > 0 or ahead < 0:
            raise ValueError(f"a pool of {size} environments, {ahead} ahead, with a limit of {limit_seconds} s")
        self._host, self._limit, self._journal = host, float(limit_seconds), journal
        self._workers: list[Worker | None] = [None] * size
        self._keys: list[Key] = [()] * size
        self._steps = [0] * size
        self._closings: list[Call] = []  # of environments whose episode is over
        self._most_ahead = ahead
        self._announced: deque[tuple[Mapping[str, Any], Key]] = deque()
        self._ahead: dict[Key, tuple[Worker, Call[Start]]] = {}  # reset, or in their reset, without a slot

    def announce(self, task: Mapping[str, Any], key: Key) -> None:
        """Says of an episode that it will be reset, in the order of the calls, with a key that no other has. Nothing
        begins here: the first `reset` looks ahead.
        """
        if self._most_ahead:
            self._announced.append((task, key))

    def reset(self, slot: int, task: Mapping[str, Any], key: Key = ()) -> Call[Start]:
        """Begins an episode on a slot, in an environment of its own. `key` is the episode's, for the journal.

        Raises:
          ValueError: a call of this slot is still running.
          UserError: the host can make no more environments.
        """
        before = self._workers[slot]
        closing = None
        if before is not None and before.busy:
            raise ValueError(f"reset on slot {slot} while a call of it is running")
        if before is not None and before.usable:
            closing = before.submit(self._call(self._keys[slot], "close", "close"))
            self._closings.append(closing)
        worker, call = self._ahead.pop(key, None) or self._begin(task, key, f"env-{slot}", closing)
        self._workers[slot], self._keys[slot], self._steps[slot] = worker, key, 0
        while self._announced and len(self._ahead) < self._most_ahead:
            coming, its_key = self._announced.popleft()
            if its_key != key:
                self._ahead[its_key] = self._begin(coming, its_key, "env-ahead", closing)
        return call

    def step(self, slot: int, action: Action) -> Call[StepResult]:
        """Applies an action on a slot.

        Raises:
          ValueError: the slot was not reset, or a call of it is still running.
        """
        worker = self._worker(slot, "step")
        self._steps[slot] += 1
        return worker.submit(self._call(self._keys[slot], f"step {self._steps[slot]}", "step", action))

    def report(self, slot: int) -> Call[Report]:
        """Asks for the report of a slot's episode. Raises as `step` does."""
        worker = self._worker(slot, "report")
        return worker.submit(self._call(self._keys[slot], "report", "report", steps=self._steps[slot]))

    def close(self) -> list[CallFailure]:
        """Closes, all at once, every environment that has not failed. One that is in a call is closed when that is
        over; nobody waits for it.

        Returns what failed in closing, that of earlier episodes too, to be counted. Blocks for one limit at most; the
        pool may be used again afterwards.
        """
        workers = [(key, worker) for key, worker in zip(self._keys, self._workers, strict=True) if worker is not None]
        workers += [(key, worker) for key, (worker, _) in self._ahead.items()]
        self._workers = [None] * len(self._workers)
        self._announced.clear()
        self._ahead = {}
        calls, self._closings = self._closings, []
        for key, worker in workers:
            if worker.busy:
                worker.give_up(self._call(key, "close", "close"))
            elif worker.usable:
                calls.append(worker.submit(self._call(key, "close", "close")))
        return [result for result in [call.result() for call in calls] if isinstance(result, CallFailure)]

    def _begin(self, task: Mapping[str, Any], key: Key, name: str, after: Call | None) -> tuple[Worker, Call[Start]]:
        """A new environment in its reset, which waits until `after` is over."""
        worker = self._host.worker(lambda call: self._begin_close(key), name)
        return worker, worker.submit(self._call(key, "reset", "reset", task), after)

    def _begin_close(self, key: Key) -> Call:
        call = self._call(key, "close", "close")
        self._closings.append(call)
        return call

    def _worker(self, slot: int, method: str) -> Worker:
        worker = self._workers[slot]
        if worker is None:
            raise ValueError(f"{method} on slot {slot} before its reset")
        return worker

    def _call(self, key: Key, name: str, method: str, *args: Any, steps: int = 0) -> Call:
        """A call of an episode; settled where the journal has a failure for it."""
        journal = self._journal
        if journal is None:
            return Call(method, args, self._limit, steps=steps)
        failure = journal.get(*key, name)
        if failure is None:
            note = lambda failure: journal.put(*key, name, value=asdict(failure))
            return Call(method, args, self._limit, note, steps)
        call = Call(method, args, self._limit)
        call.settle(CallFailure(**failure))
        return call

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
