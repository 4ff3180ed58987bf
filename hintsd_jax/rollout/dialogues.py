# SPDX-License-Identifier: Apache-2.0

"""Dialogues of another policy, from a file: its path flows in, episodes that can be trained on flow out, in a seeded
order.

The file is chat JSONL as the field writes it, one dialogue a line: `{"messages": [{"role": "system" | "user" |
"assistant" | "tool", "content": "..."}, ...], "tools": [...]}`; `tools`, and of an assistant's message `tool_calls` and
`weight`, are optional. Every message of the assistant is an action: the ids that its text has under the policy's own
tokenizer and chat template, the stop token included, after what a rollout would have read before it. One of weight 0 is
only read.

Invariant 9 holds: the texts come from outside, so a message of the assistant that holds a control token is refused, and
those of users and tools are guarded as an environment's are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

from hintsd_jax.envs.base import Message, ToolCall
from hintsd_jax.envs.tool_calls import render_calls
from hintsd_jax.errors import UserError, reason
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.storage import located, open_file

ENDED = "dialogue"
"""How such an episode ended."""
_ROLES = ("system", "user", "assistant", "tool")
_FORM = '{"messages": [{"role": ..., "content": ...}, ...]}'


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """The dialogues of one file. digest: of its bytes, so that a run that continues knows the file again."""

    path: str
    episodes: Sequence[Episode]
    digest: str

    @classmethod
    def read(cls, path: str, chat: ChatFormat) -> Dialogues:
        """All dialogues of a file, tokenised.

        Raises:
          UserError: there is no such file, it holds no dialogue, or a line of it is none; one line that says which.
        """
        file = open_file(located(path))
        if file is None:
            raise UserError(f"sft.path: there is no file {path}: give one with a dialogue a line, {_FORM}")
        digest, episodes = hashlib.sha256(), []
        with file:
            for number, line in _lines(file, path):
                digest.update(line)
                if line.strip():
                    episodes.append(_episode(line, f"{path} line {number}", number, chat))
        if not episodes:
            raise UserError(f"sft.path: {path} holds no dialogue: it needs one a line, {_FORM}")
        return cls(path, episodes, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.episodes)

    def of_step(self, seed: int, step: int, groups: int, size: int) -> list[Episode]:
        """The `groups` x `size` dialogues of a training step (counted from 0): epochs of a seeded shuffle, read on
        without a gap. Pure in its arguments.
        """
        order: dict[int, np.ndarray] = {}
        seen: dict[int, int] = {}
        chosen = []
        for number in range(groups * size):
            epoch, place = divmod(step * groups * size + number, len(self))
            if epoch not in order:
                order[epoch] = np.random.default_rng([seed, epoch]).permutation(len(self))
            index = int(order[epoch][place])
            occurrence = seen[index] = seen.get(index, -1) + 1
            chosen.append(dataclasses.replace(self.episodes[index], group=number // size, occurrence=occurrence))
        return chosen

    def describe(self, limit: int) -> str:
        """How many there are, and how many of their actions end beyond `limit` tokens, where none can be trained on.

        Raises:
          UserError: all of them do.
        """
        ends = [
            step.stop
            for episode in self.episodes
            for number, step in enumerate(episode.steps, 1)
            if number not in episode.given
        ]
        beyond = sum(end > limit for end in ends)
        if beyond == len(ends):
            raise UserError(
                f"sft.path: all actions of {self.path} end beyond {limit} tokens, the last of batch.length_buckets:"
                " raise rollout.context and that, or give shorter dialogues"
            )
        said = f"{len(self):,} dialogues of {self.path}, {len(ends):,} actions"
        return f"{said}, {beyond:,} of them beyond {limit} tokens and not trained on" if beyond else said


def _lines(file: IO[bytes], path: str) -> Iterator[tuple[int, bytes]]:
    try:
        yield from enumerate(file, start=1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)})") from error


def _episode(line: bytes, where: str, number: int, chat: ChatFormat) -> Episode:
    messages, tools, given = _parsed(line, where, chat.style)
    actions = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    read = [dict(message) for message in messages[: actions[0]]]
    episode = Episode.begin(f"dialogue {number}", 0, read, chat.prompt(read, tools), tools)
    for place, end in zip(actions, [*actions[1:], len(messages)], strict=True):
        text = messages[place]["content"]
        if not chat.is_plain_action(text):
            raise UserError(f"{where}, message {place + 1} holds a control token of the chat template: remove it")
        ids = chat.encode(text)
        before, observed = episode.dialogue(len(episode.steps) + 1), chat.heard(messages[place + 1 : end])
        episode.append_action(ids, [0.0] * len(ids), text)  # nobody knows how likely it was sampled
        goes_on = end < len(messages)
        delta = chat.observation(before, tools, ids, observed) if goes_on else None
        episode.append_observation(delta, observed)
    episode.given = frozenset(n for n, place in enumerate(actions, 1) if place in given)
    episode.terminated, episode.ended = True, ENDED
    return episode


def _parsed(line: bytes, where: str, style: str) -> tuple[list[Message], tuple[Mapping[str, Any], ...], frozenset[int]]:
    """The messages and tools of a line, checked, and the places of the messages that are only read. Tool calls stand in
    the content, as the chat template writes them.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({reason(error)})") from error
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        raise UserError(f"{where} is no dialogue: it needs the form {_FORM}")
    tools = value.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: tools must be a list of objects")
    messages = [_message(message, f"{where}, message {n}", style) for n, message in enumerate(value["messages"], 1)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"{where} has no message of the assistant, so there is nothing to learn from it")
    given = frozenset(n for n, message in enumerate(value["messages"]) if message.get("weight") == 0)
    if given.issuperset(n for n, role in enumerate(roles) if role == "assistant"):
        raise UserError(f"{where}: all messages of the assistant have weight 0, so there is nothing to learn from it")
    if roles[0] == "assistant":
        raise UserError(f"{where} begins with the assistant: it must begin with a system or user message")
    for n, (role, before) in enumerate(zip(roles[1:], roles), 2):
        if role == before == "assistant":
            raise UserError(f"{where}: messages {n - 1} and {n} are both the assistant's: join them")
    return messages, tuple(tools), given


def _message(message: Any, where: str, style: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise UserError(f"{where}: its role must be one of {', '.join(_ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls") or []
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{where}: its content must be a text")
    if message["role"] != "assistant":
        return {"role": message["role"], "content": content}
    if message.get("weight", 1) not in (0, 1):  # as in OpenAI's format for fine-tuning
        raise UserError(f"{where}: its weight must be 0 (only read) or 1 (learned)")
    try:
        written = render_calls([_call(call) for call in calls], style) if calls else ""
    except (KeyError, TypeError, ValueError) as error:
        if type(error) is ValueError:  # a name or a value that the style has no way to write
            raise UserError(f"{where}: its tool_calls cannot be written in the style {style}: {error}") from error
        raise UserError(
            f"{where}: its tool_calls are not of the form {{'function': {{'name', 'arguments'}}}}"
        ) from error
    return {"role": "assistant", "content": "\n".join(filter(None, (content, written)))}


def _call(call: Mapping[str, Any]) -> ToolCall:
    function = call["function"]
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments  # OpenAI's are a text
    if not isinstance(function["name"], str) or not isinstance(arguments, dict):
        raise TypeError("a name and arguments")
    return ToolCall(function["name"], arguments)
