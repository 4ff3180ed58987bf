# SPDX-License-Identifier: Apache-2.0

"""Text from outside: names that may be misspelt, and characters that no tokenizer takes."""

from __future__ import annotations

import difflib
import os
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

# Where code stands that nobody looks into first: this package, installed ones, Python's own.
_OTHERS = (
    f"{Path(__file__).parent}{os.sep}",
    *(f"{sysconfig.get_paths()[kind]}{os.sep}" for kind in ("purelib", "platlib", "stdlib")),
    "<frozen ",
)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint for a message about an unknown name: the nearest known one, whatever the case; without any near
    `otherwise`, by default all of them.
    """
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, 1, 0.5)
    if near:
        return f"did you mean {by_lower[near[0]]!r}?"
    return otherwise or f"choose one of {', '.join(by_lower.values())}"


def is_encodable(text: str) -> bool:
    """Whether text is Unicode. Strings can hold half a surrogate pair, which no tokenizer and no file takes."""
    return text.isascii() or encodable(text) == text


def encodable(text: str) -> str:
    """The text with "?" in place of halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode("utf-8")


def described(error: BaseException, with_place: bool = True) -> str:
    """An exception of code that is not ours in one line: its type, its message, and the innermost place in the user's
    own files, or else the innermost.
    """
    try:
        message = " ".join(encodable(str(error)[:600]).split())[:300]
    except BaseException as second:  # a __str__ that fails must not hide the failure that it belongs to
        message = f"(its message cannot be read: {type(second).__name__})"
    place = _place(traceback.extract_tb(error.__traceback__)) if with_place else ""
    return encodable(f"{type(error).__name__}: {message}{place}")[:400]


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """ " (my_envs.py, line 12, in delete_file)", or "" where there are no frames."""
    theirs = [frame for frame in frames if not frame.filename.startswith(_OTHERS)]
    for frame in (theirs or frames)[-1:]:
        return f" ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"
    return ""
