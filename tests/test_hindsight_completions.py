"""What one request comes to: an answer, or a reason why there is none; what goes out, and what never does."""

import email.utils
import json
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.completions import (
    ERROR,
    GARBAGE,
    MAX_BYTES,
    REFUSED,
    TIMEOUT,
    ChatServer,
    Reply,
    _answer,
    _freed,
    _retry_after,
)
from hintsd_jax.sampling import Sampling
from tests.chat_server import PROXIES, right, serving

KEY = "sk-Zz9+secret/value=="
MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which step? é"})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("TEST_KEY", KEY)


SAMPLING = Sampling(0.6, 0.95, 0, 512)


def chat(url, key_env="TEST_KEY", timeout=20.0, sampling=SAMPLING):
    return ChatServer(url, "some-model", key_env, timeout, sampling)


def ask(script, **options):
    with serving(script) as server:
        return chat(server.url, **options).ask(MESSAGES), server.requests


def test_an_answer_and_all_that_went_out():
    reply, (request,) = ask(lambda e: e.answer("Step 2 é", usage=(11, 5)))
    assert reply == Reply("Step 2 é", prompt_tokens=11, completion_tokens=5)
    assert request.path == "/v1/chat/completions"
    assert request.body == {
        "model": "some-model",
        "messages": list(MESSAGES),
        "temperature": 0.6,
        "top_p": 0.95,
        "max_tokens": 512,
    }
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert set(request.headers) == {
        "Authorization",
        "Content-Type",
        "Content-Length",
        "Host",
        "User-Agent",
        "Connection",
        "Accept-Encoding",
    }


def test_what_is_off_is_not_sent():
    _, (request,) = ask(right, key_env="", sampling=Sampling(0.0, 1.0, 40, 9))
    assert request.headers["Authorization"] is None
    assert {name: request.body[name] for name in request.body if name not in ("model", "messages")} == {
        "temperature": 0.0,
        "top_k": 40,
        "max_tokens": 9,
    }


