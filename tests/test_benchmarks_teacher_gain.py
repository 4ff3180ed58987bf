"""Teachers against their students: what each reads before a right action, and whether an arm is marked."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import comparison_tables, comparison_teachers, teacher_gain
from benchmarks.hindsight_setup import Setup
from hintsd_jax.algorithms.branching import all_steps, feedback_at_start
from hintsd_jax.config import build
from hintsd_jax.envs.desk import Desk
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.hindsight.targets import Target
from tests.configs import algorithm_config
from tests.examples_helpers import FakeChat, make_episode, target_branches
from tests.test_benchmarks_attribution import CHAT, SCRIPTS
from tests.test_benchmarks_comparison import LABELS, summary

TASKS = [generate_task(3, n) for n in range(5)]


@pytest.fixture(scope="module")
def played():
    setup = Setup(algorithm_config("hint_sd", {"env.name": "desk"}), CHAT, Desk)
    return teacher_gain.play(setup, SCRIPTS, TASKS, 2, seed=0)


def test_each_task_is_played_right_and_with_faults_that_break_it(played):
    assert len(played.episodes) > 2 * len(TASKS)
    for episode in played.episodes:
        right, fault = played.right[episode.task_id], played.fault[id(episode)]
        texts = [step.text for step in episode.steps]
        assert texts[: fault - 1] == list(right[: fault - 1]) and episode.success == (fault > len(texts))
        assert episode.success or texts[fault - 1] != right[fault - 1]
    assert [episode.group for episode in played.episodes] == sorted(episode.group for episode in played.episodes)
    with pytest.raises(UserError, match="no task has a place for 99 faults: lower --faults"):
        teacher_gain.play(Setup(algorithm_config("hint_sd"), CHAT, Desk), SCRIPTS, TASKS, 99, seed=0)


@pytest.mark.parametrize("position", ["target", "start"])
def test_what_a_teacher_has_read_before_its_targets(position):
    """Each target's own feedback, where it stands; other targets' never."""
    episode, chat = make_episode(3), FakeChat()
    targets = (Target(2, "x"), Target(4, "y"))
    branches = target_branches(episode, targets, chat, position=position)
    found = [(branch.step, context) for branch, context in teacher_gain.teachers_contexts(episode, branches)]
    expected = []
    for step, text in ((2, "x"), (4, "y")):
        own, first = episode.steps[step - 1], episode.steps[0]
        turn = list(chat.user_turn(text))
        at_start = [*turn, *episode.tokens[first.start : own.start]]
        expected.append((step, [*episode.tokens[: own.prompt_start], *turn] if position == "target" else at_start))
    assert found == expected


def test_what_a_teacher_of_whole_episodes_reads_on():
    episode, chat = make_episode(4), FakeChat()
    branches = feedback_at_start(episode, all_steps(episode), ({"role": "user", "content": "z"},), chat, {})
    begin, first = list(chat.user_turn("z")), episode.steps[0].start
    for branch, context in teacher_gain.teachers_contexts(episode, branches):
        assert context == [*begin, *episode.tokens[first : branch.start]]


def test_a_gain_is_counted_up_to_the_fault(played, monkeypatch):
    """Every step of every failed episode is a target; scores are the lengths of what was read, so that each gain is
    what the feedback adds to it.
    """
    config = algorithm_config("hint_sd", {"env.name": "desk", "hindsight.prompts": "compact"})
    review = lambda episodes: Hindsight(
        [Analysis(e, tuple(Target(n, "Use other.") for n in all_steps(e))) for e in episodes]
    )
    session = SimpleNamespace(
        algorithm=build.algorithm(config), config=config, chat=CHAT, trained=None, policy=None, weights=lambda _: None
    )
    session.analyser = lambda trained, step: SimpleNamespace(review=review)
    score = lambda weights, policy, rows: [np.full(len(action), len(read) / len(action)) for read, action in rows]
    monkeypatch.setattr(teacher_gain, "span_logprobs", score)
    found = teacher_gain.measure(session, played)
    failed = [episode for episode in played.episodes if not episode.success]
    faults = [played.fault[id(episode)] for episode in failed]
    assert found["fault"]["n"] == len(failed) and found["all"]["n"] == sum(faults)
    assert found["before"]["n"] == sum(faults) - len(failed)
    step = failed[0].steps[0]  # the generation prompt stands in both
    added = (
        len(CHAT.user_turn(session.algorithm.prompts.teacher_feedback("Use other."))) - step.start + step.prompt_start
    )
    assert {found[place]["value"] for place in comparison_teachers.PLACES} == {added}
    assert found["likelier"]["value"] == 1 and comparison_teachers.is_better(found)


def rate(value, low):
    return {"value": value, "low": low, "high": value + 0.1, "n": 10.0}


def test_an_arm_whose_teacher_is_no_better_is_marked(tmp_path):
    gain = lambda low: dict.fromkeys(("fault", "before", "all", "likelier"), rate(0.2, low))
    none = dict.fromkeys(("fault", "before", "all", "likelier"))
    path = tmp_path / "gains.json"
    path.write_text(json.dumps({"gains": {"hint_sd": gain(0.1), "openclaw_rl": gain(-0.1), "sdpo": none}}))
    gains = comparison_teachers.read(path)
    marked = comparison_teachers.marked(LABELS | {"sdpo": "SDPO"}, gains)
    assert marked["hint_sd"] == LABELS["hint_sd"] and marked["openclaw_rl"] == f"OpenClaw; {comparison_teachers.MARK}"
    assert marked["sdpo"].endswith(comparison_teachers.MARK) and comparison_teachers.read(None) == {}
    runs = [summary(arm, seed) for arm in ("hint_sd", "openclaw_rl") for seed in (0, 1)]
    text = comparison_tables.page(runs, LABELS, gains=gains)
    assert "## Teachers" in text and text.count(marked["openclaw_rl"]) > 3
    assert "+0.20 [-0.10, +0.30]" in text and marked["sdpo"] not in text
    assert "## Teachers" not in comparison_tables.page(runs, LABELS)
