"""Many questions to a real server: in order, within limits and budgets, the same again from the journal, and an end
when nothing answers.
"""

import dataclasses
import itertools
import json
import re
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hintsd_jax.config.schema import EndpointSection
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import endpoint as module
from hintsd_jax.hindsight.endpoint import OVER_BUDGET, Endpoint
from hintsd_jax.hindsight.questions import Answers, Question
from hintsd_jax.hindsight.replies import ERROR, GARBAGE, PROMPT_TOO_LONG, REFUSED, TIMEOUT, TRUNCATED, Reply
from hintsd_jax.runs.journal import Journal
from hintsd_jax.sampling import Sampling
from tests.chat_server import PROXIES, in_turn, right, serving

SAMPLING = Sampling(0.6, 0.95, 0, 512)
KEY = "sk-4711-0815-4242"
CONFIG = EndpointSection(
    url="http://localhost:1/v1", model="m", concurrency=3, timeout_s=20.0, retries=2, backoff_s=0.01, max_failures=100
)


def used(calls, tokens=0, failures=0, answers=0):
    return {"calls": calls, "tokens": tokens, "failures_in_a_row": failures, "answers": answers}


def whole(texts, dropped, tokens=0):
    """Answers of which none was cut."""
    return Answers(texts, dropped, tokens, [False] * len(texts))


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def make(server, **changes):
    return Endpoint(dataclasses.replace(CONFIG, url=server.url, **changes), SAMPLING)


def questions(*texts):
    return [
        Question(f"task/{n}", ({"role": "user", "content": text},), np.array([n, 7], np.uint32))
        for n, text in enumerate(texts)
    ]


def upper(exchange):
    exchange.answer(exchange.question.upper())


def by_question(**scripts):
    """Scripts by the question's text."""
    return lambda exchange: scripts[exchange.question](exchange)


def times(server):
    return [request.time for request in server.requests]


def test_answers_stand_in_the_order_of_the_questions():
    others = threading.Event()

    def script(exchange):
        if exchange.question == "a":
            assert others.wait(20)  # the first question is answered last
        upper(exchange)
        if exchange.question == "c":
            others.set()

    with serving(script) as server:
        endpoint = make(server)
        assert endpoint.ask(questions("a", "b", "c"), None) == whole(["A", "B", "C"], Counter(), tokens=9)
        assert endpoint.used == used(3, 30, 0, 3)
        assert endpoint.ask([], None) == whole([], Counter(), tokens=0) and endpoint.used["calls"] == 3


def test_as_many_at_a_time_as_allowed_and_never_more():
    together = threading.Barrier(4)

    def script(exchange):
        together.wait(20)  # nobody is answered before four are there
        upper(exchange)

    with serving(script) as server:
        answers = make(server, concurrency=4).ask(questions(*"abcdefghijkl"), None)
        assert answers.texts == list("ABCDEFGHIJKL") and server.most_under_way == 4


