# SPDX-License-Identifier: Apache-2.0

"""An office against its task's reference: an office and a request in; the goal, and the calls that are missing,
possible or surplus, out.

Nothing can be undone and every effect carries its hour. So the goal can be reached as long as no hour has a surplus
call and the office still accepts what is missing, and the true faulty step of a failed episode is the first one after
which that is no longer so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.base import CallError
from hintsd_jax.envs.desk.office import Office


def office_before(task: Mapping[str, Any], hour: int) -> Office:
    """The office when request `hour` comes, after the reference's earlier calls."""
    office = Office.from_json(task["world"])
    for earlier, request in enumerate(task["requests"][:hour]):
        office.hour = earlier
        for tool, arguments in request["calls"]:
            office.call(tool, arguments)
    office.hour = hour
    return office


def goal_state(task: Mapping[str, Any]) -> dict:
    """The final state after all calls of the reference."""
    return office_before(task, len(task["requests"])).final_state()


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


def surplus_calls(office: Office, task: Mapping[str, Any], hour: int) -> list[list]:
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
