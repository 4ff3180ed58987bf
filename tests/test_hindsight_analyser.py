"""Analysers with an asker that answers from a script: what is asked, what is dropped, what is privileged."""

import json
from collections import Counter

import numpy as np
import pytest

from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import selectors
from hintsd_jax.hindsight.analyser import EnvironmentAnalyser, ModelAnalyser, privileged
from hintsd_jax.hindsight.analysis import Analysis, attribution
from hintsd_jax.hindsight.prompts import Benchmark, find
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
    """Gives each question the next answer, which is cut where it ends in "~"; keeps what was asked."""

    def __init__(self, answers):
        self.answers, self.asked, self.names, self.complete = list(answers), [], [], []

    def __call__(self, questions):
        questions = list(questions)
        for question in questions:
            self.asked.append(question.messages[-1]["content"])
            self.names.append(question.name)
            self.complete.append(question.is_complete)
        assert len({tuple(question.key.tolist()) for question in questions}) == len(questions)
        texts = [self.answers.pop(0) for _ in questions]
        dropped = Counter(silent=texts.count(None)) if None in texts else Counter()
        return Answers(texts, dropped, 7 * len(questions), [bool(text) and text.endswith("~") for text in texts])


def key_of(episode):
    return job_key(0, 0, episode.task_id, 0)


def model(ask, select="hindsight", max_targets=2, prompts="compact"):
    return ModelAnalyser(ask, find(prompts), Benchmark("office"), key_of, select, max_targets, 12_000)


def review(episodes, ask, select="hindsight", max_targets=2):
    return model(ask, select, max_targets).review(episodes)


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
    known = None if faults is None else tuple(Fault(step, f"{SECRET} {step}") for step in faults)
    episode.report = Report(SECRET, known)
    return episode


def answer(*failures):
    return json.dumps({"failures": [{"step": step, "feedback": text} for step, text in failures]})


def test_answers_become_targets_and_drops_are_counted():
    answers = [
        answer((3, "c"), (1, "a"), (2, "b"), (9, "x"), (1, "again"), (2, "")),
        "no json",
        "think " + answer((2, "b")),
    ]
    hindsight = review([failed(), failed(name="b"), failed(name="c")], Script(answers))
    expected = [(Target(1, "a"), Target(2, "b")), (), (Target(2, "b"),)]
    assert [analysis.targets for analysis in hindsight.analyses] == expected
    assert hindsight.dropped == Counter(bad_step=1, repeated_step=1, empty_feedback=1, over_limit=1, unparsable=1)
    assert (hindsight.questions, hindsight.readable_answers, hindsight.generated_tokens) == (3, 2, 21)
    assert hindsight.analyses[1].problem and hindsight.analyses[0].answer == answers[0]


def test_an_answer_that_was_cut_is_told_apart():
    answers = ['{"failures": [{"step": 1, "feedb~', answer((1, "a")) + " and~", "hm"]
    hindsight = review([failed(name=name) for name in "abc"], Script(answers))
    assert [bool(analysis.targets) for analysis in hindsight.analyses] == [False, True, False]
    assert hindsight.dropped == Counter(truncated=1, unparsable=1) and hindsight.readable_answers == 1


def test_an_answer_is_complete_when_it_can_be_read():
    script = Script([answer()] * 7)
    review([failed()], script)
    review([failed(steps=2)], script, "all")
    (whole, first, second) = script.complete
    assert not whole('{"failures": [{"step": 1, "feedback": "a"}') and whole('x {"failures": [{"step": 1}]}')
    assert first(answer((1, "a"))) and second(answer((2, "a")))
    model(script, prompts="released").judge_steps([failed(steps=2)])
    verdict, hint = script.complete[3:5]
    assert verdict('{"verdict": 1}') and not verdict('{"hint": "a"}')
    assert hint('{"hint": null}') and not hint('{"hint": "a')


@pytest.mark.parametrize("prompts", ["compact", "released"])
def test_a_model_reads_the_episode_and_nothing_privileged(prompts):
    script = Script([answer((1, "a"))] * 2)
    model(script, prompts=prompts).review([failed(faults=(2,)), failed(faults=(1, 3), name="b")])
    for asked in script.asked:
        assert SECRET not in asked and "4711" not in asked
        assert all(f"act {n}" in asked and f"seen {n}" in asked for n in range(3))


