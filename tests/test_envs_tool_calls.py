"""Tool calls: strict on what is read, silent on what is not a call, and never an exception."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.tool_calls import BARE, HERMES, MAX_DEPTH, PYTHON_TAG, parse_action, render_call

GOOD = '<tool_call>\n{"name": "cat", "arguments": {"path": "a.txt"}}\n</tool_call>'

_texts = st.text() | st.sampled_from(
    ["</tool_call>", "<tool_call>", "\n</tool_call>", "</think>", '"}}', "\\", "é\U0001f600"]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=12,
)
_calls = st.builds(ToolCall, name=st.text(min_size=1), arguments=st.dictionaries(_texts, _json, max_size=4))
_fragments = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<think>", "</think>", GOOD, '"name"', '"arguments"', '"x"']
    + ["\n", "{", "}", "[", ":", ",", "{}", "NaN", "1e999", "\\ud800"]
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_calls, max_size=3), st.sampled_from(["", "I will look.\n", "<think>\nmaybe <tool_call>\n</think>\n\n"])
)
def test_any_arguments_come_back(calls, before):
    text = before + "\n".join(render_call(call) for call in calls)
    action = parse_action(text)
    assert action.problem is None
    assert action.calls == tuple(calls)
    assert action.text == text


@settings(max_examples=200, deadline=None)
@given(
    st.text()
    | st.lists(_fragments, max_size=14).map("".join)
    | st.text(alphabet=st.characters(categories=["Cs", "Lu"]))
)
def test_never_raises_and_is_all_or_nothing(text):
    action = parse_action(text)
    assert action.text == text
    assert action.problem is None or (action.calls == () and "\n" not in action.problem)
    assert (len(action.calls) > 0) <= ("<tool_call>" in text)
    json.dumps([call.arguments for call in action.calls], allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "text", ["", "Done.", "a < b and tool_call", "<tool_response>\n{}\n</tool_response>", '{"name": "x"}']
)
def test_text_without_a_tag_is_no_call_and_no_problem(text):
    assert parse_action(text).calls == () and parse_action(text).problem is None


def test_calls_keep_their_order_and_text_around_is_allowed():
    action = parse_action(f"First {GOOD} then\n" + GOOD.replace("cat", "rm") + " done")
    assert [call.name for call in action.calls] == ["cat", "rm"]
    assert action.problem is None


def block(payload: str) -> str:
    return f"<tool_call>\n{payload}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block('{"name": "x", "arguments": {}'), "not valid JSON"),
        (block("{'name': 'x', 'arguments': {}}"), "not valid JSON"),
        (block(""), "not valid JSON"),
        (block('{"name": "x", "arguments": {}} extra'), "does not end with"),
        (block('[{"name": "x", "arguments": {}}]'), "not a JSON object"),
        (block('{"name": "x"}'), 'lacks "arguments"'),
        (block('{"arguments": {}}'), 'lacks "name"'),
        (block('{"name": "", "arguments": {}}'), '"name" must be'),
        (block('{"name": 3, "arguments": {}}'), '"name" must be'),
        (block('{"name": "x", "arguments": "{}"}'), '"arguments" must be'),
        (block('{"name": "x", "arguments": [1]}'), '"arguments" must be'),
        (block('{"name": "x", "arguments": {}, "id": 1}'), "unknown key 'id'"),
        (block('{"name": "x", "name": "y", "arguments": {}}'), "twice"),
        (block('{"name": "x", "arguments": {"a": {"b": 1, "b": 2}}}'), "twice"),
        (block('{"name": "x", "arguments": {"a": NaN}}'), "NaN is not JSON"),
        (block('{"name": "x", "arguments": {"a": -Infinity}}'), "-Infinity is not JSON"),
        (block('{"name": "x", "arguments": {"a": 1e999}}'), "too large"),
        (block('{"name": "x", "arguments": {"a": ' + "9" * 5000 + "}}"), "5000 digits"),
        (block('{"name": "x", "arguments": {"a": "\\ud83d"}}'), "surrogate"),
        (block('{"name": "x", "arguments": {"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}}"), "too deeply"),
        (block('{"name": "x", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}"), "too deeply"),
        (GOOD[: -len("</tool_call>")], "does not end with"),
        (GOOD.removeprefix("<tool_call>\n"), "without <tool_call>"),
        (GOOD + "\n</tool_call>", "without <tool_call>"),
        ("<tool_call>\n" + GOOD + "\n</tool_call>", "not valid JSON"),
        (GOOD + "\n<tool_call>\n", "not valid JSON"),
        ("<think>\nhm " + GOOD, "<think> without </think>"),
    ],
)
def test_what_cannot_be_read_is_a_problem(text, message):
    action = parse_action(text)
    assert action.calls == ()
    assert message in action.problem


def test_render_refuses_what_is_not_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        render_call(ToolCall("x", {"a": float("nan")}))


BARE_GOOD = '{"name": "cat", "parameters": {"path": "a.txt"}}'
_bare_fragments = st.sampled_from(
    [BARE_GOOD, PYTHON_TAG, ";", "\n", "{", "}", "[", ":", ",", "{}", '"name"', '"parameters"', "NaN"]
    + ["<think>", "</think>", "<tool_call>"]
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_calls, min_size=1, max_size=3),
    st.sampled_from(["", "\n ", PYTHON_TAG, f"<think>\nmaybe {BARE_GOOD}\n</think>\n\n"]),
    st.sampled_from([";", "; ", "\n", " ;\n", "\n\n"]),
    st.sampled_from(["", "\n", "  "]),
)
def test_any_bare_arguments_come_back(calls, before, separator, after):
    text = before + separator.join(render_call(call, BARE) for call in calls) + after
    action = parse_action(text, BARE)
    assert (action.problem, action.calls, action.text) == (None, tuple(calls), text)


@settings(max_examples=200, deadline=None)
@given(
    st.text()
    | st.lists(_bare_fragments, max_size=14).map("".join)
    | st.text(alphabet=st.characters(categories=["Cs", "Lu"]))
)
def test_bare_never_raises_and_is_all_or_nothing(text):
    action = parse_action(text, BARE)
    assert action.text == text
    assert action.problem is None or (action.calls == () and "\n" not in action.problem)
    json.dumps([call.arguments for call in action.calls], allow_nan=False, ensure_ascii=False).encode()


def test_a_bare_call_may_say_that_it_is_a_function():
    typed = BARE_GOOD.replace("{", '{"type": "function", ', 1)
    assert parse_action(typed, BARE).calls == parse_action(BARE_GOOD, BARE).calls != ()
    for text, style in (
        (typed.replace('"function"', '"tool"'), BARE),
        (GOOD.replace("{", '{"type": "function", ', 1), HERMES),
    ):
        assert "unknown key 'type'" in parse_action(text, style).problem


@pytest.mark.parametrize(
    "text", ["", "Done.", f"I call {BARE_GOOD}", GOOD, "[1]", "<think>\n{\n</think>\n\nDone.", ";"]
)
def test_bare_text_that_begins_otherwise_holds_no_call(text):
    assert parse_action(text, BARE).calls == () and parse_action(text, BARE).problem is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BARE_GOOD.replace("parameters", "arguments"), 'lacks "parameters"'),
        ('{"name": "x", "parameters": "{}"}', '"parameters" must be'),
        ('{"name": "x", "parameters": {}, "kind": "function"}', "unknown key 'kind'"),
        ('{"name": "x", "parameters": {}', "call 1 is not valid JSON"),
        ("{ not json", "call 1 is not valid JSON"),
        (f"{BARE_GOOD}; rm", "call 2 is not valid JSON"),
        (f"{BARE_GOOD};", "call 2 is not valid JSON"),
        (f"{BARE_GOOD}\nDone.", "call 2 is not valid JSON"),
        (f"{BARE_GOOD} Done.", "followed by more"),
        (BARE_GOOD + BARE_GOOD, "followed by more"),
        (f"{BARE_GOOD}, {BARE_GOOD}", "followed by more"),
        (f"{PYTHON_TAG}print(1)", "call 1 is not valid JSON"),
        (f"{PYTHON_TAG}[{BARE_GOOD}]", "not a JSON object"),
        ('{"name": "x", "parameters": {"a": 1e999}}', "too large"),
        ('{"name": "x", "parameters": {"a": "\\ud83d"}}', "surrogate"),
        ('{"name": "x", "parameters": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}", "too deeply"),
        (f"<think>\nhm {BARE_GOOD}", "<think> without </think>"),
    ],
)
def test_bare_calls_that_cannot_be_read_are_a_problem(text, message):
    action = parse_action(text, BARE)
    assert action.calls == ()
    assert message in action.problem


def test_the_styles_write_what_their_templates_write():
    call = ToolCall("cat", {"path": "é.txt"})
    assert (
        render_call(call)
        == render_call(call, HERMES)
        == '<tool_call>\n{"name": "cat", "arguments": {"path": "é.txt"}}\n</tool_call>'
    )
    assert render_call(call, BARE) == '{"name": "cat", "parameters": {"path": "é.txt"}}'
