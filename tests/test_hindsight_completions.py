"""One request: what goes out and what never does, and what a reply comes to. How servers misbehave on the wire and in
words is the battery's (`benchmarks/batteries/judges.py`), which runs here once.
"""

import dataclasses
import email.utils
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.batteries import battery, judges
from hintsd_jax.config.schema import EndpointSection
from hintsd_jax.config.secrets import endpoint_problems
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import replies
from hintsd_jax.hindsight.completions import ChatServer, _freed, _retry_after
from hintsd_jax.hindsight.refusals import judge
from hintsd_jax.hindsight.replies import ERROR, PROMPT_TOO_LONG, REFUSED, TIMEOUT, Reply
from hintsd_jax.sampling import Sampling
from tests.chat_server import PROXIES, in_turn, right, serving

KEY = "sk-Zz9+secret/value=="
MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which step? é"})
SAMPLING = Sampling(0.6, 0.95, 0, 512)
CONFIG = EndpointSection(url="http://localhost/v1", model="some-model", key_env="TEST_KEY", timeout_s=20.0)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("TEST_KEY", KEY)


def chat(url="http://localhost/v1", sampling=SAMPLING, **changes):
    return ChatServer(dataclasses.replace(CONFIG, url=url, **changes), sampling)


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
    assert sorted(request.headers) == sorted(
        ["Authorization", "Content-Type", "Content-Length", "Host", "User-Agent", "Connection", "Accept-Encoding"]
    )


