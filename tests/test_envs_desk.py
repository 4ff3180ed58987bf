"""Desk: its office, its tasks, and above all its truth about faults, against a solver that tries everything."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.base import CallError
from hintsd_jax.envs.desk import demonstrations as demos
from hintsd_jax.envs.desk import reference
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.kinds import DECISIONS, FAMILIES
from hintsd_jax.envs.desk.office import EFFECTS, LOOKUPS, PARAMETERS, Office, tool_docs
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.errors import UserError

SHAPES = [(1, 0), (1, 1), (2, 1), (4, 3), (5, 5), (9, 5), (16, 12)]


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
@given(st.integers(0, 10**6), st.sampled_from([shape for shape in SHAPES if shape[1]]), st.integers(0, 99))
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
@given(st.integers(0, 10**6), st.randoms(use_true_random=False), st.sampled_from([(4, 3), (6, 3)]))
def test_the_first_fault_is_where_the_solver_stops_succeeding(index, rng, shape):
    """Random play, wrong tools and arguments included: before the first fault the solver can succeed, after it it
    cannot.
    """
    task = generate_task(5, index, *shape)
    names = sorted(
        {value for request in task["requests"] for _, args in request["calls"] for value in args.values()} | {"nobody"}
    )
    env = Desk()
    env.reset(task)
    first, result, steps = None, None, 0
    wasted, answered = set(), set()
    planned = iter(demonstrated(task, index))
    while (result is None or not result.terminated) and steps < 25:
        if rng.random() < 0.7:
            text = next(planned, demos.REPLY)
        else:
            tool = rng.choice(sorted(PARAMETERS))
            text = demos.call_text(tool, {p: rng.choice(names) for p in PARAMETERS[tool]})
        could, hour = can_succeed(env.office, task, env.office.hour), env.office.hour
        result = env.step(parse_action(text))
        steps += 1
        answer = (hour, text, *(message["content"] for message in result.messages))
        looked_up = any(f'"{tool}"' in text for tool in LOOKUPS)
        if "Error" in answer[-1] or (looked_up and answer in answered):
            wasted.add(steps)
        answered.add(answer)
        if could and not can_succeed(env.office, task, env.office.hour):
            first = steps
    faults = env.report().faults
    if result.terminated:
        assert bool(faults) == (result.reward == 0.0)
    if first is not None:  # of a cut episode a step that was only wasted may come before it
        assert next(fault.step for fault in faults if fault.step not in wasted) == first
    assert not result.terminated or not wasted & {fault.step for fault in faults}
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


COPY_AND_TELL = {  # a decision, then two things to do
    "id": "by-hand",
    "world": {
        "listings": {"find_files": {"report": [["draft", "a"], ["final", "b"]]}},
        "files": {"a": "a", "b": "b"},
        "mails": ["m"],
        "slots": [],
        "events": [],
        "contacts": {},
    },
    "requests": [
        {
            "kind": "copy", "text": 'Copy "report" to "c", the final one.', "label": "final", "wrong": "a",
            "lookup": ["find_files", {"title": "report"}], "calls": [["copy_file", {"file": "b", "to": "c"}]],
        },
        {
            "kind": "tell", "text": 'Archive "m" and notify "p".', "label": None, "wrong": None, "lookup": None,
            "calls": [["archive_mail", {"mail": "m"}], ["notify", {"name": "p"}]],
        },
    ],
}  # fmt: skip
LOOK, COPY = (
    demos.call_text("find_files", {"title": "report"}),
    demos.call_text("copy_file", {"file": "b", "to": "c"}),
)
ERRS, ARCHIVE = demos.call_text("read_file", {"file": "nobody"}), demos.call_text("archive_mail", {"mail": "m"})
ON_ITS_WAY, GARBLED = demos.call_text("read_file", {"file": "b"}), "<tool_call>\n{</tool_call>"
COPY_IT, ARCHIVE_IT, NOTIFY = 'Call copy_file for "b".', 'Call archive_mail for "m".', 'Call notify for "p".'


@pytest.mark.parametrize(
    "actions, faults",
    [
        ([LOOK] * 5, [(2, COPY_IT)]),  # the first look-up is needed
        ([LOOK, ON_ITS_WAY, LOOK, LOOK], [(3, COPY_IT)]),
        ([ERRS, LOOK, ERRS, ERRS], [(1, COPY_IT)]),
        ([GARBLED, LOOK], [(1, COPY_IT)]),
        ([LOOK, ON_ITS_WAY], [(2, COPY_IT)]),  # nothing was wasted: the last step
        ([LOOK, COPY, "Done.", ERRS, ARCHIVE, ERRS], [(4, ARCHIVE_IT)]),  # what that step should have done
        ([LOOK, LOOK, COPY, "Done.", ARCHIVE], [(2, COPY_IT)]),  # the open request wasted none
        ([LOOK, COPY, LOOK, "Done.", ARCHIVE], [(3, "Say Done.")]),
        ([LOOK, COPY, "Done.", LOOK, LOOK], [(5, ARCHIVE_IT)]),  # in another request it is no repetition
        ([LOOK, COPY, "Done.", ARCHIVE], [(4, NOTIFY)]),
        ([LOOK, LOOK, "Done.", ARCHIVE, ERRS], [(3, COPY_IT), (5, NOTIFY)]),
        ([LOOK, LOOK, COPY, "Done.", ARCHIVE, demos.call_text("notify", {"name": "p"})], []),  # cut before its reply
        ([LOOK, LOOK, COPY, ERRS, "Done.", ARCHIVE, demos.call_text("notify", {"name": "p"}), "Done."], []),
    ],
)
def test_a_cut_episode_is_at_fault_where_it_wasted_steps(actions, faults):
    env, _ = play(COPY_AND_TELL, actions)
    assert [(fault.step, fault.feedback) for fault in env.report().faults] == faults


def test_the_relevant_tools_and_the_full_instructions_give_no_answer_away():
    used = set()
    for index in range(40):
        task = generate_task(10, index, 3, 2)
        start = Desk(instructions="full", tools="relevant", seed=0, length=3).reset(task)
        names = [tool["function"]["name"] for tool in start.tools]
        needed = {call[0] for request in task["requests"] for call in request["calls"]}
        needed |= {request["lookup"][0] for request in task["requests"] if request["lookup"]}
        assert set(names) == needed and names == [name for name in PARAMETERS if name in names]
        swapped = json.loads(json.dumps(task))
        for request in swapped["requests"]:  # the other candidate is meant: only the user's words may differ
            if request["wrong"]:
                key = DECISIONS[request["kind"]].family.choice
                arguments = request["calls"][0][1]
                arguments[key], request["wrong"] = request["wrong"], arguments[key]
        again = Desk(instructions="full", tools="relevant").reset(swapped)
        assert (again.messages, again.tools) == (start.messages, start.tools)
        used |= set(names)
        assert all(name in start.messages[0]["content"] for name in names if name in LOOKUPS)
    assert used == set(PARAMETERS)
    assert Desk().reset(task).tools == Desk(tools="all").reset(task).tools == tool_docs()
    assert Desk().reset(task).messages[0]["content"] == "You run an office. Do each request, then say Done."


@pytest.mark.parametrize("option, says", [({"instructions": "ful"}, "'full'"), ({"tools": "some"}, "relevant")])
def test_options_that_are_none_are_refused(tmp_path, option, says):
    for make in (lambda: Desk(**option), lambda: Desk.tasks("train", str(tmp_path), **option)):
        with pytest.raises(UserError, match=f"env.options.{next(iter(option))} = .* is unknown: .*{says}"):
            make()
    assert not list(tmp_path.iterdir())


def test_feedback_names_the_right_value():
    kinds = set()
    for index in range(120):
        task = generate_task(7, index, 8, 6)
        actions = demonstrated(task, index, error_scale=3.0)
        env, _ = play(task, actions)
        for fault in env.report().faults:
            action = actions[fault.step - 1]
            request = next((r for r in task["requests"] if r["wrong"] and f'"{r["wrong"]}"' in action), None)
            if request is None:
                assert action == demos.REPLY and fault.feedback.startswith('Call notify for "')
                kinds.add("tell")
            else:
                right = request["calls"][0][1][DECISIONS[request["kind"]].family.choice]
                assert fault.feedback == f'Use {request["label"]} "{right}".'
                kinds.add(request["kind"])
    assert kinds == {*DECISIONS, "tell"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_choice_shows_where_the_thing_is_used_later_and_is_one_fault(family):
    """What a follow-up's look-up shows, against what the choice was: the taken one, or of two the one that is left."""
    seen = 0
    for index in range(60):
        task = generate_task(12, index, 8, 4)
        for later, request in enumerate(task["requests"]):
            thing = request["lookup"] and next(iter(request["lookup"][1].values()))
            choices = [
                (hour, each)
                for hour, each in enumerate(task["requests"][:later])
                if each["label"] and DECISIONS[each["kind"]].family is FAMILIES[family]
            ]
            if request["kind"] != f"check_{family}":
                continue
            (hour, choice), *_ = [each for each in choices if f'"{thing}"' in each[1]["text"]]
            steps = [demos.reference_steps(each) for each in task["requests"]]
            right, number = [[step.right for step in part] for part in steps], sum(map(len, steps[:hour])) + 2
            wrong = [*right[:hour], [right[hour][0], steps[hour][1].wrong, demos.REPLY], *right[hour + 1 :]]
            other = next(label for label in DECISIONS[choice["kind"]].labels if label != choice["label"])
            for parts, taken, faults in ((right, choice["label"], []), (wrong, other, [number])):
                env, result = play(task, [text for part in parts[:later] for text in part])
                shown = env.step(parse_action(right[later][0])).messages[0]["content"]
                left = family in ("delete", "cancel")
                expected = next(e for e in (choice["label"], other) if e != taken) if left else taken
                assert shown.startswith(f'Found {expected} "') and shown.count('"') == 2
                for text in [*right[later][1:], *(text for part in right[later + 1 :] for text in part)]:
                    result = env.step(parse_action(text))
                    assert not any("Error" in message["content"] for message in result.messages)
                assert [fault.step for fault in env.report().faults] == faults
                assert result.terminated and result.reward == float(not faults)
            seen += 1
    assert seen >= 3


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
