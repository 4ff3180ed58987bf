# SPDX-License-Identifier: Apache-2.0

"""The simulated backends of one BFCL episode, and the only way to call them.

In: a task's initial state and tool calls. Out: the text of each result, as the benchmark's own executor writes it.

Invariants: model text is never evaluated. A call reaches a backend only if its name is a documented method of a class
of the task and its argument names are identifiers; then it is an ordinary method call with plain JSON values, and
whatever it raises becomes the result text. All `Backends` own their state: two episodes of one task share nothing.
Some calls take hours, or all memory: most of MathAPI's are refused by guards; the others (a `find` in a folder that was
copied into itself again and again) are ended by the limits of the environment's process (`Bfcl.isolation`).
"""

import contextlib
import copy
import functools
import importlib
import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hintsd_jax.envs.bfcl.tasks import read_json_lines

# Python refuses to print an integer of more than 4,300 digits (about 2**14 bits) anyway.
MAX_RESULT_BITS = 1 << 20
# Of nested values: Python itself reads fewer than 200, and copying them takes some frames each.
MAX_DEPTH = 90
# A logarithm to this many digits takes some milliseconds, to ten times as many 0.4 s.
MAX_DIGITS = 1_000
_PLAIN_NUMBER = re.compile(r"[-+]?\d{1,100}(\.\d{0,100})?([eE][-+]?\d{1,3})?")

# mpmath has one precision for all threads, which MathAPI sets in a call.
_ONE_AT_A_TIME = threading.Lock()


class RefusedCall(Exception):
    """A legal call that would not end in time."""


@functools.cache
def tool_docs(class_name: str) -> tuple[Mapping[str, Any], ...]:
    """The benchmark's documentation of a backend's tools, as read from the wheel. Shared: do not change it."""
    config = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    return tuple(read_json_lines(f"multi_turn_func_doc/{config.MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name]}"))


class Backends:
    """The backends of one episode.

    Args:
      initial_config: the initial state, by class name.
      class_names: of the task.
      long_context: whether the benchmark fills the state up.

    Attributes:
      instances: class names -> backends, for the checkers. Only `call` changes them.
    """

    def __init__(self, initial_config: Mapping[str, Any], class_names: Sequence[str], long_context: bool = False):
        self.instances = {name: _build(name, initial_config.get(name, {}), long_context) for name in class_names}
        # Where two classes share a method name the later class gets it, as in the benchmark's executor.
        self._methods: dict[str, Callable] = {
            doc["name"]: getattr(instance, doc["name"])
            for name, instance in self.instances.items()
            for doc in tool_docs(name)
        }
        self._math = {doc["name"] for doc in tool_docs("MathAPI")} if "MathAPI" in self.instances else set()

    def bound(self, name: str, arguments: Mapping[str, Any], positional: Sequence[Any] = ()) -> dict[str, Any]:
        """The arguments by name, defaults included; as they are where the tool does not take them."""
        try:
            call = inspect.signature(self._methods[name]).bind(*positional, **arguments)
        except (KeyError, TypeError):
            return dict(arguments)
        call.apply_defaults()
        return dict(call.arguments)

    def call(self, name: str, arguments: Mapping[str, Any], positional: Sequence[Any] = ()) -> str:
        """The text of the call's result.

        Raises:
          MemoryError, SystemError: there is no more memory. Nothing else, whatever a model writes.
        """
        if name not in self._methods:
            return f"Error during execution: name '{name}' is not defined"
        for key in arguments:
            if not key.isidentifier():
                return f"Error during execution: {key!r} is not an argument name"
        if problem := _unwritable(arguments):
            return f"Error during execution: {problem}"
        method = self._methods[name]
        # Copied, so that a backend that stores a list does not share it with the recorded action.
        arguments = copy.deepcopy(dict(arguments))
        try:
            _guard(method, positional, arguments)
            with _ONE_AT_A_TIME if name in self._math else contextlib.nullcontext():
                return _as_text(method(*positional, **arguments))
        except (MemoryError, SystemError):  # of the machine, not of the call: no answer that an agent should learn from
            raise
        except Exception as error:  # the benchmark's rule: any exception is the answer to the call
            return f"Error during execution: {error}"


def _build(class_name: str, config: Mapping[str, Any], long_context: bool) -> Any:
    constants = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    backend = getattr(importlib.import_module(constants.CLASS_FILE_PATH_MAPPING[class_name]), class_name)()
    if class_name not in constants.STATELESS_CLASSES:
        backend._load_scenario(copy.deepcopy(config), long_context=long_context)
    # Once more: loading a long context takes module-level dictionaries by reference.
    return copy.deepcopy(backend)


def _as_text(result: Any) -> str:
    """A result as the benchmark's executor writes it."""
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError):
            return str(result)  # it holds a Decimal, an mpf or an object of the backend
    return str(result)


def _unwritable(arguments: Mapping[str, Any]) -> str | None:
    """Why the executor could not write these values as Python and read them again: JSON's NaN and Infinity are no
    Python names.
    """
    pending: list[tuple[Any, int]] = [(arguments, 0)]
    while pending:  # iterative, so that depth itself cannot hurt
        value, depth = pending.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return f"name '{'nan' if math.isnan(value) else 'inf'}' is not defined"
        if isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                return "too many nested parentheses"
            pending.extend((child, depth + 1) for child in (value.values() if isinstance(value, dict) else value))
    return None


def _guard(method: Callable, positional: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    check = _GUARDS.get(method.__name__)
    if check is None:
        return
    try:
        bound = inspect.signature(method).bind(*positional, **arguments)
    except TypeError:
        return  # the call itself fails with the message that the model should read
    bound.apply_defaults()
    check(**bound.arguments)


def _guard_power(base: Any, exponent: Any) -> None:
    if not (isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1 and exponent > 0):
        return
    if base.bit_length() * exponent > MAX_RESULT_BITS:
        raise RefusedCall("the result is too large")


def _guard_logarithm(value: Any, base: Any, precision: Any) -> None:
    _guard_precision(precision)
    for number in (value, base):
        # mpmath reads numbers from text, and works for hours on "1e999999999".
        if isinstance(number, str) and not _PLAIN_NUMBER.fullmatch(number):
            raise RefusedCall("expected a number")


def _guard_square_root(number: Any, precision: Any) -> None:
    _guard_precision(precision)


def _guard_round_number(number: Any, decimal_places: Any) -> None:
    # Rounding an integer to -n places computes 10**n first.
    if isinstance(decimal_places, int) and abs(decimal_places) > MAX_DIGITS:
        raise RefusedCall(f"decimal_places must be at most {MAX_DIGITS}")


def _guard_precision(precision: Any) -> None:
    try:
        digits = int(precision)  # mpmath takes "1000000000" and 1e9 as well
    except (TypeError, ValueError, OverflowError):
        return  # no number: the tool says so itself
    if digits > MAX_DIGITS:
        raise RefusedCall(f"precision must be at most {MAX_DIGITS}")


_GUARDS: Mapping[str, Callable[..., None]] = {
    "power": _guard_power,
    "logarithm": _guard_logarithm,
    "square_root": _guard_square_root,
    "round_number": _guard_round_number,
}
