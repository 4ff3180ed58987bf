"""Chat rendering as token ids: messages in, the ids that they add to an append-only stream out.

A template renders whole dialogues, while a stream only grows. So only what new messages add is tokenised, once.

Invariant 1: prompt + sampled ids + deltas is the stream. With history="keep" the deltas are read off a stub dialogue,
and the stream equals the template's rendering of the dialogue, text and ids, wherever the template keeps earlier turns;
that is verified on probe dialogues when a `ChatFormat` is built, and where it rewrites them (stock Qwen3 drops earlier
thinking) the sampled tokens stand, a declared deviation. With history="template" the student always reads the
template's own rendering of the dialogue so far: while that extends the stream's text, the sampled ids stand and only
the rest is tokenised; where it rewrites anything (earlier thinking; spaces around an action; a control token in it, or
another stop token than the template's), a new stream begins with the whole rendering tokenised afresh. So does tool
documentation that comes in mid-episode: "template" renders the dialogue with the longer list, while under "keep" the
list that was read stands and the message that announces the tools holds their documentation, in the template's own
words (a declared deviation).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hintsd_jax.envs.base import Message, ToolCall
from hintsd_jax.envs.tool_calls import THINK_CLOSE, THINK_OPEN, render_call
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat_template import PROBE_TOOL, Template, Tools


@dataclass(frozen=True)
class Delta:
    """Token ids that messages add; `prompt_start` is the index in `ids` where the generation prompt starts.
    `new_stream`: they begin a new stream, because the template has rewritten what was read before."""

    ids: tuple[int, ...]
    prompt_start: int
    new_stream: bool = False


class ChatFormat:
    """A tokenizer and its chat template, as the frames of append-only streams.

    `stop_ids`: token ids that close a sampled action; the first is the one the template writes.
    `style`: the format of tool calls, see `toolcalls`.
    `vocab_size`: the largest token id plus one; a policy must have at least as many.
    `deviation`: None, or with history="keep" one line that shows where the template rewrites earlier turns.

    history=None (the default) refuses a template that rewrites earlier turns; "keep" lets the sampled tokens
    stand, a declared deviation from the template; "template" follows the template.
    `stop_ids` of the constructor also close an action (`tokenizer.generation_stops`). `variables` go to the template,
    e.g. enable_thinking=False; see `Template`.

    Raises UserError when the template cannot be used this way; the line shows the differing piece.
    """

    def __init__(self, tokenizer: Any, *, history: str | None = None, stop_ids: Sequence[int] = (), **variables: Any):
        if history not in (None, "keep", "template"):
            raise UserError(f"history {history!r}: use 'keep' or 'template'")
        self._tokenizer, self._history = tokenizer, history
        self._template = Template(tokenizer, variables)
        self.style = self._template.style
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self._generation_ids = self._encode(self._template.generation)
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_ids = tuple(dict.fromkeys((*self._encode(self._template.stop), *eos, *stop_ids)))
        if max(self.stop_ids) >= self.vocab_size:
            last = max(self.stop_ids)
            raise UserError(
                f"generation_config.json ends a generation with token {last}, but the tokenizer has only {self.vocab_size}"
            )
        if history != "template":
            self._verify_feedback()
        probes = ((probe, tools) for probe in self._probes() for tools in ((), (PROBE_TOOL,)))
        self.deviation = next((text for probe, tools in probes if (text := self._difference(probe, tools))), None)
        if self.deviation and history == "template":
            raise UserError(f"the chat template cannot be followed: {self.deviation}")
        if self.deviation and history is None:
            raise UserError(
                f"the chat template rewrites earlier turns: {self.deviation}. Use a template that keeps them,"
                " set history='keep' to let the sampled tokens stand, or history='template' to follow the template"
            )

    def prompt(self, messages: Iterable[Message], tools: Tools = ()) -> Delta:
        """The first messages and the generation prompt. `tools` are rendered by the template, as they are."""
        return self._delta(self._template.render(messages, tools))

    def delta(self, messages: Iterable[Message]) -> Delta:
        """What follows an action span that ended with a stop token: the closing of its turn, the messages, the
        generation prompt."""
        return self._delta(self._template.added(messages))

    def announcing(
        self, messages: Sequence[Message], tools: Tools
    ) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
        """An answer that brings further `tools`, as the student is told: (messages, tools that go into the tool list)."""
        if self._history == "template" or not tools:
            return tuple(messages), tuple(tools)
        *earlier, last = messages
        return (*earlier, last | {"content": f"{self._template.documentation(tools)}\n{last['content']}"}), ()

    def observation(
        self,
        dialogue: Sequence[Message],
        tools: Tools,
        ids: Sequence[int],
        messages: Sequence[Message],
        added: Tools = (),
    ) -> Delta:
        """What the student reads when `messages` answer the action `ids`, which ended with a stop token; `dialogue`
        came before it, under the tool list `tools`. `added` goes into the list with this answer; see `announced`."""
        if self._history != "template":
            return self.delta(messages)
        read = self._template.render(dialogue, tools) + self._text(ids)
        answered = [*dialogue, {"role": "assistant", "content": self.decode(ids)}, *messages]
        text = self._template.render(answered, [*tools, *added])
        if text.startswith(read):
            return self._delta(text[len(read) :])
        return replace(self._delta(text), new_stream=True)

    def user_turn(self, text: str) -> tuple[int, ...]:
        """One more user message and the generation prompt, to follow `tokens[:branch]` of an episode, which already
        ends with a closed message."""
        return self._delta(self._template.added([_user(text)])[len(self._template.closing) :]).ids

    def teacher_context(
        self, dialogue: Sequence[Message], tools: Tools, trunk: Sequence[int], text: str
    ) -> tuple[int, tuple[int, ...]]:
        """The teacher's context: `dialogue`, the feedback as one more user message, the generation prompt.

        Args:
          trunk: what the student read of `dialogue`, without the generation prompt.
        Returns:
          (seen, words): the context is `trunk[:seen]` and then `words`. All of the trunk is seen but where, with
          history="template", the feedback makes the template rewrite earlier turns.
        """
        if self._history != "template":
            return len(trunk), self.user_turn(text)
        read = self._template.render(dialogue, tools).removesuffix(self._template.generation)
        whole = self._template.render([*dialogue, _user(text)], tools)
        if whole.startswith(read):
            return len(trunk), self._delta(whole[len(read) :]).ids
        context = self._delta(whole)
        seen = common_prefix(trunk, context.ids[: context.prompt_start])
        return seen, context.ids[seen:]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an action span, without the stop token that closed it. Where the generation prompt has opened the
        thinking, the text begins with that opening, so that it reads like any other thinking."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self._template.opening + self._text(ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of an action that reads `text`, its stop token included: the way back from `decode`. A stop token in
        the text itself ends it there."""
        ids = self._encode(text.removeprefix(self._template.opening)) + self.stop_ids[:1]
        return ids[: 1 + next(n for n, token in enumerate(ids) if token in self.stop_ids)]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself; where a letter is spread over several, each shows a replacement character."""
        return [self._text([token]) for token in ids]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            [int(token) for token in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _delta(self, text: str) -> Delta:
        generation = self._template.generation
        if not text.endswith(generation):
            raise UserError(f"the chat template does not end with its generation prompt: {text[-60:]!r}")
        # tokenised apart: they meet at a control token, so the ids are those of the joint text (verified on the probes)
        before = self._encode(text[: -len(generation)])
        return Delta(before + self._generation_ids, len(before))

    def _probes(self) -> list[tuple[Message, ...]]:
        """Small dialogues in all roles; without thinking only where an action can begin without it."""
        opening = self._template.opening
        thought = f"{opening or THINK_OPEN + chr(10)}hm\n{THINK_CLOSE}\n\n"
        return [self._probe(text) for text in ((thought,) if opening else ("", thought))]

    def _probe(self, thought: str) -> tuple[Message, ...]:
        call = render_call(ToolCall("look", {"at": "x"}), self.style)
        return (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Look twice."},
            {"role": "assistant", "content": f"{thought}{call}\n{call}"},
            {"role": "tool", "content": '{"seen": 1}'},
            {"role": "tool", "content": "two\nlines"},
            {"role": "assistant", "content": f"{thought}Done."},
            {"role": "user", "content": "Thanks. Once more?"},
        )

    def _difference(self, messages: Sequence[Message], tools: Tools) -> str | None:
        """One line where the stream of a dialogue leaves the template's own rendering of it; None if nowhere."""
        template = self._template
        actions = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text, ids = template.render(messages[: actions[0]], tools), self.prompt(messages[: actions[0]], tools).ids
        for index, end in zip(actions, [*actions[1:], len(messages)], strict=True):
            sampled, answers = (
                messages[index]["content"].removeprefix(template.opening) + template.stop,
                messages[index + 1 : end],
            )
            action = self._encode(sampled)
            delta = self.observation(messages[:index], tools, action, answers)
            ids = delta.ids if delta.new_stream else ids + action + delta.ids
            text = (
                template.render(messages[:end], tools)
                if self._history == "template"
                else text + sampled + template.added(answers)
            )
        truth = template.render(messages, tools)
        return _compare(text, truth) or (None if ids == self._encode(truth) else _RETOKENISED)

    def _verify_feedback(self) -> None:
        """A user message after any closed message (user, tool) must read as the template itself would write it."""
        advice, template = _user("Take the other one."), self._template
        for history in (self._probe("")[:2], self._probe("")[:5]):
            trunk = self.prompt(history)
            truth = template.render((*history, advice))
            text = template.render(history, generate=False) + template.added([advice])[len(template.closing) :]
            grown = trunk.ids[: trunk.prompt_start] + self.user_turn(advice["content"])
            if problem := _compare(text, truth) or (None if grown == self._encode(truth) else _RETOKENISED):
                raise UserError(
                    f"the chat template does not take one more user message after a {history[-1]['role']} message: {problem}"
                )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


_RETOKENISED = "the pieces tokenise differently from the whole dialogue"


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _compare(text: str, truth: str) -> str | None:
    """The first difference with a little before it, as one line; None when there is none."""
    if text == truth:
        return None
    at = common_prefix(text, truth)
    piece = slice(max(0, at - 12), at + 40)
    return f"the episode has {text[piece]!r} where the template writes {truth[piece]!r}"
