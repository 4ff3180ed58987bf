"""Desk: its office, its tasks, and above all its truth about faults, against a solver that tries everything."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.desk import demonstrations as demos
from hintsd_jax.envs.desk import reference
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.generator import DECISIONS, MAX_LENGTH, generate_task
from hintsd_jax.envs.desk.office import EFFECTS, LOOKUPS, PARAMETERS, CallError, Office, tool_docs
from hintsd_jax.envs.tool_calls import parse_action

SHAPES = [(1, 0), (1, 1), (2, 1), (3, 2), (4, 3), (5, 5), (6, 4), (MAX_LENGTH, len(DECISIONS))]


def play(task, actions):
    """The environment after the given action texts, and the last `StepResult`."""
    env = Desk()
    env.reset(task)
    result = None
    for text in actions:
        result = env.step(parse_action(text))
    return env, result


def demonstrated(task, seed, error_scale=1.0):
    actions = []

    def on_step(step, mistake):
        actions.append(mistake or step.right)
        return actions[-1]

    demos.demonstrate(task, random.Random(seed), on_step, error_scale)
    return actions


def can_succeed(office, task, hour):
    """Whether the goal can still be reached while request `hour` is open (`hour == len(requests)`: none is), by playing
    what is missing, now and in later hours.
    """
    office = office.clone()
    for later in range(hour, len(task["requests"])):
        office.hour = later
        for tool, arguments in reference.missing_calls(office, task, later):
            try:
                office.call(tool, arguments)
            except CallError:
                return False
    return office.final_state() == reference.goal_state(task)


def test_there_are_enough_tools_and_each_is_documented():
    assert len(PARAMETERS) >= 12 and len(LOOKUPS) and len(EFFECTS)
    documented = {doc["function"]["name"]: tuple(doc["function"]["parameters"]["required"]) for doc in tool_docs()}
    assert documented == PARAMETERS


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES))
def test_the_reference_succeeds_and_leaves_no_fault(index, shape):
    task = generate_task(3, index, *shape)
    assert json.loads(json.dumps(task)) == task == generate_task(3, index, *shape)
    env, result = play(task, demonstrated(task, 0, error_scale=0.0))
    assert result.terminated and result.reward == 1.0
    assert env.report().faults == ()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES[1:]), st.integers(0, 99))
def test_mistakes_are_silent_and_break_the_outcome(index, shape, seed):
    task = generate_task(4, index, *shape)
    actions = demonstrated(task, seed, error_scale=1.3)
    env = Desk()
    env.reset(task)
    for text in actions:
        result = env.step(parse_action(text))
        assert not any("Error" in message["content"] for message in result.messages)  # nothing shows at its step
    choices = [step for request in task["requests"] for step in demos.reference_steps(request) if step.wrong]
    wrong = any(step.wrong in actions and step.wrong != demos.REPLY for step in choices)
    forgot = any(
        request["kind"] == "tell" and demos.call_text(*request["calls"][1]) not in actions
        for request in task["requests"]
    )
    assert result.reward == float(not (wrong or forgot))
    assert bool(env.report().faults) == (wrong or forgot)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_the_first_fault_is_where_the_solver_stops_succeeding(index, rng):
    """Random play, wrong tools and arguments included: before the first fault the solver can succeed, after it it
    cannot.
    """
    task = generate_task(5, index, 4, 3)
    names = sorted(
        {value for request in task["requests"] for _, args in request["calls"] for value in args.values()} | {"nobody"}
    )
    env = Desk()
    env.reset(task)
    first, result, steps = None, None, 0
    planned = iter(demonstrated(task, index))
    while (result is None or not result.terminated) and steps < 25:
        if rng.random() < 0.7:
            text = next(planned, demos.REPLY)
        else:
            tool = rng.choice(sorted(PARAMETERS))
            text = demos.call_text(tool, {p: rng.choice(names) for p in PARAMETERS[tool]})
        could = can_succeed(env.office, task, env.office.hour)
        result = env.step(parse_action(text))
        steps += 1
        if could and not can_succeed(env.office, task, env.office.hour):
            first = steps
    faults = env.report().faults
    if result.terminated:
        assert bool(faults) == (result.reward == 0.0)
    if first is not None:
        assert faults[0].step == first
    assert [fault.step for fault in faults] == sorted({fault.step for fault in faults})


def test_the_solver_agrees_with_trying_everything():
    """On small tasks: breadth-first search over every effect with every name that occurs, up to the end of the task."""

    def search(office, task, hour):
        if hour == len(task["requests"]):
            return office.final_state() == reference.goal_state(task)
        names = sorted({v for request in task["requests"] for _, a in request["calls"] for v in a.values()})
        options = [None]
        for tool, parameters in EFFECTS.items():
            if any(tool == call[0] for request in task["requests"] for call in request["calls"]):
                options += [
                    (tool, dict(zip(parameters, values))) for values in itertools.product(names, repeat=len(parameters))
                ]
        for count in (0, 1, 2):  # no request needs more than two effects
            for calls in itertools.product(options[1:], repeat=count):
                trial = office.clone()
                trial.hour = hour
                try:
                    for tool, arguments in calls:
                        trial.call(tool, arguments)
                except CallError:
                    continue
                if search(trial, task, hour + 1):
                    return True
        return False

    answers = set()
    for index in range(12):
        task = generate_task(6, index, 1, index % 2)
        tool, arguments = task["requests"][0]["calls"][0]
        for start in (
            [],
            [[tool, arguments]],
            [[tool, arguments | {next(iter(arguments)): task["requests"][0]["wrong"] or "x"}]],
        ):
            office = Office.from_json(task["world"])
            try:
                for call in start:
                    office.call(*call)
            except CallError:
                continue
            answer = can_succeed(office, task, 0)
            assert answer == search(office, task, 0)
            answers.add(answer)
    assert answers == {True, False}


def test_feedback_names_the_right_value():
    kinds = set()
    for index in range(200):
        task = generate_task(7, index, 4, 3)
        actions = demonstrated(task, index)
        env, _ = play(task, actions)
        for fault in env.report().faults:
            action = actions[fault.step - 1]
            request = next((r for r in task["requests"] if r["wrong"] and f'"{r["wrong"]}"' in action), None)
            if request is None:
                assert action == demos.REPLY and fault.feedback.startswith('Call notify for "')
                kinds.add("tell")
            else:
                right = request["calls"][0][1][DECISIONS[request["kind"]].choice]
                assert fault.feedback == f'Use {request["label"]} "{right}".'
                kinds.add(request["kind"])
    assert kinds == {*DECISIONS, "tell"}


@pytest.mark.parametrize(
    "text, observation",
    [
        (demos.call_text("fly_away", {"to": "x"}), "Error: no tool 'fly_away'."),
        (demos.call_text("delete_file", {"file": "nobody"}), "Error: no such file."),
        (demos.call_text("delete_file", {"name": "nobody"}), "Error: delete_file takes file."),
        (demos.call_text("delete_file", {"file": 7}), "Error: delete_file takes strings."),
    ],
)
def test_a_wrong_call_is_answered_and_changes_nothing(text, observation):
    task = generate_task(8, 0)
    env = Desk()
    env.reset(task)
    before = env.office.to_json()
    assert env.step(parse_action(text)).messages[0]["content"] == observation
    assert env.office.to_json() == before
    assert env.step(parse_action("<tool_call>\nnot json\n</tool_call>")).messages[0]["content"].startswith("Error: ")


def test_reviews_of_any_play_name_the_reported_faults():
    for index in range(100):
        task = generate_task(9, index)
        actions = demonstrated(task, index)
        lines, faults = demos.review(task, actions)
        assert len(lines) == len(actions)
        assert [n for n, line in enumerate(lines, 1) if line.endswith("bad")] == [fault.step for fault in faults]
        assert all(line.startswith(f"#{n} ") for n, line in enumerate(lines, 1))
