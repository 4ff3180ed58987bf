"""A byte-level BPE tokenizer in plain Python: a GGUF's vocabulary and merges in, token ids out. The oracle for the
tokenizers that `real_policy` writes: it shares no code with them and does not read their files.

The splits are those that the families have published: GPT-2's pattern (with single digits cut out first for SmolLM2)
and Qwen2's. Slow, and plain on purpose: one loop per merge.
"""

# regex comes with transformers:
# pyright: reportMissingModuleSource=false
from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte: itself where it can be seen, else one from 256 on, in order (GPT-2)."""
    seen = [33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174 for byte in range(256)]
    letters, others = [], 256
    for byte in range(256):
        letters.append(chr(byte if seen[byte] else others))
        others += not seen[byte]
    return letters


LETTERS = _byte_letters()


class PlainBpe:
    """`fields`: a GGUF's metadata. family: "qwen2" or "smollm"."""

    def __init__(self, fields: Mapping[str, Any]):
        tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        self.family = fields["tokenizer.ggml.pre"]
        self.ids = {token: n for n, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): n for n, merge in enumerate(fields["tokenizer.ggml.merges"])}
        added = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (3, 4)]  # control, user-defined
        longest_first = sorted(added, key=len, reverse=True)
        self.added = set(added)
        self.control = regex.compile(f"({'|'.join(map(regex.escape, longest_first))})")

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in self.control.split(text):
            if piece in self.added:
                ids.append(self.ids[piece])
                continue
            for word in self._words(piece):
                ids += self._merged(word)
        return ids

    def _words(self, text: str) -> Iterator[str]:
        if self.family == "qwen2":
            yield from regex.findall(QWEN2, unicodedata.normalize("NFC", text))
        else:
            for part in regex.split(r"(\p{N})", text):
                yield from regex.findall(GPT2, part)

    def _merged(self, word: str) -> list[int]:
        """Pairs are merged in the order of their ranks, from the left. A byte without a token is left out."""
        letters = (LETTERS[byte] for byte in word.encode())
        parts = [letter for letter in letters if letter in self.ids]
        while True:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)), default=None)
            if best not in self.ranks:
                return [self.ids[part] for part in parts]
            merged, n = [], 0
            while n < len(parts):
                both = tuple(parts[n : n + 2]) == best
                merged.append(parts[n] + parts[n + 1] if both else parts[n])
                n += 1 + both
            parts = merged