def test_selected_steps_are_asked_about_and_answered_for():
    episodes, random_step = [failed(name=name) for name in "abcdefgh"], selectors.find("random")
    steps = [random_step(episode, key_of(episode), 1) for episode in episodes]
    assert {len(chosen) for chosen in steps} == {1} and len({chosen[0] for chosen in steps}) > 1
    assert steps == [random_step(episode, key_of(episode), 1) for episode in episodes]
    steps = [chosen[0] for chosen in steps]
    script = Script([answer((step, "so")) for step in steps[:-1]] + [answer((steps[-1] % 3 + 1, "elsewhere"))])
    hindsight = review(episodes, script, "random", 1)
    assert [analysis.targets for analysis in hindsight.analyses[:-1]] == [(Target(step, "so"),) for step in steps[:-1]]
    assert hindsight.analyses[-1].targets == () and hindsight.dropped == Counter(bad_step=1)
    assert all(f"#{step}" in asked for step, asked in zip(steps, script.asked, strict=True))


@pytest.mark.parametrize(
    "select, steps",
    [("first", [1]), ("last", [4]), ("all", [1, 2, 3, 4]), ("oracle", [2, 3]), ("random", 2), ("hindsight", None)],
)
def test_which_steps_are_selected(select, steps):
    episode, selector = failed(steps=4, faults=(3, 2, 4)), selectors.find(select)
    selected = selector(episode, key_of(episode), 2) if selector else None
    if select == "random":
        assert len(set(selected)) == steps and selected == sorted(selected) and set(selected) <= {1, 2, 3, 4}
        assert selector(episode, key_of(episode), 9) == [1, 2, 3, 4]  # there are no more
    else:
        assert selected == steps
    assert privileged(select, "student") == (select == "oracle") and privileged(select, "environment")


def test_several_selected_steps_of_an_episode_make_one_analysis():
    """Each question is about its own step; the limit of targets is the selector's, not the parser's."""
    script = Script([answer((1, "a")), "no json", answer((3, "c"))])
    (analysis,) = (hindsight := review([failed()], script, "all", 1)).analyses
    assert analysis.targets == (Target(1, "a"), Target(3, "c")) and analysis.problem and "no json" in analysis.answer
    assert (hindsight.questions, hindsight.readable_answers) == (3, 2)
    assert hindsight.dropped == Counter(unparsable=1) and len(set(script.names)) == 3


def test_an_oracle_without_a_fault_or_a_report_asks_nothing():
    hindsight = review([failed(faults=()), failed(faults=None)], Script([]), "oracle")
    assert hindsight.analyses == [] and hindsight.dropped == Counter(nothing_named=1, no_report=1)


def longest_action(episode, key, max_targets):
    """A selector from outside of the package."""
    sizes = [step.stop - step.start for step in episode.steps]
    return [sizes.index(max(sizes)) + 1]


def no_step(episode, key, max_targets):
    return []


def backwards(episode, key, max_targets):
    return [2, 1]


def beyond(episode, key, max_targets):
    return [1, len(episode.steps) + 1]


def peeking(episode, key, max_targets):
    """Would name the true faults."""
    return [] if episode.report is None else [fault.step for fault in episode.report.faults]


HERE = __name__


def test_a_selector_of_ones_own_by_its_path():
    episode = failed(faults=(1, 2))
    script = Script([answer((1, "so"))])
    hindsight = review([episode], script, f"{HERE}:longest_action")
    assert [analysis.targets for analysis in hindsight.analyses] == [(Target(1, "so"),)] and "#1" in script.asked[0]
    assert not privileged(f"{HERE}:longest_action", "student")
    by_report = EnvironmentAnalyser(key_of, f"{HERE}:longest_action", 3).review([episode])
    assert [target.step for target in by_report.analyses[0].targets] == [1]
    assert review([episode], Script([]), f"{HERE}:no_step").dropped == Counter(nothing_named=1)


def test_a_selector_of_ones_own_does_not_see_the_ground_truth():
    episode = failed(faults=(1, 2))
    assert review([episode], Script([]), f"{HERE}:peeking").questions == 0
    assert episode.report is not None  # it is withheld, not taken away


def test_a_selector_that_cannot_be_used_is_refused_by_name():
    for name, says in {
        "frist": "selector 'frist' is unknown: did you mean 'first'?",
        f"{HERE}:SECRET": "is no function",
        f"{HERE}:nothing": "has no 'nothing'",
    }.items():
        with pytest.raises(UserError, match=says.replace("?", r"\?")):
            model(Script([]), name)
    for name, steps in {"backwards": r"\[2, 1\]", "beyond": r"\[1, 4\]"}.items():
        with pytest.raises(UserError, match=f"{HERE}:{name}' gave {steps} of 3 steps: .* ascending"):
            review([failed()], Script([]), f"{HERE}:{name}")


