"""The styles of calls that are no JSON object alone: XML, PYTHONIC, LFM2, OLMO3 and FENCED. What models write is
read, what is read is written again as it was, and nothing raises or is run.
"""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.call_reading import FENCED, LFM2, MAX_DEPTH, OLMO3, PYTHONIC, XML
from hintsd_jax.envs.tool_calls import PROBLEM_KINDS, parse_action, render_calls

NEW = (FENCED, XML, PYTHONIC, LFM2, OLMO3)


def tool(name, **properties):
    """A tool as chat templates take it; each parameter with its schema."""
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = (
    tool(
        "book",
        who={"type": "string"},
        seats={"type": "integer"},
        price={"type": "number"},
        window={"type": "boolean"},
        dates={"type": "array", "items": {"type": "string"}},
        options={"type": "object"},
        note={"anyOf": [{"type": "string"}, {"type": "null"}]},
        weight={"anyOf": [{"type": "integer"}, {"type": "null"}]},
        mode={"enum": ["fast", "slow"]},
        rank={"enum": [1, 2]},
        extra={"type": "any"},
        untyped={"description": "anything"},
    ),
    {
        "name": "flat",
        "parameters": {"type": "dict", "properties": {"count": {"type": "float"}, "of": {"type": "dict"}}},
    },
)


def xml(name, *parameters):
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def read(text, style, tools=TOOLS):
    """The calls of a text without a problem, as (name, arguments)."""
    action = parse_action(text, style, tools=tools)
    assert action.problem is None, action.problem
    return [(call.name, call.arguments) for call in action.calls]


# -- XML


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("who", "Ana", "Ana"),
        ("who", "42", "42"),
        ("who", "null", "null"),
        ("who", "true", "true"),
        ("who", "", ""),
        (
            "who",
            "\n two lines \nand 'quotes' \"of\" both \\n kinds\n",
            "\n two lines \nand 'quotes' \"of\" both \\n kinds\n",
        ),
        (
            "who",
            "</parameter> in text, <tool_call>, </function> too",
            "</parameter> in text, <tool_call>, </function> too",
        ),
        ("who", "é \U0001f600 中", "é \U0001f600 中"),
        ("seats", "42", 42),
        ("seats", " -7 ", -7),
        ("seats", "4.5", "4.5"),
        ("seats", "many", "many"),
        ("seats", "null", None),
        ("price", "4.50", 4.5),
        ("price", "4", 4),
        ("price", "1e3", 1000.0),
        ("window", "true", True),
        ("window", "False", False),
        ("window", "maybe", "maybe"),
        ("dates", '["1 May", "2 May"]', ["1 May", "2 May"]),
        ("dates", "['1 May', \"it's\"]", ["1 May", "it's"]),
        ("dates", "1 May", "1 May"),
        ("dates", '{"a": 1}', '{"a": 1}'),
        ("options", '{"a": {"b": [1, null, true]}}', {"a": {"b": [1, None, True]}}),
        ("options", "{'a': None, 'b': True}", {"a": None, "b": True}),
        ("note", "null", None),
        ("note", "None", None),
        ("note", "nothing", "nothing"),
        ("weight", "None", None),
        ("weight", "3", 3),
        ("mode", "fast", "fast"),
        ("rank", "2", 2),
        ("extra", "[1]", [1]),
        ("extra", "2.5", 2.5),
        ("extra", "words [", "words ["),
        ("extra", "[1", "[1"),
        ("untyped", "3", "3"),
        ("unknown", "3", "3"),
    ],
)
def test_the_schema_says_what_a_value_is(key, text, value):
    ((name, arguments),) = read(f"I book.\n{xml('book', (key, text))} Done.", XML)
    assert name == "book" and json.dumps(arguments) == json.dumps({key: value})


def test_tools_without_a_schema_take_text():
    assert read(xml("flat", ("count", "3"), ("of", '{"a": 1}')), XML) == [("flat", {"count": 3, "of": {"a": 1}})]
    assert read(xml("book", ("seats", "3")), XML, ()) == [("book", {"seats": "3"})]
    assert read(xml("unheard_of", ("seats", "3")), XML) == [("unheard_of", {"seats": "3"})]
    assert read(xml("book"), XML, [{"name": "book"}, {"function": "odd"}]) == [("book", {})]


