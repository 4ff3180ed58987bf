"""Which steps broke a BFCL episode: injected faults are found where they were put, detours are not named."""

import random

import pytest

from hintsd_jax.envs.base import Action, ToolCall
from hintsd_jax.envs.bfcl.env import Bfcl
from hintsd_jax.envs.bfcl.execute import tool_docs
from hintsd_jax.envs.bfcl.faults import FaultSearch, PlayedCall, PlayedTurn
from tests.bfcl_helpers import DONE, action_of, answer_of, call, entry_of, play, task_of, tasks

KINDS = ("dropped call", "wrong argument", "wrong tool", "wrong order", "early stop")


def other(value):
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x" if isinstance(value, str) else None


def injected(kind, task, rng):
    """(answer, step of the fault) where one call a step is made, or None where the drawn place does not take this kind
    of fault.
    """
    answer = answer_of(task)
    turn = rng.choice([index for index, calls in enumerate(answer) if calls])
    calls = answer[turn]
    at = rng.randrange(len(calls))
    step = sum(len(calls) + 1 for calls in answer[:turn]) + at + 1
    match kind:
        case "dropped call":
            del calls[at]
        case "early stop":
            del calls[at:]
        case "wrong argument" if calls[at].arguments:
            key = rng.choice(list(calls[at].arguments))
            calls[at] = ToolCall(calls[at].name, calls[at].arguments | {key: other(calls[at].arguments[key])})
        case "wrong tool":
            docs = [doc for name in entry_of(task)["involved_classes"] for doc in tool_docs(name)]
            doc = rng.choice([doc for doc in docs if doc["name"] != calls[at].name])
            calls[at] = ToolCall(
                doc["name"], {key: rng.choice([1, "x", ["a"], True]) for key in doc["parameters"]["properties"]}
            )
        case "wrong order" if at + 1 < len(calls):
            calls[at : at + 2] = calls[at + 1], calls[at]
        case _:
            return None
    return answer, step


@pytest.mark.parametrize("kind", KINDS)
def test_an_injected_fault_is_found_at_its_step(kind):
    rng, right, wrong = random.Random(0), 0, []
    for task in tasks()[:: 2 if kind == "wrong order" else 10]:
        drawn = injected(kind, task, rng)
        if drawn is None or max(map(len, drawn[0])) > 20:
            continue
        environment, last, _ = play(task, drawn[0], one_call_a_step=True)
        if last.reward:
            continue  # it made no difference
        if [fault.step for fault in environment.report().faults] == [drawn[1]]:
            right += 1
        else:
            wrong.append((task["id"], drawn[1], environment.report()))
    # a wrong tool can by chance be another call of the turn
    assert right >= 40 and len(wrong) <= (kind == "wrong tool"), wrong


def faults_of(task, answer, **options):
    environment, last, _ = play(task, answer, Bfcl(**options), one_call_a_step=True)
    assert last.reward == 0
    return [(fault.step, fault.feedback) for fault in environment.report().faults]


@pytest.fixture
def task():
    """One whose first user turn is cd, mkdir, mv."""
    first = task_of("base", 0)
    names = [[call.name for call in calls] for calls in answer_of(first)]
    assert names == [["cd", "mkdir", "mv"], ["cd", "grep"], ["sort"], ["cd", "mv", "cd", "diff"]]
    return first


