"""Hindsight with an engine that answers from a script: what is asked, what is dropped, what is privileged."""

import json
from collections import Counter

import numpy as np
import pytest

from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.episodes.chat import ChatFormat
from hintsd_jax.episodes.episode import Episode
from hintsd_jax.episodes.rollout import job_key
from hintsd_jax.hindsight import analyser
from hintsd_jax.hindsight.analyser import Analysis, HindsightConfig, ask_environment, ask_policy, attribution, given_step
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.sampling import Sampling, Stats
from tests.helpers import make_tokenizer

TOKENIZER = make_tokenizer()
CHAT = ChatFormat(TOKENIZER)
SECRET = "the vault code is 4711"


class ScriptedEngine:
    """Gives each job the next answer; keeps what was asked."""

    def __init__(self, answers):
        self.answers, self.asked = list(answers), []

    def run(self, params, jobs):
        for job in jobs:
            self.asked.append(TOKENIZER.decode(job.prompt))
            ids = [*TOKENIZER.encode(self.answers.pop(0), add_special_tokens=False), CHAT.stop_ids[0]]
            job.submit(ids, [0.0] * len(ids), True)
            assert job.collect() is None
        return Stats(sampled=7 * len(self.asked))


def config(**changes):
    fields = {"select": "hindsight", "analyser": "policy_ema", "max_targets": 2, "clip_chars": 12_000, "context": 4000}
    return HindsightConfig(**(fields | changes), sampling=Sampling(0.6, 0.95, 0, 50))


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
    episode.report = Report(SECRET, None if faults is None else tuple(Fault(step, f"{SECRET} {step}") for step in faults))
    return episode, job_key(0, 0, name, 0)


def answer(*failures):
    return json.dumps({"failures": [{"step": step, "feedback": text} for step, text in failures]})


def test_answers_become_targets_and_drops_are_counted():
    answers = [answer((3, "c"), (1, "a"), (2, "b"), (9, "x"), (1, "again"), (2, "")), "no json", "think " + answer((2, "b"))]
    engine = ScriptedEngine(answers)
    found = ask_policy(engine, None, CHAT, [failed(), failed(name="b"), failed(name="c")], config())
    assert [analysis.targets for analysis in found.analyses] == [(Target(1, "a"), Target(2, "b")), (), (Target(2, "b"),)]
    assert found.dropped == Counter(bad_step=1, repeated_step=1, empty_feedback=1, over_limit=1, unparsable=1)
    assert found.parsed == 2 and found.tokens == 21
    assert found.analyses[1].problem and found.analyses[0].answer == answers[0]


def test_the_policy_analyser_sees_the_episode_and_nothing_privileged():
    engine = ScriptedEngine([answer((1, "a"))] * 2)
    pairs = [failed(faults=(2,)), failed(faults=(1, 3), name="b")]
    ask_policy(engine, None, CHAT, pairs, config())
    for asked in engine.asked:
        assert SECRET not in asked and "4711" not in asked
        assert all(f"act {n}" in asked and f"seen {n}" in asked for n in range(3))


def test_a_given_step_is_asked_about_and_answered_for():
    pairs = [failed(name=name) for name in "abcdefgh"]
    steps = [given_step(*pair) for pair in pairs]
    assert set(steps) <= {1, 2, 3} and len(set(steps)) > 1 and steps == [given_step(*pair) for pair in pairs]
    engine = ScriptedEngine([answer((step, "so")) for step in steps[:-1]] + [answer((steps[-1] % 3 + 1, "elsewhere"))])
    found = ask_policy(engine, None, CHAT, pairs, config(select="random", max_targets=1))
    assert [analysis.targets for analysis in found.analyses[:-1]] == [(Target(step, "so"),) for step in steps[:-1]]
    assert found.analyses[-1].targets == () and found.dropped == Counter(bad_step=1)
    assert all(f"#{step}" in asked for step, asked in zip(steps, engine.asked, strict=True))


def test_what_cannot_be_asked_is_counted():
    found = ask_policy(ScriptedEngine([]), None, CHAT, [failed(), failed(steps=0)], config(context=60))
    assert found.analyses == [] and found.dropped == Counter(prompt_too_long=1, no_steps=1)


def test_the_environment_analyser_gives_its_faults():
    found = ask_environment([failed(faults=(1, 2, 3)), failed(faults=None), failed(faults=())], config(analyser="environment"))
    assert [[t.step for t in analysis.targets] for analysis in found.analyses] == [[1, 2], []]
    assert found.dropped == Counter(over_limit=1, no_report=1, nothing_named=1)
    assert "environment" in analyser.PRIVILEGED


def test_attribution_against_counting_by_hand():
    def analysis(faults, targets):
        return Analysis(failed(faults=faults)[0], tuple(Target(step, "f") for step in targets))

    rates = attribution([analysis((1, 3), (1, 2)), analysis((2,), (3,)), analysis((1,), ()), analysis(None, (1,)), analysis((2, 3), (2, 3))])
    assert rates == pytest.approx(
        {"hindsight/precision": 3 / 5, "hindsight/recall": 3 / 6, "hindsight/first_fault": 2 / 4}
    )
    assert attribution([]) == {}


def test_an_answer_that_names_nothing_is_counted():
    found = ask_policy(ScriptedEngine([answer()]), None, CHAT, [failed()], config())
    assert found.parsed == 1 and found.analyses[0].targets == () and found.dropped == Counter(nothing_named=1)


def test_question_keys_differ_by_episode():
    keys = {tuple(np.asarray(job_key(1, 2, f"hindsight {name}", rollout))) for name in "ab" for rollout in range(3)}
    assert len(keys) == 6
