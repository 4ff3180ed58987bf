"""The gate behind environments: what is right is copied, anything else is one clear line."""

import numpy as np
import pytest

from hintsd_jax.envs.base import Fault, Report, Start, StepResult
from hintsd_jax.envs.protocol import ProtocolError, checked

USER = {"role": "user", "content": "Go."}
START = Start((USER,))


def test_what_is_right_is_copied_in_plain_types():
    tool = {"name": "cat", "parameters": {}}
    message = dict(USER, more="is left out")
    start = checked("reset", Start([{"role": "system", "content": "Rules."}, message], [tool]))
    assert start == Start(({"role": "system", "content": "Rules."}, USER), ({"name": "cat", "parameters": {}},))
    result = checked("step", StepResult([message], np.float32(0.5), np.bool_(True), 0, [tool]))
    assert result == StepResult((USER,), 0.5, True, False, ({"name": "cat", "parameters": {}},))
    assert (type(result.reward), type(result.terminated), type(result.truncated)) == (float, bool, bool)
    tool["name"], message["content"] = "dog", "Stop."  # what the environment changes later stays its own
    assert start.tools == result.tools == ({"name": "cat", "parameters": {}},) and result.messages == (USER,)
    assert checked("step", StepResult((), terminated=True)) == StepResult((), terminated=True)
    assert checked("step", StepResult((), truncated=True)) == StepResult((), truncated=True)
    faults = (fault for fault in [Fault(1, "so")])  # may be read once only
    assert checked("report", Report("r", faults, [True, False])) == Report("r", (Fault(1, "so"),), (True, False))
    assert checked("report", Report("r")) == Report("r", None, ())
    assert checked("close", "whatever") is None


REFUSED = [
    ("reset", None, "returned NoneType, not a Start"),
    ("reset", Start(()), "no messages"),
    ("reset", Start((USER, {"role": "system", "content": "x"})), "may only come first"),
    ("reset", Start((USER,), tools=({1, 2},)), "not JSON"),
    ("reset", Start((USER,), tools=("cat",)), "must be a JSON object"),
    ("reset", StepResult((USER,)), "not a Start"),
    ("step", None, "returned NoneType, not a StepResult"),
    ("step", "done", "returned str, not a StepResult"),
    ("step", START, "returned Start, not a StepResult"),
    ("step", StepResult(()), "must end the episode"),
    ("step", StepResult(("hello",)), "a message is str"),
    ("step", StepResult(({"role": "assistant", "content": "x"},)), "role 'assistant': use user, tool"),
    ("step", StepResult(({"role": "user"},)), "content is NoneType"),
    ("step", StepResult(({"role": "user", "content": "\ud800"},)), "not Unicode"),
    ("step", StepResult((USER,), reward=float("nan")), "not a finite number"),
    ("step", StepResult((USER,), reward="1"), "not a finite number"),
    ("step", StepResult((USER,), tools={"a": 1}), "must be a JSON object"),
    ("step", StepResult((USER,), tools=[{"a": {1}}]), "the tools are not JSON"),
    ("step", StepResult((USER,), tools=[{"a": float("nan")}]), "not JSON"),
    ("report", None, "not a Report"),
    ("report", Report(3), "summary is not text"),
    ("report", Report("x", (Fault(0, "f"),)), "not a Fault with a step from 1 on"),
    ("report", Report("x", (Fault(True, "f"),)), "not a Fault with a step from 1 on"),
    ("report", Report("x", (Fault(1, None),)), "not a Fault with a step from 1 on"),
    ("report", Report("x", ((1, "f"),)), "not a Fault"),
    ("report", Report("x", None, (1,)), "valid_turns are (1,), not bools"),
]


@pytest.mark.parametrize(("method", "value", "message"), REFUSED)
def test_anything_else_is_refused_in_one_line(method, value, message):
    with pytest.raises(ProtocolError) as error:
        checked(method, value)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("method", "value"), [("step", StepResult(None)), ("report", Report("x", 3))])
def test_what_is_no_sequence_is_an_error_too(method, value):
    with pytest.raises(TypeError, match="not iterable"):
        checked(method, value)
