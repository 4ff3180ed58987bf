"""Looking back beside the rollouts: the same questions and answers as afterwards, whoever is quicker."""

import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.config import build
from hintsd_jax.config.schema import EndpointSection
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.analyser import ModelAnalyser
from hintsd_jax.hindsight.analysis import Hindsight
from hintsd_jax.hindsight.endpoint import Endpoint
from hintsd_jax.hindsight.looking_back import Arriving, GivenUp, LookingBack
from hintsd_jax.hindsight.prompts import Benchmark, find
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.runs.journal import Journal
from hintsd_jax.sampling import Sampling
from tests.chat_server import serving
from tests.configs import algorithm_config
from tests.helpers import make_tokenizer

CHAT = ChatFormat(make_tokenizer())
ANSWER = '{"failures": [{"step": 2, "feedback": "Look first."}]}'


def episode(name, reward=0.0, steps=3):
    prompt = ({"role": "user", "content": f"Do {name}."},)
    made = Episode.begin(name, 0, prompt, CHAT.prompt(prompt))
    for number in range(steps):
        ids = CHAT.encode(f"act {number} of {name}")
        made.append_action(ids, [0.0] * len(ids), f"act {number} of {name}")
        last = number == steps - 1
        messages = [] if last else [{"role": "tool", "content": "ok"}]
        made.append_observation(None if last else CHAT.delta(messages), messages, reward if last else 0.0)
    made.reward, made.terminated, made.ended = reward, True, "terminated"
    return made


PLAYED = [episode("a"), episode("b", 1.0), None, episode("c", steps=1), episode("d"), None, episode("e", 1.0), None]
EPISODES = [each for each in PLAYED if each is not None]


@given(st.permutations(range(len(PLAYED))), st.integers(0, len(PLAYED)))
@settings(max_examples=40, deadline=None)
def test_episodes_are_read_in_their_order_whatever_order_they_come_in(order, before):
    arriving, read = Arriving(), []
    for place in order[:before]:
        arriving.put(place, PLAYED[place])
    reader = threading.Thread(target=lambda: read.extend(arriving))
    reader.start()
    for place in order[before:]:
        arriving.put(place, PLAYED[place])
    arriving.complete()
    reader.join(10)
    assert [id(each) for each in read] == [id(each) for each in EPISODES] == [id(each) for each in arriving]
    assert len(arriving) == len(EPISODES) and arriving[-1] is EPISODES[-1] and arriving[1:3] == EPISODES[1:3]


def test_an_episode_is_read_as_soon_as_those_before_it_are_over_and_their_number_when_all_are():
    arriving, read, counted = Arriving(), [], []
    readers = [
        threading.Thread(target=lambda: [read.append(each.task_id) for each in arriving]),
        threading.Thread(target=lambda: counted.append(len(arriving))),
    ]
    for reader in readers:
        reader.start()
    for place, expected in ((1, []), (0, ["a", "b"]), (3, ["a", "b"]), (2, ["a", "b", "c"])):
        arriving.put(place, PLAYED[place])
        wait_until(lambda: read == expected)  # noqa: B023 - called at once
        assert read == expected and not counted
    arriving.complete()
    for reader in readers:
        reader.join(10)
    assert counted == [3]


def wait_until(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(0.02)  # what should not happen may still


def endpoint_of(server, **changes):
    values = {"concurrency": 2, "timeout_s": 20.0, "retries": 1, "backoff_s": 0.01, "max_failures": 100} | changes
    return Endpoint(EndpointSection(url=server.url, model="m", **values), Sampling(0.6, 0.95, 0, 512))


def analyser_of(endpoint, journal, prompts="released"):
    ask = lambda questions: endpoint.ask(questions, journal)
    key_of = lambda each: np.array([len(each.tokens), 7], np.uint32)
    return ModelAnalyser(ask, find(prompts), Benchmark("office"), key_of, "hindsight", 3, 12_000)


def told(hindsight):
    kept = [
        (each.episode.task_id, each.targets, each.answer, each.problem, each.verdicts) for each in hindsight.analyses
    ]
    return kept, hindsight.dropped, hindsight.questions, hindsight.readable_answers, hindsight.generated_tokens


@pytest.mark.parametrize("name", ["hint_sd", "openclaw_rl", "sdpo"])
@pytest.mark.parametrize("budget", [0, 3])
def test_what_comes_of_it_is_the_same_beside_and_after(name, budget, tmp_path):
    """Some questions are refused, and a budget may end; the journal then answers all of it again without a request."""

    def script(exchange):
        time.sleep(random.random() / 100)
        if "of d" in exchange.question:
            return exchange.refuse(503)
        return exchange.answer(ANSWER)

    algorithm, outcomes, known = build.algorithm(algorithm_config(name)), [], []
    with serving(script) as server:
        for beside in (False, True, True):
            journal = Journal(tmp_path / f"{beside}.jsonl")  # the third one is that of the second
            endpoint = endpoint_of(server, max_calls=budget)
            analyser = analyser_of(endpoint, journal)
            before = len(server.requests)
            with LookingBack(lambda given: algorithm.analyse(given, analyser), beside, lambda: None) as looking_back:  # noqa: B023
                for place in random.sample(range(len(PLAYED)), len(PLAYED)):
                    looking_back.over(place, PLAYED[place])
                    time.sleep(random.random() / 100)
                hindsight = looking_back.hindsight(EPISODES)
            outcomes.append((told(hindsight), endpoint.used))
            known.append(sorted(line.split('"sum"')[0] for line in journal.path.read_text().splitlines()))
            sent = len(server.requests) - before
    assert outcomes[0] == outcomes[1] == outcomes[2] and outcomes[0][0][2] > 0
    assert known[0] == known[1] == known[2] and sent == 0


def test_a_question_goes_out_before_the_last_episode_is_over(tmp_path):
    with serving(lambda exchange: exchange.answer(ANSWER)) as server:
        analyser, waited = analyser_of(endpoint_of(server), Journal(tmp_path / "j.jsonl")), []
        with LookingBack(analyser.review, True, lambda: waited.append(len(server.requests))) as looking_back:
            looking_back.over(0, EPISODES[0])
            wait_until(lambda: len(server.requests) == 1)
            looking_back.over(1, EPISODES[2])
            hindsight = looking_back.hindsight([EPISODES[0], EPISODES[2]])
    assert waited and waited[0] >= 1 and len(server.requests) == hindsight.questions == 2


def test_what_an_analyser_raises_is_raised_where_the_outcome_is_asked_for():
    def analyse(episodes):
        raise UserError(f"the server refuses {next(iter(episodes)).task_id}")

    with pytest.raises(UserError, match="refuses a"), LookingBack(analyse, True, lambda: None) as looking_back:
        looking_back.over(0, EPISODES[0])
        looking_back.hindsight(EPISODES[:1])


def test_when_playing_fails_nothing_more_is_asked():
    ended = []

    def analyse(episodes):
        try:
            list(episodes)
        except GivenUp:
            ended.append(True)
            raise
        return Hindsight()

    with pytest.raises(KeyError), LookingBack(analyse, True, lambda: None) as looking_back:
        looking_back.over(0, EPISODES[0])
        raise KeyError("played no more")
    wait_until(lambda: ended)
    assert ended