def test_what_has_no_answer_is_counted():
    hindsight = review([failed(), failed(steps=0), failed(name="b")], Script([None, answer((1, "a"))]))
    assert [analysis.episode.task_id for analysis in hindsight.analyses] == ["b"]
    assert hindsight.dropped == Counter(silent=1, no_steps=1)


def test_a_judge_reads_one_step_and_its_observation_alone():
    verdicts, hints = ["1", "-1", "hm", None, "0", "1"], ["", "Take b instead.", "", "Take c instead.", None, "hm~"]
    wrapped = [(v and f'{{"verdict": {v}}}', h and f'{{"hint": "{h}"}}') for v, h in zip(verdicts, hints, strict=True)]
    script = Script([text if text is None else text or '{"hint": ""}' for pair in wrapped for text in pair])
    hindsight = model(script).judge_steps([failed(faults=(2,)), failed(steps=0), failed(name="b")])
    for n, asked in enumerate(script.asked):
        step = n // 2 % 3
        assert f"act {step}" in asked and f"seen {step}" in asked and "Do it." not in asked
        assert sum(f"act {m}" in asked for m in range(3)) == 1 and SECRET not in asked
    first, second = hindsight.analyses
    assert (first.targets, first.verdicts) == ((Target(2, "Take b instead."),), (1.0, -1.0, 0.0))
    # a hint comes without a verdict too
    assert (second.targets, second.verdicts) == ((Target(1, "Take c instead."),), (0.0, 0.0, 1.0))
    assert second.episode.task_id == "b" and hindsight.questions == 12


def test_two_judges_say_verdict_and_hint_apart():
    """As OpenClaw-RL has them: a hint comes with any verdict, an unreadable verdict is 0, short hints are dropped."""
    steps = [
        ('{"verdict": 1}', '{"hint": ""}'),
        ('{"verdict": -1}', '{"hint": "Take the other one."}'),
        ("hm", '{"hint": "Ask for the name first."}'),
        ('{"verdict": 0}', '{"hint": "Look more"}~'),
    ]
    script = Script([text for pair in steps for text in pair])
    hindsight = model(script, prompts="released").judge_steps([failed(steps=4)])
    (analysis,) = hindsight.analyses
    assert analysis.verdicts == (1.0, -1.0, 0.0, 0.0)
    assert analysis.targets == (Target(2, "Take the other one."), Target(3, "Ask for the name first."))
    assert (hindsight.questions, hindsight.readable_answers) == (8, 7) and hindsight.dropped == Counter(unparsable=1)
    assert len(set(script.names)) == 8 and [name.rpartition("/")[2] for name in script.names[:2]] == ["verdict", "hint"]


def test_the_environment_analyser_gives_its_faults():
    by_report = lambda select, *episodes: EnvironmentAnalyser(key_of, select, 2).review(episodes)
    hindsight = by_report("hindsight", failed(faults=(1, 2, 3)), failed(faults=None), failed(faults=()))
    assert [[t.step for t in analysis.targets] for analysis in hindsight.analyses] == [[1, 2], []]
    assert hindsight.dropped == Counter(over_limit=1, no_report=1, nothing_named=1) and hindsight.questions == 2
    last = by_report("last", failed(faults=(1, 2, 3)))
    assert [t.step for t in last.analyses[0].targets] == [3] and not last.dropped
    # of given steps all are kept: the limit is the selector's
    assert [t.step for t in by_report("all", failed(faults=(1, 2, 3))).analyses[0].targets] == [1, 2, 3]
    assert by_report("last", failed(steps=0, faults=())).dropped == Counter(nothing_named=1)
    with pytest.raises(ValueError, match="whole episodes"):
        EnvironmentAnalyser(key_of, "all", 2).judge_steps([failed(faults=(1,))])


def test_attribution_against_counting_by_hand():
    def analysis(faults, targets):
        return Analysis(failed(faults=faults), tuple(Target(step, "f") for step in targets))

    rates = attribution(
        [
            analysis((1, 3), (1, 2)),
            analysis((2,), (3,)),
            analysis((1,), ()),
            analysis(None, (1,)),
            analysis((2, 3), (2, 3)),
        ]
    )
    assert rates == pytest.approx({"checked_targets": 5, "precision": 3 / 5, "recall": 3 / 6, "first_fault": 2 / 4})
    assert attribution([]) == {}


def test_an_answer_that_names_nothing_is_counted():
    hindsight = review([failed()], Script([answer()]))
    assert hindsight.readable_answers == 1 and hindsight.analyses[0].targets == ()
    assert hindsight.dropped == Counter(nothing_named=1)


def test_question_keys_differ_by_episode():
    keys = {tuple(np.asarray(job_key(1, 2, f"hindsight {name}", rollout))) for name in "ab" for rollout in range(3)}
    assert len(keys) == 6
