"""Hindsight with an asker that answers from a script: what is asked, what is dropped, what is privileged."""

import json
from collections import Counter

import numpy as np
import pytest

from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.hindsight import analyser
from hintsd_jax.hindsight.analyser import (
    Analysis,
    HindsightConfig,
    analyse,
    ask_environment,
    attribution,
    given_steps,
    judge,
)
from hintsd_jax.hindsight.questions import Answers
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from tests.helpers import make_tokenizer

TOKENIZER = make_tokenizer()
CHAT = ChatFormat(TOKENIZER)
SECRET = "the vault code is 4711"


class Script:
    """Gives each question the next answer; keeps what was asked."""

    def __init__(self, answers):
        self.answers, self.asked, self.names = list(answers), [], []

    def __call__(self, questions):
        for question in questions:
            (message,) = question.messages
            self.asked.append(message["content"])
            self.names.append(question.name)
        assert len({tuple(question.key.tolist()) for question in questions}) == len(questions)
        texts = [self.answers.pop(0) for _ in questions]
        return Answers(texts, Counter(silent=texts.count(None)) if None in texts else Counter(), 7 * len(questions))


def config(select="hindsight", max_targets=2):
    return HindsightConfig(select, max_targets, clip_chars=12_000)


def failed(steps=3, name="a", faults=None):
    prompt = ({"role": "user", "content": "Do it."},)
    episode = Episode.begin(name, 0, prompt, CHAT.prompt(prompt))
    for number in range(steps):
        ids = [*TOKENIZER.encode(f"act {number}", add_special_tokens=False), CHAT.stop_ids[0]]
        episode.append_action(ids, [-0.1] * len(ids), f"act {number}")
        last = number + 1 == steps
        messages = [{"role": "tool", "content": f"seen {number}"}]
        episode.append_observation(None if last else CHAT.delta(messages), messages)
    episode.ended, episode.terminated = "terminated", True
    episode.report = Report(
        SECRET, None if faults is None else tuple(Fault(step, f"{SECRET} {step}") for step in faults)
    )
    return episode, job_key(0, 0, name, 0)


def answer(*failures):
    return json.dumps({"failures": [{"step": step, "feedback": text} for step, text in failures]})


def test_answers_become_targets_and_drops_are_counted():
    answers = [
        answer((3, "c"), (1, "a"), (2, "b"), (9, "x"), (1, "again"), (2, "")),
        "no json",
        "think " + answer((2, "b")),
    ]
    found = analyse([failed(), failed(name="b"), failed(name="c")], config(), Script(answers))
    assert [analysis.targets for analysis in found.analyses] == [
        (Target(1, "a"), Target(2, "b")),
        (),
        (Target(2, "b"),),
    ]
    assert found.dropped == Counter(bad_step=1, repeated_step=1, empty_feedback=1, over_limit=1, unparsable=1)
    assert (found.asked, found.parsed, found.tokens) == (3, 2, 21)
    assert found.analyses[1].problem and found.analyses[0].answer == answers[0]


def test_the_policy_analyser_sees_the_episode_and_nothing_privileged():
    script = Script([answer((1, "a"))] * 2)
    analyse([failed(faults=(2,)), failed(faults=(1, 3), name="b")], config(), script)
    for asked in script.asked:
        assert SECRET not in asked and "4711" not in asked
        assert all(f"act {n}" in asked and f"seen {n}" in asked for n in range(3))


def test_given_steps_are_asked_about_and_answered_for():
    pairs = [failed(name=name) for name in "abcdefgh"]
    steps = [given_steps(*pair, config("random", 1)) for pair in pairs]
    assert {len(chosen) for chosen in steps} == {1} and len({chosen[0] for chosen in steps}) > 1
    assert steps == [given_steps(*pair, config("random", 1)) for pair in pairs]
    steps = [chosen[0] for chosen in steps]
    script = Script([answer((step, "so")) for step in steps[:-1]] + [answer((steps[-1] % 3 + 1, "elsewhere"))])
    found = analyse(pairs, config("random", 1), script)
    assert [analysis.targets for analysis in found.analyses[:-1]] == [(Target(step, "so"),) for step in steps[:-1]]
    assert found.analyses[-1].targets == () and found.dropped == Counter(bad_step=1)
    assert all(f"#{step}" in asked for step, asked in zip(steps, script.asked, strict=True))


