# SPDX-License-Identifier: Apache-2.0

"""The action style "code": an action's text in, the one Python block in it out, for environments whose agents act by
code (`action_style = "code"`).

A block begins with a line that is nothing but ```` ```python ```` (or py, python3, or no word at all) and ends with a
line that is nothing but ```` ``` ````; fences may be indented and longer. Text may stand around it. A block in another
language is text.

Invariant: all or nothing, and in time in proportion to the text. No block, a second one, or one without an end is a
problem for the agent to be told of: which of two blocks was meant, nobody knows.
"""

import re

CODE = "code"
# Kinds of problems, beside those of `envs.tool_calls`.
NO_CODE, TWO_BLOCKS, OPEN_BLOCK = "no_code", "two_blocks", "open_block"

_FENCE = re.compile(r"^[ \t]{0,8}(`{3,})[ \t]*([^\s`]*)[ \t]*\r?$", re.MULTILINE)
_WORDS = ("", "python", "python3", "py")
_EXPECTED = "write exactly one block that begins with a line ```python and ends with a line ```"


class NoCode(ValueError):
    """Why an action has no code that can be run: one of the kinds above, and one line."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def write_block(code: str) -> str:
    """A block that `read_block` reads, of code without a line that is a fence."""
    return f"```python\n{code.strip()}\n```"


def read_block(text: str) -> str:
    """The code of the one Python block in a text, without its fences.

    Raises:
      NoCode: there is none, an empty one, more than one, or one without an end.
    """
    found: list[str] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[2] and len(fence[1]) >= len(opened[1]):
            if opened[2].lower() in _WORDS:
                found.append(text[opened.end() + 1 : fence.start()])
            opened = None
    if opened is not None and opened[2].lower() in _WORDS:
        raise NoCode(OPEN_BLOCK, f"a code block has no end: {_EXPECTED}")
    if len(found) > 1:
        raise NoCode(TWO_BLOCKS, f"{len(found)} code blocks, of which none was run: {_EXPECTED}")
    if not found or not found[0].strip():
        raise NoCode(NO_CODE, f"no code was found: {_EXPECTED}")
    return found[0]
