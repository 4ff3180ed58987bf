"""Tool calls: strict on what is read, silent on what is not a call, and never an exception."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.call_reading import (
    BARE,
    FENCED,
    HERMES,
    JSON,
    LFM2,
    MAX_DEPTH,
    OLMO3,
    PYTHON_TAG,
    PYTHONIC,
    STYLES,
    XML,
)
from hintsd_jax.envs.tool_calls import PROBLEM_KINDS, parse_action, render_call

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
    "text", ["", "Done.", "a < b and tool_call", "<tool_response>\n{}\n</tool_response>", '{"size": "x"}']
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
    assert message in action.problem and action.problem_kind == kind_of(message)


def kind_of(message: str) -> str:
    """The kind of problem, told by words of its text."""
    words = {
        "frame": ("does not end with", "without <tool_call>", "followed by more"),
        "not_a_call": ("not a JSON object", "lacks", "must be", "unknown key"),
        "thinking": ("<think> without",),
    }
    return next((kind for kind, parts in words.items() if any(part in message for part in parts)), "json")


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


@pytest.mark.parametrize("said", ["", "I look.\n"])
def test_what_llama_4_says_may_stand_before_bare_calls(said):
    text = f"<|python_start|>{said}<|python_end|>{BARE_GOOD}"
    assert parse_action(text, BARE).calls == parse_action(BARE_GOOD, BARE).calls != ()
    assert parse_action(text.replace("<|python_end|>", ""), BARE).problem_kind == "other_form"


def test_a_bare_call_may_say_that_it_is_a_function():
    typed = BARE_GOOD.replace("{", '{"type": "function", ', 1)
    assert parse_action(typed, BARE).calls == parse_action(BARE_GOOD, BARE).calls != ()
    for text, style in (
        (typed.replace('"function"', '"tool"'), BARE),
        (GOOD.replace("{", '{"type": "function", ', 1), HERMES),
    ):
        assert "unknown key 'type'" in parse_action(text, style).problem


@pytest.mark.parametrize("text", ["", "Done.", "I call {cat}", "[1]", f"<think>\n{BARE_GOOD}\n</think>\n\nDone.", ";"])
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
    assert message in action.problem and action.problem_kind == kind_of(message)


def test_the_styles_write_what_their_templates_write():
    call = ToolCall("cat", {"path": "é.txt"})
    assert (
        render_call(call)
        == render_call(call, HERMES)
        == '<tool_call>\n{"name": "cat", "arguments": {"path": "é.txt"}}\n</tool_call>'
    )
    assert render_call(call, BARE) == '{"name": "cat", "parameters": {"path": "é.txt"}}'
    assert render_call(call, JSON) == '{"name": "cat", "arguments": {"path": "é.txt"}}'


# -- JSON objects anywhere: what Qwen2.5-Coder writes

JSON_GOOD = '{"name": "find_files", "arguments": {"name": "report"}}'


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_calls, min_size=1, max_size=3),
    st.sampled_from([HERMES, BARE, JSON]),
    st.sampled_from(["{}", "```json\n{}\n```", "I {{look}} first.\n{}\nThen [1, {{}}] more.", "[{}]"]),
)
def test_any_arguments_come_back_from_objects_anywhere(calls, style, frame):
    separator = ", " if frame == "[{}]" and style != HERMES else "\n"
    frame = "{}" if frame == "[{}]" and style == HERMES else frame
    text = frame.format(separator.join(render_call(call, style) for call in calls))
    action = parse_action(text, JSON)
    assert (action.problem, action.calls) == (None, tuple(calls))


@pytest.mark.parametrize(
    ("text", "calls", "kind"),
    [
        (f"```json\n{JSON_GOOD}\n```", 1, ""),
        (JSON_GOOD, 1, ""),
        (f"[{JSON_GOOD}, {JSON_GOOD}] and {JSON_GOOD}", 3, ""),
        (f"<think>\n{JSON_GOOD}\n</think>\nDone.", 0, ""),
        ('Found {"size": 3} and [{"a": 1}, {"b": 2}].', 0, ""),
        ('A { "brace" in prose. ' + JSON_GOOD, 1, ""),
        (JSON_GOOD[:-1], 0, "json"),
        (JSON_GOOD + JSON_GOOD[:-1], 0, "json"),
        (JSON_GOOD + JSON_GOOD.replace('"report"', "NaN"), 0, "json"),
        (JSON_GOOD.replace('"report"', "[" * 100_000), 0, "json"),
        (JSON_GOOD + '{"name": 3, "arguments": {}}', 0, "not_a_call"),
        (JSON_GOOD.replace("}}", '}, "parameters": {}}'), 0, "not_a_call"),
        ("{'name': 'cat', 'arguments': {}}", 0, "other_form"),
        ('{"function": "cat", "args": {}}', 0, "other_form"),
        ('{"name": "cat"}', 0, "other_form"),
        ("[cat(path='a.txt')]", 0, "other_form"),
    ],
)
def test_objects_anywhere(text, calls, kind):
    action = parse_action(text, JSON)
    assert (len(action.calls), action.problem_kind) == (calls, kind)


# -- Calls in another form

FORMS = {  # a name and its arguments as JSON -> the call as some family writes it
    "hermes": lambda name, args: f'<tool_call>\n{{"name": "{name}", "arguments": {args}}}\n</tool_call>',
    "json": lambda name, args: f'{{"name": "{name}", "arguments": {args}}}',
    "parameters": lambda name, args: f'{{"name": "{name}", "parameters": {args}}}',
    "arguments first": lambda name, args: f'{{"arguments": {args}, "name": "{name}"}}',
    "as text": lambda name, args: json.dumps({"name": name, "arguments": args}),
    "list": lambda name, args: f'[{{"name": "{name}", "arguments": {args}}}]',
    "fenced": lambda name, args: f'```json\n{{\n  "name": "{name}",\n  "arguments": {args}\n}}\n```',
    "in prose": lambda name, args: f'Let me see.\n{{"name": "{name}", "arguments": {args}}}\nI wait.',
    "openai": lambda name, args: f'{{"type": "function", "function": {{"name": "{name}", "arguments": {args}}}}}',
    "react": lambda name, args: f"Thought: hm\nAction: {name}\nAction Input: {args}",
    "react json": lambda name, args: f'{{"action": "{name}", "action_input": {args}}}',
    "tool": lambda name, args: f'{{"tool": "{name}", "args": {args}}}',
    "python dict": lambda name, args: f"{{'name': '{name}', 'arguments': {args}}}",
    "no quotes": lambda name, args: f"{{name: {name}, arguments: {args}}}",
    "unclosed": lambda name, args: f'{{"name": "{name}", "arguments": {args}',
    "cut": lambda name, args: f'```json\n{{"name": "{name}", "argu',
    "no arguments": lambda name, args: f'{{"name": "{name}"}}',
    "llama function": lambda name, args: f"<function={name}>{args}</function>",
    "xml": lambda name, args: (
        f"<tool_call>\n<function={name}>\n<parameter=x>\n{args}\n</parameter>\n</function>\n</tool_call>"
    ),
    "lfm2": lambda name, args: f"I look.<|tool_call_start|>[{name}(x={args})]<|tool_call_end|>",
    "olmo3": lambda name, args: f"<function_calls>{name}(x={args})\n{name}()</function_calls>",
    "coder": lambda name, args: f"<function={name}>\n<parameter=x>\n1\n</parameter>\n</function>",
    "mistral": lambda name, args: f'[TOOL_CALLS] [{{"name": "{name}", "arguments": {args}}}]',
    "mistral new": lambda name, args: f"[TOOL_CALLS]{name}[ARGS]{args}",
    "python tag": lambda name, args: f"<|python_tag|>{name}.call(x=1)",
    "functionary": lambda name, args: f"<function_call>{name}{args}</function_call>",
    "deepseek": lambda name, args: f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n{args}",
    "granite": lambda name, args: f"<|tool_call|>{name} {args}",
    "anthropic": lambda name, args: f'<function_calls>\n<invoke name="{name}">\n</invoke>\n</function_calls>',
    "gpt-oss": lambda name, args: f"<|channel|>commentary to=functions.{name} <|message|>{args}",
    "python": lambda name, args: f"{name}(x={args})",
    "python list": lambda name, args: f"[{name}(x={args}), {name}()]",
    "python fenced": lambda name, args: f"```python\n{name}({args})\n```",
    "python lines": lambda name, args: f"{name}(x=')', y=[1, (2)])\nprint({name}(\"a\", {args}))",
    "python cut": lambda name, args: f"[{name}(x={args}",
}
READ = {HERMES: {"hermes"}, BARE: {"parameters"}, JSON: {*FORMS} & {"hermes", "json", "parameters", "arguments first"}}
READ[JSON] |= {"list", "fenced", "in prose", "mistral"}
READ |= {FENCED: {"fenced"}, XML: {"xml"}, PYTHONIC: {"python list"}, LFM2: {"lfm2"}, OLMO3: {"olmo3"}}
_names = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True)
_arguments = st.dictionaries(_names, st.integers(0, 9) | st.text(max_size=9), max_size=3).map(json.dumps)


@settings(max_examples=40, deadline=None)
@given(_names, _arguments, st.sampled_from(STYLES), st.sampled_from(["", "<think>\nFirst Done.\n</think>\n\n"]))
def test_a_call_in_any_known_form_is_read_or_is_a_problem(name, arguments, style, thinking):
    for form, write in FORMS.items():
        action = parse_action(thinking + write(name, arguments), style)
        assert "\n" not in (action.problem or "")
        if form in READ[style]:
            assert {call.name for call in action.calls} == {name} and action.problem_kind == ""
        else:
            assert not action.calls and action.problem and action.problem_kind in PROBLEM_KINDS, (form, style)


_words = st.sampled_from(
    [
        "I",
        "called",
        "the",
        "tool",
        "find_files",
        "(again)",
        "name:",
        "arguments",
        "{x}",
        "{",
        "}",
        "[1]",
        "it's",
        "f(x)",
    ]
    + ["Done.", '"quoted"', "a = b;", "parameters:", "<b>", "</b>", "```", "\n", "action", "Action:", "function", "\\"]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(_words, max_size=12).map(" ".join), st.sampled_from(sorted({*STYLES} - {BARE})))
def test_prose_that_only_mentions_tools_stays_prose(text, style):
    action = parse_action(text, style)
    assert (action.calls, action.problem, action.problem_kind) == ((), None, "")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "text",
    [
        "Done.",
        "I copied the file.",
        "I used find_files(name='report') and found it.",
        "The name: report, the arguments: none.",
        'The file holds the text "name": see above.',
        "The set is {1, 2} and the list [1, 2].",
        'It says: {"title": "Minutes", "size": 3}.',
        "All of it (see above).",
        "sum(a, b) is 3",
        "3 files, as the function said.",
        "Copied a.txt (3 KB)\nMoved b.txt (4 KB)",
        "```\na table\n```",
        "Action: none needed.",
    ],
)
def test_an_answer_to_the_user_is_no_call(style, text):
    action = parse_action(text, style)
    assert (action.calls, action.problem, action.problem_kind) == ((), None, "")


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(_fragments | _bare_fragments | _words, max_size=14).map("".join), st.integers(0, 2))
def test_objects_anywhere_never_raise_and_are_all_or_nothing(text, cut_at):
    action = parse_action(text, JSON, cut_at)
    assert action.text == text and action.problem_kind in ("", *PROBLEM_KINDS)
    assert (action.problem is None) == (action.problem_kind == "")
    assert action.problem is None or (action.calls == () and "\n" not in action.problem)
    json.dumps([call.arguments for call in action.calls], allow_nan=False, ensure_ascii=False).encode()


def seconds(read, text):
    began = time.process_time()
    read(text)
    return time.process_time() - began


PIECES = [
    *(
        '{"',
        "{'name': 'a",
        "f(",
        "[f(a=1",
        '"name": "a',
        "\n \t",
        "<function",
        '{"name":[',
        "(",
        " ",
        "```a\n",
        "print( ",
    ),
    *(
        "<tool_call>",
        "</tool_call>",
        '{"a": 1}',
        '{"a": 1, "a": 2}',
        "Action: x\n",
        "[ {",
        "{name",
        '\\"',
        "<think>",
        "1",
    ),
]


@pytest.mark.parametrize("before", ["", "```a\n", "["])
def test_reading_takes_time_in_proportion(before):
    """16 times the text may take 64 times as long, not 256 times; which piece of it repeats is no matter."""
    for style in (HERMES, BARE, JSON):
        for piece in PIECES:
            read = lambda size, piece=piece, style=style: parse_action(
                f"{before}{piece * (size // len(piece))}x", style
            )
            few = min(seconds(read, 4_000) for _ in range(2))
            assert seconds(read, 64_000) < 64 * few + 0.3, (style, piece)


def test_objects_that_cannot_be_read_are_looked_at_up_to_some_number():
    """An error of Python's decoder counts the lines before it: time with the square of the text, if there are many."""
    action = parse_action("\n" * 200_000 + '{"' * 20_000, JSON)
    assert action.problem == "more than 1,000 objects are not valid JSON" and action.problem_kind == "json"


def test_a_problem_of_a_cut_action_says_so():
    for text in (GOOD[:40], f"<think>\n{GOOD}", JSON_GOOD, "<tool_call>"):
        whole, cut = parse_action(text), parse_action(text, cut_at=7)
        assert cut.problem == f"the action was cut at 7 tokens: {whole.problem}"
        assert cut.problem_kind == "cut" != whole.problem_kind
    assert parse_action(GOOD, cut_at=7) == parse_action(GOOD) and parse_action("Well, I", cut_at=7).problem is None
