# SPDX-License-Identifier: Apache-2.0

"""Chat rendering as token ids: messages in, the ids that they add to an append-only stream out.

A template renders whole dialogues, while a stream only grows. So only what new messages add is tokenised, once.

Invariant 1: prompt + sampled ids + deltas is the stream. With history="keep" the deltas are read off a stub dialogue,
and the stream equals the template's rendering of the dialogue, text and ids, wherever the template keeps earlier turns;
that is verified on probe dialogues when a `ChatFormat` is built, and where it rewrites them (stock Qwen3 drops earlier
thinking) the sampled tokens stand, a declared deviation. With history="template" the student always reads the
template's own rendering of the dialogue so far: while that extends the stream's text, the sampled ids stand and only
the rest is tokenised; where it rewrites anything (earlier thinking; spaces around an action; a control token in it, or
another stop token than the template's), a new stream begins, with the whole rendering tokenised again.

Tool documentation that comes in mid-episode begins a new stream too under "template", which renders the dialogue with
the longer list; under "keep" the list stays, and the message that announces the tools holds their documentation as the
template writes it (a declared deviation).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from hintsd_jax.envs.base import Message, ToolCall
from hintsd_jax.envs.call_reading import THINK_CLOSE, THINK_OPEN
from hintsd_jax.envs.tool_calls import render_calls
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat_template import PROBE_TOOL, Template, Tools
from hintsd_jax.rollout.guard import OWN
from hintsd_jax.sampling.prefix import common_prefix_length

_DELTAS = 256  # that are kept: rollouts of a task are told the same again and again (on Desk 85 % of the time)
_RETOKENISED = "the pieces tokenise differently from the whole dialogue"


@dataclass(frozen=True)
class Delta:
    """Token ids that messages add to a stream.

    prompt_start: the index in `ids` where the generation prompt begins. new_stream: they begin a new stream, because
    the template has rewritten what was read before.
    """

    ids: tuple[int, ...]
    prompt_start: int
    new_stream: bool = False


class ChatFormat:
    """A tokenizer and its chat template, as the frames of append-only streams.

    Attributes:
      stop_ids: token ids that close a sampled action; the first is the one that the template writes.
      style: of tool calls, see `envs.tool_calls`.
      vocab_size: the largest token id plus one; a policy must have at least as many.
      follows_template: whether history is "template".
      deviation: None, or with history="keep" one line that shows where the template rewrites earlier turns.
      adaptation: None, or one line that says what the template has no place for, and where it stands instead (see
        `rollout.tool_messages`).

    Args:
      tokenizer: of transformers, with a chat template.
      history: None refuses a template that rewrites earlier turns; "keep" lets the sampled tokens stand, a declared
        deviation from the template; "template" follows the template.
      stop_ids: further ids that close an action (see `checkpoints.tokenizer.generation_stops`).
      call_style: in which tool calls are read, see `envs.tool_calls`; "auto": in which the template writes them;
        "code": actions are blocks of code, and tools are written as for HERMES.
      **variables: for the template, e.g. enable_thinking=False; see `Template`.

    Raises:
      UserError: the template cannot be used this way; the line shows the piece that differs.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        history: str | None = None,
        stop_ids: Sequence[int] = (),
        call_style: str = "auto",
        **variables: Any,
    ):
        if history not in (None, "keep", "template"):
            raise UserError(f"chat.history {history!r}: use 'keep' or 'template'")
        self._tokenizer, self._history = tokenizer, history
        self._template = Template(tokenizer, variables, call_style)
        self.style, self.adaptation = self._template.style, self._template.adaptation
        self.follows_template = history == "template"
        self._delta_after = lru_cache(_DELTAS)(self._new_delta_after)
        self._known = frozenset(tokenizer.get_vocab().values())
        self.vocab_size = max(self._known) + 1
        self._generation_prompt_ids = self._encode(self._template.generation_prompt)
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_ids = tuple(dict.fromkeys((*self._encode(self._template.stop_token), *eos, *stop_ids)))
        if max(self.stop_ids) >= self.vocab_size:
            raise UserError(
                f"generation_config.json ends a generation with token {max(self.stop_ids)},"
                f" but the tokenizer has only {self.vocab_size}"
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
                " set chat.history = 'keep' to let the sampled tokens stand, or 'template' to follow the template"
            )

    def prompt(self, messages: Iterable[Message], tools: Tools = (), tags_stand: bool = False) -> Delta:
        """The first messages and the generation prompt. `tools` are rendered by the template, or where it has no place
        for them, into the messages. tags_stand: in all but results, as the trainer words them (see `rollout.guard`).
        """
        if tags_stand:
            messages = [m if m["role"] == "tool" else {**m, OWN: OWN} for m in messages]
        return self._delta(self._template.render(messages, tools))

    def delta(self, messages: Iterable[Message], cut: bool = False) -> Delta:
        """What follows an action span: the end of its message, `messages`, the generation prompt. With `cut` the span
        has no stop token, and the delta begins with the one that the template writes.
        """
        return self._delta_after(cut, tuple((m["role"], m["content"], m.get(OWN)) for m in messages))

    def heard(self, messages: Iterable[Message]) -> tuple[Message, ...]:
        """What users and tools say, without guarded strings (see `rollout.guard`): as the student reads it, and whoever
        is told of it later. Other messages stand as their author wrote them.
        """
        plain = self._template.plain
        return tuple({**m, "content": plain(m["content"])} if m["role"] in ("user", "tool") else m for m in messages)

    def announce_tools(
        self, messages: Sequence[Message], tools: Tools
    ) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
        """An observation that brings further tools, as the student reads it.

        Returns:
          (messages, tools): the messages as they are `heard`. With history="template" the tools are as they are; else
          the last message holds their documentation, and none is left to go into the tool list.
        """
        messages = self.heard(messages)
        if self._history == "template" or not tools:
            return messages, tuple(tools)
        *earlier, last = messages
        documented = f"{self._template.documentation(tools)}\n{last['content']}"
        return (*earlier, {**last, "content": documented, OWN: OWN}), ()

    def observation(
        self,
        dialogue: Sequence[Message],
        tools: Tools,
        ids: Sequence[int],
        messages: Sequence[Message],
        added_tools: Tools = (),
        cut: bool = False,
    ) -> Delta:
        """What the student reads after an action.

        Args:
          dialogue: what came before the action.
          tools: the tool list under which the action was sampled.
          ids: of the action; it ended with a stop token unless it was `cut`.
          messages: what answers it, and `added_tools`, what goes into the tool list with it; see `announce_tools`.
        """
        if self._history != "template":
            return self.delta(messages, cut)
        before = self._template.render(dialogue, tools) + self.text(ids)
        after = [*dialogue, {"role": "assistant", "content": self.decode(ids)}, *messages]
        text = self._template.render(after, [*tools, *added_tools])
        if text.startswith(before):
            return self._delta(text[len(before) :])
        return replace(self._delta(text), new_stream=True)

    def user_turn(self, text: str, tags_stand: bool = False) -> tuple[int, ...]:
        """One more user message and the generation prompt, to follow `tokens[:prompt_start]` of an episode, which ends
        with a closed message already. tags_stand: as in `prompt`."""
        return self._delta(self._template.added([_user(text, tags_stand)])[len(self._template.closing) :]).ids

    def teacher_context(
        self, dialogue: Sequence[Message], tools: Tools, trunk: Sequence[int], text: str, tags_stand: bool = False
    ) -> tuple[int, tuple[int, ...]]:
        """The teacher's context before a step: `dialogue`, the feedback `text` as one more user message, the generation
        prompt.

        Args:
          tools: the tool list before the step.
          trunk: what the student read of `dialogue`, without the generation prompt.
          tags_stand: in `text`, as in `prompt`.

        Returns:
          (prefix_length, context): the teacher reads `trunk[:prefix_length]` and then the ids `context`. That is all of
          the trunk but where, with history="template", the feedback makes the template rewrite earlier turns.
        """
        if self._history != "template":
            return len(trunk), self.user_turn(text, tags_stand)
        student = self._template.render(dialogue, tools).removesuffix(self._template.generation_prompt)
        teacher = self._template.render([*dialogue, _user(text, tags_stand)], tools)
        if teacher.startswith(student):
            return len(trunk), self._delta(teacher[len(student) :]).ids
        whole = self._delta(teacher)
        prefix_length = common_prefix_length(trunk, whole.ids[: whole.prompt_start])
        return prefix_length, whole.ids[prefix_length:]

    def unknown_ids(self, entries: int) -> tuple[tuple[int, int], ...]:
        """The ids below `entries`, a policy's vocabulary, that no token has, as ranges (first, last + 1)."""
        ends = [-1, *sorted(self._known), entries]
        return tuple((before + 1, after) for before, after in itertools.pairwise(ends) if after > before + 1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an action span, without the stop token that closed it. Where the generation prompt has opened
        thinking, the text begins with that, so that it reads like any other thinking."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self._template.thinking_prefix + self.text(ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of an action that reads `text`, its stop token included: the way back from `decode`. A stop token in
        the text itself ends it there."""
        ids = self._encode(text.removeprefix(self._template.thinking_prefix)) + self.stop_ids[:1]
        return ids[: 1 + next(n for n, token in enumerate(ids) if token in self.stop_ids)]

    def is_plain_action(self, text: str) -> bool:
        """Whether an action from outside holds no control token of the chat template, with which its message, or
        another, would end or begin."""
        return self._template.plain_action(text) == text

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself; of a letter that is spread over several, each shows a replacement
        character.
        """
        return [self.text([token]) for token in ids]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens as it stands, control tokens too."""
        return self._tokenizer.decode(
            [int(token) for token in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _new_delta_after(self, cut: bool, said: tuple[tuple[str, str, Any], ...]) -> Delta:
        """`delta` of messages as (role, content, own)."""
        messages = [{"role": role, "content": text} | ({OWN: own} if own else {}) for role, text, own in said]
        return self._delta((self._template.stop_token if cut else "") + self._template.added(messages))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _delta(self, text: str) -> Delta:
        generation_prompt = self._template.generation_prompt
        if not text.endswith(generation_prompt):
            raise UserError(f"the chat template does not end with its generation prompt: {text[-60:]!r}")
        # tokenised apart: they meet at a control token, so the ids are those of the joint text (verified on the probes)
        before = self._encode(text[: -len(generation_prompt)])
        return Delta(before + self._generation_prompt_ids, len(before))

    def _probes(self) -> list[tuple[Message, ...]]:
        """Small dialogues in all roles; without thinking only where an action can begin without it."""
        prefix = self._template.thinking_prefix
        thinking = f"{prefix or THINK_OPEN + chr(10)}hm\n{THINK_CLOSE}\n\n"
        return [self._probe(text) for text in ((thinking,) if prefix else ("", thinking))]

    def _probe(self, thinking: str) -> tuple[Message, ...]:
        calls = render_calls([ToolCall("look", {"at": "x"})] * 2, self.style)
        return (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Look twice."},
            {"role": "assistant", "content": f"{thinking}{calls}"},
            {"role": "tool", "content": '{"seen": 1}'},
            {"role": "tool", "content": "two\nlines"},
            {"role": "assistant", "content": f"{thinking}Done."},
            {"role": "user", "content": "Thanks. Once more?"},
        )

    def _difference(self, messages: Sequence[Message], tools: Tools) -> str | None:
        """One line where the stream of a dialogue leaves the template's own rendering of it; None if nowhere."""
        template = self._template
        actions = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text, ids = template.render(messages[: actions[0]], tools), self.prompt(messages[: actions[0]], tools).ids
        for index, end in zip(actions, [*actions[1:], len(messages)], strict=True):
            sampled = messages[index]["content"].removeprefix(template.thinking_prefix) + template.stop_token
            action, observation = self._encode(sampled), messages[index + 1 : end]
            delta = self.observation(messages[:index], tools, action, observation)
            ids = delta.ids if delta.new_stream else ids + action + delta.ids
            if self._history == "template":
                text = template.render(messages[:end], tools)
            else:
                text += sampled + template.added(observation)
        truth = template.render(messages, tools)
        return _compare(text, truth) or (None if ids == self._encode(truth) else _RETOKENISED)

    def _verify_feedback(self) -> None:
        """Checks that a user message after any closed message (user, tool) reads as the template itself writes it."""
        feedback, template = _user("Take the other one."), self._template
        for dialogue in (self._probe("")[:2], self._probe("")[:5]):
            prompt = self.prompt(dialogue)
            truth = template.render((*dialogue, feedback))
            text = template.render(dialogue, generate=False) + template.added([feedback])[len(template.closing) :]
            ids = prompt.ids[: prompt.prompt_start] + self.user_turn(feedback["content"])
            if problem := _compare(text, truth) or (None if ids == self._encode(truth) else _RETOKENISED):
                role = dialogue[-1]["role"]
                raise UserError(
                    f"the chat template does not take one more user message after a {role} message: {problem}."
                    " Set chat.history = 'template' to follow the template"
                )


def _user(text: str, tags_stand: bool = False) -> Message:
    return {"role": "user", "content": text} | ({OWN: OWN} if tags_stand else {})


def _compare(text: str, truth: str) -> str | None:
    """The first difference with a little before it, as one line; None when there is none."""
    if text == truth:
        return None
    at = common_prefix_length(text, truth)
    piece = slice(max(0, at - 12), at + 40)
    return f"the episode has {text[piece]!r} where the template writes {truth[piece]!r}"
