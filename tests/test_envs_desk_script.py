"""Scripts of Desk tasks: the reference succeeds, a fault is what it says, where it says, and the only one, from its
seed alone.
"""

import random

import pytest

from hintsd_jax.envs.desk import Desk, script
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.tool_calls import parse_action

TASKS = [*(generate_task(5, index) for index in range(10)), *(generate_task(5, n, 8, 6) for n in range(50))]
HARMLESS = ("wrong_order",)  # within one request the order does not count


def play(task, actions):
    """(the environment, its last `StepResult`, the observations)."""
    desk, observations = Desk(), []
    desk.reset(task)
    for action in actions:
        result = desk.step(parse_action(action))
        observations.append([message["content"] for message in result.messages])
    return desk, result, observations


def test_the_reference_succeeds():
    for task in TASKS:
        played = script.ground_truth(task)
        desk, result, observations = play(task, played.actions)
        assert result.terminated and result.reward == 1.0 and desk.report().faults == ()
        assert (played.fault, played.step) == ("", 0)
        assert not any("Error" in text for texts in observations for text in texts)


@pytest.mark.parametrize("fault", script.FAULTS)
def test_a_fault_is_the_only_one_and_stands_where_it_says(fault):
    """The office's own report, which follows from the state alone, is the oracle."""
    count = 0
    for task in TASKS:
        right = script.ground_truth(task).actions
        for site in script.sites(task, fault):
            faulty = script.with_fault(task, fault, 0, site)
            differing = [n for n, (a, b) in enumerate(zip(right, faulty.actions), 1) if a != b]
            assert faulty.step == differing[0] and faulty.fault == fault
            desk, result, observations = play(task, faulty.actions)
            assert result.terminated and desk.office.hour == len(task["requests"])
            outcome = (result.reward, [fault.step for fault in desk.report().faults])
            expected = (1.0, []) if fault in HARMLESS else (0.0, [faulty.step])
            assert outcome == expected, (task["id"], site)
            assert not any("Error" in text for text in observations[faulty.step - 1]), (
                "a fault shows nothing at its step"
            )
            count += 1
    assert count >= 5


def test_a_fault_follows_from_task_kind_and_seed():
    for fault in script.FAULTS:
        known = [task for task in TASKS if script.sites(task, fault)]
        assert known and all(script.with_fault(task, fault, 3) == script.with_fault(task, fault, 3) for task in known)
        assert all(script.with_fault(task, fault, 0) is None for task in TASKS if task not in known)
    drawn = {script.with_fault(TASKS[0], "wrong_argument", seed) for seed in range(12)}
    assert len(drawn) > 3


def test_several_faults_stand_where_they_say():
    found = 0
    for task in TASKS[10:]:
        rng = random.Random(task["id"])
        drawn = {}
        for fault in rng.sample(sorted({**script.CHOICES, **script.OTHER_FAULTS}), 8):
            for site in script.sites(task, fault)[:1]:
                drawn.setdefault(site[0], (fault, site))
        actions, steps = script.with_faults(task, list(drawn.values()), rng)
        desk, result, _ = play(task, actions)
        reported = [fault.step for fault in desk.report().faults]
        # another argument or tool may use up what a later request needs: nothing can go wrong there any more
        sure = not {"wrong_argument", "wrong_tool"} & {fault for fault, _ in drawn.values()}
        assert (
            reported[:1] == sorted(steps)[:1]
            and set(reported) <= set(steps)
            and (not sure or len(reported) == len(steps))
        )
        assert result.terminated and result.reward == float(not steps)
        found += len(steps) > 1
    assert found > 20
    with pytest.raises(ValueError, match="two faults in one request"):
        script.with_faults(TASKS[0], [("early_stop", (3, 0))] * 2, random.Random(0))
    with pytest.raises(ValueError, match="no place for 'early_stop'"):
        script.with_faults(TASKS[0], [("early_stop", (2, 0))], random.Random(0))


def test_kinds_of_sites():
    task = next(task for task in TASKS if {"copy", "tell"} <= {request["kind"] for request in task["requests"]})
    hours = [request["kind"] for request in task["requests"]]
    assert script.sites(task, "wrong_copy") == [(hours.index("copy"), 1)]
    assert script.sites(task, "forgotten_call") == [(hours.index("tell"), 1)]
    assert script.sites(task, "wrong_order") == [(hours.index("tell"), 0)]
    assert script.sites(task, "early_stop") == [(len(hours) - 1, 0)]
    assert [hour for hour, _ in script.sites(task, "dropped_call")] == [
        hour for hour, kind in enumerate(hours) if kind != "tell"
    ]
    absent = next(kind for kind in DECISIONS if kind not in hours)
    assert script.sites(task, f"wrong_{absent}") == [] and script.with_fault(task, f"wrong_{absent}", 0) is None
    with pytest.raises(ValueError, match="no fault"):
        script.sites(task, "laziness")
    with pytest.raises(ValueError, match="no place"):
        script.with_fault(task, "wrong_copy", 0, (hours.index("tell"), 0))
