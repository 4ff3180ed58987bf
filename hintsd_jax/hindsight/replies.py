# SPDX-License-Identifier: Apache-2.0

"""The body of a chat reply: bytes flow in, an answer or the reason why there is none flows out. Nothing in it raises.

Read are replies with status 2xx in the forms that servers send: content as a text or a list of parts, also as a stream
of events that nobody asked for; and what a server says of an error, in the usual forms.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from hintsd_jax.texts import encodable

TIMEOUT, ERROR, GARBAGE, REFUSED = "endpoint_timeout", "endpoint_error", "endpoint_garbage", "endpoint_refused"
TRUNCATED = "truncated"  # as the parser counts an answer that was cut before it could be read
PROMPT_TOO_LONG = "prompt_too_long"  # as the policy's analyser counts it
_BYTES_PER_TOKEN = 4  # where a server does not report its usage
_CHARSETS = ("iso8859", "cp125", "utf-16", "utf-32", "gb", "big5", "shift_jis", "euc", "koi8")  # beside UTF-8
_PAGE = 10_000  # characters of a page of HTML that are looked at


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of one request.

    text: the answer; None: there is none, `reason` is one of the six above and `detail` one line for people.
    retryable: whether the same request may fare better. wait_s: seconds that the server asks to be left alone before
      that.
    stop: where set, the line that ends the run: nothing will work until somebody mends it. stop_if_first: the same,
      unless another question was answered in this form.
    prompt_tokens, completion_tokens: as the server reports them, or estimated from the texts' length where it does
      not. cut: the server ended the answer at its limit of tokens.
    """

    text: str | None = None
    reason: str = ""
    detail: str = ""
    retryable: bool = False
    wait_s: float = 0.0
    stop: str = ""
    stop_if_first: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False


def parsed(content: bytes, content_type: str = "") -> Any:
    """The JSON value of a body; a stream of events as the one reply that it makes.

    Raises:
      ValueError: it is neither.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("RecursionError") from None
    except UnicodeDecodeError:
        text = _decoded(content, content_type)
    except ValueError:
        text = _decoded(content, "")
    if re.match(r"\s*(data|event|id|retry)?:", text):
        return _joined(text)
    return _loaded(text)


def error_of(value: Any) -> Mapping[str, Any] | None:
    """The error that a body holds, as OpenAI's servers write it, or in the place of its first choice; else None."""
    if isinstance(value, dict) and isinstance(value.get("choices"), list) and value["choices"]:
        value = value["choices"][0]
    error = value.get("error") if isinstance(value, dict) else None
    return {"message": error} if isinstance(error, str) and error else error if isinstance(error, dict) else None


def answer(value: Any, prompt_estimate: int) -> Reply:
    """The reply of a body without an error. A garbled one may be followed by a better one."""
    usage = value.get("usage") if isinstance(value, dict) else None
    prompt, completion = (
        _count(usage.get(name) if isinstance(usage, dict) else None) for name in ("prompt_tokens", "completion_tokens")
    )
    choices = value.get("choices") if isinstance(value, dict) else None
    choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    read = [(_text(_message(choice).get("content")), choice) for choice in choices]
    text, choice = next((each for each in read if (each[0] or "").strip()), read[0] if read else (None, {}))
    cut = choice.get("finish_reason") in ("length", "max_tokens")
    reason, detail, retryable = "", "", False
    if not (text or "").strip():
        reason, detail, retryable = _missing(text, choice, cut, said(value))
    if reason:
        return Reply(None, reason, detail, retryable, prompt_tokens=prompt or 0, completion_tokens=completion or 0)
    text = encodable(text or "")
    completion = tokens(text) if completion is None else completion
    prompt = prompt_estimate if prompt is None else prompt
    return Reply(text, prompt_tokens=prompt, completion_tokens=completion, cut=cut)


def tokens(*texts: str) -> int:
    """An estimate."""
    return math.ceil(sum(len(text.encode("utf-8", "replace")) for text in texts) / _BYTES_PER_TOKEN)


def said(value: Any) -> str:
    """What a server says in a body, its JSON value or else its bytes: the message of an error in any of the usual
    forms, or all of it.
    """
    if isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
        return re.sub(r"<[^>]*>", " ", text[:_PAGE]) if text.lstrip().startswith("<") else text
    for name in ("error", "message", "detail"):
        value = value[name] if isinstance(value, dict) and value.get(name) else value
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "JSON of many levels"


def _missing(text: str | None, choice: Mapping[str, Any], cut: bool, words: str) -> tuple[str, str, bool]:
    """(reason, detail, whether it may fare better) where there is no text; ("", "", False) for an empty answer."""
    message = _message(choice)
    thought = any(message.get(name) for name in ("reasoning_content", "reasoning"))
    finish = choice.get("finish_reason")
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        return REFUSED, f"the model refuses: {message['refusal']}", False
    if finish == "content_filter":
        return REFUSED, "the server's filter took the answer", False
    if cut:
        spent = "in reasoning" if thought else "before an answer"
        return TRUNCATED, f"the limit of tokens was reached {spent}", False
    if message.get("tool_calls") or message.get("function_call"):
        return GARBAGE, "a call of a tool in place of an answer, though none was offered", False
    if thought:
        return GARBAGE, "reasoning without an answer: switch it off with endpoint.extra_body", False
    return ("", "", False) if text is not None else (GARBAGE, f"no text in choices[0].message.content: {words}", True)


def _message(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    message = choice.get("message")
    return message if isinstance(message, dict) else {}


def _text(content: Any) -> str | None:
    """Of a message's content; None where it holds none. Parts that are no text (reasoning, images) are left out."""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    kinds = (None, "text", "output_text")
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") in kinds else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if texts else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None


def _decoded(content: bytes, content_type: str) -> str:
    charset = re.search(r"charset=\"?([\w.:-]+)", content_type, re.IGNORECASE)
    try:
        name = codecs.lookup(charset[1]).name if charset else ""
    except LookupError:
        name = ""
    return content.decode(name if name.startswith(_CHARSETS) else "utf-8", "replace")


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("RecursionError") from None


def _joined(text: str) -> Any:
    """Server-sent events, one JSON object each, as one reply."""
    pieces: dict[str, list[str]] = {"content": [], "reasoning_content": [], "refusal": []}
    calls, finish, usage, ended = [], None, None, False
    for line in text.splitlines() if "\n" not in text else text.split("\n"):
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            ended |= data == "[DONE]"
            continue
        event = _loaded(data)
        if error_of(event):
            return event
        usage = (event.get("usage") if isinstance(event, dict) else None) or usage
        choices = event.get("choices") if isinstance(event, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        finish = choice.get("finish_reason") or finish
        delta = choice.get("delta") or choice.get("message")
        for name, value in delta.items() if isinstance(delta, dict) else ():
            name = "reasoning_content" if name == "reasoning" else name
            if name in pieces and (piece := _text(value)):
                pieces[name].append(piece)
            elif name == "tool_calls" and value:
                calls.append(value)
    if not (ended or finish):
        raise ValueError("a stream that ends early")
    message = {name: "".join(parts) or None for name, parts in pieces.items()} | {"tool_calls": calls}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}
