"""The two dialogue formats of BFCL: which calls an action makes, against the official handler and by hand, and how
results come back.
"""

import ast
import importlib.util
import json
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hintsd_jax.envs.base import Action
from hintsd_jax.envs.bfcl.actions import blocks, read_calls, result_messages
from hintsd_jax.envs.call_reading import BARE, PYTHONIC, XML
from hintsd_jax.envs.tool_calls import render_call
from tests.bfcl_helpers import call, parse_action


def block(text, before="\n", after="\n"):
    return f"<tool_call>{before}{text}{after}</tool_call>"


LS, CD = '{"name": "ls", "arguments": {"a": true}}', '{"name": "cd", "arguments": {"folder": "x"}}'
ls, cd = call("ls", a=True), call("cd", folder="x")
TEXTS = {  # text: (official, paper)
    "Done.": ((), ()),
    block(LS): ((ls,), (ls,)),
    f"I look.\n{block(LS)}\n{block(CD)} And so on.": ((ls, cd), (ls, cd)),
    f"<think>\n{block(CD)}\n</think>\n\n{block(LS)}": ((ls,), (cd, ls)),
    block(LS, "", ""): ((), (ls,)),
    block(LS, " ", "\n\n"): ((), (ls,)),
    f"{block('{not json}')}\n{block(LS)}": ((ls,), (ls,)),
    f"{block('[1]')}\n{block(LS)}": ((), (ls,)),
    f"{block('null')}\n{block(LS)}": ((), (ls,)),
    f"{block(chr(123) + '}')}\n{block(LS)}": ((), (ls,)),
    block('{"name": "ls"}'): ((), ()),
    block('{"name": "ls", "arguments": null}'): ((), (call("ls"),)),
    block('{"name": "ls", "arguments": "{\\"a\\": true}"}'): ((ls,), (ls,)),
    block('{"name": "ls", "arguments": "a"}'): ((), (call("ls"),)),
    block('{"name": "ls", "arguments": [1]}'): ((), (call("ls"),)),
    block('{"name": "ls", "arguments": {"a": false, "a": true}, "id": 3}'): ((ls,), (ls,)),
    f"<tool_call>\n{LS}": ((), ()),
    f"{LS}\n</tool_call>": ((), ()),
}


@pytest.mark.parametrize("text", TEXTS)
def test_calls_are_those_that_the_formats_own_handlers_run(text):
    action = parse_action(text)
    assert (read_calls(action, "official"), read_calls(action, "paper")) == TEXTS[text]


@pytest.fixture(scope="module")
def official_calls():
    """The wheel's own functions, taken out of modules that cannot be imported here (they need the whole wheel's
    requirements).
    """
    folder = Path(importlib.util.find_spec("bfcl_eval").submodule_search_locations[0]) / "model_handler"
    wanted, space = {"_extract_tool_calls", "decode_execute", "convert_to_function_call"}, {"json": json, "re": re}
    for file in ("local_inference/qwen_fc.py", "utils.py"):
        for node in ast.walk(ast.parse((folder / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in wanted:
                node.decorator_list = []
                exec(compile(ast.Module([node], []), file, "exec"), space)
    handler = SimpleNamespace(_extract_tool_calls=space["_extract_tool_calls"])

    def calls(text):
        try:
            return space["decode_execute"](handler, text.split("</think>")[-1].lstrip("\n"), False)
        except Exception:  # the handler's own rule: whatever it is, the user turn ends
            return []

    return calls


def test_mixtures_of_blocks_are_read_as_the_official_handler_reads_them(official_calls):
    for text, (calls, _) in TEXTS.items():
        assert len(official_calls(text)) == len(calls), text
    rng, several = random.Random(0), 0
    pieces = [
        LS,
        CD,
        '{"name": "ls", "arguments": {}}',
        '{"name": "ls"}',
        '{"name": "a", "arguments": "{}"}',
        "{",
        "[1]",
        "x",
        "</think>",
    ]
    for _ in range(2000):
        parts = [
            block(rng.choice(pieces), *rng.choice([("\n", "\n")] * 8 + [("", "\n"), (" ", "")]))
            for _ in range(rng.randint(1, 4))
        ]
        text = rng.choice(["", "<think>\nhm\n</think>\n\n", "So: "]) + rng.choice(["\n", ""]).join(parts)
        calls = read_calls(parse_action(text), "official")
        assert [f"{c.name}({','.join(f'{k}={v!r}' for k, v in c.arguments.items())})" for c in calls] == official_calls(
            text
        ), text
        several += len(calls) > 1
    assert several > 100


OPENINGS = (
    "<tool_call>\n",
    "<tool_call>\n{",
    "<tool_call>{ ",
    "<tool_call> ",
    '<tool_call>\n{"a": 1}',
    "\n",
    " ",
    "{",
    "}",
)


@pytest.mark.parametrize("form", ["official", "paper"])
def test_blocks_are_found_as_the_handlers_expressions_do_in_time_that_grows_with_the_text(form):
    whole = {
        "official": re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL),
        "paper": re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL),
    }[form]
    rng, found = random.Random(0), 0
    pieces = [*OPENINGS, "</tool_call>", "\n</tool_call>", "}\n</tool_call>", "x", "</", "tool_call>"]
    for _ in range(3000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
        assert list(blocks(text, form)) == whole.findall(text), text
        found += len(whole.findall(text))
    assert found > 300
    for piece in OPENINGS:
        began = time.process_time()
        read_calls(Action(f"<tool_call>{piece * 40_000}"), form)  # the whole expressions take minutes for most of them
        assert time.process_time() - began < 2, piece


def test_calls_of_another_style_stand_as_the_host_loop_read_them():
    text = render_call(ls, BARE)
    for form in ("official", "paper"):
        assert read_calls(parse_action(text, BARE), form) == (ls,)
        assert read_calls(Action("", (ls, cd)), form) == (ls, cd)
        assert read_calls(parse_action("{broken", BARE), form) == ()
        # tags that are only text of an argument, and tags of another style
        quoting = call("echo", content="<tool_call>\n{}\n</tool_call>")
        for style in (BARE, XML, PYTHONIC):
            assert read_calls(parse_action(render_call(quoting, style), style), form) == (quoting,)


def test_results_come_in_the_formats_own_messages():
    results = ['{"current": ["a"]}', "Error: [x"]
    assert result_messages((ls, cd), results, "official") == tuple(
        {"role": "tool", "content": text} for text in results
    )
    (message,) = result_messages((ls, cd), results, "paper")
    assert message == {
        "role": "user",
        "content": '<tool_call>\n{"name": "ls_1", "content": {"current": ["a"]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "cd_2", "content": "Error: [x"}\n</tool_call>\n',
    }
    cut = '{"current": ["a"... [cut: the first 16 of 40 characters]'
    assert json.dumps(cut) in result_messages((ls,), [cut], "paper")[0]["content"]
