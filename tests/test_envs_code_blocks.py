"""Actions that are code: one Python block, whatever stands around it; everything else is a problem with a kind."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.protocol import call_style
from hintsd_jax.envs.tool_calls import PROBLEM_KINDS, parse_action, render_call
from hintsd_jax.errors import UserError

BLOCK = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (BLOCK, "print(1)\n"),
        (f"I look first.\n{BLOCK}\nThen I go on.", "print(1)\n"),
        ("```py\r\nx = 1\r\n```\r\n", "x = 1\r\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("  ```Python3\n  x = 1\n  ```  ", "  x = 1\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),  # a longer fence holds a shorter one
        ("```json\n{}\n```\n" + BLOCK, "print(1)\n"),  # another language is text
        ("Say ```python in a line.\n" + BLOCK, "print(1)\n"),
        (f"<think>\n{BLOCK}\n</think>\n```python\nprint(2)\n```", "print(2)\n"),
        ("```python\ns = 'a ``` b'\n```", "s = 'a ``` b'\n"),
    ],
)
def test_the_one_block_is_the_code(text, code):
    action = parse_action(text, "code")
    assert (action.code, action.problem, action.problem_kind) == (code, None, "")
    assert action.text == text and action.size == 1 and action.calls == ()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "no_code"),
        ("Done.", "no_code"),
        ("```python\n \n```", "no_code"),
        ("```json\n{}\n```", "no_code"),
        ("apis.supervisor.complete_task()", "other_form"),
        ('<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>', "other_form"),
        (f"{BLOCK}\n{BLOCK}", "two_blocks"),
        (f"{BLOCK}\nOutput:\n```\n1\n```", "two_blocks"),  # what models that play the world too write
        ("```python\nprint(1)", "open_block"),
        (f"{BLOCK}\n```python\nprint(", "open_block"),
        ("<think> Hm.\n" + BLOCK, "thinking"),
        ("```python\ns = '\ud800'\n```", "no_code"),
    ],
)
def test_everything_else_is_told_and_counted_by_kind(text, kind):
    action = parse_action(text, "code")
    assert (action.code, action.problem_kind) == (None, kind) and kind in PROBLEM_KINDS
    assert action.problem and "\n" not in action.problem and action.size == 0
    cut = parse_action(text, "code", cut_at=9)
    assert cut.problem_kind == "cut" and cut.problem.startswith("the action was cut at 9 tokens: ")


def test_a_call_written_as_code_is_read_as_code():
    text = render_call(ToolCall("look", {"at": "x'y", "n": 1}), "code")
    assert parse_action(text, "code").code == 'look(at="x\'y", n=1)\n'


def test_a_cut_action_with_a_whole_block_counts():
    assert parse_action(BLOCK, "code", cut_at=9).code == "print(1)\n"


_pieces = st.sampled_from(["```", "```python", "```py\n", "\n", "````", "x = 1", "<think>", "</think>", " ", "\ud800"])


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(_pieces, max_size=14).map("".join))
def test_never_raises_and_is_all_or_nothing(text):
    action = parse_action(text, "code")
    assert action.text == text and (action.code is None) == bool(action.problem) == bool(action.problem_kind)
    assert action.code is None or (action.code in text and action.code.strip())


def test_in_time_in_proportion_to_the_text():
    for piece in ("```\n", "```python\n", " " * 9 + "```", "`", "```a", "\n"):
        start = time.perf_counter()
        parse_action(piece * (1_000_000 // len(piece)), "code")
        assert time.perf_counter() - start < 3, piece


def test_the_environments_class_says_that_actions_are_code():
    code, tools = type("E", (), {"action_style": "code"}), type("E", (), {})
    assert call_style(code, "e", "auto") == "code"
    assert [call_style(tools, "e", style) for style in ("auto", "json")] == ["auto", "json"]
    with pytest.raises(UserError, match="leave it at auto"):
        call_style(code, "e", "json")
    with pytest.raises(UserError, match="use .tools. or .code."):
        call_style(type("E", (), {"action_style": ["code"]}), "e", "auto")