def test_a_key_that_is_not_set_is_not_sent(monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    assert ask(right)[1][0].headers["Authorization"] is None
    monkeypatch.setenv("TEST_KEY", " \n")
    assert ask(right)[1][0].headers["Authorization"] is None


@pytest.mark.parametrize("tail", ["/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_the_path_is_completed(tail):
    with serving(right) as server:
        chat(server.url.removesuffix("/v1") + tail + "?version=3").ask(MESSAGES)
        assert server.requests[0].path == "/v1/chat/completions?version=3"
        assert chat(f"{server.url}?version=3").shown == f"{server.url}/chat/completions"


NO_URLS = [
    "",
    "localhost:8000/v1",
    "ftp://a/v1",
    "http://",
    "http://a:99999/v1",
    "http://a b/v1",
    "http://a/v1\n",
    "http://ä/v1",
    "http://a..b/v1",
]


@pytest.mark.parametrize("url", NO_URLS)
def test_a_url_that_is_none(url):
    with pytest.raises(UserError, match="is no URL"):
        chat(url)


def test_no_secret_in_the_config():
    for make in (lambda: chat(f"http://me:{KEY[:5]}@host/v1"), lambda: chat("http://host/v1", key_env=KEY)):
        with pytest.raises(UserError, match="endpoint.key_env") as caught:
            make()
        assert KEY[:5] not in str(caught.value)


@pytest.mark.parametrize("key", [f"{KEY}\nX-More: 1", f"{KEY}\r", "schlüssel"])
def test_a_key_that_no_header_takes(monkeypatch, key):
    monkeypatch.setenv("TEST_KEY", key)
    if key.strip() == KEY:
        assert chat("http://localhost/v1")  # a line's end is of the file that it was read from
        return
    with pytest.raises(UserError, match="variable TEST_KEY") as caught:
        chat("http://localhost/v1")
    assert key not in str(caught.value) and KEY not in str(caught.value)


GARBAGE_BODIES = {
    "no JSON": b"<html>It works!</html>",
    "nothing": b"",
    "no UTF-8": b'{"choices": "\xff"}',
    "too deep": b"[" * 100_000,
    "a list": b"[1]",
    "a number": b"7",
    "a number without end": b'{"choices": ' + b"9" * 5000 + b"}",
    "no choices": b'{"error": {"message": "overloaded"}}',
    "empty choices": b'{"choices": []}',
    "choices are text": b'{"choices": "abc"}',
    "a choice is null": b'{"choices": [null]}',
    "content is null": b'{"choices": [{"message": {"content": null}}],'
    b' "usage": {"prompt_tokens": 5, "completion_tokens": 6}}',
    "content is a list": b'{"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]}',
}


@pytest.mark.parametrize("body", GARBAGE_BODIES.values(), ids=GARBAGE_BODIES.keys())
def test_garbage_is_no_answer_and_may_be_followed_by_a_better_one(body):
    reply, _ = ask(lambda e: e.send(body))
    assert (reply.text, reply.reason, reply.retryable, reply.stop) == (None, GARBAGE, True, "")
    assert reply.detail and "\n" not in reply.detail and len(reply.detail) <= 300
    assert (reply.prompt_tokens, reply.completion_tokens) == ((5, 6) if b"usage" in body else (0, 0))


def test_a_babbling_server_is_cut_off():
    sent = Counter()

    def babble(exchange):
        exchange.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + b'{"choices": [{"message": {"content": "')
        for _ in range(10_000):
            exchange.wfile.write(b"blah " * 2000)
            sent["bytes"] += 10_000

    reply, _ = ask(babble)
    assert reply.reason == GARBAGE and str(MAX_BYTES) in reply.detail
    assert sent["bytes"] < 50_000_000  # of the 100 MB; what the sockets hold may go out


_names = st.sampled_from(["choices", "message", "content", "usage", "prompt_tokens"])
_values = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=8,
)


@given(st.binary(max_size=60) | _values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=60, deadline=None)
def test_no_body_raises(body):
    reply = _answer(body, MESSAGES)
    assert isinstance(reply.text, str) == (reply.reason == "") and reply.reason in ("", GARBAGE)


@pytest.mark.parametrize("text", ["", "no JSON at all", '{"failures": []}', "half \ud800 a pair"])
def test_any_text_is_an_answer(text):
    reply, _ = ask(lambda e: e.answer(text))
    assert reply.text == text.replace("\ud800", "?") and reply.reason == ""


@pytest.mark.parametrize("usage", [None, (-1, True), (2**40, "3")])
def test_tokens_are_estimated_where_they_are_not_reported(usage):
    def script(exchange):
        value = {"choices": [{"message": {"content": "12345678é"}}]}
        exchange.send(
            value if usage is None else value | {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}
        )

    reply, _ = ask(script)
    assert (reply.prompt_tokens, reply.completion_tokens) == (
        6,
        3,
    )  # 9 + 14 bytes and 10 bytes, 4 to a token, rounded up


@pytest.mark.parametrize(
    ("status", "reason", "again"),
    [
        *((status, ERROR, True) for status in (500, 502, 503)),
        *((status, REFUSED, True) for status in (408, 409, 425, 429)),
        *((status, REFUSED, False) for status in (400, 413, 422)),
    ],
)
def test_statuses(status, reason, again):
    reply, _ = ask(lambda e: e.refuse(status, "because\n of it", {"Retry-After": "2.5"}))
    assert reply == Reply(None, reason, f"HTTP {status}: because of it", again, wait_s=2.5 if again else 0.0)


DETAILS = [
    ({"detail": "too long"}, "too long"),
    ({"error": "bad"}, "bad"),
    (b"plain", "plain"),
    (b"\xff", "\ufffd"),
    ([1], "[1]"),
]


@pytest.mark.parametrize(("body", "text"), DETAILS)
def test_what_the_server_says_of_it(body, text):
    assert ask(lambda e: e.send(body, 400))[0].detail == f"HTTP 400: {text}"


def test_what_no_other_request_will_change_ends_the_run(monkeypatch):
    def line(status, key_env="TEST_KEY", headers=()):
        reply, _ = ask(
            lambda e: e.refuse(status, f"Incorrect key: {e.headers['Authorization']}", headers), key_env=key_env
        )
        assert reply.text is None and not reply.retryable and KEY not in str(reply) and "\n" not in reply.stop
        return reply.stop

    assert "into the environment variable TEST_KEY" in line(401) and "into the environment variable TEST_KEY" in line(
        403
    )
    assert "endpoint.key_env" in line(401, key_env="")
    assert "'some-model'" in line(404) and "endpoint.url or .model" in line(404)
    assert f"redirects to https://other/{'***'} (HTTP 308)" in line(308, headers={"Location": f"https://other/{KEY}"})
    monkeypatch.delenv("TEST_KEY")
    assert "set the environment variable TEST_KEY" in line(401)


def test_time_and_network():
    silent, _ = ask(lambda e: e.be_silent(), timeout=0.3)
    assert silent == Reply(None, TIMEOUT, "no whole answer within 0.3 s", retryable=True)
    cut, _ = ask(lambda e: e.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"))
    assert (cut.reason, cut.retryable) == (ERROR, True) and "IncompleteRead" in cut.detail
    with serving(right) as server:
        gone = chat(server.url)
        assert gone.ask(MESSAGES).text == "yes"
    reply = gone.ask(MESSAGES)
    assert (reply.reason, reply.retryable) == (ERROR, True) and "refused" in reply.detail


def test_a_slow_answer_is_an_answer():
    assert ask(lambda e: (time.sleep(0.3), e.answer("late")))[0].text == "late"


def test_the_key_is_in_no_reply():
    def echo(exchange):
        text = f"you sent {exchange.headers['Authorization']}"
        {
            "/a": lambda: exchange.answer(text),
            "/b": lambda: exchange.refuse(400, text),
            "/c": lambda: exchange.send(text.encode(), 500),
            "/d": lambda: exchange.send({"choices": text}),
            "/e": lambda: exchange.wfile.write(f"{text}\r\n".encode()),
        }[exchange.path[:2]]()

    with serving(echo) as server:
        base = server.url.removesuffix("/v1")
        replies = [chat(f"{base}/{name}").ask(MESSAGES) for name in "abcde"]
        assert [request.headers["Authorization"] for request in server.requests] == [f"Bearer {KEY}"] * 5
        client = chat(server.url)
    assert replies[0].text == "you sent Bearer ***" and [reply.reason for reply in replies[1:]] == [
        REFUSED,
        ERROR,
        GARBAGE,
        ERROR,
    ]
    assert all("Bearer ***" in reply.detail for reply in replies[1:])
    for thing in (*replies, client, vars(client)):
        assert KEY not in repr(thing)


def test_a_dummy_key_does_not_change_answers():
    assert _freed(Reply("the list is EMPTY", detail="EMPTY"), "EMPTY") == Reply("the list is EMPTY", detail="***")


def test_retry_after():
    assert _retry_after("3") == 3.0 and _retry_after("0.5") == 0.5
    assert 20 < _retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30
    for nothing in ("", "soon", "-3", "nan", "inf", "Mon, 99 Foo", email.utils.formatdate(0, usegmt=True)):
        assert _retry_after(nothing) == 0.0
