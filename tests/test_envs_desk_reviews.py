"""What the demonstrator says afterwards: against the office's own report, and by hand."""

import json
import random
import re

import pytest

from hintsd_jax.envs.desk import demonstrations as demos
from hintsd_jax.envs.desk import reviews, script
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.kinds import DECISIONS

TASKS = [generate_task(9, index, 8, 6) for index in range(60)]


def test_reviews_of_any_play_name_the_reported_faults():
    for task in TASKS:
        actions, _ = demos.played(task, random.Random(task["id"]))
        lines, faults = reviews.review(task, actions)
        assert len(lines) == len(actions)
        assert [n for n, line in enumerate(lines, 1) if line.endswith("bad")] == [fault.step for fault in faults]
        assert all(line.startswith(f"#{n} ") for n, line in enumerate(lines, 1))
        for line, action in zip(lines, actions, strict=True):
            taken = re.match(r'Take (\w+) "', action)
            labels = re.match(r"#\d+ (?!asked)(\w+) (\w+)( asked \w+ given \w+)? (ok|bad)", line)
            assert bool(labels) == bool(taken)
            pairs = re.findall(r"asked (\w+) given (\w+)", line)
            if taken:
                assert labels[2] == taken[1]
                pairs.append(labels.groups()[:2])
            if pairs:
                assert line.endswith("ok" if all(asked == given for asked, given in pairs) else "bad")
                assert all(f'"{given}"' in action for _, given in re.findall(r"asked (\w+) given (\w+)", line))
        answer = reviews.review_answer(lines, faults)
        assert [failure["step"] for failure in json.loads(answer.splitlines()[-1])["failures"]] == [
            f.step for f in faults
        ]
        assert answer.count("\n") == sum(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize(
    "fault, line",
    [
        ("dropped_call", "forgot bad"),
        ("wrong_argument", r"asked (\w+) given (?!\1)\w+ bad"),
        ("wrong_tool", "tool bad"),
        ("early_stop", "forgot bad"),
        ("forgotten_call", "forgot bad"),
    ],
)
def test_a_line_says_what_else_went_wrong(fault, line):
    faulty = [script.with_fault(task, fault, 0) for task in TASKS]
    for task, played in zip(TASKS, faulty, strict=True):
        if played:
            assert re.search(f"{line}$", reviews.review(task, played.actions)[0][played.step - 1])
    assert sum(map(bool, faulty)) > 10


def test_of_a_cut_episode_the_wasted_step_is_bad():
    task = TASKS[0]
    look_up = next(r["lookup"] for r in task["requests"] if r["lookup"])
    lines, faults = reviews.review(task, [demos.call_text(*look_up)] * 3)
    assert [fault.step for fault in faults] == [2] and lines[1] == "#2 wasted bad"


def test_feedback_on_any_step_of_any_play():
    for task in TASKS:
        actions, _ = demos.played(task, random.Random(1))
        _, faults = reviews.review(task, actions)
        known = {fault.step: fault.feedback for fault in faults}
        for step, action in enumerate(actions, 1):
            line, feedback = reviews.step_feedback(task, actions, step)
            taken = re.match(r'Take (\w+) "(\w+)"', action)
            expected = known.get(step, f'Use {taken[1]} "{taken[2]}".' if taken else "Go on.")
            assert feedback == expected and line.startswith(f"#{step} ")


@pytest.mark.parametrize(
    "action, observation, knows",
    [
        (demos.call_text("find_files", {"title": "a"}), 'Found draft "b", final "c".', (1, "")),
        (demos.call_text("delete_file", {"file": "a"}), "Error: no such file.", (-1, "Look it up first.")),
        (demos.call_text("find_files", {"title": "a"}), "Error: found nothing.", (-1, "Look up another name.")),
        (demos.choice_text("draft", "b", demos.call_text("copy_file", {"file": "b", "to": "c"})), "Ok.", (0, "")),
        (
            demos.choice_text("draft", "b", demos.call_text("delete_file", {"file": "b"})),
            "Ok.",
            (-1, "Call copy_file instead."),
        ),
        (demos.call_text("notify", {"name": "a"}), "Ok.", (0, "")),
        ("Done.", 'user: Delete "a", the small one.', (0, "")),
        ("Take what?", "", (0, "")),
    ],
)
def test_a_judge_of_one_step_knows_no_request(action, observation, knows):
    assert reviews.step_verdict(action, observation) == knows
    assert set(DECISIONS["copy"].labels) == {"draft", "final"}
