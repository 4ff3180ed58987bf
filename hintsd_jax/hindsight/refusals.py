# SPDX-License-Identifier: Apache-2.0

"""Why a server refused a request: this question alone, or the form that every question has.

Servers share no codes for this, so their words decide: the ones that OpenAI, Azure, vLLM, SGLang, llama.cpp, TGI and
gateways before them use. What no rule knows is the form's fault unless another question was answered in that form.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from hintsd_jax.hindsight.replies import PROMPT_TOO_LONG, REFUSED

_FORM = re.compile(
    r"un(supported|recogni[sz]ed|known|expected)|(not|n't) (be )?(support(s|ed)?|permitted|allowed|recogni[sz]ed)"
    r"|extra (inputs?|fields?)|additional propert",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size|limit)|max_model_len|max_seq_len"
    r"|max(imum)? ([\w-]+ ){0,2}(input|prompt|sequence|model) (length|tokens?)"
    r"|(prompt|input|request|messages?|conversation)\b.{0,60}?\b(too|very) (long|large|many tokens)"
    r"|too many (input |prompt )?tokens|(input|prompt) token count"
    r"|(exceeds?|exceeded|longer than|greater than|larger than).{0,60}?\b(context|input|sequence|prompt)"
    r"|reduce (the length|your prompt|the prompt)|max_new_tokens.{0,60}?must be",
    re.IGNORECASE | re.DOTALL,
)
_NEVER_FITS = re.compile(
    r"context[ _-]?(length|window|size)|request too large|(prompt|input) is too long", re.IGNORECASE
)
_OWN = re.compile(r"content.?(filter|policy|management)|invalid_prompt|moderation|flagged|usage polic", re.IGNORECASE)
_LIMIT = re.compile(r"(?:context[ _-](?:length|window|size)|max_model_len)[^\d,;]{0,40}(\d{1,9})", re.IGNORECASE)
_LOOKED_AT = 4000  # characters of what a server says


@dataclasses.dataclass(frozen=True)
class Refusal:
    """reason: what the question counts as. mend: what to set; "" where it is this question's own. certain: whether it
    is the form's fault whatever came of other questions."""

    reason: str
    mend: str = ""
    certain: bool = False


def judge(
    status: int, words: str, code: str, param: str, max_tokens: tuple[str, int], extra: Collection[str]
) -> Refusal:
    """Args:
    status: of the reply. words: what the server says. code, param: of its error, "" where it has none.
    max_tokens: the request's field and its value. extra: names of the further fields.
    """
    field, most = max_tokens
    words = words[:_LOOKED_AT]
    limit = _LIMIT.search(words)
    if limit and field != "none" and 0 < int(limit[1]) <= most:
        mend = f"lower hindsight.max_tokens: {most} tokens of an answer leave no room for a question"
        return Refusal(REFUSED, mend, certain=True)
    of_form = _FORM.search(words)
    if status == 413 or never_fits("", code) or (not of_form and _TOO_LONG.search(words)):
        return Refusal(PROMPT_TOO_LONG)
    if _OWN.search(f"{code} {words}"):
        return Refusal(REFUSED)
    if mend := _mend(f"{param} {words}", field, extra):
        return Refusal(REFUSED, mend, certain=True)
    fields = "mend endpoint.max_tokens_field, .send_sampling, .extra_body or .model, which make the request's form"
    return Refusal(REFUSED, fields, certain=bool(of_form))


def never_fits(words: str, code: str) -> bool:
    """Whether a status that calls for another try (429, 5xx) says that the prompt is too long for any."""
    return bool(_NEVER_FITS.search(f"{code} {words[:_LOOKED_AT]}"))


def _mend(named: str, field: str, extra: Collection[str]) -> str:
    """What to set, by the field that the server names; "" where it names none that is sent."""

    def names(*fields: str) -> bool:
        return any(re.search(rf"(?<![\w]){re.escape(each)}(?!\w)", named) for each in fields)

    if names(*extra):
        return f"mend endpoint.extra_body ({', '.join(each for each in extra if names(each))})"
    if names("max_tokens", "max_completion_tokens"):
        if re.search(r"too (large|big|high|many)|at most|less than|exceed|greater than|maximum", named, re.IGNORECASE):
            return "lower hindsight.max_tokens"
        other = "max_completion_tokens" if field == "max_tokens" else "max_tokens"
        return f"set endpoint.max_tokens_field = {other if names(other) or field != 'none' else 'max_tokens'}"
    if names("temperature", "top_p", "top_k"):
        return "set endpoint.send_sampling = False"
    if re.search(r"\bmodel\b", named, re.IGNORECASE) and re.search(
        r"not (found|exist|available|served|loaded)|n't exist|unknown|invalid|no such|not a valid", named, re.IGNORECASE
    ):
        return "mend endpoint.model"
    return ""
