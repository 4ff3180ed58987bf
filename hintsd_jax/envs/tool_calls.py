# SPDX-License-Identifier: Apache-2.0

"""Tool calls in the form that is expected of a policy: an action's text in, an `Action` out, and back.

Eight styles. HERMES (Qwen): `<tool_call>`, one JSON object {"name": str, "arguments": object}, `</tool_call>`, with
nothing but whitespace between; text may stand around the blocks. BARE (Llama 3): the action is nothing but objects
{"name": str, "parameters": object}, separated by ";" or a newline, with or without `<|python_tag|>` before them (or
Llama 4's `<|python_start|>`, what it says, `<|python_end|>`). JSON (what coder models write): every object with "name"
and "arguments" or "parameters", alone or in lists, wherever it stands: bare, in a code fence, between tags. FENCED: the
same, but in code fences only. XML (Qwen3-Coder, Qwen3.5): see `envs.xml_calls`. PYTHONIC (Llama 4), LFM2 and OLMO3: see
`envs.pythonic_calls`. A leading `<think>` block is reasoning: no call is read in it.

Where no call is found, but what looks like one in another form (`envs.other_forms`), that is a problem too: an action
that was meant to call a tool never passes for one that calls none.

One more style, CODE, is of environments whose agents act by code: see `envs.code_blocks`.

Invariant: `parse_action` never raises, whatever the text, takes time in proportion to it, and it is all or nothing: one
call that cannot be read gives a `problem` and no calls. What it accepts survives `render_calls` unchanged and encodes
as UTF-8.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hintsd_jax.envs import json_calls, pythonic_calls, xml_calls
from hintsd_jax.envs.base import Action, ToolCall
from hintsd_jax.envs.call_reading import (
    BARE,
    FENCED,
    HERMES,
    JSON,
    LFM2,
    LFM2_END,
    LFM2_START,
    OLMO3,
    OLMO3_END,
    OLMO3_START,
    PYTHONIC,
    XML,
    CallProblem,
    after_thinking,
)
from hintsd_jax.envs.code_blocks import CODE, NO_CODE, OPEN_BLOCK, TWO_BLOCKS, NoCode, read_block, write_block
from hintsd_jax.envs.other_forms import holds_call
from hintsd_jax.texts import is_encodable

Tools = Sequence[Mapping[str, Any]]

# Kinds of problems (`Action.problem_kind`): not valid JSON, or no Python call; tags, fences or separators; JSON that is
# no call, or an argument twice or without a name; thinking without an end; the same of an action that was cut at its
# limit; a call in another form; in the style CODE no block, two, or one without an end.
PROBLEM_KINDS = ("json", "frame", "not_a_call", "thinking", "cut", "other_form", NO_CODE, TWO_BLOCKS, OPEN_BLOCK)

_EXPECTED = {
    HERMES: 'write each one as <tool_call>{"name": ..., "arguments": {...}}</tool_call>',
    BARE: 'write it as nothing but {"name": ..., "parameters": {...}}',
    JSON: 'write each one as {"name": ..., "arguments": {...}}',
    FENCED: 'write each one as {"name": ..., "arguments": {...}} in a code fence that begins with a line ```json',
    XML: "write each one as <tool_call><function=NAME><parameter=NAME>value</parameter></function></tool_call>",
    PYTHONIC: "write them as a list that begins a line, [name(argument=value), ...]",
    LFM2: f"write them as {LFM2_START}[name(argument=value), ...]{LFM2_END}",
    OLMO3: f"write them, each on a line, as {OLMO3_START}name(argument=value){OLMO3_END}",
}


def render_call(call: ToolCall, style: str = HERMES) -> str:
    """`render_calls` of one call."""
    return render_calls([call], style)


def render_calls(calls: Sequence[ToolCall], style: str = HERMES) -> str:
    """The text of at least one call as the chat templates of its style write it; in JSON the objects alone, in CODE a
    block with Python calls.

    Raises:
      ValueError: an argument is NaN or infinite, or the style cannot write a name or a value (see its module).
    """
    if style == CODE:
        return write_block("\n".join(map(_as_code, calls)))
    if style == XML:
        return xml_calls.write_calls(calls)
    if style in (PYTHONIC, LFM2, OLMO3):
        return pythonic_calls.write_calls(calls, style)
    return json_calls.write_calls(calls, style)


def parse_action(text: str, style: str = HERMES, cut_at: int = 0, tools: Tools = ()) -> Action:
    """Reads every tool call of a sampled action, or its code; never raises. See the module docstring for what is
    accepted.

    cut_at: the number of tokens at which the action was cut; 0 where it came to its end. tools: the documentation of
    those that can be called, by which XML converts its values; without it they all are text.
    """
    try:
        if style == CODE:
            return Action(text, code=_read_code(text))
        calls = xml_calls.read_calls(text, tools) if style == XML else _READERS[style](text)
        if not calls and holds_call(text[after_thinking(text) :]):
            raise CallProblem("other_form", f"no call could be read: {_EXPECTED[style]}")
        return Action(text, calls, style=style)
    except (ValueError, RecursionError) as error:  # RecursionError: the C decoder on thousands of brackets
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        kind = error.kind if isinstance(error, CallProblem | NoCode) else "json"
    if cut_at:
        kind, problem = "cut", f"the action was cut at {cut_at} tokens: {problem}"
    return Action(text, problem=problem, problem_kind=kind, style="" if style == CODE else style)


def _as_code(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


def _read_code(text: str) -> str:
    after = text[after_thinking(text) :]
    try:
        code = read_block(after)
    except NoCode as error:
        if error.kind == NO_CODE and holds_call(after):
            raise CallProblem("other_form", f"a tool call, and {error}") from None
        raise
    if not is_encodable(code):
        raise CallProblem(NO_CODE, "the code holds half of a surrogate pair")
    return code


_READERS: dict[str, Callable[[str], tuple[ToolCall, ...]]] = {
    HERMES: json_calls.read_tagged,
    BARE: json_calls.read_bare,
    JSON: json_calls.read_anywhere,
    FENCED: json_calls.read_fenced,
    PYTHONIC: pythonic_calls.read_lists,
    LFM2: partial(pythonic_calls.read_between_tags, style=LFM2),
    OLMO3: partial(pythonic_calls.read_between_tags, style=OLMO3),
}
