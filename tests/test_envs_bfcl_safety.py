"""Attacks on the BFCL environment, from text through the parser to the backends: nothing runs, nothing hangs, all ends
in an answer.
"""

import builtins
import os
import subprocess
import time

import pytest

from hintsd_jax.envs.base import Start, StepResult, ToolCall
from hintsd_jax.envs.bfcl import env as bfcl_env
from hintsd_jax.envs.bfcl.env import Bfcl
from hintsd_jax.envs.tool_calls import render_call
from hintsd_jax.rollout.env_call import ENV_DIED
from hintsd_jax.rollout.env_pool import EnvPool
from hintsd_jax.rollout.env_process import ProcessHost
from hintsd_jax.runs.journal import Journal
from tests.bfcl_helpers import entry_of, parse_action, tasks

IMPORT = "__import__('os').system('touch pwned')"
SECONDS = 5.0  # for what comes back at once; generous, for a busy machine
CALLS = [
    ("divide", {"a": IMPORT, "b": 1}),
    (IMPORT, {}),
    ("add(a=1,b=2) or " + IMPORT, {}),
    ("add.__globals__", {}),
    ("add.__self__.__class__", {}),
    ("__init__", {}),
    ("__class__", {}),
    ("_load_scenario", {"scenario": {}}),
    ("__import__", {"name": "os"}),
    ("exit", {}),
    ("SystemExit", {}),
    ("raise SystemExit", {}),
    ("add", {"a=1,b=2) or " + IMPORT + " or add(a": 1}),
    ("add", {"__class__": 1}),
    ("add", {"self": 1, "a": 1, "b": 2}),
    ("add", {"a": {"__class__": "x"}, "b": []}),
    ("add", {"a": {"__reduce__": [IMPORT]}, "b": 1}),
    ("cat", {"file_name": "/etc/passwd"}),
    ("cat", {"file_name": ["x"]}),
    ("cat", {"file_name": "{0.__class__.__init__.__globals__}"}),
    ("echo", {"content": "x" * 10**7, "file_name": "../../pwned"}),
    ("x" * 10**7, {}),
    ("add", {"x" * 10**7: 1}),
    ("divide", {"a": "x" * 10**7, "b": 1}),
    ("power", {"base": 9, "exponent": 10**9}),
    ("power", {"base": -9, "exponent": 10**300}),
    ("logarithm", {"value": 10, "base": 2, "precision": 10**9}),
    ("logarithm", {"value": 10, "base": 2, "precision": "1000000000"}),
    ("logarithm", {"value": 10, "base": 2, "precision": 1e12}),
    ("logarithm", {"value": "1e999999999", "base": 2, "precision": 10}),
    ("logarithm", {"value": 2, "base": "1e-99_999_999_9", "precision": 10}),
    ("square_root", {"number": 2, "precision": 10**9}),
    ("square_root", {"number": 2, "precision": "1000000000"}),
    ("square_root", {"number": "9" * 10**6, "precision": 10}),
    ("round_number", {"number": 5, "decimal_places": -(10**9)}),
]
TEXTS = {  # a block, and how the turn ends: the observation of a call, or the next user message
    "NaN": ('{"name": "add", "arguments": {"a": NaN, "b": 1}}', "name 'nan' is not defined"),
    "Infinity": ('{"name": "add", "arguments": {"a": [-Infinity], "b": 1}}', "name 'inf' is not defined"),
    "number too large": ('{"name": "add", "arguments": {"a": 1e999, "b": 1}}', "name 'inf' is not defined"),
    "5,000 digits": ('{"name": "add", "arguments": {"a": ' + "9" * 5000 + ', "b": 1}}', None),
    "10 million digits": ('{"name": "add", "arguments": {"a": ' + "9" * 10**7 + ', "b": 1}}', None),
    "nested 10,000 deep": ('{"name": "add", "arguments": {"a": ' + "[" * 10_000 + "]" * 10_000 + ', "b": 1}}', None),
    "nested 300 deep": (
        '{"name": "add", "arguments": {"a": ' + "[" * 300 + "]" * 300 + ', "b": 1}}',
        "too many nested parentheses",
    ),
    "open brackets": ('{"name": "add", "arguments": ' + '{"a":' * 100_000, None),
    "duplicate keys": ('{"name": "add", "arguments": {"a": 1, "a": 2, "b": 3}}', '{"result": 5}'),
    "half a surrogate pair": ('{"name": "add", "arguments": {"a": "\\ud800", "b": "!"}}', '{"result": "\\ud800!"}'),
    "arguments as text": ('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}', '{"result": 3}'),
    "no JSON": (IMPORT, None),
    "name is a list": ('{"name": ["add"], "arguments": {}}', None),
    "call in a list": ('[{"name": "add", "arguments": {"a": 1, "b": 2}}]', None),
}


@pytest.fixture(scope="module")
def task():
    return next(
        task for task in tasks("base") if entry_of(task)["involved_classes"] == ["GorillaFileSystem", "MathAPI"]
    )


