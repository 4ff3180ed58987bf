"""What to say about a step of Desk: the words of a correct hint, shared by the environment's report and the
demonstrations.

Advice names a value and the label that was asked for, never the outcome or the goal state: `Use final "b".`
"""

from __future__ import annotations

import re

NEUTRAL = "Go on."
_NAME = re.compile(r'( for)? "[^"]*"')


def use(value: str, label: str | None) -> str:
    return f'Use {label} "{value}".' if label else f'Use "{value}".'


def without_names(feedback: str) -> str:
    """What is left for a judge who saw the action alone: `Use final.`"""
    return _NAME.sub("", feedback)


def still_to_do(call: list) -> str:
    tool, arguments = call
    return f'Call {tool} for "{next(iter(arguments.values()))}".'


def about_surplus(entry: list, request: dict) -> str:
    """Advice about an effect that nobody asked for: the value that differs from the request's, or else what was asked
    for.
    """
    tool, arguments = entry
    for wanted_tool, wanted in request["calls"]:
        if wanted_tool == tool:
            for position, (parameter, value) in enumerate(wanted.items()):
                if arguments[parameter] != value:
                    return use(
                        value, request["label"] if position == 0 else None
                    )  # the first argument is the chosen one
            return f"Call {tool} only once."
    return still_to_do(request["calls"][0])
