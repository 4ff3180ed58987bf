"""The solver of Desk, and with it the truth about faults: an office and its task in, whether the goal can still be
reached and which calls are missing or surplus out.

The solver plays what is still missing, now and in later hours. Because nothing can be undone and every effect carries
its hour, it succeeds if and only if anything can. The true faulty step of a failed episode is the first step before
which the solver can still succeed and after which it cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.desk.office import CallError, Office


def reference_state(task: Mapping[str, Any]) -> dict:
    """The final state after the reference's calls: the goal."""
    office = Office.from_json(task["world"])
    for hour, request in enumerate(task["requests"]):
        office.hour = hour
        for tool, arguments in request["calls"]:
            office.call(tool, arguments)
    return office.final_state()


def can_succeed(office: Office, task: Mapping[str, Any], hour: int) -> bool:
    """Whether the goal can still be reached from `office` while request `hour` is open (`hour == len(requests)`: none
    is).
    """
    office = office.clone()
    for later in range(hour, len(task["requests"])):
        office.hour = later
        for tool, arguments in missing_calls(office, task, later):
            try:
                office.call(tool, arguments)
            except CallError:
                return False
    return office.final_state() == reference_state(task)


def missing_calls(office: Office, task: Mapping[str, Any], hour: int) -> list[list]:
    """The reference's calls of request `hour` that are not in the ledger yet."""
    done = Counter(repr([tool, args]) for at, tool, args, _ in office.ledger if at == hour)
    missing = []
    for tool, arguments in task["requests"][hour]["calls"]:
        if done[repr([tool, arguments])]:
            done[repr([tool, arguments])] -= 1
        else:
            missing.append([tool, arguments])
    return missing


def surplus_entries(office: Office, task: Mapping[str, Any], hour: int) -> list[list]:
    """The ledger's `[tool, arguments]` of that hour that the reference does not have: each is beyond repair."""
    expected = Counter(repr(call) for call in task["requests"][hour]["calls"])
    surplus = []
    for at, tool, arguments, _ in office.ledger:
        if at == hour:
            if expected[repr([tool, arguments])]:
                expected[repr([tool, arguments])] -= 1
            else:
                surplus.append([tool, arguments])
    return surplus


def possible_calls(office: Office, task: Mapping[str, Any], hour: int) -> list[list]:
    """The missing calls that the office would still accept: what an earlier fault made impossible is not this hour's
    fault.
    """
    possible = []
    for tool, arguments in missing_calls(office, task, hour):
        trial = office.clone()
        try:
            trial.call(tool, arguments)
        except CallError:
            continue
        possible.append([tool, arguments])
    return possible
