"""What to say about a step of Desk: the words of a correct hint, shared by the environment's report and the demonstrations.

Advice names values, never the outcome or the goal state: `Use "right", not "wrong".`
"""

from __future__ import annotations

NEUTRAL = "Go on."


def use(right: str, wrong: str | None = None) -> str:
    return f'Use "{right}".' if wrong is None else f'Use "{right}", not "{wrong}".'


def still_to_do(call: list) -> str:
    tool, arguments = call
    return f'Call {tool} for "{next(iter(arguments.values()))}".'


def about_surplus(entry: list, reference_calls: list[list]) -> str:
    """Advice about an effect that nobody asked for: the value that differs from the reference, or else what was asked for."""
    tool, arguments = entry
    for wanted_tool, wanted in reference_calls:
        if wanted_tool == tool:
            for parameter, value in wanted.items():
                if arguments[parameter] != value:
                    return use(value, arguments[parameter])
            return f"Call {tool} only once."
    return still_to_do(reference_calls[0])