def test_several_xml_calls_with_text_around():
    text = f"<think>\n{xml('book')}\n</think>\n\nFirst:\n{xml('book', ('seats', '1'))}\nthen {xml('flat')} now"
    assert read(text, XML) == [("book", {"seats": 1}), ("flat", {})]
    closely = (
        "<tool_call><function=book><parameter=who>Ana</parameter><parameter=seats>2</parameter></function></tool_call>"
    )
    assert read(closely, XML) == [("book", {"who": "Ana", "seats": 2})]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (xml("book", ("dates", "[1, ")), "json", "call 1: parameter 'dates' is not valid JSON: Expecting value"),
        (xml("book", ("dates", "[1] [2]")), "json", "call 1: parameter 'dates' is not valid JSON: more than one value"),
        (xml("book", ("seats", "9" * 5000)), "json", "5000 digits"),
        (xml("book", ("price", "1e999")), "json", "too large"),
        (xml("book", ("options", '{"a": ' + "[" * 40 + "]" * 40 + "}")), "json", "nested too deeply"),
        (xml("book", ("options", '{"a": ' * 100_000)), "json", "nested too deeply"),
        (xml("book", ("options", '{"a": "\\ud83d"}')), "json", "surrogate"),
        (xml("book", ("who", "a"), ("who", "b")), "not_a_call", "the parameter 'who' twice"),
        (xml("book", ("who", "a"))[: -len("</tool_call>")], "frame", "does not end with </function> and </tool_call>"),
        (xml("book", ("who", "a")).replace("</function>\n", ""), "frame", "has no </parameter> before the next one"),
        (xml("book", ("who", "a")).replace("</parameter>\n", ""), "frame", "has no </parameter> before the next one"),
        (xml("book", ("who", "a"))[:45], "frame", "has no </parameter>"),
        (xml("book", ("who", "a")).removeprefix("<tool_call>"), "frame", "</tool_call> without <tool_call>"),
        (
            '<tool_call>\n{"name": "book", "arguments": {}}\n</tool_call>',
            "frame",
            "does not begin with <function=NAME>",
        ),
        ("<tool_call>\n<function=>\n</function>\n</tool_call>", "frame", "does not begin with <function=NAME>"),
        ("<function=book>\n</function>", "other_form", "no call could be read: write each one as <tool_call><function"),
        (f"{xml('book')}\n<tool_call>", "frame", "call 2 does not begin"),
        (f"<think>\n{xml('book')}", "thinking", "<think> without </think>"),
    ],
)
def test_xml_that_cannot_be_read_is_a_problem(text, kind, message):
    action = parse_action(text, XML, tools=TOOLS)
    assert (action.calls, action.problem_kind) == ((), kind) and message in action.problem
    cut = parse_action(text, XML, 9, TOOLS)
    assert cut.problem_kind == "cut" and cut.problem == f"the action was cut at 9 tokens: {action.problem}"


# -- Python calls


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("'Ana'", "Ana"),
        ('"it\'s"', "it's"),
        (
            r"'it\'s \\ \n \t \x41\u00e9\U0001f600 \N{BULLET} \101 \d \ud83d\ude00'",
            "it's \\ \n \t Aé\U0001f600 • A \\d \U0001f600",
        ),
        ('"""two\n"lines" """', 'two\n"lines" '),
        ("'two\nlines'", "two\nlines"),
        ("'one' \"two\"", "onetwo"),
        ("'[g(a=1)], <|tool_call_end|>, )]'", "[g(a=1)], <|tool_call_end|>, )]"),
        ("'é 中'", "é 中"),
        ("-3", -3),
        ("4.50", 4.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("[1, [2.5, 'x'], ]", [1, [2.5, "x"]]),
        ("(1, 2)", [1, 2]),
        ("(1,)", [1]),
        ("(1)", 1),
        ("()", []),
        ("{'a': {\"b\": [None]}, 'c': True,}", {"a": {"b": [None]}, "c": True}),
        ("{}", {}),
    ],
)
def test_literals_of_python(written, value):
    for text, style in (
        (f"[f(a={written}, from=1), g.h()]", PYTHONIC),
        (f"<|python_start|>[f( a = {written} ,from=1,),\n g.h( ) ,]<|python_end|>", PYTHONIC),
        (f"I look.\n  [f(a={written}, from=1), g.h()] and more\nDone.", PYTHONIC),
        (f"[f(a={written}, from=1)]\n[g.h()]", PYTHONIC),
        (f"<|tool_call_start|>[f(a={written}, from=1), g.h()]<|tool_call_end|>I look.", LFM2),
        (
            f"So: <|tool_call_start|>[f(a={written}, from=1)]<|tool_call_end|>"
            " <|tool_call_start|>[g.h()]\n<|tool_call_end|>",
            LFM2,
        ),
        (f"I look.<function_calls>f(a={written}, from=1)\ng.h()</function_calls>", OLMO3),
        (f"<function_calls>\n  f( a = {written} ,from=1,), g.h()\n</function_calls> now", OLMO3),
        (f"<function_calls>f(a={written}, from=1)</function_calls><function_calls>g.h()</function_calls>", OLMO3),
    ):
        calls = read(text, style)
        assert json.dumps(calls) == json.dumps([("f", {"a": value, "from": 1}), ("g.h", {})]), text