@pytest.fixture
def attacked(task, tmp_path, monkeypatch):
    """Takes an action's text; gives the StepResult, after it was checked that nothing was run and no file written."""

    def attack(text, form="official"):
        environment, executed = Bfcl(format=form, unreadable_calls="end_turn"), []
        environment.reset(task)
        monkeypatch.chdir(tmp_path)
        for module, attribute in ((builtins, "eval"), (builtins, "exec"), (os, "system"), (subprocess, "Popen")):
            monkeypatch.setattr(module, attribute, lambda *args, **kwargs: executed.append(args))
        started = time.monotonic()
        turn = environment.step(parse_action(text))
        took = time.monotonic() - started
        monkeypatch.undo()
        assert (
            took < SECONDS and not executed and not list(tmp_path.iterdir()) and not (turn.terminated or turn.truncated)
        )
        return turn

    return attack


@pytest.mark.parametrize("name, arguments", CALLS, ids=lambda value: str(value)[:30])
def test_calls_run_nothing_and_come_back_at_once_as_an_observation(attacked, name, arguments):
    (message,) = attacked(render_call(ToolCall(name, arguments))).messages
    assert message["role"] == "tool" and "error" in message["content"].lower() and len(message["content"]) < 4100


@pytest.mark.parametrize("form", ["official", "paper"])
@pytest.mark.parametrize("kind", TEXTS)
def test_texts_that_are_hard_to_read_end_as_an_observation_or_the_next_user_turn(attacked, task, kind, form):
    block, wanted = TEXTS[kind]
    turn = attacked(f"<tool_call>\n{block}\n</tool_call>", form)
    if wanted is None:
        assert list(turn.messages) == entry_of(task)["question"][1]
        return
    (message,) = turn.messages
    if form == "official":
        assert message["role"] == "tool" and wanted in message["content"]
    else:
        assert message["role"] == "user" and '"name": "add_1"' in message["content"]
    assert message["content"].encode()  # what no tokenizer takes does not come through


def test_a_folder_inside_itself_costs_no_more_than_an_error(task):
    environment = Bfcl()
    environment.reset(task)
    calls = [("mkdir", {"dir_name": "a"}), ("mkdir", {"dir_name": "b"})]
    calls += [("cp", {"source": one, "destination": other}) for one in "ab" for other in "ab"]
    calls += [("find", {"path": ".", "name": "x"}), ("du", {"human_readable": True}), ("ls", {"a": True})]
    calls += [("cp", {"source": "a", "destination": "c"})]
    started = time.monotonic()
    turn = environment.step(parse_action("\n".join(render_call(ToolCall(*call)) for call in calls)))
    assert len(turn.messages) == len(calls)
    while not turn.terminated:
        turn = environment.step(parse_action(""))
    assert turn.reward == 0 and environment.report().faults and time.monotonic() - started < SECONDS


def test_too_many_calls_in_one_step_are_answered_not_run(task, monkeypatch):
    monkeypatch.setattr(bfcl_env, "MAX_STEP_CALLS", 3)
    environment = Bfcl()
    environment.reset(task)
    messages = environment.step(parse_action("\n".join([render_call(ToolCall("ls", {}))] * 5))).messages
    assert ["more than 3 calls" in message["content"] for message in messages] == [False] * 3 + [True] * 2


def test_a_call_without_end_is_killed_counted_and_journalled(task, tmp_path):
    """`find` in a folder of 2**60 files, which 240 calls of `cp` have built; as in a run, in a process of its own."""
    calls = [("mkdir", {"dir_name": "d0"})]
    for n in range(60):
        calls += [("mkdir", {"dir_name": f"d{n + 1}"}), ("cp", {"source": f"d{n}", "destination": f"d{n + 1}"})]
        calls += [
            ("cp", {"source": f"d{n}", "destination": f"e{n}"}),
            ("cp", {"source": f"e{n}", "destination": f"d{n + 1}"}),
        ]
    build, find = [
        [
            parse_action("\n".join(render_call(ToolCall(*call)) for call in calls[n : n + 90]))
            for n in range(0, 241, 90)
        ],
        parse_action(render_call(ToolCall("find", {"path": "d60"}))),
    ]
    host = ProcessHost("hintsd_jax.envs.bfcl:Bfcl", {}, memory_gib=0.1)

    def run(find):
        with EnvPool(host, 1, 60.0, Journal(tmp_path / "answers")) as pool:
            assert isinstance(pool.reset(0, task, ("t",)).result(), Start)
            assert all(isinstance(pool.step(0, action).result(), StepResult) for action in build)
            return pool.step(0, find).result(), pool.close()

    try:
        failure, closing = run(find)
        assert failure.reason == ENV_DIED and closing == []
        assert run(parse_action(render_call(ToolCall("ls", {})))) == (
            failure,
            [],
        )  # from the journal: nothing is called
    finally:
        host.close()
