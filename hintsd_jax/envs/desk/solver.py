"""The solver of Desk and, by it, the truth about faults.

The solver plays what is still missing, now and in later hours. Because nothing can be undone and every effect carries
its hour, it succeeds if and only if anything can. The true faulty step of a failed episode is the first step before
which the solver can still succeed and after which it cannot.
"""

from __future__ import annotations

from collections import Counter

from hintsd_jax.envs.desk.world import CallError, World


def reference_state(task: dict) -> dict:
    """The final state after the reference's calls: the goal."""
    world = World.from_json(task["world"])
    for hour, request in enumerate(task["requests"]):
        world.hour = hour
        for tool, arguments in request["calls"]:
            world.call(tool, arguments)
    return world.final_state()


def can_succeed(world: World, task: dict, hour: int) -> bool:
    """Whether the goal can still be reached from `world` while request `hour` is open (`hour == len(requests)`: none
    is).
    """
    world = world.clone()
    for later in range(hour, len(task["requests"])):
        world.hour = later
        for tool, arguments in missing_calls(world, task, later):
            try:
                world.call(tool, arguments)
            except CallError:
                return False
    return world.final_state() == reference_state(task)


def missing_calls(world: World, task: dict, hour: int) -> list[list]:
    """The reference's calls of request `hour` that are not in the ledger yet."""
    done = Counter(repr([tool, args]) for at, tool, args, _ in world.ledger if at == hour)
    missing = []
    for tool, arguments in task["requests"][hour]["calls"]:
        if done[repr([tool, arguments])]:
            done[repr([tool, arguments])] -= 1
        else:
            missing.append([tool, arguments])
    return missing


def surplus_entries(world: World, task: dict, hour: int) -> list[list]:
    """The ledger's `[tool, arguments]` of that hour which the reference does not hold: each is beyond repair."""
    wanted = Counter(repr(call) for call in task["requests"][hour]["calls"])
    surplus = []
    for at, tool, arguments, _ in world.ledger:
        if at == hour:
            if wanted[repr([tool, arguments])]:
                wanted[repr([tool, arguments])] -= 1
            else:
                surplus.append([tool, arguments])
    return surplus


def possible_calls(world: World, task: dict, hour: int) -> list[list]:
    """The missing calls that the office would still accept: what an earlier fault made impossible is not this hour's
    fault.
    """
    possible = []
    for tool, arguments in missing_calls(world, task, hour):
        trial = world.clone()
        try:
            trial.call(tool, arguments)
        except CallError:
            continue
        possible.append([tool, arguments])
    return possible