@pytest.mark.parametrize(
    ("inner", "kind", "message"),
    [
        ("f(a=1", "json", 'call 1 is not a Python call: expected "," or ")"'),
        ("f(a=1), g(", "json", "call 2 is not a Python call: expected the name of an argument at character "),
        ("f(a=1, b.c=1)", "json", "expected the name of an argument"),
        ("f(a=1, *[2])", "not_a_call", "call 1 has an argument without a name"),
        ("f(a='x", "json", "call 1 is not a Python call: expected a literal"),
        ("f(a=b)", "json", "expected a literal"),
        ("f(a=__import__('os').system('x'))", "json", "expected a literal"),
        ("f(a=g())", "json", "expected a literal"),
        ("f(a=f'{1}')", "json", "expected a literal"),
        ("f(a=b'x')", "json", "expected a literal"),
        ("f(a=1 + 1)", "json", 'expected "," or ")"'),
        ("f(a=[x for x in y])", "json", "expected a literal"),
        ("f(a={1, 2})", "json", "expected a string as key"),
        ("f(a={1: 2})", "json", "expected a string as key"),
        ("f(a={'b': 1, 'b': 2})", "json", "a key stands twice"),
        ("f(a=1e999)", "json", "too large"),
        (f"f(a={'9' * 5000})", "json", "5000 digits"),
        (f"f(a={'[' * (MAX_DEPTH + 1)})", "json", "nested too deeply"),
        (f"f(a={'[' * 100_000})", "json", "nested too deeply"),
        ("f(a='\\ud83d')", "json", "surrogate"),
        ("f(a=1, a=2)", "not_a_call", "call 1 has the argument 'a' twice"),
        ("f(a=1, 'x')", "not_a_call", "call 1 has an argument without a name"),
        ("f(a=1, None)", "not_a_call", "call 1 has an argument without a name"),
        ("f(a=1, **{'b': 2})", "not_a_call", "call 1 has an argument without a name"),
        ("f(a=1), 3", "json", "expected the name of a tool"),
    ],
)
def test_python_that_cannot_be_read_is_a_problem(inner, kind, message):
    for text, style in (
        (f"[{inner}]", PYTHONIC),
        (f"<|tool_call_start|>[{inner}]<|tool_call_end|>", LFM2),
        (f"<function_calls>{inner}</function_calls>", OLMO3),
    ):
        action = parse_action(text, style)
        assert (action.calls, action.problem_kind) == ((), kind), (text, action)
        assert message in action.problem and "\n" not in action.problem


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<|tool_call_start|>[f()]", "frame"),
        ("<|tool_call_start|>[f()] and <|tool_call_end|>", "frame"),
        ("[f()]<|tool_call_end|>", "frame"),
        ("<|tool_call_start|>[]<|tool_call_end|>", "json"),
        ('<|tool_call_start|>[{"name": "f", "arguments": {}}]<|tool_call_end|>', "json"),
        ("<|tool_call_start|>", "json"),
        ("[f(a=1)]", "other_form"),
    ],
)
def test_frames_of_lfm2(text, kind):
    action = parse_action(text, LFM2)
    assert (action.calls, action.problem_kind) == ((), kind)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<function_calls>f()", "frame"),
        ("<function_calls>f() and </function_calls>", "json"),
        ("f()</function_calls>", "frame"),
        ("<function_calls></function_calls>", "json"),
        ("<function_calls>f() </function_calls> </function_calls>", "frame"),
        ("<function_calls><function_calls>f()</function_calls>", "json"),
        ('<function_calls>{"name": "f", "arguments": {}}</function_calls>', "json"),
        ("<function_calls>[f()]</function_calls>", "json"),
        ("<function_calls>", "json"),
        ("<function_calls>f(1)</function_calls>", "not_a_call"),
        ("f(a=1)", "other_form"),
    ],
)
def test_frames_of_olmo3(text, kind):
    action = parse_action(text, OLMO3)
    assert (action.calls, action.problem_kind) == ((), kind)


