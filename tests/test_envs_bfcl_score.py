"""BFCL's scores are the benchmark's own: the ground truth passes everywhere, verdicts are the official checker's."""

import collections
import random

import pytest

from benchmarks.bfcl_agreement import Official, corrupted, random_answer, steps_of
from benchmarks.bfcl_agreement import play as play_steps
from hintsd_jax.envs.bfcl.env import Bfcl
from hintsd_jax.envs.bfcl.execute import Backends
from hintsd_jax.envs.bfcl.score import _differences
from tests.bfcl_helpers import all_categories, answer_of, entry_of, play, tasks


def test_the_ground_truth_is_valid_in_all_800_tasks():
    assert len(tasks()) == 800 and {task["category"] for task in tasks()} == set(all_categories())
    for task in tasks():
        environment, last, turns = play(task)
        assert (last.reward, last.terminated, last.messages) == (1.0, True, ()), environment.report()
        assert all(turn.reward == 0 and not turn.terminated and turn.messages for turn in turns[:-1])
        report = environment.report()
        assert report.faults == () and report.valid_turns == (True,) * len(entry_of(task)["question"])


def test_with_one_call_a_step_the_limit_fails_two_tasks():
    failed = {}
    for task in tasks():
        environment, last, _ = play(task, one_call_a_step=True)
        if last.reward != 1.0:
            failed[task["id"]] = environment.failure.error_type
    # Both have a user turn of 34 calls, of which 21 steps run; in 46 it is the last turn, which is scored as it stands.
    assert failed == {
        "multi_turn_long_context_38": "multi_turn:force_terminated",
        "multi_turn_long_context_46": "multi_turn:instance_state_mismatch",
    }


def test_dropping_the_last_call_fails_every_task_and_the_report_says_where():
    kinds = collections.Counter()
    for task in tasks("base"):
        answer = answer_of(task)
        failing = max(turn for turn, calls in enumerate(answer) if calls)
        answer[failing].pop()
        environment, last, _ = play(task, answer)
        assert (last.reward, last.terminated) == (0.0, True)
        report = environment.report()
        kinds[environment.failure.error_type] += 1
        assert (
            f"failed at user turn {failing + 1} of {len(answer)} ({environment.failure.error_type})" in report.summary
        )
        assert report.valid_turns[:failing] == (True,) * failing and not report.valid_turns[failing]
        (fault,) = report.faults
        assert fault.step == sum(1 + bool(calls) for calls in answer[: failing + 1]) and fault.feedback
    assert kinds == {
        "multi_turn:empty_turn_model_response": 137,
        "multi_turn:instance_state_mismatch": 52,
        "multi_turn:execution_response_mismatch": 11,
    }


@pytest.mark.parametrize("kind", ["corrupted", "random"])
def test_verdicts_are_the_official_checkers(kind):
    """A share of benchmarks/bfcl_agreement.py."""
    rng, official, verdicts = random.Random(1), Official(), collections.Counter()
    environment = Bfcl(unreadable_calls="end_turn")
    for task in rng.sample(tasks(), 200):
        answer = (
            random_answer(task, rng)
            if kind == "random"
            else corrupted(answer_of(task), entry_of(task)["involved_classes"], rng)
        )
        steps = steps_of(answer, rng)
        wanted = official.verdict(task, steps)
        assert play_steps(task, steps, environment) == wanted, (task["id"], steps)
        verdicts[wanted[1]] += 1
    assert len(verdicts) == 4 and min(verdicts.values()) >= 5, verdicts  # every verdict was really met


def test_differences_are_text_and_bounded_even_for_a_folder_inside_itself():
    config = {"root": {"w": {"type": "directory", "contents": {"a": {"type": "directory", "contents": {}}}}}}
    ours, theirs = (Backends({"GorillaFileSystem": config}, ["GorillaFileSystem"]) for _ in range(2))
    ours.call("cp", {"source": "a", "destination": "a"})  # the benchmark's copy makes a loop here
    ours.call("touch", {"file_name": "mine"})
    theirs.call("touch", {"file_name": "theirs"})
    assert list(_differences(ours.instances, theirs.instances)) == [
        ("GorillaFileSystem.root/a/a", "should not be there", ""),
        ("GorillaFileSystem.root/theirs", "is missing", "should be ''"),
        ("GorillaFileSystem.root/mine", "should not be there", ""),
    ]