FORMS = [
    ({"sampling": Sampling(0.0, 1.0, 40, 9)}, {"temperature": 0.0, "top_k": 40, "max_tokens": 9}),
    ({"max_tokens_field": "max_completion_tokens", "send_sampling": False}, {"max_completion_tokens": 512}),
    ({"max_tokens_field": "none", "send_sampling": False}, {}),
    (
        {"send_sampling": False, "extra_body": {"max_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}}},
        {"max_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}},
    ),
]


@pytest.mark.parametrize(("changes", "sent"), FORMS)
def test_the_form_of_a_request_is_the_configs(changes, sent):
    _, (request,) = ask(right, **changes)
    assert {name: request.body[name] for name in request.body if name not in ("model", "messages")} == sent


def test_headers_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("AZURE", " az-0815-4711 \n")
    reply, (request,) = ask(lambda e: e.answer(e.headers["api-key"]), key_env="", headers_env={"api-key": "AZURE"})
    assert request.headers["api-key"] == "az-0815-4711" and request.headers["Authorization"] is None
    assert reply.text == "***"
    monkeypatch.delenv("AZURE")
    with pytest.raises(UserError, match="set the environment variable AZURE"):
        chat(headers_env={"api-key": "AZURE"})


def test_a_key_that_is_not_set_is_not_sent(monkeypatch):
    for value in ("", " \n"):
        monkeypatch.setenv("TEST_KEY", value)
        assert ask(right)[1][0].headers["Authorization"] is None


@pytest.mark.parametrize("tail", ["/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_the_path_is_completed(tail):
    with serving(right) as server:
        chat(server.url.removesuffix("/v1") + tail + "?version=3").ask(MESSAGES)
        assert server.requests[0].path == "/v1/chat/completions?version=3"
        assert chat(f"{server.url}?version=3").shown == f"{server.url}/chat/completions"


NO_URLS = ["localhost:8000/v1", "ftp://a/v1", "http://", "http://a:99999/v1", "http://a b/v1", "http://a/v1\n"]
NO_URLS += ["http://ä/v1", "http://a..b/v1"]
HEX = "0123456789abcdef0123456789abcdef"
SECRETS = [
    *({"url": f"http://{place}"} for place in ("me:pass-4711@host/v1", "sk-4711@host/v1")),
    *(
        {"url": f"http://host/v1?{query}"}
        for query in ("key=4711", "a=1&API-Key=4711", "a=1;subscription%2Dkey=4711", "sk-4711", f"x={HEX}", "code=4711")
    ),
    {"url": "http://host/v1#access_token=4711"},
    *({"key_env": name} for name in (KEY, HEX.replace("0123", "abcd", 1), "a b")),
    *(
        {"headers_env": {name: value}}
        for name, value in (("api-key", KEY), ("api key", "A"), ("Host", "A"), (KEY, "A"))
    ),
    *({"extra_body": body} for body in ({"api_key": "4711"}, {"a": [{"b": KEY}]}, {"user": {"Authorization": "4711"}})),
    *({"extra_body": body} for body in ({"model": "x"}, {"stream": True}, {"x": float("nan")}, {"x": {1, 2}})),
]
HARMLESS = [
    *(
        {"url": f"https://me.openai.azure.com/openai/deployments/gpt-4o-mini-2024-07-18?{query}"}
        for query in ("api-version=2024-12-01-preview", "deployment=my-long-name_2024_07&debug", "version=3")
    ),
    {"key_env": "OPENAI_API_KEY_2"},
    {"headers_env": {"api-key": "AZURE_KEY", "X-Title": "HF_TOKEN"}},
    {"extra_body": {"prompt_cache_key": "desk", "min_tokens": 3, "thinking": {"type": "disabled", "budget_tokens": 0}}},
]


@pytest.mark.parametrize("url", NO_URLS)
def test_a_url_that_is_none(url):
    with pytest.raises(UserError, match="is no URL"):
        chat(url)


def test_no_secret_in_the_config():
    """Nor what no request can be made of; the refusal repeats nothing of it."""
    for changes in SECRETS:
        problems = endpoint_problems(dataclasses.replace(CONFIG, **changes))
        assert len(problems) == 1 and "endpoint." in problems[0], changes
        assert not any(secret in problems[0] for secret in ("4711", KEY, HEX[8:])), changes
        with pytest.raises(UserError):
            chat(**changes)
    for changes in HARMLESS:
        assert endpoint_problems(dataclasses.replace(CONFIG, **changes)) == [], changes


@pytest.mark.parametrize("key", [f"{KEY}\nX-More: 1", f"{KEY}\r", "schlüssel"])
def test_a_key_that_no_header_takes(monkeypatch, key):
    monkeypatch.setenv("TEST_KEY", key)
    if key.strip() == KEY:
        assert chat()  # a line's end is of the file that it was read from
        return
    with pytest.raises(UserError, match="variable TEST_KEY") as caught:
        chat()
    assert key not in str(caught.value) and KEY not in str(caught.value)


@pytest.mark.parametrize("kind", ["form refused", "question refused", "shape", "wire"])
def test_every_behaviour_of_a_judge(tmp_path, kind):
    """The battery's short form: nothing is a traceback, silent, a lost run or a leak of the key."""
    slow = ("wire: 100 for ever", "shape: many fields")
    played = {name: case for name, case in judges.behaviours().items() if name.startswith(kind) and name not in slow}
    bad = {name: outcome for name, case in played.items() if battery.is_bad(outcome := judges.ask(case, tmp_path))}
    assert len(played) > 15 and bad == {}


def test_a_spoiled_reply_is_an_answer_or_counted(tmp_path):
    outcomes = [judges.ask_spoiled(judges.spoiled(random.Random(n)), tmp_path) for n in range(10)]
    assert not any(battery.is_bad(outcome) for outcome in outcomes)


ANY_SERVER = chat(key_env="")
_names = st.sampled_from(["choices", "message", "content", "usage", "prompt_tokens", "error", "finish_reason", "delta"])
_values = st.recursive(
    st.none() | st.booleans() | st.sampled_from(["text", "length", "y"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=8,
)
_bodies = st.binary(max_size=60) | _values.map(lambda value: json.dumps(value).encode())


@given(_bodies | _bodies.map(lambda body: b"data: " + body + b"\n\ndata: [DONE]"))
@settings(max_examples=80, deadline=None)
def test_no_body_raises(body):
    reply = ANY_SERVER._read(200, {}, body, 1)
    assert isinstance(reply.text, str) == (reply.reason == "") and isinstance(reply.detail, str)
    assert isinstance(ANY_SERVER._read(400, {}, body, 1).detail, str)


@pytest.mark.parametrize("usage", [None, (-1, True), (2**40, "3")])
def test_tokens_are_estimated_where_they_are_not_reported(usage):
    value = {"choices": [{"message": {"content": "12345678é"}}]}
    value |= {} if usage is None else {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}
    reply, _ = ask(lambda e: e.send(value))
    assert (reply.prompt_tokens, reply.completion_tokens) == (
        6,
        3,
    )  # 9 + 14 bytes and 10 bytes, 4 to a token, rounded up


def test_tokens_of_an_answer_without_a_text_are_used_up_too():
    value = {"choices": [{"message": {"content": None}}], "usage": {"prompt_tokens": 5, "completion_tokens": 6}}
    reply = replies.answer(value, 1)
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == (None, 5, 6)


@pytest.mark.parametrize(
    ("status", "reason", "again"),
    [
        *((status, ERROR, True) for status in (500, 502, 503)),
        *((status, REFUSED, True) for status in (408, 409, 425, 429)),
        *((status, REFUSED, False) for status in (400, 422)),
        (413, PROMPT_TOO_LONG, False),
    ],
)
def test_statuses(status, reason, again):
    reply, _ = ask(lambda e: e.refuse(status, "because\n of it", {"Retry-After": "2.5"}))
    assert (reply.stop_if_first != "") == (status in (400, 422))
    assert dataclasses.replace(reply, stop_if_first="") == Reply(
        None, reason, f"HTTP {status}: because of it", again, wait_s=2.5 if again else 0.0
    )


DETAILS = [({"detail": "too bad"}, "too bad"), ({"error": "bad"}, "bad"), (b"plain", "plain"), (b"\xff", "\ufffd")]
DETAILS += [([1], "[1]"), (b"<p>a <b>page</b></p>", "a page"), ({"detail": [{"msg": "é"}]}, '[{"msg": "é"}]')]


@pytest.mark.parametrize(("body", "text"), DETAILS)
def test_what_the_server_says_of_it(body, text):
    assert ask(lambda e: e.send(body, 400))[0].detail == f"HTTP 400: {text}"


def test_what_no_other_request_will_change_ends_the_run(monkeypatch):
    def line(status, headers=(), **changes):
        reply, _ = ask(lambda e: e.refuse(status, f"Incorrect key: {e.headers['Authorization']}", headers), **changes)
        assert reply.text is None and not reply.retryable and KEY not in str(reply) and "\n" not in reply.stop
        return reply.stop

    assert all("into the environment variable TEST_KEY" in line(status) for status in (401, 403))
    assert "endpoint.key_env" in line(401, key_env="")
    assert "'some-model'" in line(404) and "endpoint.url or .model" in line(404)
    place = {"Location": f"https://other/{KEY}?token=4711"}
    assert "redirects to https://other/*** (HTTP 308), which" in line(308, headers=place)
    monkeypatch.delenv("TEST_KEY")
    assert "set the environment variable TEST_KEY" in line(401)


def judged(words, code="", param="", field="max_tokens", extra=()):
    refusal = judge(400, words, code, param, (field, 512), extra)
    return refusal.reason, refusal.mend, refusal.certain


def test_a_long_prompt_is_told_from_a_long_answer():
    for words in (
        "maximum context length is 4096 tokens, you requested 5000",
        "Prompt contains 40000 tokens, too large for model with 32768 maximum context length",
        "too many tokens: total number of tokens in the prompt cannot exceed 4081",
        "the input exceeds the available context",
        "'max_tokens' is too large: 512. This model's maximum context length is 8192 tokens, the input 8000",
    ):
        assert judged(words) == (PROMPT_TOO_LONG, "", False), words
    assert judged("no words of ours", code="context_length_exceeded", param="messages")[0] == PROMPT_TOO_LONG
    for words in (
        "max_tokens is too large: 512. This model supports at most 100 completion tokens",
        "max_tokens: 512 > 100, which is the maximum allowed number of output tokens",
        "max_tokens=512 cannot be greater than max_model_len=500",
    ):
        reason, mend, certain = judged(words)
        assert (reason, certain) == (REFUSED, True) and mend.startswith("lower hindsight.max_tokens"), words


def test_what_to_set_follows_from_the_servers_words():
    assert judged("Extra inputs are not permitted: max_tokens")[1:] == (
        "set endpoint.max_tokens_field = max_completion_tokens",
        True,
    )
    assert "= max_tokens" in judged("unknown max_completion_tokens", field="max_completion_tokens")[1]
    assert "send_sampling = False" in judged("`temperature` is deprecated for this model")[1]
    assert "extra_body (top_k)" in judged("top_k: unexpected", extra=("top_k", "min_p"))[1]
    assert "endpoint.model" in judged("no such model")[1]
    for words in ("Bad Request", "", "the tokens of temperatures"):  # another question may be answered in this form
        assert judged(words)[0] == REFUSED and judged(words)[1] and not judged(words)[2]
    assert judged("flagged by moderation") == (REFUSED, "", False)


def test_time_and_network(monkeypatch):
    silent, _ = ask(lambda e: e.be_silent(), timeout_s=0.3)
    assert silent == Reply(None, TIMEOUT, "no whole answer within 0.3 s", retryable=True)
    with serving(in_turn(lambda e: (time.sleep(0.3), e.answer("late")), right)) as server:
        gone = chat(server.url)
        assert gone.ask(MESSAGES).text == "late" and gone.ask(MESSAGES).text == "yes"
    reply = gone.ask(MESSAGES)
    assert (
        (reply.reason, reply.retryable) == (ERROR, True) and "refused" in reply.detail and "proxy" not in reply.detail
    )
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:1")
    assert "endpoint.use_proxy" in gone.ask(MESSAGES).detail


def test_the_key_is_in_no_reply():
    """Also not as JSON or a URL writes it, nor a part of it where a text is cut."""
    escaped = KEY.replace("+", "\\u002b").replace("/", "\\/")
    long = {"detail": ("x" * 280) + KEY}

    def echo(exchange):
        text = f"you sent {exchange.headers['Authorization']}"
        {
            "/a": lambda: exchange.answer(text),
            "/b": lambda: exchange.refuse(400, text),
            "/c": lambda: exchange.send(text.encode(), 500),
            "/d": lambda: exchange.send({"choices": text}),
            "/e": lambda: exchange.wfile.write(f"{text}\r\n".encode()),
            "/f": lambda: exchange.send(f'{{"you": "sent Bearer {escaped}"}}'.encode(), 422),
            "/g": lambda: exchange.refuse(500, "Bearer sk-Zz9%2Bsecret%2Fvalue%3D%3D"),
            "/h": lambda: exchange.refuse(500, "Bearer " + "*" * 280 + KEY * 3),
        }[exchange.path[:2]]()

    with serving(echo) as server:
        base = server.url.removesuffix("/v1")
        answers = [chat(f"{base}/{name}").ask(MESSAGES) for name in "abcdefgh"]
        client = chat(server.url)
    assert answers[0].text == "you sent Bearer ***" and all("Bearer *" in reply.detail for reply in answers[1:])
    assert _freed(Reply(detail=str(long)), [KEY]).detail.endswith("x***'}")
    for thing in (*answers, client, vars(client)):
        assert KEY not in repr(thing) and "secret" not in repr(thing) and "sk-Zz" not in repr(thing)


def test_a_dummy_key_does_not_change_answers():
    assert _freed(Reply("the list is EMPTY", detail="EMPTY"), ["EMPTY"]) == Reply("the list is EMPTY", detail="***")


def test_retry_after():
    assert _retry_after("3") == 3.0 and _retry_after("0.5") == 0.5
    assert 20 < _retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30
    for nothing in ("", "soon", "-3", "nan", "inf", "Mon, 99 Foo", email.utils.formatdate(0, usegmt=True)):
        assert _retry_after(nothing) == 0.0