@pytest.mark.parametrize(
    "text", ["[see (above)]", "See [f()].", "[1, 2]", "[a = (b)]", "[x](y)", "[f(x) = 3]", "a[f(b=1)]"]
)
def test_brackets_in_prose_are_no_list_of_calls(text):
    assert parse_action(text, PYTHONIC).calls == () and parse_action(text, PYTHONIC).problem is None


# -- JSON in fences


def fenced(payload, word="json"):
    return f"```{word}\n{payload}\n```"


CALL = '{"name": "f", "arguments": {"a": "```\\n"}}'


@pytest.mark.parametrize(
    ("text", "count", "kind"),
    [
        (fenced(CALL), 1, ""),
        (f"I look.\n{fenced(CALL)}\nand\n{fenced(CALL, '')}\nDone.", 2, ""),
        (fenced(f"[{CALL}, {CALL}]"), 2, ""),
        (fenced(CALL.replace("arguments", "parameters"), "JSON"), 1, ""),
        (f"```json\n{CALL}```", 1, ""),
        (f"  ```json\n  {CALL}\n  ```", 1, ""),
        (f"{fenced('print(1)', 'python')}\n{fenced(CALL)}", 1, ""),
        (fenced('{"size": 3}') + "\n" + fenced('{"broken": ') + "\n" + fenced(CALL), 1, ""),
        (fenced('{"size": 3}'), 0, ""),
        (f"<think>\n{fenced(CALL)}\n</think>\nDone.", 0, ""),
        (CALL, 0, "other_form"),
        (fenced(CALL, "python"), 0, "other_form"),
        (f"```json\n{CALL}", 0, "frame"),
        (f"```json\n{CALL} and\n```", 0, "frame"),
        (f"```json\n{CALL[:-1]}", 0, "json"),
        (f"{fenced(CALL)}\n{fenced(CALL[:-9])}", 0, "json"),
        (fenced('{"name": 3, "arguments": {}}'), 0, "not_a_call"),
        (fenced('{"name": "f", "arguments": {}, "id": 1}'), 0, "not_a_call"),
    ],
)
def test_calls_in_fences(text, count, kind):
    action = parse_action(text, FENCED)
    assert (len(action.calls), action.problem_kind) == (count, kind), action
    assert all(call == ToolCall("f", {"a": "```\n"}) for call in action.calls)


# -- Properties

_texts = st.text() | st.sampled_from(
    [
        "</tool_call>",
        "<tool_call>",
        "\n</parameter>\n",
        "</function>",
        "<parameter=b>",
        "it's",
        '"""',
        "\\",
        "\\n",
        "```",
    ]
    + ["<|tool_call_end|>", ")]", "null", "true", "1", "[1]", "\n", "\r\n", "\x00", "é\U0001f600", "{'a': 1}"]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=12,
)
_names = st.from_regex(r"[^\W\d]\w{0,9}", fullmatch=True).filter(
    lambda name: name not in ("None", "null", "true", "True", "false", "False")
)
_calls = st.builds(ToolCall, name=_names, arguments=st.dictionaries(_names, _json, max_size=4))
_typed = st.fixed_dictionaries(
    {},
    optional={
        "who": _texts.filter(lambda text: "</parameter>" not in text),
        "seats": st.integers(),
        "price": st.floats(allow_nan=False, allow_infinity=False),
        "window": st.booleans(),
        "dates": st.lists(_json, max_size=3),
        "options": st.dictionaries(_texts, _json, max_size=3),
        "note": st.none() | st.just("a note"),
        "weight": st.none() | st.integers(),
    },
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(_calls, min_size=1, max_size=3),
    st.lists(_typed, min_size=1, max_size=3),
    st.sampled_from(["", "I look.\n"]),
)
def test_what_is_written_is_read(calls, typed, before):
    for style in (FENCED, PYTHONIC, LFM2, OLMO3):
        action = parse_action(before + render_calls(calls, style), style)
        assert (action.problem, action.calls) == (None, tuple(calls))
    booked = [ToolCall("book", arguments) for arguments in typed]
    action = parse_action(before + render_calls(booked, XML), XML, tools=TOOLS)
    assert (action.problem, action.calls) == (None, tuple(booked))


