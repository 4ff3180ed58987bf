# SPDX-License-Identifier: Apache-2.0

"""One request to an OpenAI-compatible `/chat/completions` server, and what came of it: never an exception for what a
server does.

Only the messages, the model's name and how to sample go out. The key is read from the environment for each request and
stands only in its header; what a server says is freed of it before anybody else sees it.
"""

from __future__ import annotations

import dataclasses
import email.utils
import http.client
import json
import math
import os
import ssl
import time
import urllib.error
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from hintsd_jax.envs.base import Message
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.post import Poster
from hintsd_jax.sampling import Sampling
from hintsd_jax.texts import encodable

TIMEOUT, ERROR, GARBAGE, REFUSED = "endpoint_timeout", "endpoint_error", "endpoint_garbage", "endpoint_refused"
MAX_BYTES = 4 * 2**20  # of a reply; 32,000 tokens are some 200 kB
_AGAIN = (408, 409, 425, 429)  # the 4xx that may pass; so may every 5xx
_BYTES_PER_TOKEN = 4  # where a server does not report its usage
_SECRET_FROM = 8  # characters; shorter keys are dummies such as "EMPTY", which an answer may well contain as a word


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of one request.

    text: the answer; None: there is none, `reason` is one of the four above and `detail` one line for people.
    retryable: whether the same request may fare better. wait_s: seconds that the server asks to be left alone before
    that.
    stop: where set, the line that ends the run: nothing will work until somebody repairs it.
    prompt_tokens, completion_tokens: as the server reports them, or estimated from the answer's length where it does
    not. cut: the server ended the answer at its limit of tokens.
    """

    text: str | None = None
    reason: str = ""
    detail: str = ""
    retryable: bool = False
    wait_s: float = 0.0
    stop: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False


class ChatServer:
    """A server, a model and how it samples. Safe to use from several threads.

    Args:
      url: "http(s)://host[:port]/v1", with or without "/chat/completions" at its end.
      model: as the server names it.
      key_env: the environment variable with the key; "" or one that is not set: no Authorization header.
      timeout_s: of one request, as a whole.
      sampling: top_p 1 and top_k 0 are not sent: some servers refuse what they do not know.

    Raises:
      UserError: the URL is none or holds a password, `key_env` cannot be a variable's name, or the key cannot stand in
        a header.
    """

    def __init__(self, url: str, model: str, key_env: str, timeout_s: float, sampling: Sampling):
        self._url, self.shown = _checked(url)
        if key_env and not (key_env.isascii() and key_env.isidentifier()):  # not repeated: it may be the key itself
            raise UserError("endpoint.key_env is no name of an environment variable: give the name, never the key")
        self._model, self._key_env, self._timeout = model, key_env, timeout_s
        self._sampling = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        self._sampling |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        self._sampling |= {"top_k": sampling.top_k} if sampling.top_k else {}
        self._poster = Poster(timeout_s, MAX_BYTES)
        self._key()

    def ask(self, messages: Sequence[Message]) -> Reply:
        """One request; blocks for the time limit at most."""
        key = self._key()
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        body = json.dumps({"model": self._model, "messages": messages} | self._sampling).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "hintsd_jax"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        try:
            status, received, content = self._poster.post(self._url, body, headers)
        except (OSError, http.client.HTTPException) as error:
            return _freed(self._broken(error), key)
        return _freed(self._read(status, received, content, messages), key)

    def _key(self) -> str:
        key = os.environ.get(self._key_env, "").strip() if self._key_env else ""
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                f"the environment variable {self._key_env} does not hold a key: it has characters that no header takes"
            )
        return key

    def _broken(self, error: Exception) -> Reply:
        """A request that got no whole reply."""
        cause = (
            error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception) else error
        )
        if isinstance(cause, TimeoutError):
            return Reply(reason=TIMEOUT, detail=f"no whole answer within {self._timeout:g} s", retryable=True)
        detail = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, ssl.SSLCertVerificationError):
            stop = (
                f"{self.shown} is not trusted ({detail}): give SSL_CERT_FILE its authority's certificate, or mend"
                " endpoint.url"
            )
            return Reply(reason=ERROR, detail=detail, stop=stop)
        return Reply(reason=ERROR, detail=detail, retryable=True)

    def _read(self, status: int, headers: Mapping[str, str], content: bytes, messages: Sequence[Message]) -> Reply:
        if 200 <= status < 300:
            return _answer(content, messages)
        detail = f"HTTP {status}: {_said(content)}"
        if status >= 500 or status in _AGAIN:
            reason = ERROR if status >= 500 else REFUSED
            return Reply(
                reason=reason, detail=detail, retryable=True, wait_s=_retry_after(headers.get("Retry-After", ""))
            )
        return Reply(
            reason=REFUSED if status >= 400 else ERROR, detail=detail, stop=self._stop(status, headers, detail)
        )

    def _stop(self, status: int, headers: Mapping[str, str], detail: str) -> str:
        """What to do about a status that no other request will change; "" for one that may be this request's own."""
        if status in (401, 403):  # what the server says of a key is not repeated
            if not self._key_env:
                return (
                    f"{self.shown} wants a key (HTTP {status}): name the environment variable that holds it in"
                    " endpoint.key_env"
                )
            if not self._key():
                return f"{self.shown} wants a key (HTTP {status}): set the environment variable {self._key_env}"
            return (
                f"{self.shown} refuses the key (HTTP {status}): put one that may use {self._model!r} into the"
                f" environment variable {self._key_env}"
            )
        if status == 404:
            return (
                f"{self.shown} does not have this path or the model {self._model!r} ({detail}): mend endpoint.url or"
                " .model"
            )
        if status < 400:
            place = headers.get("Location", "nowhere")
            return f"{self.shown} redirects to {place} (HTTP {status}), which is not followed: mend endpoint.url"
        return ""