@pytest.mark.parametrize(
    ("first", "calls"),
    [
        ([lambda e: e.refuse(500)], 2),
        ([lambda e: e.refuse(429), lambda e: e.refuse(503)], 3),
        ([lambda e: e.send(b"<html>")], 2),
        ([lambda e: e.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")], 2),
    ],
    ids=["500", "429 503", "garbage", "early end"],
)
def test_what_may_pass_is_asked_again(first, calls):
    with serving(in_turn(*first, right)) as server:
        endpoint = make(server)
        assert endpoint.ask(questions("a"), None) == whole(["yes"], Counter(), tokens=3)
        assert endpoint.used == used(calls, 10, 0, 1)
        assert all(request.body == server.requests[0].body for request in server.requests)


def test_a_time_out_is_asked_again():
    with serving(in_turn(lambda e: e.be_silent(), right)) as server:
        endpoint = make(server, timeout_s=0.5, retries=20)  # a loaded machine may need more than one more
        assert endpoint.ask(questions("a"), None).texts == ["yes"] and endpoint.used["calls"] >= 2


@pytest.mark.parametrize(
    ("script", "reason", "calls"),
    [
        (lambda e: e.refuse(500), ERROR, 3),
        (lambda e: e.refuse(429), REFUSED, 3),
        (lambda e: e.send(b"[]"), GARBAGE, 3),
        (lambda e: e.refuse(400), REFUSED, 1),
    ],
)
def test_retries_end_and_the_run_does_not(script, reason, calls):
    with serving(by_question(a=script, b=upper)) as server:
        endpoint = make(server)
        assert endpoint.ask(questions("a", "b"), None) == whole([None, "B"], Counter({reason: 1}), tokens=3)
        assert endpoint.used == used(calls + 1, 10, 0, 1)


NEVER = {"silent": lambda e: e.be_silent(), "trickles": lambda e: e.trickle(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200)}


@pytest.mark.parametrize("script", NEVER.values(), ids=NEVER.keys())
def test_a_server_that_never_answers_is_counted(script):
    with serving(script) as server:
        began = time.monotonic()
        assert make(server, timeout_s=0.2, retries=1).ask(questions("a", "b"), None).dropped == Counter({TIMEOUT: 2})
        assert time.monotonic() - began < 5


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening
        endpoint = Endpoint(dataclasses.replace(CONFIG, url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1"), SAMPLING)
        assert endpoint.ask(questions("a", "b"), None) == whole([None, None], Counter({ERROR: 2}))
        assert endpoint.used == used(6, 0, 2, 0)


def test_waits_grow_and_are_the_questions_own():
    endpoint = Endpoint(dataclasses.replace(CONFIG, backoff_s=1.0), SAMPLING)
    waits = [[endpoint._wait_s(name, n, Reply()) for n in range(1, 9)] for name in ("task/0", "task/1")]
    assert (
        waits == [[endpoint._wait_s(name, n, Reply()) for n in range(1, 9)] for name in ("task/0", "task/1")]
        and waits[0] != waits[1]
    )
    for n, wait in enumerate(waits[0][:6]):
        assert 2**n / 2 <= wait <= 2**n
    assert waits[0][7] == module.LONGEST_WAIT_S == endpoint._wait_s("a", 5000, Reply())  # 64 to 128 s without the cap
    assert (
        endpoint._wait_s("a", 1, Reply(wait_s=5.0)) == 5.0
        and endpoint._wait_s("a", 1, Reply(wait_s=1e9)) == module.LONGEST_WAIT_S
    )


def test_the_servers_wish_to_wait_is_kept():
    with serving(
        in_turn(lambda e: e.refuse(429, headers={"Retry-After": "0.4"}), lambda e: e.refuse(500), right)
    ) as server:
        make(server, backoff_s=0.1).ask(questions("a"), None)
        first, second = np.diff(times(server))
        assert first >= 0.4 and second >= 0.1  # the second doubled, less half at most


def test_no_longer_than_the_cap(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.05)
    with serving(in_turn(lambda e: e.refuse(429, headers={"Retry-After": "3600"}), right)) as server:
        assert make(server).ask(questions("a"), None).texts == ["yes"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_ends_the_run_at_once(monkeypatch, tmp_path, status):
    """Whoever else is still waited for; and the rest is not asked."""
    monkeypatch.setenv("TEST_KEY", KEY)
    scripts = by_question(
        a=lambda e: e.be_silent(),
        b=lambda e: e.refuse(status, f"bad key {e.headers['Authorization']}"),
        c=upper,
        d=upper,
    )
    with serving(scripts) as server:
        began = time.monotonic()
        with pytest.raises(UserError, match="TEST_KEY|endpoint.url") as caught:
            make(server, key_env="TEST_KEY", concurrency=2).ask(
                questions("a", "b", "c", "d"), Journal(tmp_path / "j.jsonl")
            )
        assert time.monotonic() - began < 10
        assert KEY not in str(caught.value) and caught.value.__cause__ is None and not (tmp_path / "j.jsonl").exists()
        assert {request.question for request in server.requests} <= {"a", "b"}


def test_the_key_is_nowhere(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("TEST_KEY", KEY)

    def echo(exchange):
        text = f"headers: {dict(exchange.headers)}"
        exchange.refuse(400, text) if exchange.question == "a" else exchange.answer(text)

    with serving(echo) as server:
        endpoint = make(server, key_env="TEST_KEY", max_failures=2)
        answers = endpoint.ask(questions("a", "b"), Journal(tmp_path / "j.jsonl"))
        with pytest.raises(UserError) as caught:
            endpoint.ask(questions("a", "a"), None)
        assert all(request.headers["Authorization"] == f"Bearer {KEY}" for request in server.requests)
    assert "***" in answers.texts[1] and "***" in str(caught.value)
    written = (tmp_path / "j.jsonl").read_text()
    assert written.count("***") == 2
    for text in (
        written,
        str(caught.value),
        repr(endpoint),
        repr(vars(endpoint)),
        repr(endpoint.config),
        repr(answers),
        *capfd.readouterr(),
    ):
        assert KEY not in text


def test_a_refused_form_ends_the_run_after_the_first_and_the_run_goes_on_in_another(tmp_path):
    def script(exchange):
        if "max_tokens" in exchange.body:
            exchange.refuse(400, "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")
        else:
            upper(exchange)

    with serving(script) as server:
        journal = Journal(tmp_path / "j.jsonl")
        with pytest.raises(
            UserError, match=r"set endpoint.max_tokens_field = max_completion_tokens \(HTTP 400: 'max_to"
        ):
            make(server, concurrency=1).ask(questions(*"abcd"), journal)
        assert len(server.requests) == 1 and not (tmp_path / "j.jsonl").exists()
        other = make(server, max_tokens_field="max_completion_tokens")
        assert other.ask(questions(*"abcd"), journal).texts == list("ABCD") and len(server.requests) == 5


@pytest.mark.parametrize(
    "refusal", [lambda e: e.refuse(400, "Bad Request"), lambda e: e.refuse(422, ""), lambda e: e.send(b"", 400)]
)
def test_what_names_nothing_is_the_questions_own_where_another_is_answered(refusal):
    """Whichever came first: those under way are waited for."""
    with serving(by_question(a=refusal, b=lambda e: (time.sleep(0.1), upper(e)), c=refusal, d=refusal)) as server:
        endpoint = make(server)
        assert endpoint.ask(questions(*"abcd"), None) == whole([None, "B", None, None], Counter({REFUSED: 3}), tokens=3)
        resumed = make(server)
        resumed.used = json.loads(json.dumps(endpoint.used))  # by way of a checkpoint
        assert resumed.ask(questions("a"), None).dropped == Counter({REFUSED: 1})
        for asked in (questions("a", "c", "d", "b"), questions("a")):  # of three at a time none is answered
            with pytest.raises(UserError, match="refuses the form of the request: .*HTTP 4"):
                make(server).ask(asked, None)


def test_a_prompt_too_long_for_the_server_is_no_failure_of_it():
    too_long = lambda e: e.refuse(400, "This model's maximum context length is 4096 tokens, you requested 5000")
    with serving(by_question(a=too_long, b=lambda e: e.refuse(500), c=upper)) as server:
        endpoint = make(server, max_failures=2, retries=0)
        dropped = Counter({PROMPT_TOO_LONG: 4, ERROR: 1})
        names = ["task/0", "task/1", "task/2", "task/3", "task/4", "task/5"]
        asked = [dataclasses.replace(questions(text)[0], name=name) for name, text in zip(names, "aabaac")]
        assert endpoint.ask(asked, None) == whole([None] * 5 + ["C"], dropped, tokens=3)
        assert len(server.requests) == 6 and endpoint.used == used(6, 10, 0, 1)


def test_a_judge_that_only_thinks_is_asked_once_and_the_end_says_what_to_do():
    def script(exchange):
        message = {"content": None, "reasoning_content": "hm"}
        usage = {"prompt_tokens": 7, "completion_tokens": 512}
        exchange.send({"choices": [{"message": message, "finish_reason": "length"}], "usage": usage})

    with serving(script) as server:
        endpoint = make(server, max_failures=4)
        assert endpoint.ask(questions(*"abc"), None) == whole([None] * 3, Counter({TRUNCATED: 3}), tokens=3 * 512)
        assert endpoint.used == used(3, 3 * 519, 3, 0) and len(server.requests) == 3
        with pytest.raises(UserError, match=r"4 questions in a row .*in reasoning\): raise hindsight.max_tokens, or"):
            endpoint.ask(questions("d"), None)


def test_an_answer_that_the_server_cut_says_so(tmp_path):
    def script(exchange):
        choice = {"message": {"content": "{"}, "finish_reason": "length" if exchange.question == "long" else "stop"}
        exchange.send({"choices": [choice]})

    with serving(script) as server:
        journal = Journal(tmp_path / "journal")
        asked = [make(server).ask(questions("long", "short"), journal) for _ in range(2)]  # again from the journal
    assert [answers.cut for answers in asked] == [[True, False]] * 2


def test_a_step_done_again_sends_nothing(tmp_path):
    scripts = by_question(a=upper, b=lambda e: e.refuse(400), c=lambda e: e.send(b"no"), d=upper, e=upper)
    with serving(scripts) as server:
        endpoint = make(server, max_calls=6, concurrency=2)
        answers = endpoint.ask(questions(*"abcde"), Journal(tmp_path / "j.jsonl"))
        assert answers == whole(
            ["A", None, None, "D", None], Counter({REFUSED: 1, GARBAGE: 1, OVER_BUDGET: 1}), tokens=6
        )
        sent = len(server.requests)
    again = make(server, max_calls=6, concurrency=2)  # nobody listens there now
    assert again.ask(questions(*"abcde"), Journal(tmp_path / "j.jsonl")) == answers
    assert again.used == endpoint.used == used(6, 20, 0, 2) and sent == 6
    assert [json.loads(line)["key"][:2] for line in (tmp_path / "j.jsonl").read_text().splitlines()] == [
        ["endpoint", f"task/{n}"] for n in range(5)
    ]


def test_an_outcome_is_put_down_before_it_is_used(tmp_path, monkeypatch):
    put = Journal.put

    def full(self, *key, value):
        if key[1] == "task/1":
            raise OSError("no space left")
        put(self, *key, value=value)

    monkeypatch.setattr(Journal, "put", full)
    with serving(upper) as server:
        endpoint = make(server)
        with pytest.raises(OSError, match="no space"):
            endpoint.ask(questions("a", "b", "c"), Journal(tmp_path / "j.jsonl"))
        assert endpoint.used["calls"] == 1  # as much as is on disk


def test_another_episode_of_the_same_name_is_another_question(tmp_path):
    with serving(upper) as server:
        journal = Journal(tmp_path / "j.jsonl")
        assert make(server).ask(questions("a"), journal).texts == ["A"] and make(server).ask(
            questions("b"), journal
        ).texts == ["B"]
        assert make(server).ask(questions("a"), Journal(journal.path)).texts == ["A"] and len(server.requests) == 2


def test_calls_never_exceed_their_budget():
    """Three questions at a time could, with their retries, send nine."""
    with serving(lambda e: e.refuse(500)) as server:
        endpoint = make(server, max_calls=4)
        assert (
            endpoint.ask(questions(*"abcde"), None).dropped == Counter({ERROR: 2, OVER_BUDGET: 3})
            and len(server.requests) == 4
        )
        assert endpoint.used == used(4, 0, 2, 0)
        assert endpoint.ask(questions("f"), None).dropped == Counter({OVER_BUDGET: 1}) and len(server.requests) == 4


def test_the_last_call_of_a_budget_is_used():
    with serving(upper) as server:
        assert make(server, max_calls=4).ask(questions(*"abcdef"), None).texts == ["A", "B", "C", "D", None, None]


def test_the_budget_of_tokens_is_looked_at_before_each_question():
    with serving(upper) as server:  # 10 tokens each
        endpoint = make(server, max_tokens=25, concurrency=1)
        assert endpoint.ask(questions(*"abcde"), None) == whole(
            ["A", "B", "C", None, None], Counter({OVER_BUDGET: 2}), tokens=9
        )
        assert endpoint.used["tokens"] == 30 and len(server.requests) == 3
        endpoint = make(
            server, max_tokens=25, concurrency=2
        )  # the second question after the one that used it up was under way
        assert endpoint.ask(questions(*"abcde"), None).texts == ["A", "B", "C", "D", None]


def test_failures_in_a_row_end_the_run_and_it_goes_on_when_the_server_is_back(tmp_path):
    down, back = (lambda e: e.refuse(500, "CUDA out of memory")), upper
    with serving(by_question(a=back, b=down, c=down, d=down, e=back)) as server:
        endpoint = make(server, max_failures=3, retries=0)
        with pytest.raises(UserError, match=re.escape("3 questions in a row got no answer")) as caught:
            endpoint.ask(questions(*"abcde"), Journal(tmp_path / "j.jsonl"))
        assert (
            server.url in str(caught.value)
            and "HTTP 500: CUDA out of memory" in str(caught.value)
            and "\n" not in str(caught.value)
        )
    with serving(back) as server:
        endpoint = make(server, max_failures=3, retries=0)
        answers = endpoint.ask(questions(*"abcde"), Journal(tmp_path / "j.jsonl"))
        assert answers.texts == ["A", None, None, "D", "E"] and endpoint.used["failures_in_a_row"] == 0
        assert {request.question for request in server.requests} == {"d", "e"}


def test_failures_go_on_from_one_step_to_the_next_and_a_budget_is_none_of_them():
    with serving(by_question(a=upper, b=lambda e: e.refuse(400))) as server:
        endpoint = make(server, max_failures=2, max_calls=2)
        assert endpoint.ask(questions("a", "b", "b"), None).dropped == Counter({REFUSED: 1, OVER_BUDGET: 1})
        assert endpoint.used["failures_in_a_row"] == 1
        resumed = make(server, max_failures=2)
        resumed.used = json.loads(json.dumps(endpoint.used))  # by way of a checkpoint
        with pytest.raises(UserError, match="2 questions in a row"):
            resumed.ask(questions("b"), None)


def test_after_an_end_nobody_goes_on_asking():
    with serving(by_question(a=lambda e: e.refuse(500), b=lambda e: (time.sleep(0.2), e.refuse(401)))) as server:
        with pytest.raises(UserError):
            make(server, retries=1000, backoff_s=0.05).ask(questions("a", "b"), None)
        deadline = time.monotonic() + 10
        while any(thread.name == "endpoint" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_names_are_unique():
    question = questions("a")[0]
    with pytest.raises(ValueError, match="two questions have the name 'task/0'"):
        Endpoint(CONFIG, SAMPLING).ask([question, question], None)


class Scripted:
    """In a server's place: the n-th request of a question gets the n-th of its replies, again from the first in the
    next process.
    """

    shown = "scripted"

    def __init__(self, script):
        self._script, self._lock, self.asked = script, threading.Lock(), Counter()

    def ask(self, messages):
        text = messages[0]["content"]
        with self._lock:
            self.asked[text] += 1
            reply = self._script[int(text)][min(self.asked[text], len(self._script[int(text)])) - 1]
        return {
            "y": Reply(f"answer {text}", prompt_tokens=7, completion_tokens=3),
            "f": Reply(reason=REFUSED, detail="no", stop_if_first="refuses the form"),
            "l": Reply(reason=PROMPT_TOO_LONG, detail="long"),
            "t": Reply(reason=TRUNCATED, detail="cut", completion_tokens=9),
            "n": Reply(reason=REFUSED, detail="no"),
            "r": Reply(reason=ERROR, detail="again", retryable=True, completion_tokens=1),
        }[reply]


def scripted(script, **changes):
    endpoint = Endpoint(dataclasses.replace(CONFIG, backoff_s=0.0, **changes), SAMPLING)
    endpoint._server = Scripted(script)
    return endpoint


SCRIPTS = st.lists(st.sampled_from(["y", "n", "r", "ry", "rry", "rrry", "rn"]), max_size=9)
ALL = st.lists(st.sampled_from(["y", "n", "r", "ry", "rry", "rrry", "rn", "f", "l", "t"]), max_size=9)


@given(ALL, st.integers(0, 12), st.integers(0, 40), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whenever_it_is_killed_it_ends_the_same(tmp_path, script, max_calls, max_tokens, data):
    """A journal cut after any question, any number at a time: the same answers, counts and budgets, and never too many
    calls.
    """
    concurrency, max_failures = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 20))
    limits = {
        "max_calls": max_calls,
        "max_tokens": max_tokens,
        "concurrency": concurrency,
        "max_failures": max_failures,
    }
    asked, path = questions(*map(str, range(len(script)))), tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)

    def run(journal):
        endpoint = scripted(script, **limits)
        try:
            return endpoint.ask(asked, journal), endpoint
        except UserError as error:
            return str(error), endpoint

    whole, endpoint = run(Journal(path))
    if max_calls:
        assert endpoint._server.asked.total() <= max_calls
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    path.write_bytes(b"".join(lines[: data.draw(st.integers(0, len(lines)))]))
    again, continued = run(Journal(path))
    assert again == whole and continued.used == endpoint.used
    assert (path.read_bytes() if path.exists() else b"") == b"".join(lines)


def test_what_is_known_holds_back_what_comes_after_it_as_it_did(tmp_path):
    """Seven calls: the third question waited for the first, and so found the tokens used up."""
    limits, asked, path = (
        {"max_calls": 7, "max_tokens": 10, "concurrency": 3},
        questions("0", "1", "2"),
        tmp_path / "j.jsonl",
    )
    whole = scripted("yyy", **limits).ask(asked, Journal(path))
    assert whole.texts == ["answer 0", "answer 1", None]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert scripted("yyy", **limits).ask(asked, Journal(path)) == whole


@given(SCRIPTS, st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_without_budgets_each_question_is_for_itself(script, concurrency):
    """The oracle takes one question after the other."""
    endpoint = scripted(script, concurrency=concurrency)
    answers = endpoint.ask(questions(*map(str, range(len(script)))), None)
    tried = [list(itertools.islice(itertools.chain(replies, itertools.repeat(replies[-1])), 3)) for replies in script]
    calls = [next((n for n, reply in enumerate(replies, 1) if reply != "r"), 3) for replies in tried]
    last = [replies[n - 1] for replies, n in zip(tried, calls)]
    assert answers.texts == [f"answer {n}" if end == "y" else None for n, end in enumerate(last)]
    assert answers.dropped == Counter({"n": REFUSED, "r": ERROR}[end] for end in last if end != "y")
    assert answers.tokens == sum(n - 1 + {"y": 3, "n": 0, "r": 1}[end] for n, end in zip(calls, last))
    trailing = len(list(itertools.takewhile(lambda end: end != "y", reversed(last))))
    assert endpoint.used["calls"] == sum(calls) and endpoint.used["failures_in_a_row"] == trailing


def test_a_bug_is_not_an_outcome():
    with pytest.raises(KeyError):
        scripted(["x"]).ask(questions("0"), None)