_fragments = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<function=book>",
        "</function>",
        "</parameter>",
        "<parameter=seats>",
        "<think>",
        "</think>",
    ]
    + [
        "<parameter=who>",
        "<parameter=extra>",
        "<parameter=options>",
        "\n",
        " ",
        "3",
        "null",
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        "\\",
    ]
    + [
        "<|tool_call_start|>",
        "<|tool_call_end|>",
        "[f(",
        "a=",
        ")",
        ",",
        "):",
        "\n[f(a=1",
        "(",
        "'x'",
        "**",
        "1.",
        "\\N{",
        '"""',
    ]
    + [
        "```json\n",
        "\n```",
        "```",
        CALL,
        '{"name": "f", "arguments": {',
        xml("book", ("seats", "1")),
        "[f(a='x')]",
        "\\ud800",
    ]
)


@settings(max_examples=250, deadline=None)
@given(
    st.lists(_fragments, max_size=14).map("".join)
    | st.text()
    | st.text(alphabet=st.characters(categories=["Cs", "Lu"])),
    st.sampled_from(NEW),
)
def test_any_text_is_read_without_an_error_and_what_is_read_can_be_written(text, style):
    action = parse_action(text, style, tools=TOOLS)
    assert action.text == text and action.problem_kind in ("", *PROBLEM_KINDS)
    assert action.problem is None or (action.calls == () and "\n" not in action.problem)
    json.dumps([call.arguments for call in action.calls], allow_nan=False, ensure_ascii=False).encode()
    if action.calls:
        again = parse_action(render_calls(action.calls, style), style, tools=TOOLS)
        assert (again.problem, again.calls) == (None, action.calls)


@pytest.mark.parametrize(
    ("call", "style", "message"),
    [
        (ToolCall("get-weather", {}), PYTHONIC, "cannot be written as a Python call"),
        (ToolCall("f", {"a b": 1}), LFM2, "cannot be written as a Python call"),
        (ToolCall("f", {"None": 1}), LFM2, "cannot be written as a Python call"),
        (ToolCall("f>", {}), XML, "cannot stand in a tag"),
        (ToolCall("f", {"a": "</parameter>\n</function>"}), XML, "what would end a parameter"),
        *((ToolCall("f", {"a": [math.inf]}), style, "JSON") for style in NEW),
    ],
)
def test_what_a_style_cannot_write_is_refused(call, style, message):
    with pytest.raises(ValueError, match=message):
        render_calls([call], style)


def test_a_structure_in_json_values_of_xml_is_escaped():
    call = ToolCall("book", {"options": {"html": "</parameter>\n</function>"}})
    assert parse_action(render_calls([call], XML), XML, tools=TOOLS).calls == (call,)


PIECES = (
    "<tool_call><function=f><parameter=a>",
    "</parameter> ",
    " ",
    "<",
    "[f(a='",
    "\n[f(",
    "f.",
    '"',
    "'''",
    "[",
    "1",
    "\\x",
)
PIECES += (
    "1,",
    "'a' ",
    '```json\n{"',
    "```json\n{}\n",
    "```a\n",
    "{'a':",
    "<|tool_call_start|>[f()]<|tool_call_end|>",
    "<function_calls>f()</function_calls>",
    "<function_calls>f()",
    "f() ",
    "a",
)


@pytest.mark.parametrize("style", NEW)
def test_reading_takes_time_in_proportion(style):
    """16 times the text may take 64 times as long, not 256 times."""
    begins = {XML: "<tool_call><function=f><parameter=a>", FENCED: "```json\n", OLMO3: "<function_calls>f(a="}
    before = begins.get(style, "<|tool_call_start|>[f(a=")

    def seconds(text):
        began = time.process_time()
        parse_action(text, style)
        return time.process_time() - began

    for piece in PIECES:
        for start in ("", before.removeprefix("" if style == LFM2 else "<|tool_call_start|>")):
            few = min(seconds(start + piece * (2_000 // len(piece))) for _ in range(2))
            assert seconds(start + piece * (32_000 // len(piece))) < 64 * few + 0.2, (start, piece)
