# SPDX-License-Identifier: Apache-2.0

"""A chat template as text: messages in, their rendering out, and the frames that the template writes around messages.

A template renders whole dialogues. What it writes around an assistant's text is read off a stub dialogue whose last
message is an assistant's sentinel: what follows the sentinel closes an assistant message, what a generation prompt adds
opens the next one. The style of tool calls is read off a stub with one call (`rollout.call_style`). What a template has
no place for (tools, a system message, tool results, two user messages in a row) stands elsewhere instead
(`rollout.tool_messages`), and `adaptation` says so.

Invariants: nothing of the messages and tools is left out silently. A rendering depends on its messages, tools and the
template's variables only, never on the day: templates that print a date get a fixed one. No text of a message or a tool
becomes structure (`rollout.guard`). Of a tokenizer's named templates one is used for everything.
"""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from hintsd_jax.envs.base import Message
from hintsd_jax.envs.call_reading import BARE, HERMES, PYTHON_TAG, THINK_CLOSE, THINK_OPEN
from hintsd_jax.errors import UserError
from hintsd_jax.rollout import tool_messages
from hintsd_jax.rollout.call_style import find_style
from hintsd_jax.rollout.guard import OWN, Guard, Plain, plain_tool, texts_of
from hintsd_jax.sampling.prefix import common_prefix_length

Tools = Sequence[Mapping[str, Any]]

# What Llama 3.1's template has where nobody says otherwise.
DATE = datetime.datetime(2024, 7, 26)
_VARIABLES = {"date_string": DATE.strftime("%d %b %Y")}
# Templates that ask for the day get this macro in place of transformers' clock, which cannot be passed as a variable.
_REPLACED = "".join(f" | replace('%{d}', '{DATE.strftime('%' + d)}')" for d in ("-d", *"aAbBdHIjmMpSyYDFT"))
_CLOCK = "{% macro strftime_now(format) %}{{ format" + _REPLACED + " }}{% endmacro %}\n"
_SENTINEL = "@sampled@"
_STUB: tuple[Message, ...] = ({"role": "user", "content": "stub"}, {"role": "assistant", "content": _SENTINEL})
_REQUEST: tuple[Message, ...] = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look."})
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
_UNHEARD = "unheard_of_tool"  # names that no template has in its own words
_UNHEARD_PARTS = (_UNHEARD, "Does what nobody heard of.", "unheard_of_place")
_UNHEARD_TOOL = {
    "type": "function",
    "function": {
        "name": _UNHEARD,
        "description": _UNHEARD_PARTS[1],
        "parameters": {"type": "object", "properties": {_UNHEARD_PARTS[2]: {"type": "string"}}},
    },
}


