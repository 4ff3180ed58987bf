"""Chat rendering: messages in, only the token ids that they add out.

A template renders whole dialogues, while an episode only grows. So the text that new messages add is read off the template
itself: render a stub dialogue whose last message is an assistant's sentinel, followed by the new messages and
the generation prompt, and keep what comes after the sentinel and its end-of-turn token. Only that piece is
tokenised, once.

Invariant 1: prompt + sampled ids + deltas is the episode, and equals the template's rendering of the same
dialogue, text and ids. That is verified on probe dialogues when a `ChatFormat` is built. Some templates break it by
rewriting earlier turns (stock Qwen3 drops earlier thinking); `history` says which truth holds then.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from hintsd_jax.envs.base import Message
from hintsd_jax.errors import UserError

_SENTINEL = "@sampled@"
_STUB = ({"role": "user", "content": "stub"}, {"role": "assistant", "content": _SENTINEL})

_CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>'
_PROBES = tuple(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look twice."},
        {"role": "assistant", "content": f"{thought}{_CALL}\n{_CALL}"},
        {"role": "tool", "content": '{"seen": 1}'},
        {"role": "tool", "content": "two\nlines"},
        {"role": "assistant", "content": f"{thought}Done."},
        {"role": "user", "content": "Thanks. Once more?"},
    )
    for thought in ("", "<think>\nhm\n</think>\n\n")
)


@dataclass(frozen=True)
class Delta:
    """Token ids that messages add; `branch` is the index in `ids` where the generation prompt starts."""

    ids: tuple[int, ...]
    branch: int


class ChatFormat:
    """A tokenizer and its chat template, as the frames of an append-only episode.

    `stop_ids`: token ids that close a sampled action; the first is the one the template writes.
    `vocab_size`: the largest token id plus one; a policy must have at least as many.
    `deviation`: None, or with history="keep" one line that shows where the template rewrites earlier turns.

    history=None (the default) refuses a template that rewrites earlier turns; "keep" lets the sampled tokens
    stand, a declared deviation from the template. ("template", one row per step, is not built yet.)
    `template_kwargs` go to the template, e.g. enable_thinking=False.

    Control tokens in message contents are written with a space after their first character, so that no
    environment's or policy's text can open or close a turn.

    Raises UserError when the template cannot be used this way; the line shows the differing piece.
    """

    def __init__(self, tokenizer: Any, *, history: str | None = None, **template_kwargs: Any):
        if history not in (None, "keep", "template"):
            raise UserError(f"history {history!r}: use 'keep' or 'template'")
        if history == "template":
            raise UserError("history 'template' is not built yet: use 'keep', or a chat template that keeps earlier turns as they are")
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template: put chat_template.jinja beside its tokenizer.json")
        self._tokenizer = tokenizer
        self._template_kwargs = template_kwargs
        self._control = tuple(sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special))
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

        bare, prompting = self._render(_STUB), self._render(_STUB, generate=True)
        if bare.count(_SENTINEL) != 1 or not prompting.startswith(bare) or prompting == bare:
            raise UserError("the chat template does not render assistant text and a generation prompt in one piece each")
        self._generation = prompting[len(bare) :]
        generation_ids, tail = self._encode(self._generation), bare.partition(_SENTINEL)[2]
        tail_ids = self._encode(tail)
        if not tail_ids or tail_ids[0] not in tokenizer.added_tokens_decoder:
            raise UserError(f"the chat template does not close an assistant turn with a control token: {tail[:40]!r}")
        if generation_ids[0] not in tokenizer.added_tokens_decoder:
            raise UserError(f"the generation prompt does not begin with a control token: {self._generation[:40]!r}")
        self._generation_ids = generation_ids
        stop = tokenizer.added_tokens_decoder[tail_ids[0]].content
        if not tail.startswith(stop):
            raise UserError(f"the chat template writes {tail[:40]!r} after assistant text, which does not begin with {stop!r}")
        self._stop = stop
        self._closing = tail[len(stop) :]  # "\n" in ChatML: outside the action, before the next message
        eos = tokenizer.eos_token_id
        self.stop_ids = (tail_ids[0],) + ((eos,) if eos is not None and eos != tail_ids[0] else ())

        self._verify_feedback()
        self.deviation = next((text for probe in _PROBES if (text := self._difference(probe))), None)
        if self.deviation and history is None:
            raise UserError(
                f"the chat template rewrites earlier turns: {self.deviation}."
                " Use a template that keeps them, or set history='keep' to let the sampled tokens stand"
            )

    def prompt(self, messages: Iterable[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Delta:
        """The first messages and the generation prompt. `tools` are rendered by the template, as they are."""
        return self._delta(self._render(self._plain(messages), tools, generate=True))

    def delta(self, messages: Iterable[Message]) -> Delta:
        """What follows an action span that ended with a stop token: the closing of its turn, the messages, the
        generation prompt."""
        return self._delta(self._added(messages))

    def feedback(self, text: str) -> tuple[int, ...]:
        """One more user message and the generation prompt, to follow `tokens[:branch]` of an episode, which already
        ends with a closed message."""
        return self._delta(self._added([{"role": "user", "content": text}])[len(self._closing) :]).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an action span, without the stop token that closed it."""
        ids = [int(token) for token in ids]
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _render(self, messages: Iterable[Message], tools: Sequence[Mapping[str, Any]] = (), generate: bool = False) -> str:
        messages = list(messages)
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=generate,
                tokenize=False,
                **self._template_kwargs,
            )
        except jinja2.TemplateError as error:  # also what a template raises on purpose about an order of roles
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template cannot render the roles {roles}: {error}") from error

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _added(self, messages: Iterable[Message]) -> str:
        text = self._render((*_STUB, *self._plain(messages)), generate=True)
        return text.partition(_SENTINEL + self._stop)[2]

    def _delta(self, text: str) -> Delta:
        if not text.endswith(self._generation):
            raise UserError(f"the chat template does not end with its generation prompt: {text[-60:]!r}")
        # tokenised apart: they meet at a control token, so the ids are those of the joint text (verified on the probes)
        before = self._encode(text[: -len(self._generation)])
        return Delta(before + self._generation_ids, len(before))

    def _plain(self, messages: Iterable[Message]) -> list[Message]:
        return [dict(message, content=self._neutral(message["content"])) for message in messages]

    def _neutral(self, content: str) -> str:
        for token in self._control:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return content

    def _difference(self, messages: Sequence[Message]) -> str | None:
        """One line where prompt + actions + deltas leave the template's own rendering of `messages`; None if nowhere."""
        actions = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        ids, text = list(self.prompt(messages[: actions[0]]).ids), self._render(messages[: actions[0]], generate=True)
        for index, end in zip(actions, [*actions[1:], len(messages)], strict=True):
            ids += self._encode(messages[index]["content"]) + self.stop_ids[:1] + self.delta(messages[index + 1 : end]).ids
            text += messages[index]["content"] + self._stop + self._added(messages[index + 1 : end])
        truth = self._render(messages, generate=True)
        return _compare(text, truth) or (None if tuple(ids) == self._encode(truth) else _RETOKENISED)

    def _verify_feedback(self) -> None:
        """A user message after any closed message (user, tool) must read as the template itself would write it."""
        advice = {"role": "user", "content": "Take the other one."}
        for history in (_PROBES[0][:2], _PROBES[0][:5]):
            trunk = self.prompt(history)
            truth = self._render((*history, advice), generate=True)
            text = self._render(history) + self._added([advice])[len(self._closing) :]
            grown = trunk.ids[: trunk.branch] + self.feedback(advice["content"])
            if problem := _compare(text, truth) or (None if grown == self._encode(truth) else _RETOKENISED):
                raise UserError(f"the chat template does not take one more user message after a {history[-1]['role']} message: {problem}")


_RETOKENISED = "the pieces tokenise differently from the whole dialogue"


def _compare(text: str, truth: str) -> str | None:
    """The first difference with a little before it, as one line; None when there is none."""
    if text == truth:
        return None
    at = next((i for i, (a, b) in enumerate(zip(text, truth, strict=False)) if a != b), min(len(text), len(truth)))
    piece = slice(max(0, at - 12), at + 40)
    return f"the episode has {text[piece]!r} where the template writes {truth[piece]!r}"
