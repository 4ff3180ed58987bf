# SPDX-License-Identifier: Apache-2.0

"""The style in which a chat template writes tool calls: its rendering of one call in, a style of `envs.tool_calls` out.

A template that writes no calls at all has no style of its own: LFM2's, whose vocabulary has the tags of its calls, is
known by them; any other gets HERMES. A style that cannot be read is refused, by its name where it has one.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.call_reading import BARE, FENCED, HERMES, JSON, LFM2, LFM2_START, OLMO3, PYTHONIC, STYLES, XML
from hintsd_jax.envs.tool_calls import render_call
from hintsd_jax.errors import UserError

_CALL = ToolCall("look", {"at": "x"})
# Those that hold others come first: FENCED and HERMES have JSON's object within them, LFM2 has PYTHONIC's list.
_ORDER = (HERMES, XML, LFM2, OLMO3, PYTHONIC, FENCED, BARE, JSON)
# What only the calls of a family have, in a rendering without whitespace.
_FOREIGN = {
    "to=functions.": "gpt-oss (harmony)",
    "｜tool▁call": "DeepSeek",
    "｜DSML｜": "DeepSeek",
    "<|tool_call_begin|>": "Kimi K2",
    "<arg_key>": "GLM",
    "<minimax:tool_call>": "MiniMax",
    "<seed:tool_call>": "Seed-OSS",
    "call:look{": "Gemma 4",
    "[TOOL_CALLS]": "Mistral",
    '"tool_name":': "Cohere",
    "<function=look>{": "Llama's <function=...> tags",
}


def find_style(write: Callable[[Sequence[Mapping[str, Any]]], str], vocabulary: Collection[str], request: str) -> str:
    """The style of a template's calls.

    Args:
      write: the template: a dialogue in, its text out. Raises UserError where it refuses the dialogue.
      vocabulary: the tokenizer's.
      request: what a user says before the call.

    Raises:
      UserError: the template writes calls in a style that cannot be read.
    """
    text = _rendered(write, request)
    for style in _ORDER:
        if _same_quotes(render_call(_CALL, style), style) in _same_quotes(text, style):
            return style
    if _CALL.name not in text:
        return LFM2 if LFM2_START in vocabulary else HERMES
    at = max(0, text.index(_CALL.name) - 40)
    piece = text[at : at + 80]
    squeezed = "".join(text.split())
    family = next((family for mark, family in _FOREIGN.items() if mark in squeezed), None)
    what = f"the format of {family}, which is" if family else "a format that is"
    raise UserError(
        f"the chat template writes tool calls in {what} not supported: {piece!r}. With env.call_style the policy can be"
        f" trained on another: {', '.join(STYLES)}"
    )


def _rendered(write: Callable[[Sequence[Mapping[str, Any]]], str], request: str) -> str:
    """A dialogue with a call as the template writes it; "" where it refuses calls. Some templates take arguments as
    JSON text only, as OpenAI's interface has them.
    """
    for arguments in (_CALL.arguments, '{"at": "x"}'):
        for content in ("", None):
            function = {"type": "function", "id": "call00000", "function": {"name": _CALL.name, "arguments": arguments}}
            calling = {"role": "assistant", "content": content, "tool_calls": [function]}
            try:
                text = write([{"role": "user", "content": request}, calling])
            except UserError:
                continue
            if _CALL.name in text:
                return text
    return ""


def _same_quotes(text: str, style: str) -> str:
    """Without whitespace; of Python calls with one kind of quotes, of which templates use either."""
    text = "".join(text.split())
    return text.replace("'", '"') if style in (PYTHONIC, LFM2) else text
