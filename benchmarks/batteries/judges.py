"""Judges that misbehave: what `Endpoint.ask` and a whole training step make of them, and whether the key gets out.

  python -m benchmarks.batteries.judges [--seed N] [--cases N]

Each case is a server on this machine with one behaviour; it repeats the key wherever it can. Three questions are asked:
answers have to come out, be counted by reason, or the run has to end with one line that names what to set. Then replies
that are spoiled at random, and whole steps of `desk_smoke`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import gzip
import io
import json
import logging
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.batteries import battery
from benchmarks.batteries.battery import Case, Ending, Outcome
from hintsd_jax.config.schema import EndpointSection
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.endpoint import Endpoint
from hintsd_jax.hindsight.questions import Question
from hintsd_jax.runs.journal import Journal
from hintsd_jax.sampling import Sampling
from tests.chat_server import serving

KEY = "sk-Zz9+4711/0815-secret=="
MAX_TOKENS = 512
HEAD = b"HTTP/1.1 200 OK\r\n"
SETTINGS = EndpointSection(model="m", key_env="JUDGE_KEY", timeout_s=5.0, retries=1, backoff_s=0.0, max_failures=50)
STEPS = ("hint_sd step: max_tokens", "hint_sd step: truncated", "hint_sd step: too long", "hint_sd step: right")

Script = Callable[[Any], object]


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """want: the answer's text, the reason that is counted, or "ends: <pattern of the line>". requests: the most that
    three questions may cost. changes: of `SETTINGS`.
    """

    script: Script
    want: str
    requests: int = 6
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def key_of(exchange: Any) -> str:
    return f"you sent {exchange.headers['Authorization']}"


def choice(message: Any, finish: Any = "stop", **more: Any) -> dict:
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], **more}


def sends(value: Any, status: int = 200, headers: Any = (), spoil: Callable[[bytes], bytes] = bytes) -> Script:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda exchange: exchange.send(spoil(content), status, headers)


def refuses(status: int, message: str, headers: Any = (), **error: Any) -> Script:
    def script(exchange: Any) -> None:
        exchange.send({"error": {"message": f"{message} {key_of(exchange)}", **error}}, status, headers)

    return script


def raw(content: bytes) -> Script:
    return lambda exchange: exchange.wfile.write(content)


def floods(head: bytes, piece: bytes, pieces: int) -> Script:
    def script(exchange: Any) -> None:
        exchange.wfile.write(head)
        for _ in range(pieces):
            exchange.wfile.write(piece)

    return script


def events(*deltas: Any, finish: str = "stop", done: bool = True) -> bytes:
    lines = [": a comment"]
    lines += [f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}" for delta in deltas]
    lines += (
        [f"data: {json.dumps({'choices': [{'index': 0, 'delta': {}, 'finish_reason': finish}]})}"] if finish else []
    )
    return "\n\n".join(lines + ["data: [DONE]"] * done).encode() + b"\n\n"


def one_refused(refusal: Script) -> Script:
    """Of three questions one is refused."""
    return lambda exchange: refusal(exchange) if exchange.question == "b" else exchange.answer("yes")


YES = {"role": "assistant", "content": "yes"}
TRUNCATED, GARBAGE, REFUSED, ERROR = "truncated", "endpoint_garbage", "endpoint_refused", "endpoint_error"
TIMEOUT, TOO_LONG = "endpoint_timeout", "prompt_too_long"
LONG = (
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4488 in the messages, 512"
)
UNSUPPORTED = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
DATE = email.utils.formatdate(0, usegmt=True)


def behaviours() -> dict[str, Behaviour]:
    """The name is "<kind>: <what it does>"."""
    form, own, shape, wire = _forms(), _own(), _shapes(), _wire()
    return {
        f"{kind}: {name}": behaviour
        for kind, group in (("form refused", form), ("question refused", own), ("shape", shape), ("wire", wire))
        for name, behaviour in group.items()
    }


def _forms() -> dict[str, Behaviour]:
    def ends(status: int, message: str, pattern: str, changes: Any = None, **error: Any) -> Behaviour:
        return Behaviour(refuses(status, message, **error), f"ends: {pattern}", 3, changes or {})

    detail = [{"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]
    completion, field = {"max_tokens_field": "max_completion_tokens"}, "endpoint.max_tokens_field = "
    pairs = {"reasoning_effort": "low"}
    return {
        "max_tokens": ends(400, UNSUPPORTED, f"{field}max_completion_tokens", code="unsupported_parameter"),
        "max_tokens 422": ends(422, "max_tokens: unknown field", f"{field}max_completion_tokens"),
        "max_completion_tokens": ends(400, "unknown max_completion_tokens", f"{field}max_tokens", completion),
        "by its param alone": ends(400, "Bad.", f"{field}max_completion_tokens", param="max_tokens"),
        "temperature": ends(400, "'temperature' does not support 0.6 with this model", "send_sampling = False"),
        "top_p": ends(400, "top_p is not supported", "send_sampling = False"),
        "temperature by its param": ends(400, "Invalid value.", "send_sampling = False", param="temperature"),
        "top_k in a list": Behaviour(sends({"detail": detail}, 422), "ends: send_sampling = False", 3),
        "extra field": ends(400, "Unrecognized request argument supplied: reasoning_effort", "extra_body", {
            "extra_body": pairs
        }),
        "max_tokens too large": ends(400, "max_tokens is too large: 512. At most 100", "lower hindsight.max_tokens"),
        "no room beside the answer": ends(400, LONG.replace("4096", "400"), "lower hindsight.max_tokens"),
        "model": ends(400, "The model 'm' does not exist", "endpoint.model"),
        "model 404": ends(404, "model m not found", "endpoint.url or .model"),
        "path": Behaviour(sends(b"<h1>Not Found</h1>", 404), "ends: endpoint.url or .model", 3),
        "method": ends(405, "Method Not Allowed", "endpoint.url or .model"),
        "no words": Behaviour(sends(b"", 400), "ends: HTTP 400", 3),
        "plain words": Behaviour(sends(b"Bad Request", 400), "ends: HTTP 400: Bad Request", 3),
        "media type": ends(415, "Unsupported Media Type", "HTTP 415"),
        "key": ends(401, "Incorrect API key", "variable JUDGE_KEY"),
        "rights": ends(403, "not for you", "variable JUDGE_KEY"),
        "payment": ends(402, "Insufficient credits", "mend the account"),
        "quota": ends(429, "You exceeded your current quota", "mend the account", code="insufficient_quota"),
        "redirect": Behaviour(
            lambda e: e.send(b"", 307, {"Location": f"https://other.invalid/v1?key={KEY}"}), "ends: redirects", 3
        ),
        "redirect to nowhere": Behaviour(sends(b"", 302), "ends: redirects to nowhere", 3),
        "not modified": Behaviour(sends(b"", 304), "ends: redirects", 3),
        "escape codes in words": ends(400, "\x1b[2J\x1b]0;owned\x07 top_p is not supported", "send_sampling = False"),
        "surrogate in words": ends(400, "\ud800 temperature is not supported", "send_sampling = False"),
        "a long word": ends(400, "temperature is not supported " + "x" * 10**6, "send_sampling = False"),
    }  # fmt: skip


def _own() -> dict[str, Behaviour]:
    long = {
        "OpenAI": refuses(400, LONG, code="context_length_exceeded", param="messages"),
        "vLLM": refuses(400, f"{LONG} in the completion). Please reduce the length.", param="max_tokens", code=400),
        "SGLang": refuses(400, "The input (5000 tokens) is longer than the model's context length (4096 tokens)."),
        "TGI": refuses(422, "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens"),
        "llama.cpp": refuses(500, "the request exceeds the available context size", type="exceed_context_size_error"),
        "gateway": refuses(400, "prompt is too long: 210000 tokens > 200000 maximum"),
        "Gemini": refuses(400, "The input token count (40000) exceeds the maximum number of tokens allowed (32768)."),
        "413": sends(b"Request Entity Too Large", 413),
        "tokens a minute": refuses(429, "Request too large for m on tokens per min (TPM): Limit 1, Requested 2"),
    }
    return {f"too long: {name}": Behaviour(script, TOO_LONG, 3) for name, script in long.items()} | {
        "one of three": Behaviour(one_refused(refuses(400, "Bad Request")), f"yes|{REFUSED}", 3),
        "filter": Behaviour(refuses(400, "blocked by content management policy", code="content_filter"), REFUSED, 3),
        "filter took the answer": Behaviour(sends(choice({"content": None}, "content_filter")), REFUSED, 3),
        "refusal": Behaviour(sends(choice({"content": None, "refusal": "I cannot"})), REFUSED, 3),
        "too many requests": Behaviour(refuses(429, "slow down", {"Retry-After": "-5"}), REFUSED),
        "Retry-After in the past": Behaviour(refuses(503, "later", {"Retry-After": DATE}), ERROR),
        "Retry-After nonsense": Behaviour(refuses(503, "later", {"Retry-After": "nan"}), ERROR),
        "server error": Behaviour(refuses(500, "CUDA out of memory"), ERROR),
        "page": Behaviour(sends(b"<html><title>502 Bad Gateway</title></html>", 502), ERROR),
        "strange status": Behaviour(sends(b"", 599), ERROR),
        "error with status 200": Behaviour(sends({"error": {"message": "overloaded", "code": 502}}), ERROR),
        "error as text": Behaviour(sends({"error": "overloaded"}), ERROR),
        "error in a choice": Behaviour(sends({"choices": [{"error": {"message": "no", "code": 429}}]}), REFUSED),
        "refused form with status 200": Behaviour(
            sends({"error": {"message": "top_p is not supported", "code": 400}}), "ends: send_sampling = False", 3
        ),
    }


def _shapes() -> dict[str, Behaviour]:
    think = {"role": "assistant", "content": None, "reasoning_content": "Let me see"}
    parts = [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "y"}, {"type": "text", "text": "es"}]
    calls = {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    deep = b'{"choices": ' + b"[" * 100_000
    answers = {
        "right": choice(YES),
        "parts": choice({"content": parts}),
        "one part": choice({"content": {"type": "text", "text": "yes"}}),
        "parts of text": choice({"content": ["y", "es"]}),
        "with reasoning": choice(think | YES),
        "first choice empty": {"choices": [{"message": {"content": ""}}, {"message": YES}]},
        "many choices": {"choices": [{"message": YES}] * 100},
        "odd usage": choice(YES, usage={"prompt_tokens": -1, "completion_tokens": "many"}),
        "error is null": choice(YES, error=None),
        "many fields": choice(YES, **{f"f{n}": n for n in range(1000)}),
    }
    truncated = {
        "thinking": choice(think, "length"),
        "thinking, empty": choice(think | {"content": ""}, "length"),
        "thinking elsewhere": choice({"content": "\n", "reasoning": "hm"}, "length"),
        "nothing and cut": choice({"content": None}, "length"),
        "no parts and cut": choice({"content": []}, "length"),
    }
    garbage = {
        "reasoning alone": choice(think),
        "tool calls": choice(calls, "tool_calls"),
        "a function": choice({"content": None, "function_call": {"name": "f"}}),
        "no choices": {"choices": []},
        "choices null": {"choices": None},
        "a choice is null": {"choices": [None]},
        "a message is a list": {"choices": [{"message": [1]}]},
        "content is a number": choice({"content": 7}),
        "content is an image": choice({"content": [{"type": "image_url", "image_url": "x"}]}),
        "a list": [1],
        "nothing": {},
    }
    return {
        **{name: Behaviour(sends(value), "yes", 3) for name, value in answers.items()},
        **{name: Behaviour(sends(value), TRUNCATED, 3) for name, value in truncated.items()},
        **{name: Behaviour(sends(value), GARBAGE) for name, value in garbage.items()},
        "an answer that is cut": Behaviour(sends(choice(YES, "length")), "yes", 3),
        "an empty answer": Behaviour(sends(choice({"content": ""})), "", 3),
        "surrogates": Behaviour(sends(choice({"content": "\ud800yes\udfff"})), "?yes?", 3),
        "deep": Behaviour(sends(deep), GARBAGE),
        "deep and whole": Behaviour(sends(b"[" * 100_000 + b"]" * 100_000), GARBAGE),
        "NaN": Behaviour(sends(b'{"choices": [{"message": {"content": "yes"}}], "usage": NaN}'), "yes", 3),
        "a number without end": Behaviour(sends(b'{"choices": ' + b"9" * 5000 + b"}"), GARBAGE),
        "thinking for ever": Behaviour(sends(choice(think, "length")), "ends: raise hindsight.max_tokens", 4, {
            "max_failures": 3
        }),
        "repeats the key": Behaviour(lambda e: e.answer(key_of(e)), "you sent Bearer ***", 3),
        "repeats the key as JSON": Behaviour(
            sends(b'{"choices": [], "you": "sk-Zz9\\u002b4711\\/0815-secret=="}'), GARBAGE
        ),
    }  # fmt: skip


def _wire() -> dict[str, Behaviour]:
    good, sse = json.dumps(choice(YES)).encode(), {"Content-Type": "text/event-stream"}
    latin = json.dumps(choice({"content": "é"}), ensure_ascii=False).encode("latin-1")
    zipped, bomb = gzip.compress(good), gzip.compress(b" " * 50_000_000)
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    length = f"Content-Length: {len(good)}\r\n\r\n".encode()
    return {
        "stream": Behaviour(sends(events({"content": "y"}, {"content": "es"}), headers=sse), "yes", 3),
        "stream without its end": Behaviour(sends(events({"content": "y"}, finish="", done=False)), GARBAGE),
        "stream, thinking": Behaviour(sends(events({"reasoning": "hm"}, finish="length")), TRUNCATED, 3),
        "stream, error": Behaviour(sends(b'data: {"error": {"message": "overloaded"}}\n\n'), ERROR),
        "stream, garbage": Behaviour(sends(b"data: {\n\ndata: [DONE]\n\n"), GARBAGE),
        "gzip": Behaviour(sends(zipped, headers={"Content-Encoding": "gzip"}), "yes", 3),
        "deflate": Behaviour(sends(zlib.compress(good), headers={"Content-Encoding": "deflate"}), "yes", 3),
        "gzip that is none": Behaviour(sends(good, headers={"Content-Encoding": "gzip"}), ERROR),
        "half a gzip": Behaviour(sends(zipped[:-12], headers={"Content-Encoding": "gzip"}), ERROR),
        "a gzip of 50 MB": Behaviour(sends(bomb, headers={"Content-Encoding": "gzip"}), GARBAGE),
        "br": Behaviour(sends(good, headers={"Content-Encoding": "br"}), ERROR),
        "latin-1": Behaviour(sends(latin, headers={"Content-Type": "application/json; charset=latin-1"}), "é", 3),
        "latin-1 unsaid": Behaviour(sends(latin), "\ufffd", 3),
        "no such charset": Behaviour(sends(latin, headers={"Content-Type": "text/x; charset=hex"}), "\ufffd", 3),
        "UTF-16": Behaviour(sends(good.decode().encode("utf-16")), "yes", 3),
        "a mark before it": Behaviour(sends(b"\xef\xbb\xbf" + good), "yes", 3),
        "page": Behaviour(sends(b"<html>It works!</html>"), GARBAGE),
        "no content": Behaviour(sends(b"", 204), GARBAGE),
        "100 MB": Behaviour(floods(HEAD + b"\r\n", b"x" * 10_000, 10_000), GARBAGE),
        "a chunk of negative size": Behaviour(
            floods(HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n", b"x" * 10_000, 10_000), ERROR
        ),
        "chunks to no end": Behaviour(
            floods(HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 10_000, 10_000), GARBAGE
        ),
        "100 before it": Behaviour(raw(b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + length + good), "yes", 3),
        "103 before it": Behaviour(raw(hints + HEAD + length + good), "yes", 3),
        "100 for ever": Behaviour(floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 10**5), TIMEOUT + "|" + GARBAGE),
        "101": Behaviour(raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), ERROR),
        "silent": Behaviour(lambda e: e.be_silent(), TIMEOUT, 6, {"timeout_s": 0.3}),
        "a byte at a time": Behaviour(lambda e: e.trickle(HEAD + b"X: y\r\n" * 500), TIMEOUT, 6, {"timeout_s": 0.3}),
        "ends at once": Behaviour(raw(b""), ERROR),
        "ends early": Behaviour(raw(HEAD + b"Content-Length: 99\r\n\r\nhalf"), ERROR),
        "mail": Behaviour(lambda e: e.wfile.write(f"220 {key_of(e)}\r\n".encode()), ERROR),
        "many headers": Behaviour(raw(HEAD + b"X: y\r\n" * 1000 + b"\r\n"), ERROR),
        "a long header": Behaviour(raw(HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n"), ERROR),
    }  # fmt: skip


def ask(behaviour: Behaviour, folder: Path) -> Outcome:
    """What three questions come to, and whether it is what was wanted."""
    os.environ["JUDGE_KEY"] = KEY
    journal = folder / f"{time.monotonic_ns()}.jsonl"
    log = io.StringIO()
    with serving(behaviour.script) as server, _captured(log):
        settings = dataclasses.replace(SETTINGS, url=server.url, **behaviour.changes)
        questions = [Question(name, ({"role": "user", "content": name},), np.zeros(2, np.uint32)) for name in "abc"]
        endpoint = Endpoint(settings, Sampling(0.6, 0.95, 20, MAX_TOKENS))
        ended, answers = "", None
        try:
            answers = endpoint.ask(questions, Journal(journal))
        except UserError as error:
            ended = str(error)
        requests = len(server.requests)
    written = journal.read_text() if journal.exists() else ""
    ended = ended.replace(server.url, "http://SERVER/v1")
    says = ended or (f"answer {answers.texts[0]!r}" if answers and answers.texts[0] is not None else "")
    if answers and answers.dropped:
        said = [json.loads(line)["value"]["detail"] for line in written.splitlines()]
        says = f"{dict(answers.dropped)}: {next(filter(None, said), '')}"
    everything = "\n".join((written, ended, repr(answers), repr(vars(endpoint)), log.getvalue()))
    if (found := _leak(everything)) or not says.isprintable():
        return Outcome(Ending.LOST, f"the key, or what is no text, gets out ({found}): {says}")
    if requests > behaviour.requests:
        return Outcome(Ending.LOST, f"{requests} requests: {says}")
    if behaviour.want.startswith("ends: "):
        right = re.search(behaviour.want.removeprefix("ends: "), ended) and "\n" not in ended
        return Outcome(Ending.REFUSED if right else Ending.LOST, says)
    if answers is None:
        return Outcome(Ending.LOST, says)
    wanted = behaviour.want.split("|")
    if not set(answers.texts) - {None} | set(answers.dropped) <= set(wanted):
        return Outcome(Ending.SILENT, f"not {behaviour.want}: {says}")
    if answers.texts.count(None) != answers.dropped.total():
        return Outcome(Ending.SILENT, f"not counted: {answers}")
    return Outcome(Ending.COUNTED if answers.dropped else Ending.FINE, says)


@contextlib.contextmanager
def _captured(log: io.StringIO) -> Iterator[None]:
    """What is printed and logged, at every level."""
    handler, root = logging.StreamHandler(log), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


def _leak(text: str) -> str:
    """A piece of the key that stands in a text."""
    pieces = (KEY, KEY[:12], "0815-secret", json.dumps(KEY)[1:-1])
    return next((piece[:4] for piece in pieces if piece in text), "")


def spoiled(rng: random.Random) -> Behaviour:
    """A right reply with bytes turned, cut, doubled or swapped: an answer, or counted."""
    content = bytearray(json.dumps(choice(YES, usage={"prompt_tokens": 7, "completion_tokens": 3})).encode())
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(content))
        how = rng.randrange(4)
        if how == 0:
            content[place] = rng.randrange(256)
        elif how == 1:
            del content[place : place + rng.randint(1, 30)]
        elif how == 2:
            content[place:place] = content[place : place + rng.randint(1, 30)]
        else:
            content[place:place] = rng.choice([b"null", b"[]", b'"', b"\\", b"{", b"\xff", b"\x00", b"1e999"])
        content = content or bytearray(b" ")
    return Behaviour(sends(bytes(content)), "anything", 6)


def ask_spoiled(behaviour: Behaviour, folder: Path) -> Outcome:
    """As `ask`, for a reply of which nobody knows what it comes to: whatever is answered is one and the same."""
    outcome = ask(behaviour, folder)
    if not outcome.says.startswith("not anything: "):
        return outcome
    return Outcome(
        Ending.COUNTED if "endpoint_" in outcome.says else Ending.FINE, outcome.says[len("not anything: ") :]
    )


def step(name: str, folder: Path) -> Outcome:
    """A whole training step of `desk_smoke` whose reviews come from the server."""
    os.environ["JUDGE_KEY"] = KEY
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))  # the steps have the same ones
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    review = json.dumps({"failures": [{"step": 1, "feedback": f"Go on. {KEY}"}]})
    script: Script = {
        "right": lambda e: e.answer(review),
        "truncated": sends(choice({"content": None, "reasoning_content": "hm"}, "length")),
        "max_tokens": refuses(400, UNSUPPORTED),
        "too long": refuses(400, LONG),
    }[name.partition(": ")[2]]
    workdir = folder / name.replace(" ", "_").replace(":", "")
    with serving(script) as server:
        flags = {"endpoint.url": server.url, "endpoint.model": "m", "endpoint.key_env": "JUDGE_KEY", "optim.steps": 1}
        flags |= {"tasks.tasks_per_step": 2, "tasks.rollouts": 2, "rollout.slots": 4, "rollout.max_steps": 6}
        flags["env.data_dir"] = folder / "data"
        flags |= {"hindsight.analyser": "endpoint", "eval.test_tasks": 0}
        log = io.StringIO()
        with _captured(log):
            printed = battery.command(
                "train", "--config=desk_smoke", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in flags.items())
            )
        requests = len(server.requests)
    files = "\n".join(path.read_text("utf-8", "replace") for path in workdir.rglob("*") if path.is_file())
    if found := _leak("\n".join((files, printed.out, printed.err, log.getvalue()))):
        return Outcome(Ending.LOST, f"the key gets out ({found})")
    if name.endswith("max_tokens"):
        right = printed.status == 2 and "max_completion_tokens" in printed.err and requests <= 8
        return Outcome(
            Ending.REFUSED if right else Ending.LOST,
            f"{requests} requests: {printed.err}".replace(server.url, "http://SERVER/v1"),
        )
    if printed.status:
        return Outcome(Ending.LOST, f"status {printed.status}: {printed.err or printed.out}")
    row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    counts = {key.rpartition("/")[2]: row[key] for key in row if key.startswith("hindsight/dropped/")}
    says = f"{row['hindsight/questions']} questions, {row['hindsight/targets']} targets, dropped {counts}"
    if name.endswith("right"):
        return Outcome(Ending.FINE if row["hindsight/targets"] else Ending.SILENT, says)
    counted = counts.get("truncated", 0) + counts.get("prompt_too_long", 0) == row["hindsight/questions"] > 0
    return Outcome(Ending.COUNTED if counted else Ending.SILENT, says)


def make_cases(rng: random.Random, count: int, folder: Path) -> list[Case]:
    def case(name: str, play: Callable[..., Outcome], what: Any) -> Case:
        return Case(name, lambda: play(what, folder))

    cases = [case(name, ask, behaviour) for name, behaviour in behaviours().items()]
    cases += [case(name, step, name) for name in STEPS]
    return cases + [case(f"spoiled: {n}", ask_spoiled, spoiled(rng)) for n in range(count - len(cases))]


if __name__ == "__main__":
    raise SystemExit(battery.main("judges", "Judges that misbehave", make_cases, 200))
