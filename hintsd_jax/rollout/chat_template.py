"""A chat template as text: messages in, its rendering out, and the frames around messages, found once by probing.

A template renders whole dialogues. What it writes around an assistant's words is read off a stub dialogue whose last
message is an assistant's sentinel: what follows the sentinel closes a turn, what a generation prompt adds opens the
next one. The format of tool calls is read off a stub with one call.

Invariant: a rendering depends on its messages, tools and the template's variables only, never on the day: templates
that print a date get a fixed one. Control tokens in message contents are written with a space after their first
character, so that no environment's or policy's text can open or close a turn.
"""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from hintsd_jax.envs.base import Message, ToolCall
from hintsd_jax.envs.tool_calls import (
    BARE,
    CLOSE,
    HERMES,
    OPEN,
    PYTHON_TAG,
    STYLES,
    THINK_CLOSE,
    THINK_OPEN,
    render_call,
)
from hintsd_jax.errors import UserError

Tools = Sequence[Mapping[str, Any]]

DATE = datetime.datetime(2024, 7, 26)  # what Llama 3.1's template has where nobody says otherwise
_VARIABLES = {"date_string": DATE.strftime("%d %b %Y")}
# Templates that ask for the day find this macro in place of transformers' clock, which cannot be passed as a variable.
_REPLACED = "".join(f" | replace('%{d}', '{DATE.strftime('%' + d)}')" for d in ("-d", *"aAbBdHIjmMpSyYDFT"))
_CLOCK = "{% macro strftime_now(format) %}{{ format" + _REPLACED + " }}{% endmacro %}\n"
_SENTINEL = "@sampled@"
_STUB = ({"role": "user", "content": "stub"}, {"role": "assistant", "content": _SENTINEL})
_OWN_TAGS = (
    THINK_OPEN,
    THINK_CLOSE,
    OPEN,
    CLOSE,
)  # an assistant's own words, also where a tokenizer calls them control tokens
_CALL = ToolCall("look", {"at": "x"})
_ASKED = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look."})
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}


class Template:
    """The chat template of a tokenizer.

    generation: the text that opens an assistant turn. opening: its part that opens thinking and leaves it open, or "".
    stop: the control token that closes an assistant turn. closing: what follows it before the next message ("\\n" in
    ChatML).
    style: the format of tool calls, see `toolcalls`; HERMES where the template writes none itself.

    `variables` go to the template, e.g. enable_thinking=False, date_string="01 Jan 2025".

    Raises UserError when no frames can be found; the line shows the piece that does not fit.
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any]):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template: put chat_template.jinja beside its tokenizer.json")
        self._tokenizer = tokenizer
        self._variables = _VARIABLES | dict(variables)
        self._control = tuple(sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special))
        self.style = HERMES

        bare, prompting = self.render(_STUB, generate=False), self.render(_STUB)
        if bare.count(_SENTINEL) != 1 or not prompting.startswith(bare) or prompting == bare:
            raise UserError(
                "the chat template does not render assistant text and a generation prompt in one piece each"
            )
        self.generation = prompting[len(bare) :]
        tail = bare.partition(_SENTINEL)[2]
        if self._first_token(self.generation) is None:
            raise UserError(f"the generation prompt does not begin with a control token: {self.generation[:40]!r}")
        stop = self._first_token(tail)
        if stop is None:
            raise UserError(f"the chat template does not close an assistant turn with a control token: {tail[:40]!r}")
        self.stop, self.closing = stop, tail[len(stop) :]
        opened = self.generation.rfind(THINK_OPEN)
        self.opening = self.generation[opened:] if opened >= 0 and THINK_CLOSE not in self.generation[opened:] else ""
        self.style = self._find_style()

    def render(self, messages: Iterable[Message], tools: Tools = (), generate: bool = True) -> str:
        """The dialogue as the template writes it, with `generate` also the generation prompt. `tools` are rendered as
        they are.

        Raises UserError when the template refuses these messages.
        """
        messages = [dict(message, content=self._plain(message)) for message in messages]
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self._text(bool(tools)),
                add_generation_prompt=generate,
                tokenize=False,
                **self._variables,
            )
        except jinja2.TemplateError as error:  # also what a template raises on purpose about an order of roles
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template cannot render the roles {roles}: {error}") from error

    def added(self, messages: Iterable[Message]) -> str:
        """What `messages` add after an assistant turn that its stop token has ended: closing, messages, generation
        prompt.

        Raises UserError when the template lets nothing of an earlier turn stand.
        """
        _, found, text = self.render((*_STUB, *messages)).partition(_SENTINEL + self.stop)
        if not found:
            raise UserError(
                "the chat template rewrites the whole of an assistant turn once messages follow it: set history='template' to follow it"
            )
        return text

    def documentation(self, tools: Tools) -> str:
        """What the template writes about `tools`: its whole block where that is one piece within a message, else what
        the tools add to a list that is there already; as JSON lines where the template has no place for tools in one
        piece."""
        block = _inserted(self.render(_ASKED, generate=False), self.render(_ASKED, tools, generate=False))
        if block is None or any(token in block for token in self._control):
            block = _inserted(
                self.render(_ASKED, [PROBE_TOOL], generate=False),
                self.render(_ASKED, [PROBE_TOOL, *tools], generate=False),
            )
        if block is None or any(token in block for token in self._control):
            block = "\n".join(json.dumps(tool) for tool in tools)
        return block.strip()

    def _text(self, tools: bool) -> str:
        text = self._tokenizer.get_chat_template(
            tools=tools or None
        )  # a tokenizer may have one more for dialogues with tools
        return _CLOCK + text if "strftime_now" in text else text

    def _plain(self, message: Message) -> str:
        content, kept = message["content"], ""
        if message["role"] == "assistant" and self.style == BARE and content.startswith(PYTHON_TAG):
            kept, content = (
                PYTHON_TAG,
                content[len(PYTHON_TAG) :],
            )  # where the policy announces a call: no turn begins with it
        for token in self._control:
            if message["role"] != "assistant" or token not in _OWN_TAGS:
                content = content.replace(token, f"{token[0]} {token[1:]}")
        return kept + content

    def _first_token(self, text: str) -> str | None:
        """The added token that `text` begins with."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        added = self._tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
        return added.content if added is not None and text.startswith(added.content) else None

    def _find_style(self) -> str:
        function = {"type": "function", "function": {"name": _CALL.name, "arguments": _CALL.arguments}}
        try:
            text = self.render(
                (_STUB[0], {"role": "assistant", "content": "", "tool_calls": [function]}), generate=False
            )
        except UserError:  # a template without tool calls may refuse the probe: then it has no format of its own
            return HERMES
        for style in STYLES:
            if "".join(render_call(_CALL, style).split()) in "".join(text.split()):
                return style
        if _CALL.name not in text:
            return HERMES
        at = max(0, text.index(_CALL.name) - 40)
        raise UserError(
            f"the chat template writes tool calls in a format that is not supported: {text[at : at + 80]!r}"
        )


def _inserted(shorter: str, longer: str) -> str | None:
    """The one piece that makes `longer` of `shorter`; None where they differ in more than one place."""
    start = next((n for n, (a, b) in enumerate(zip(shorter, longer)) if a != b), len(shorter))
    end = len(longer) - (len(shorter) - start)
    return longer[start:end] if end >= start and longer[end:] == shorter[start:] else None