def _checked(url: str) -> tuple[str, str]:
    """(the whole URL, what people are shown of it: a query may hold more than they should see)."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # a port that is none raises
        right = parts.scheme in ("http", "https") and url.isascii() and url.isprintable() and " " not in url
        if host is None:
            right = False
        elif right:
            host.encode("idna")  # as the look-up of its name will do
    except ValueError:
        right = False
    if not right:
        raise UserError("endpoint.url is no URL: write it like http://localhost:8000/v1")
    if "@" in parts.netloc:
        raise UserError("endpoint.url holds a password, and configs are written down: use endpoint.key_env")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    whole, shown = (urlunsplit((parts.scheme, parts.netloc, path, query, "")) for query in (parts.query, ""))
    return whole, shown


def _answer(content: bytes, messages: Sequence[Message]) -> Reply:
    """The text of a reply with status 2xx, or why there is none. A garbled one may be followed by a better one."""
    if len(content) > MAX_BYTES:
        return Reply(reason=GARBAGE, detail=f"an answer of more than {MAX_BYTES} bytes", retryable=True)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        return Reply(reason=GARBAGE, detail=f"not JSON ({type(error).__name__}): {_said(content)}", retryable=True)
    usage = value.get("usage") if isinstance(value, dict) else None
    prompt, completion = (
        _count(usage.get(name) if isinstance(usage, dict) else None) for name in ("prompt_tokens", "completion_tokens")
    )
    try:
        choice = value["choices"][0]
        text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (TypeError, KeyError, IndexError, AttributeError):
        text, cut = None, False
    if not isinstance(text, str):
        detail = f"no text in choices[0].message.content: {_said(content)}"
        return Reply(
            reason=GARBAGE, detail=detail, retryable=True, prompt_tokens=prompt or 0, completion_tokens=completion or 0
        )
    text = encodable(text)
    prompt = _tokens(*(message["content"] for message in messages)) if prompt is None else prompt
    completion = _tokens(text) if completion is None else completion
    return Reply(text, prompt_tokens=prompt, completion_tokens=completion, cut=cut)


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None


def _tokens(*texts: str) -> int:
    """An estimate."""
    return math.ceil(sum(len(text.encode("utf-8", "replace")) for text in texts) / _BYTES_PER_TOKEN)


def _said(content: bytes) -> str:
    """What a server says in a body: the message of an error in any of the usual forms, else the text itself."""
    try:
        value = json.loads(content[:MAX_BYTES])
    except (ValueError, RecursionError):
        value = None
    for name in ("error", "message", "detail"):
        value = value[name] if isinstance(value, dict) and name in value else value
    return value if isinstance(value, str) else content.decode("utf-8", "replace")


def _retry_after(header: str) -> float:
    """Seconds, of a number or a date; 0 for anything else."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _freed(reply: Reply, key: str) -> Reply:
    """The reply without the key, should the server have repeated it; details as one short line."""

    def line(text: str, limit: int) -> str:
        return " ".join((text.replace(key, "***") if key else text).split())[:limit]

    text = reply.text.replace(key, "***") if reply.text and len(key) >= _SECRET_FROM else reply.text
    return dataclasses.replace(reply, text=text, detail=line(reply.detail, 300), stop=line(reply.stop, 600))
