# SPDX-License-Identifier: Apache-2.0

"""One request to an OpenAI-compatible `/chat/completions` server, and what came of it: never an exception for what a
server does.

Only the messages, the model's name, how to sample and what the config adds go out. Keys are read from the environment
for each request and stand only in its headers; what a server says is freed of them before anybody else sees it.
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
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from hintsd_jax.config.schema import EndpointSection
from hintsd_jax.config.secrets import endpoint_problems
from hintsd_jax.envs.base import Message
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import refusals, replies
from hintsd_jax.hindsight.post import Poster, TooLong
from hintsd_jax.hindsight.replies import ERROR, GARBAGE, PROMPT_TOO_LONG, REFUSED, TIMEOUT, Reply
from hintsd_jax.sampling import Sampling
from hintsd_jax.texts import encodable

MAX_BYTES = 4 * 2**20  # of a reply; 32,000 tokens are some 200 kB
_AGAIN = (408, 409, 425, 429)  # the 4xx that may pass; so may every 5xx
_SECRET_FROM = 8  # characters; shorter keys are dummies such as "EMPTY", which an answer may well contain as a word


class ChatServer:
    """A server, a model and how it samples. Safe to use from several threads.

    Args:
      config: see `docs/config.md`. url: with or without "/chat/completions" at its end. key_env: "" or a variable that
        is not set: no Authorization header.
      sampling: top_p 1 and top_k 0 are not sent: some servers refuse what they do not know.

    Raises:
      UserError: the URL is none or holds a secret, a name of an environment variable cannot be one, a header's variable
        is not set, or a key cannot stand in a header.
    """

    def __init__(self, config: EndpointSection, sampling: Sampling):
        if problems := endpoint_problems(config):
            raise UserError(problems[0])
        self._config = config
        url, self.shown = _completed(config.url)
        fields: dict[str, Any] = {"model": config.model}
        if config.send_sampling:
            fields["temperature"] = sampling.temperature
            fields |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
            fields |= {"top_k": sampling.top_k} if sampling.top_k else {}
        if config.max_tokens_field != "none":
            fields[config.max_tokens_field] = sampling.max_tokens
        self._fields, self._max_tokens = fields | config.extra_body, (config.max_tokens_field, sampling.max_tokens)
        self._poster = Poster(url, config.timeout_s, MAX_BYTES, config.use_proxy)
        self._secrets()

    def ask(self, messages: Sequence[Message]) -> Reply:
        """One request; blocks for the time limit at most."""
        headers = self._secrets()
        secrets = [word for value in headers.values() for word in value.split(" ") if word != "Bearer"]
        messages = [{"role": message["role"], "content": encodable(message["content"])} for message in messages]
        body = json.dumps({"messages": messages} | self._fields).encode()
        headers |= {"Content-Type": "application/json", "User-Agent": "hintsd_jax"}
        try:
            status, received, content = self._poster.post(body, headers)
        except TooLong as error:
            reply = Reply(reason=GARBAGE, detail=f"an answer of {error}", retryable=True)
        except (OSError, http.client.HTTPException) as error:
            reply = self._broken(error)
        else:
            reply = self._read(status, received, content, replies.tokens(*(each["content"] for each in messages)))
        return _freed(reply, secrets)

    def _secrets(self) -> dict[str, str]:
        """Header -> value, of those that hold keys."""
        bearer = {"Authorization": self._config.key_env} if self._config.key_env else {}
        headers = {}
        for header, variable in (bearer | self._config.headers_env).items():
            value = os.environ.get(variable, "").strip()
            if not (value.isascii() and value.isprintable()):
                raise UserError(
                    f"the environment variable {variable} does not hold a key: it has characters that no header takes"
                )
            if header in self._config.headers_env:
                if not value:
                    raise UserError(
                        f"set the environment variable {variable}: endpoint.headers_env sends it as {header}"
                    )
                headers[header] = value
            elif value:
                headers[header] = f"Bearer {value}"
        return headers

    def _broken(self, error: Exception) -> Reply:
        """A request that got no whole reply."""
        cause = (
            error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception) else error
        )
        if isinstance(cause, TimeoutError):
            return Reply(reason=TIMEOUT, detail=f"no whole answer within {self._config.timeout_s:g} s", retryable=True)
        detail = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, ssl.SSLCertVerificationError):
            stop = (
                f"{self.shown} is not trusted ({detail}): give SSL_CERT_FILE its authority's certificate, or mend"
                " endpoint.url"
            )
            return Reply(reason=ERROR, detail=detail, stop=stop)
        if isinstance(cause, OSError) and not self._config.use_proxy and urllib.request.getproxies():
            detail += "; the environment's proxy is not used: endpoint.use_proxy"
        return Reply(reason=ERROR, detail=detail, retryable=True)

    def _read(self, status: int, headers: Mapping[str, str], content: bytes, prompt_estimate: int) -> Reply:
        try:
            value = replies.parsed(content, headers.get("Content-Type", ""))
        except ValueError as problem:
            if not 200 <= status < 300:
                return self._refused(status, headers, content)
            detail = f"not JSON ({type(problem).__name__}): {replies.said(content)}"
            return Reply(reason=GARBAGE, detail=detail, retryable=True)
        if not 200 <= status < 300:
            return self._refused(status, headers, value)
        error = replies.error_of(value)
        if error is None:
            return replies.answer(value, prompt_estimate)
        code = error.get("code")  # gateways pass on what they were told
        return self._refused(code if type(code) is int and 400 <= code < 600 else 500, {}, {"error": error})

    def _refused(self, status: int, headers: Mapping[str, str], value: Any) -> Reply:
        """A reply that is none, by its status and its body: a JSON value, or bytes."""
        error, words = replies.error_of(value) or {}, replies.said(value)
        code, param = (str(error.get(name) or "") for name in ("code", "param"))
        detail = f"HTTP {status}: {words}"
        if stop := self._stop(status, headers, code):
            said = f" ({detail})" if status in (402, 404, 405, 429) else ""
            return Reply(reason=REFUSED if status >= 400 else ERROR, detail=detail, stop=f"{stop}{said}")
        if status < 200 or status >= 500 or status in _AGAIN:
            if refusals.never_fits(words, code):
                return Reply(reason=PROMPT_TOO_LONG, detail=detail)
            reason, wait_s = REFUSED if status in _AGAIN else ERROR, _retry_after(headers.get("Retry-After", ""))
            return Reply(reason=reason, detail=detail, retryable=True, wait_s=wait_s)
        refusal = refusals.judge(status, words, code, param, self._max_tokens, list(self._config.extra_body))
        if not refusal.mend:
            return Reply(reason=refusal.reason, detail=detail)
        line = f"{self.shown} refuses the form of the request: {refusal.mend} ({detail})"
        stop, stop_if_first = (line, "") if refusal.certain else ("", line)
        return Reply(reason=refusal.reason, detail=detail, stop=stop, stop_if_first=stop_if_first)

    def _stop(self, status: int, headers: Mapping[str, str], code: str) -> str:
        """What to do about a status that no other request will change; "" for one that may be this request's own."""
        if status in (401, 403, 407):  # what the server says of a key is not repeated
            named = [name for name in (self._config.key_env, *self._config.headers_env.values()) if name]
            if not named:
                return (
                    f"{self.shown} wants a key (HTTP {status}): name the environment variable that holds it in"
                    " endpoint.key_env"
                )
            if not self._secrets():
                return f"{self.shown} wants a key (HTTP {status}): set the environment variable {named[0]}"
            return (
                f"{self.shown} refuses the key (HTTP {status}): put one that may use {self._config.model!r} into the"
                f" environment variable {' or '.join(named)}"
            )
        if status == 402 or code == "insufficient_quota":
            return f"{self.shown} is not paid for this: mend the account, endpoint.url or .model"
        if status in (404, 405):
            return (
                f"{self.shown} does not have this path or the model {self._config.model!r}: mend endpoint.url or .model"
            )
        if 300 <= status < 400:
            place = (headers.get("Location", "") or "nowhere").partition("?")[0].partition("#")[0]  # no login's tokens
            return f"{self.shown} redirects to {place} (HTTP {status}), which is not followed: mend endpoint.url"
        return ""


