"""Tool calls: strict on what is read, silent on what is not a call, and never an exception."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.episodes.toolcalls import MAX_DEPTH, parse_action, render_call

GOOD = '<tool_call>\n{"name": "cat", "arguments": {"path": "a.txt"}}\n</tool_call>'

_texts = st.text() | st.sampled_from(["</tool_call>", "<tool_call>", "\n</tool_call>", "</think>", '"}}', "\\", "é\U0001f600"])
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
@given(st.lists(_calls, max_size=3), st.sampled_from(["", "I will look.\n", "<think>\nmaybe <tool_call>\n</think>\n\n"]))
def test_any_arguments_come_back(calls, before):
    text = before + "\n".join(render_call(call) for call in calls)
    action = parse_action(text)
    assert action.problem is None
    assert action.calls == tuple(calls)
    assert action.text == text


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(_fragments, max_size=14).map("".join) | st.text(alphabet=st.characters(categories=["Cs", "Lu"])))
def test_never_raises_and_is_all_or_nothing(text):
    action = parse_action(text)
    assert action.text == text
    assert action.problem is None or (action.calls == () and "\n" not in action.problem)
    assert (len(action.calls) > 0) <= ("<tool_call>" in text)
    json.dumps([call.arguments for call in action.calls], allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("text", ["", "Done.", "a < b and tool_call", "<tool_response>\n{}\n</tool_response>", '{"name": "x"}'])
def test_text_without_a_tag_is_no_call_and_no_problem(text):
    assert parse_action(text).calls == () and parse_action(text).problem is None


def test_calls_keep_their_order_and_text_around_is_allowed():
    action = parse_action(f"First {GOOD} then\n" + GOOD.replace("cat", "rm") + " done")
    assert [call.name for call in action.calls] == ["cat", "rm"]
    assert action.problem is None


def block(payload: str) -> str:
    return f"<tool_call>\n{payload}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "words"),
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
def test_what_cannot_be_read_is_a_problem(text, words):
    action = parse_action(text)
    assert action.calls == ()
    assert words in action.problem


def test_render_refuses_what_is_not_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        render_call(ToolCall("x", {"a": float("nan")}))
