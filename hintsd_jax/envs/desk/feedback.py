# SPDX-License-Identifier: Apache-2.0

"""Correct feedback on a step of Desk: a call that was left out or an effect that nobody asked for goes in, a sentence
comes out. The environment's report and the demonstrations share it.

Feedback names a value and the label that was asked for, never the outcome or the goal state: `Use final "b".`
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

NEUTRAL = "Go on."
CLOSE = "Say Done."  # on a step of a request that was carried out already
_NAME = re.compile(r'( for)? "[^"]*"')


def use_value(value: str, label: str | None) -> str:
    """On a call that took another value."""
    return f'Use {label} "{value}".' if label else f'Use "{value}".'


def make_call(call: Sequence[Any]) -> str:
    """On a `[tool, arguments]` that was left out."""
    tool, arguments = call
    return f'Call {tool} for "{next(iter(arguments.values()))}".'


def instead_of(entry: Sequence[Any], request: Mapping[str, Any]) -> str:
    """On an effect `[tool, arguments]` that nobody asked for: the value that differs from the request's, or else what
    was asked for.
    """
    tool, arguments = entry
    for expected_tool, expected in request["calls"]:
        if expected_tool == tool:
            for position, (parameter, value) in enumerate(expected.items()):
                if arguments[parameter] != value:
                    # the label belongs to the first argument, which is the chosen one
                    return use_value(value, None if position else request["label"])
            return f"Call {tool} only once."
    return make_call(request["calls"][0])


def without_names(feedback: str) -> str:
    """What is left for a judge who saw the action alone: `Use final.`"""
    return _NAME.sub("", feedback)
