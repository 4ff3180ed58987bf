# SPDX-License-Identifier: Apache-2.0

"""Settings of an endpoint: what no request can be made of, and secrets, because configs are written down.

What looks like a secret in the query of a URL: a parameter whose name, without case and signs, is one of
`SECRET_NAMES` or ends like them ("x-api-key", "accessToken"), and whatever has the shape of one: it begins like a key
("sk-...", "Bearer ...") or holds 20 letters and digits in a row. "api-version=2024-10-21" is neither.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from hintsd_jax.config.schema import EndpointSection

SECRET_NAMES = (
    *(
        "auth",
        "authorization",
        "bearer",
        "code",
        "credential",
        "credentials",
        "jwt",
        "key",
        "passwd",
        "password",
        "pwd",
    ),
    *("secret", "session", "sig", "signature", "token"),
)
_ENDINGS = ("credential", "key", "password", "secret", "signature", "token")
_BEGINS = re.compile(r"sk-\w|(sk|pk|rk|hf|gh[a-z]|xai|gsk|glpat|xox[a-z])[-_]\w{12}|AIza|eyJ|(?i:bearer|basic)\s")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OUR_HEADERS = (
    *("accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host", "te"),
    *("trailer", "transfer-encoding", "upgrade"),
)
_OUR_FIELDS = ("messages", "model", "stream")


def endpoint_problems(endpoint: EndpointSection) -> list[str]:
    """One line for each; none of them repeats a secret."""
    problems = [_url_problem(endpoint.url)] if endpoint.url else []
    problems.append(_variable_problem("endpoint.key_env", endpoint.key_env) if endpoint.key_env else "")
    for header, variable in endpoint.headers_env.items():
        if not _HEADER.fullmatch(header) or header.lower() in _OUR_HEADERS or _looks_secret(header):
            problems.append("endpoint.headers_env sets what is no header, or one of every request: write api-key=NAME")
        else:
            problems.append(_variable_problem(f"endpoint.headers_env[{header!r}]", variable))
    problems.append(_body_problem(endpoint.extra_body))
    return [problem for problem in problems if problem]


def _url_problem(url: str) -> str:
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
        return "endpoint.url is no URL: write it like http://localhost:8000/v1"
    if "@" in parts.netloc:
        return "endpoint.url holds a password, and configs are written down: use endpoint.key_env"
    for name, value in parse_qsl(f"{parts.query}&{parts.fragment}".replace(";", "&"), keep_blank_values=True):
        if _names_secret(name) or _looks_secret(name) or _looks_secret(value):
            return (
                "endpoint.url holds what looks like a key in its query, and configs are written down: use"
                " endpoint.key_env, or endpoint.headers_env for a header of another name"
            )
    return ""


def _variable_problem(setting: str, name: Any) -> str:
    """The name is not repeated: it may be the key itself."""
    usable = isinstance(name, str) and name.isascii() and name.isidentifier()
    if usable and (name in os.environ or not _looks_secret(name)):
        return ""
    return f"{setting} is no name of an environment variable: give the name, never the key"


def _body_problem(body: Mapping[str, Any]) -> str:
    ours = sorted(set(body) & set(_OUR_FIELDS))
    if ours:
        return f"endpoint.extra_body sets {', '.join(ours)}, which every request sets itself: leave it out"
    try:
        json.dumps(body, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return f"endpoint.extra_body cannot be written as JSON ({error}): use texts, finite numbers, lists and mappings"
    for name, value in _leaves("", body):
        if isinstance(value, str) and (_names_secret(name, ()) or _BEGINS.match(value)):
            return "endpoint.extra_body holds a key, and configs are written down: use endpoint.headers_env"
    return ""


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for inner, each in value.items():
            yield from _leaves(str(inner), each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(name, each)
    else:
        yield name, value


def _names_secret(name: str, endings: tuple[str, ...] = _ENDINGS) -> bool:
    plain = re.sub(r"[^a-z]", "", name.lower())
    return plain in SECRET_NAMES or plain in ("apikey", "accesstoken") or plain.endswith(endings)


def _looks_secret(text: str) -> bool:
    return bool(_BEGINS.match(text)) or any(
        re.search(r"\d", run) and re.search(r"[A-Za-z]", run) for run in re.findall(r"[A-Za-z0-9+/=]{20,}", text)
    )