def test_words_say_what_was_wrong_and_values_only_on_request(task):
    wrong = answer_of(task)
    wrong[0][1] = call("mkdir", dir_name="tmp")
    assert faults_of(task, wrong) == [(2, "mkdir was called with a wrong value for dir_name.")]
    assert faults_of(task | {"split": "train"}, wrong, ground_truth_in_report=True) == [
        (2, "mkdir was called with a wrong value for dir_name. Expected: mkdir(dir_name='temp').")
    ]
    for asked, options in (
        (task | {"split": "test"}, {"ground_truth_in_report": True}),
        (task | {"split": "train"}, {}),
    ):
        environment, _, _ = play(asked, wrong, Bfcl(**options))
        assert "temp'" not in environment.report().summary and "xpected" not in environment.report().summary
    wrong[0][1] = call("mkdir", directory="temp")
    assert faults_of(task, wrong) == [(2, "mkdir was called without dir_name, with directory, which it does not take.")]
    wrong[0][1] = call("touch", file_name="temp")
    assert faults_of(task, wrong) == [(2, "touch was called where mkdir was needed.")]
    del wrong[0][1]
    assert faults_of(task, wrong) == [(2, "Before this there should be a call of mkdir.")]
    del wrong[0][1]
    ended = "The user turn was ended without a call of"
    assert faults_of(task, wrong)[-1] == (2, f"{ended} mkdir. {ended} mv.")
    late = answer_of(task)
    late[0] = [late[0][0], late[0][2], late[0][1]]
    assert faults_of(task, late) in ([(2, "mv was called too early.")], [(2, "mkdir was called too late.")])
    extra = answer_of(task)
    extra[0].append(call("touch", file_name="more"))
    assert faults_of(task, extra) == [(4, "touch should not have been called here.")]


def test_reads_and_failed_attempts_are_not_named_beside_what_explains_the_failure(task):
    answer = answer_of(task)
    looks = [call("ls"), call("pwd"), call("mkdir", wrong=1), call("tail", file_name="no")]
    answer[0] = [
        looks[0],
        looks[1],
        answer[0][0],
        looks[2],
        looks[3],
        call("mkdir", dir_name="tmp"),
        looks[0],
        answer[0][2],
    ]
    assert faults_of(task, answer) == [(6, "mkdir was called with a wrong value for dir_name.")]
    answer[0][5] = call("mkdir", dir_name="temp")
    assert play(task, answer, one_call_a_step=True)[1].reward == 1.0


def test_all_faults_of_the_failing_turn_are_named_and_those_after_it_are_not(task):
    answer = answer_of(task)
    answer[0][1] = call("mkdir", dir_name="tmp")
    answer[0].append(call("touch", file_name="more"))
    answer[2].clear()
    assert [step for step, _ in faults_of(task, answer)] == [2, 4]


def test_a_fault_in_a_turn_that_is_not_judged_is_found_from_the_next_one():
    """Where the ground truth of a user turn is empty the benchmark looks at the state one turn later."""
    files = [task for task in tasks("miss_param") if "GorillaFileSystem" in entry_of(task)["involved_classes"]]
    task = next(task for task in files if not answer_of(task)[0])
    answer = answer_of(task)
    answer[0] = [call("pwd"), call("touch", file_name="not_asked_for")]
    environment, _, _ = play(task, answer, one_call_a_step=True)
    report = environment.report()
    assert [fault.step for fault in report.faults] == [2] and report.valid_turns[:2] == (True, False)


def test_several_calls_in_one_step_make_one_fault_of_that_step(task):
    answer = answer_of(task)
    answer[0] = [answer[0][0], call("mkdir", dir_name="tmp"), call("mv", source="x", destination="tmp")]
    environment, _, _ = play(task, answer)
    (fault,) = environment.report().faults
    assert fault.step == 1 and fault.feedback.count("wrong value") == 2


def test_long_detours_end_the_search_in_time(task):
    environment = Bfcl()
    environment.reset(task)
    for number in range(20):
        environment.step(action_of(*[call("touch", file_name=f"{number}_{other}") for other in range(15)]))
    environment.step(Action(DONE))
    report = environment.report()
    assert 1 <= len(report.faults) <= 21 and report.faults[-1].step <= 21


def test_a_search_without_anything_to_mend_names_nothing(task):
    entry, answer = entry_of(task), answer_of(task)
    environment = Bfcl()
    environment.reset(task)
    turns = [PlayedTurn(tuple(PlayedCall(1, call, "") for call in calls), 1) for calls in answer]
    ground_truth = [
        [f"{c.name}({', '.join(f'{k}={v!r}' for k, v in c.arguments.items())})" for c in calls] for calls in answer
    ]
    assert entry["id"] and FaultSearch(environment._new_backends, turns, ground_truth, failing=0).faulty_steps() == []