class Template:
    """The chat template of a tokenizer.

    Attributes:
      generation_prompt: the text that opens an assistant message.
      thinking_prefix: its part that opens thinking and leaves it open, or "".
      stop_token: the control token that closes an assistant message.
      closing: what follows the stop token before the next message ("\\n" in ChatML).
      style: of tool calls, see `envs.tool_calls` and `rollout.call_style`.
      adaptation: None, or one line: what the template has no place for, and where it stands instead; and which of
        several named templates is used.

    Args:
      tokenizer: of transformers, with a chat template.
      variables: for the template, e.g. enable_thinking=False, date_string="01 Jan 2025".
      call_style: "auto", or a style in place of the template's.

    Raises:
      UserError: the template has no such frames; the line shows the piece that does not fit.
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any], call_style: str = "auto"):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template: put chat_template.jinja beside its tokenizer.json")
        self._tokenizer = tokenizer
        self._variables = _VARIABLES | dict(variables)
        self._source, note = _chosen(tokenizer.chat_template)
        self._guard = Guard(tokenizer)  # until the frames are known
        self.style = HERMES
        # Until they are probed:
        self._lists_tools = self._takes_system = self._takes_results = self._takes_neighbours = True

        bare, prompting = self.render(_STUB, generate=False), self.render(_STUB)
        if bare.count(_SENTINEL) != 1 or not prompting.startswith(bare) or prompting == bare:
            raise UserError(
                "the chat template does not render assistant text and a generation prompt in one piece each"
            )
        self.generation_prompt = prompting[len(bare) :]
        tail = bare.partition(_SENTINEL)[2]
        if self._first_token(self.generation_prompt) is None:
            raise UserError(
                f"the generation prompt does not begin with a control token: {self.generation_prompt[:40]!r}"
            )
        stop = self._first_token(tail)
        if stop is None:
            raise UserError(f"the chat template does not close an assistant turn with a control token: {tail[:40]!r}")
        self.stop_token, self.closing = stop, tail[len(stop) :]
        _, opened, rest = self.generation_prompt.rpartition(THINK_OPEN)
        self.thinking_prefix = opened + rest if opened and THINK_CLOSE not in rest else ""
        if call_style == "auto":
            write = lambda messages: self._apply(messages, (), generate=False)
            call_style = find_style(write, tokenizer.get_vocab(), _STUB[0]["content"])
        self.style = call_style
        self.adaptation = "; ".join([*self._adapt(), *([note] if note else [])]) or None
        self._guard = self._find_guard()

    def render(self, messages: Iterable[Mapping[str, Any]], tools: Tools = (), generate: bool = True) -> str:
        """The dialogue as the template writes it, with `generate` also the generation prompt.

        Raises:
          UserError: the template refuses these messages.
        """
        messages, guard = list(messages), self._guard
        text = self._written(messages, tools, generate, guard.plain)
        if guard.is_suspicious(texts_of(messages, tools)):
            # Written apart is not enough where the tokenizer deletes the space, or the template joins two contents.
            safe = self._written(messages, tools, generate, guard.neutral)
            if guard.structure(text) != guard.structure(safe):
                return safe
        return text

    def _written(self, messages: Sequence[Mapping[str, Any]], tools: Tools, generate: bool, plain: Plain) -> str:
        """The dialogue with `plain` contents and tools."""
        contents: list[Mapping[str, Any]] = [
            {"role": message["role"], "content": self._plain(message, place, plain)}
            for place, message in enumerate(messages)
        ]
        tools = [plain_tool(tool, plain) for tool in tools]
        if tools and not self._lists_tools:
            documentation = tool_messages.documentation(tools, self.style)
            contents, tools = tool_messages.with_documentation(contents, documentation), []
        if not self._takes_system:
            contents = tool_messages.without_system(contents)
        if not self._takes_results:
            contents = tool_messages.without_results(contents)
        if not self._takes_neighbours:
            contents = tool_messages.without_neighbours(contents)
        return self._apply(contents, tools, generate)

    def _apply(self, messages: Sequence[Mapping[str, Any]], tools: Tools, generate: bool) -> str:
        """The template itself."""
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                chat_template=self._source,
                add_generation_prompt=generate,
                tokenize=False,
                **self._variables,
            )
        except Exception as error:  # what a template raises on purpose about an order of roles, and whatever it does
            roles = ", ".join(message["role"] for message in messages)
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            said = " ".join(str(error).split())[:300]
            raise UserError(f"the chat template cannot render the roles {roles}: {kind}{said}") from error

    def added(self, messages: Iterable[Message]) -> str:
        """What `messages` add after an assistant message that its stop token has ended: closing, messages, generation
        prompt.

        Raises:
          UserError: the template lets nothing of an earlier message stand.
        """
        _, sentinel, text = self.render((*_STUB, *messages)).partition(_SENTINEL + self.stop_token)
        if not sentinel:
            raise UserError(
                "the chat template rewrites the whole of an assistant turn once messages follow it:"
                " set chat.history = 'template' to follow it"
            )
        return text

    def documentation(self, tools: Tools) -> str:
        """What the template writes about `tools`: its whole block where that is one piece within a message, else what
        the tools add to a list that is there already; JSON lines where it writes tools in several pieces.
        """
        for listed in ((), (PROBE_TOOL,)):
            without, with_tools = (self.render(_REQUEST, more, False) for more in (listed, (*listed, *tools)))
            block = _inserted(without, with_tools)
            if block is not None and not any(token in block for token in self._guard.control):
                return block.strip()
        return "\n".join(json.dumps(tool) for tool in tools).strip()

    def plain(self, text: str) -> str:
        """The text as a user's or a tool's message has it."""
        return self._guard.plain(text, False)

    def plain_action(self, text: str) -> str:
        """The text as a message of the assistant has it, in which tags stand."""
        return self._plain({"role": "assistant", "content": text}, 1, self._guard.plain)

    def _plain(self, message: Mapping[str, Any], place: int, plain: Plain) -> str:
        role, content, kept = message["role"], message["content"], ""
        if role == "assistant" and self.style == BARE and content.startswith(PYTHON_TAG):
            # here it announces a call, and no message begins with it
            kept, content = PYTHON_TAG, content[len(PYTHON_TAG) :]
        authored = role == "assistant" or (role == "system" and place == 0) or bool(message.get(OWN))
        return kept + plain(content, authored)

    def _find_guard(self) -> Guard:
        """Guards the tokens that begin and end messages, and the tags that the template writes."""
        after = [self._after_stub(role, "Done.") for role in ("user", "tool")]
        opened = [self.render(_REQUEST, generate=False), self.generation_prompt]
        opened += [text.removeprefix(self.closing) for text in after]
        frames = [self.stop_token, *(self._first_token(text.lstrip()) for text in opened)]
        written = [self.render(_REQUEST, (PROBE_TOOL,)), *after]
        guard = Guard(self._tokenizer, filter(None, frames), written)
        guarded = "\n".join(sorted(guard.control | guard.tags))
        self._guard = guard
        for role in ("user", "tool"):
            attacked, harmless = (guard.structure(self._after_stub(role, text)) for text in (guarded, "Done."))
            if attacked != harmless:
                raise UserError("the tokenizer makes control tokens of any text: tokenizer.json must be repaired")
        return guard

    def _after_stub(self, role: str, text: str) -> str:
        try:
            return self.added([{"role": role, "content": text}])
        except UserError:  # its frames are then those of the generation prompt alone
            return ""

    def _adapt(self) -> list[str]:
        """Finds out what the template has no place for, a line each; from here on `render` puts it elsewhere."""
        lines = []
        self._takes_system = self._shows(_REQUEST, "Be brief.")
        if not self._takes_system:
            lines.append("it takes no system message, which stands before the first user message instead")
        self._takes_results = self._shows((*_STUB, {"role": "tool", "content": _UNHEARD}), _UNHEARD)
        if not self._takes_results:
            lines.append("it takes no tool messages, so results stand in user messages, in <tool_response>")
        unheard = {"role": "user", "content": _UNHEARD}
        self._takes_neighbours = all(
            self._shows(before, _UNHEARD) for before in ((_STUB[0], unheard), (*_STUB, _STUB[0], unheard))
        )
        if not self._takes_neighbours:
            lines.append("it takes no two user messages in a row, which are written as one")
        self._lists_tools = all(
            self._shows(request, part, (_UNHEARD_TOOL,))
            for request in (_REQUEST, _REQUEST[1:])
            for part in _UNHEARD_PARTS
        )
        if not self._lists_tools:
            place = "into the system message" if self._takes_system else "before the first user message"
            lines.append(f"it lists no tools, so their documentation is written {place}")
        return lines

    def _shows(self, messages: Sequence[Message], text: str, tools: Tools = ()) -> bool:
        try:
            return text in self.render(messages, tools)
        except UserError:
            return False

    def _first_token(self, text: str) -> str | None:
        """The added token that `text` begins with."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        added = self._tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
        return added.content if added is not None and text.startswith(added.content) else None


def _chosen(templates: str | Mapping[str, str]) -> tuple[str, str]:
    """The text of a tokenizer's template, and a line where it is one of several: the one that transformers takes for
    dialogues with tools, whether a dialogue has any, so that what answers an action is written as its prompt was.
    """
    note = ""
    if isinstance(templates, Mapping):
        name = next((name for name in ("tool_use", "default") if name in templates), None)
        if name is None:
            raise UserError(
                f"the tokenizer names the chat templates {', '.join(sorted(templates))}, and none of them 'tool_use' or"
                " 'default': rename the one to use"
            )
        templates, note = templates[name], f"of {', '.join(sorted(templates))} it is {name!r}, for all that is read"
    return (_CLOCK + templates if "strftime_now" in templates else templates), note


def _inserted(shorter: str, longer: str) -> str | None:
    """The one piece that makes `longer` of `shorter`; None where they differ in more than one place."""
    start = common_prefix_length(shorter, longer)
    end = len(longer) - (len(shorter) - start)
    return longer[start:end] if end >= start and longer[end:] == shorter[start:] else None