@pytest.mark.parametrize(
    "select, steps",
    [("first", [1]), ("last", [4]), ("all", [1, 2, 3, 4]), ("oracle", [2, 3]), ("random", 2), ("hindsight", None)],
)
def test_which_steps_are_given(select, steps):
    episode, key = failed(steps=4, faults=(3, 2, 4))
    given = given_steps(episode, key, config(select))
    if select == "random":
        assert len(set(given)) == steps and given == sorted(given) and set(given) <= {1, 2, 3, 4}
    else:
        assert given == steps
    assert analyser.privileged(select, "policy") == (select == "oracle") and analyser.privileged(select, "environment")


def test_several_given_steps_of_an_episode_make_one_analysis():
    """Each question is about its own step; the limit of targets is the choice's, not the parser's."""
    script = Script([answer((1, "a")), "no json", answer((3, "c"))])
    (analysis,) = (found := analyse([failed()], config("all", 1), script)).analyses
    assert analysis.targets == (Target(1, "a"), Target(3, "c")) and analysis.problem and "no json" in analysis.answer
    assert (found.asked, found.parsed, found.dropped) == (3, 2, Counter(unparsable=1))
    assert len(set(script.names)) == 3


def test_an_oracle_without_a_fault_or_a_report_asks_nothing():
    found = analyse([failed(faults=()), failed(faults=None)], config("oracle"), Script([]))
    assert found.analyses == [] and found.dropped == Counter(nothing_named=1, no_report=1)


def test_what_has_no_answer_is_counted():
    found = analyse([failed(), failed(steps=0), failed(name="b")], config(), Script([None, answer((1, "a"))]))
    assert [analysis.episode.task_id for analysis in found.analyses] == ["b"] and found.dropped == Counter(
        silent=1, no_steps=1
    )


def test_a_judge_sees_one_step_and_its_answer_alone():
    script = Script([answer(), answer((1, "b")), "hm", None, answer((2, "not its step")), answer()])
    found = judge([failed(faults=(2,)), failed(name="b")], script)
    for n, asked in enumerate(script.asked):
        assert f"act {n % 3}" in asked and f"seen {n % 3}" in asked and "Do it." not in asked
        assert sum(f"act {m}" in asked for m in range(3)) == 1 and SECRET not in asked
    first, second = found.analyses
    assert (first.targets, first.rewards) == ((Target(2, "b"),), (1.0, -1.0, 0.0))
    assert (second.targets, second.rewards) == (
        (),
        (0.0, 1.0, 1.0),
    )  # named no step that was shown: nothing speaks against it
    assert found.dropped == Counter(unparsable=1, bad_step=1, silent=1) and (found.asked, found.parsed) == (6, 4)


def test_the_environment_analyser_gives_its_faults():
    found = ask_environment([failed(faults=(1, 2, 3)), failed(faults=None), failed(faults=())], config())
    assert [[t.step for t in analysis.targets] for analysis in found.analyses] == [[1, 2], []]
    assert found.dropped == Counter(over_limit=1, no_report=1, nothing_named=1)
    given = ask_environment([failed(faults=(1, 2, 3))], config("last"))
    assert [t.step for t in given.analyses[0].targets] == [3] and not given.dropped


def test_attribution_against_counting_by_hand():
    def analysis(faults, targets):
        return Analysis(failed(faults=faults)[0], tuple(Target(step, "f") for step in targets))

    rates = attribution(
        [
            analysis((1, 3), (1, 2)),
            analysis((2,), (3,)),
            analysis((1,), ()),
            analysis(None, (1,)),
            analysis((2, 3), (2, 3)),
        ]
    )
    assert rates == pytest.approx(
        {"hindsight/precision": 3 / 5, "hindsight/recall": 3 / 6, "hindsight/first_fault": 2 / 4}
    )
    assert attribution([]) == {}


def test_an_answer_that_names_nothing_is_counted():
    found = analyse([failed()], config(), Script([answer()]))
    assert found.parsed == 1 and found.analyses[0].targets == () and found.dropped == Counter(nothing_named=1)


def test_question_keys_differ_by_episode():
    keys = {tuple(np.asarray(job_key(1, 2, f"hindsight {name}", rollout))) for name in "ab" for rollout in range(3)}
    assert len(keys) == 6
