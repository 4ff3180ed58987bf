# SPDX-License-Identifier: Apache-2.0

"""Text from outside never becomes structure: contents and tool documentation go in, texts that hold no token of the
frames come out.

Two kinds of strings are guarded, whatever their flags in the tokenizer. *Control tokens*: special tokens, those that
begin a message, end one or end a generation, and every added token in the form `<|...|>`. *Tags*: what else the
tokenizer has in the form of a tag (`<think>`, `</tool_call>`), and pairs of tags that the template writes itself.

Control tokens come from no content at all. Tags come neither from what users and tools say nor from the documentation
of tools. They stand where a policy or an author writes them: in the assistant's messages, in the system message that a
dialogue begins with, and in what the trainer words itself (a message with the key `OWN`).

Invariant: a guarded string is written with a space after its first character. `structure` is what stands of them in a
whole text; the caller compares it with that of `neutral` contents, which have no character that a guarded string can
begin with, so that neither a normalizer nor a template that joins contents can make one.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from hintsd_jax.envs.call_reading import (
    CLOSE,
    LFM2_END,
    LFM2_START,
    OLMO3_END,
    OLMO3_START,
    OPEN,
    PYTHON_END,
    PYTHON_START,
    THINK_CLOSE,
    THINK_OPEN,
)

OWN = "own"
"""The key of a message that the trainer words itself; no message of an environment can have it."""

Plain = Callable[[str, bool], str]
"""(text, whether tags stand) -> the text without guarded strings."""

_FAMILY_TAGS = (
    *(THINK_OPEN, THINK_CLOSE, OPEN, CLOSE, "<tool_response>", "</tool_response>"),
    *(
        LFM2_START,
        LFM2_END,
        OLMO3_START,
        OLMO3_END,
        PYTHON_START,
        PYTHON_END,
    ),  # around calls, which a policy writes itself
)
_CONTROL_FORM = re.compile(r"\s*[<\[][|｜▁].*[|｜▁][>\]]\s*", re.DOTALL)
_TAG_FORM = re.compile(r"\s*(?:<[^<>\s]+>|\[[^\[\]\s]+\])\s*")
_PAIR = re.compile(r"<([^<>\s/|]+)>")
_STAND_INS = "?.x0"


class Guard:
    """What may not come from contents.

    Args:
      tokenizer: of transformers.
      frames: tokens that begin or end messages.
      written: texts of the template with plain contents, from which its own tags are read.

    Attributes:
      control, tags: the guarded strings; none is in both.
    """

    def __init__(self, tokenizer: Any, frames: Iterable[str] = (), written: Iterable[str] = ()):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        pairs = {tag for text in written for tag in _paired(text)}
        own = {tag for tag in _FAMILY_TAGS if tag in pairs or any(token.content == tag for token in added.values())}
        control = {token.content for token in added.values() if token.special or _CONTROL_FORM.fullmatch(token.content)}
        control |= {*tokenizer.all_special_tokens, *frames}
        self.control = frozenset(token for token in control - own if token.strip())
        tags = {token.content for token in added.values() if _TAG_FORM.fullmatch(token.content)} | pairs | own
        self.tags = frozenset(tags - self.control)
        self._control_pattern, self._all_pattern = _any_of(self.control), _any_of(self.control | self.tags)

    def plain(self, text: str, tags_stand: bool) -> str:
        """The text with the guarded strings written apart; with `tags_stand` only control tokens."""
        return (self._control_pattern if tags_stand else self._all_pattern).sub(_apart, text)

    def neutral(self, text: str, tags_stand: bool) -> str:
        """The text with another character in place of each that a guarded string can begin with, but for tags that
        stand.
        """
        if not tags_stand:
            return text.translate(self._neutral)
        pieces, end = [], 0
        for tag in self._tag_pattern.finditer(text):
            pieces += [self.neutral(text[end : tag.start()], False), tag.group()]
            end = tag.end()
        return "".join((*pieces, self.neutral(text[end:], False)))

    def is_suspicious(self, texts: Iterable[str]) -> bool:
        """Whether anything in the texts could be the beginning of a guarded string."""
        return any(self._begins(letter) for letter in set().union(*texts))

    def structure(self, text: str) -> tuple[list[int], list[str]]:
        """What stands in a whole text: the ids of guarded tokens, and the guarded strings themselves, in order."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return [token for token in ids if token in self._ids], self._all_pattern.findall(text)

    @cached_property
    def _ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        ids = {number for number, token in added if token.special or self._all_pattern.search(token.content)}
        known = self._tokenizer.get_vocab()
        return frozenset(ids | {known[token] for token in self.control | self.tags if token in known})

    @cached_property
    def _tag_pattern(self) -> re.Pattern[str]:
        return _any_of(self.tags)

    @cached_property
    def _firsts(self) -> frozenset[str]:
        """Characters that guarded strings begin with, as written and as normalised; whitespace is none of them."""
        firsts = {token.strip()[0] for token in self.control | self.tags}
        return frozenset(firsts | {letter for first in firsts for letter in self._normalised(first)})

    @cached_property
    def _stand_in(self) -> str:
        return next((each for each in _STAND_INS if not self._begins(each)), "")

    @cached_property
    def _neutral(self) -> _Letters:
        return _Letters(lambda letter: self._stand_in if self._begins(letter) else letter)

    def _begins(self, letter: str) -> bool:
        if letter in self._firsts:
            return True
        return not letter.isascii() and any(each in self._firsts for each in self._normalised(letter))

    def _normalised(self, letter: str) -> str:
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        made = unicodedata.normalize("NFKC", letter) + ("" if normalizer is None else normalizer.normalize_str(letter))
        return "".join(each for each in made if not each.isspace() and each != "▁")


class _Letters(dict[int, str]):
    """What stands in place of each character, by its number, for `str.translate`; worked out once for each."""

    def __init__(self, of: Callable[[str], str]):
        super().__init__()
        self._of = of

    def __missing__(self, number: int) -> str:
        made = self[number] = self._of(chr(number))
        return made


def plain_tool(value: Any, plain: Plain) -> Any:
    """A tool, or a part of one, with all texts in it plain: names of keys too."""
    if isinstance(value, str):
        return plain(value, False)
    if isinstance(value, Mapping):
        return {plain_tool(name, plain): plain_tool(part, plain) for name, part in value.items()}
    return [plain_tool(part, plain) for part in value] if isinstance(value, list | tuple) else value


def texts_of(messages: Iterable[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything in messages and tools that is text."""
    return [*(message["content"] for message in messages), json.dumps(tools, ensure_ascii=False, default=str)]


def _paired(text: str) -> set[str]:
    """The tags in a text that it also closes, and what closes them."""
    names = {name for name in _PAIR.findall(text) if f"</{name}>" in text}
    return {tag for name in names for tag in (f"<{name}>", f"</{name}>")}


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(strings, key=lambda string: (-len(string), string))
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")


def _apart(match: re.Match[str]) -> str:
    token = match.group()
    at = len(token) - len(token.lstrip()) + 1
    return f"{token[:at]} {token[at:]}"