def _completed(url: str) -> tuple[str, str]:
    """(the whole URL, what people are shown of it: a query may hold more than they should see)."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    whole, shown = (urlunsplit((parts.scheme, parts.netloc, path, query, "")) for query in (parts.query, ""))
    return whole, shown


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


def _freed(reply: Reply, secrets: Sequence[str]) -> Reply:
    """The reply without the keys, should the server have repeated them, also as JSON or a URL writes them; details as
    one short line of what terminals take as text.
    """
    forms = {form for key in secrets if key for form in (key, json.dumps(key)[1:-1], quote(key, ""), quote(key))}

    def free(text: str, forms: Sequence[str]) -> str:
        for form in forms:
            text = text.replace(form, "***")
        return text

    def line(text: str, limit: int) -> str:
        text = free(text, sorted(forms, key=len, reverse=True))[: 10 * limit]
        return " ".join("".join(each if each.isprintable() else " " for each in text).split())[:limit]

    long = sorted((form for form in forms if len(form) >= _SECRET_FROM), key=len, reverse=True)
    return dataclasses.replace(
        reply,
        text=free(reply.text, long) if reply.text else reply.text,
        detail=line(reply.detail, 300),
        stop=line(reply.stop, 900),
        stop_if_first=line(reply.stop_if_first, 900),
    )
