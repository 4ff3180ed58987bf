"""BFCL: the scores are the benchmark's own, nothing that a model writes is evaluated, and episodes share no state."""

import ast
import builtins
import decimal
import importlib
import inspect
import json
import os
import random
import subprocess
import threading
import time

import pytest

from hintsd_jax.envs.base import Action, ToolCall, resolve
from hintsd_jax.envs.bfcl import env as bfcl_env
from hintsd_jax.envs.bfcl.env import MAX_TURN_STEPS, Bfcl
from hintsd_jax.envs.bfcl.execute import World, tool_docs
from hintsd_jax.envs.bfcl.score import _differences
from hintsd_jax.episodes.toolcalls import parse_action, render_call
from hintsd_jax.errors import UserError

pytest.importorskip("bfcl_eval", reason="the benchmark's wheel is not installed: run `make bfcl`")

from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING  # noqa: E402
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker  # noqa: E402

DONE = "Done."  # an action without a call: the user turn ends


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """All 200 tasks of multi_turn_base."""
    data_dir = str(tmp_path_factory.mktemp("tasks"))
    return [task for split in ("train", "eval", "test") for task in Bfcl.tasks(split, data_dir, categories=("multi_turn_base",))]


def method_of(name, class_names):
    for class_name in reversed(class_names):
        if any(doc["name"] == name for doc in tool_docs(class_name)):
            return getattr(getattr(importlib.import_module(CLASS_FILE_PATH_MAPPING[class_name]), class_name), name)
    raise KeyError(name)


def answer_of(task):
    """The ground truth as [turn][ToolCall], read here on its own: the oracle does not use the code under test."""
    class_names = json.loads(task["entry"])["involved_classes"]
    answer = []
    for turn in json.loads(task["ground_truth"]):
        calls = []
        for text in turn:
            node = ast.parse(text, mode="eval").body
            keywords = {item.arg: ast.literal_eval(item.value) for item in node.keywords}
            bound = inspect.signature(method_of(node.func.id, class_names)).bind(
                None, *(ast.literal_eval(item) for item in node.args), **keywords
            )
            bound.arguments.pop("self")
            calls.append(ToolCall(node.func.id, dict(bound.arguments)))
        answer.append(calls)
    return answer


def play(task, answer, environment=None, one_call_a_step=False):
    """Plays [turn][ToolCall] as text through the parser; returns (environment, last Turn, all Turns)."""
    environment = environment or Bfcl()
    environment.reset(task)
    turns = []
    for calls in answer:
        groups = [[call] for call in calls] if one_call_a_step else [calls]
        for group in filter(None, groups):
            action = parse_action("\n".join(map(render_call, group)))
            assert action.problem is None and len(action.calls) == len(group)
            turns.append(environment.step(action))
        turns.append(environment.step(parse_action(DONE)))
    return environment, turns[-1], turns


@pytest.mark.parametrize("one_call_a_step", [False, True])
def test_the_ground_truth_is_valid_in_every_task(tasks, one_call_a_step):
    assert len(tasks) == 200
    for task in tasks:
        environment, last, turns = play(task, answer_of(task), one_call_a_step=one_call_a_step)
        assert (last.reward, last.terminated, last.messages) == (1.0, True, ()), environment.report()
        assert all(turn.reward == 0 and not turn.terminated and turn.messages for turn in turns[:-1])
        assert environment.report().faults == ()


def test_dropping_the_last_call_fails_every_task_and_the_report_says_where(tasks):
    kinds = {}
    for task in tasks:
        answer = answer_of(task)
        failing = max(turn for turn, calls in enumerate(answer) if calls)
        answer[failing].pop()
        environment, last, _ = play(task, answer)
        assert (last.reward, last.terminated) == (0.0, True)
        report = environment.report()
        kind = report.summary.split("(multi_turn:")[1].split(")")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
        assert f"failed at user turn {failing + 1} of {len(answer)} " in report.summary
        (fault,) = report.faults
        assert fault.step == sum(1 + bool(calls) for calls in answer[: failing + 1]) and fault.feedback
    assert kinds == {"empty_turn_model_response": 137, "instance_state_mismatch": 52, "execution_response_mismatch": 11}


# --- agreement with the official checker ---


def corrupt(answer, class_names, rng):
    """One or two faults of the kinds a policy makes."""
    answer = [[ToolCall(call.name, dict(call.arguments)) for call in calls] for calls in answer]
    for _ in range(rng.randint(1, 2)):
        turn = rng.choice([index for index, calls in enumerate(answer) if calls] or [0])
        calls = answer[turn]
        if not calls:
            break
        at = rng.randrange(len(calls))
        match rng.choice(("drop", "double", "swap", "argument", "extra argument", "tool", "insert", "undefined", "move", "empty")):
            case "drop":
                del calls[at]
            case "double":
                calls.insert(at, calls[at])
            case "swap":
                rng.shuffle(calls)
            case "argument" if calls[at].arguments:
                key = rng.choice(sorted(calls[at].arguments))
                calls[at].arguments[key] = rng.choice([0, -1, 2.5, "", "x", None, True, [], ["a", 1], {"a": 1}, "document", 10**6])
            case "extra argument":
                calls[at].arguments["unknown"] = 1
            case "tool" | "insert" as kind:
                doc = rng.choice([doc for name in class_names for doc in tool_docs(name)])
                values = {key: rng.choice([1, 2.5, "x", "document", ["a"], True]) for key in doc["parameters"]["properties"]}
                calls[at : at + (kind == "tool")] = [ToolCall(doc["name"], values)]
            case "undefined":
                calls.insert(at, ToolCall("no_such_tool", {"a": 1}))
            case "move":
                answer[rng.randrange(len(answer))].append(calls.pop(at))
            case "empty":
                calls.clear()
    return answer


def official(task, answer, name):
    """(valid, error type) by the benchmark's own executor and checker. It keeps state by name, so every check needs a new one."""
    steps = [
        [[f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})" for call in calls]] if calls else []
        for calls in answer
    ]
    verdict = multi_turn_checker(steps, json.loads(task["ground_truth"]), json.loads(task["entry"]), "multi_turn_base", name)
    return verdict["valid"], verdict.get("error_type")


def test_verdicts_are_the_official_checkers(tasks):
    rng = random.Random(0)
    seen = {}
    for trial in range(400):
        task = tasks[trial % len(tasks)]
        answer = corrupt(answer_of(task), json.loads(task["entry"])["involved_classes"], rng)
        wanted = official(task, answer, f"trial{trial}")
        environment, last, _ = play(task, answer)
        summary = environment.report().summary
        error_type = None if last.reward else summary.split("(")[1].split(")")[0]
        assert (last.reward == 1.0, error_type) == wanted, (task["id"], answer, summary)
        seen[error_type] = seen.get(error_type, 0) + 1
    assert len(seen) == 4 and min(seen.values()) >= 10, seen  # every verdict was really met


def test_result_texts_are_the_official_executors(tasks):
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call

    for task in tasks[::5]:
        entry = json.loads(task["entry"])
        calls = sum(json.loads(task["ground_truth"]), [])
        wanted, _ = execute_multi_turn_func_call(calls, entry["initial_config"], entry["involved_classes"], "texts", entry["id"])
        world = World(entry["initial_config"], entry["involved_classes"])
        assert [world.call(call.name, call.arguments) for calls in answer_of(task) for call in calls] == wanted


# --- flow ---


def test_tools_and_messages_are_the_official_ones(tasks):
    task = tasks[0]
    entry = json.loads(task["entry"])
    start = Bfcl().reset(task)
    assert list(start.messages) == entry["question"][0]
    assert [tool["name"] for tool in start.tools] == [doc["name"] for name in entry["involved_classes"] for doc in tool_docs(name)]
    assert all(tool["description"].endswith(". Note that the provided function is in Python 3 syntax.") for tool in start.tools)
    assert not any("Python 3 syntax" in doc["description"] for doc in tool_docs(entry["involved_classes"][0]))  # shared, unchanged
    environment, _, turns = play(task, answer_of(task))
    assert [list(turn.messages) for turn in turns[1::2]] == entry["question"][1:] + [[]]
    assert all(message["role"] == "tool" for turn in turns[::2] for message in turn.messages)


@pytest.mark.parametrize("text", ["", "Sorry.", "<tool_call>\n{not json}\n</tool_call>", '<tool_call>\n{"name": "ls"}\n</tool_call>'])
def test_an_action_without_a_readable_call_ends_the_user_turn(tasks, text):
    questions = json.loads(tasks[0]["entry"])["question"]
    environment = Bfcl()
    environment.reset(tasks[0])
    for question in questions[1:]:
        assert list(environment.step(parse_action(text)).messages) == question
    last = environment.step(parse_action(text))
    assert (last.reward, last.terminated) == (0.0, True)
    assert "user turn 1 of" in environment.report().summary and environment.report().faults[0].step == 1


def test_the_official_step_limit(tasks):
    task = next(task for task in tasks if len(json.loads(task["ground_truth"])) > 1)
    nothing = Action("", (ToolCall("no_such_tool", {}),))
    environment = Bfcl()
    environment.reset(task)
    turns = [environment.step(nothing) for _ in range(MAX_TURN_STEPS + 1)]
    assert not any(turn.truncated or turn.terminated for turn in turns[:-1])
    assert turns[-1].truncated and turns[-1].messages and turns[-1].reward == 0
    assert "multi_turn:force_terminated" in environment.report().summary
    assert environment.report().faults[0].step == MAX_TURN_STEPS + 1
    # In the last turn the limit only ends the turn: the episode is still scored.
    answer = answer_of(task)
    environment.reset(task)
    for calls in answer[:-1]:
        environment.step(Action("", tuple(calls)))
        environment.step(Action(DONE))
    environment.step(Action("", tuple(answer[-1])))
    turns = [environment.step(nothing) for _ in range(MAX_TURN_STEPS)]
    assert turns[-1].terminated and turns[-1].reward == 1.0


def test_an_unfinished_episode_reports_what_is_known(tasks):
    environment = Bfcl()
    environment.reset(tasks[0])
    assert environment.report().faults is None and "not finished" in environment.report().summary
    environment.step(Action(DONE))
    assert environment.report().faults[0].step == 1


def test_two_episodes_of_one_task_share_no_state(tasks):
    for task in tasks[::20]:
        environments = [Bfcl() for _ in range(3)]
        answer = answer_of(task)
        for environment in environments:
            environment.reset(task)
        texts = [[] for _ in environments]
        for calls in answer:
            for environment, seen in zip(environments, texts):
                seen.append(environment.step(Action("", tuple(calls))) if calls else None)
                seen.append(environment.step(Action(DONE)))
        assert texts[0] == texts[1] == texts[2] and texts[0][-1].reward == 1.0
        assert play(task, answer, environments[0])[1].reward == 1.0  # and a reset forgets everything
    # A long context adds cards from a module-level table; a booking changes the balance of one.
    ours, theirs = (World({"TravelAPI": {}}, ["TravelAPI"], long_context=True).instances["TravelAPI"] for _ in range(2))
    next(iter(ours.credit_card_list.values()))["balance"] = -1
    assert ours.credit_card_list and -1 not in [card["balance"] for card in theirs.credit_card_list.values()]
    stored = ["a"]
    world = World({}, ["TwitterAPI"])
    world.instances["TwitterAPI"].authenticated = True
    assert "error" not in world.call("post_tweet", {"content": "x", "tags": stored}).lower()
    stored.append("b")
    assert "b" not in list(world.instances["TwitterAPI"].tweets.values())[-1]["tags"]


# --- what the agent sees, what the report tells ---


def test_long_results_are_cut_for_the_agent_and_scored_whole(tasks):
    for task in tasks[::25]:
        _, whole, _ = play(task, answer_of(task))
        _, last, turns = play(task, answer_of(task), Bfcl(max_observation_chars=10))
        assert last.reward == whole.reward == 1.0
        texts = [message["content"] for turn in turns for message in turn.messages if message["role"] == "tool"]
        assert any("[cut: the first 10 of " in text for text in texts)
        assert all(len(text) <= 10 or "[cut: " in text for text in texts)


def test_ground_truth_values_are_told_only_on_request_and_only_for_training(tasks):
    for task in tasks:
        if task["split"] == "train" and '"cd(folder=' in task["ground_truth"]:
            break
    answer = answer_of(task)
    answer[0].pop()
    call = json.loads(task["ground_truth"])[0][-1]
    told = play(task, answer, Bfcl(ground_truth_in_report=True))[0].report()
    assert call in told.summary and call in told.faults[0].feedback
    for environment, asked in ((Bfcl(), task), (Bfcl(ground_truth_in_report=True), task | {"split": "test"})):
        report = play(asked, answer, environment)[0].report()
        assert call not in report.summary and call not in report.faults[0].feedback and "expected" not in report.summary


def test_differences_are_text_and_bounded_even_for_a_folder_inside_itself():
    config = {"root": {"w": {"type": "directory", "contents": {"a": {"type": "directory", "contents": {}}}}}}
    ours, theirs = (World({"GorillaFileSystem": config}, ["GorillaFileSystem"]) for _ in range(2))
    ours.call("cp", {"source": "a", "destination": "a"})  # the benchmark's copy makes a loop here
    ours.call("touch", {"file_name": "mine"})
    theirs.call("touch", {"file_name": "theirs"})
    found = list(_differences(ours.instances, theirs.instances))
    assert found == [
        ("GorillaFileSystem.root/a/a", "should not be there", ""),
        ("GorillaFileSystem.root/theirs", "is missing", "should be ''"),
        ("GorillaFileSystem.root/mine", "should not be there", ""),
    ]


# --- attacks ---

IMPORT = "__import__('os').system('touch pwned')"
ATTACKS = [
    ("divide", {"a": IMPORT, "b": 1}),
    (IMPORT, {}),
    ("add(a=1,b=2) or " + IMPORT, {}),
    ("add.__globals__", {}),
    ("__init__", {}),
    ("__class__", {}),
    ("_load_scenario", {"scenario": {}}),
    ("__import__", {"name": "os"}),
    ("exit", {}),
    ("SystemExit", {}),
    ("add", {"a=1,b=2) or " + IMPORT + " or add(a": 1}),
    ("add", {"__class__": 1}),
    ("add", {"self": 1, "a": 1, "b": 2}),
    ("add", {"a": {"__class__": "x"}, "b": []}),
    ("cat", {"file_name": "/etc/passwd"}),
    ("cat", {"file_name": ["x"]}),
    ("echo", {"content": "x" * 10**6, "file_name": "../../pwned"}),
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


@pytest.mark.parametrize("name, arguments", ATTACKS, ids=lambda value: str(value)[:30])
def test_attacks_run_nothing_and_come_back_at_once_as_an_observation(tasks, name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = next(task for task in tasks if json.loads(task["entry"])["involved_classes"] == ["GorillaFileSystem", "MathAPI"])

    executed = []
    environment = Bfcl()
    environment.reset(task)
    action = parse_action(render_call(ToolCall(name, arguments)))
    assert len(action.calls) == 1
    for module, attribute in ((builtins, "eval"), (builtins, "exec"), (os, "system"), (subprocess, "Popen")):
        monkeypatch.setattr(module, attribute, lambda *args, **kwargs: executed.append(args))
    started = time.monotonic()
    turn = environment.step(action)
    monkeypatch.undo()
    assert time.monotonic() - started < 2
    (message,) = turn.messages
    assert message["role"] == "tool" and "error" in message["content"].lower()
    assert not turn.terminated and not turn.truncated and not executed and not list(tmp_path.iterdir())


def test_hard_but_legal_mathematics_still_works():
    world = World({}, ["MathAPI"])
    assert world.call("power", {"base": 2, "exponent": 100}) == json.dumps({"result": 2**100})
    assert world.call("power", {"base": -1, "exponent": 10**9}) == '{"result": 1}'
    assert world.call("power", {"base": 9, "exponent": -(10**9)}) == '{"result": 0.0}'
    assert world.call("logarithm", {"value": "100", "base": "1e1", "precision": 5}) == "{'result': mpf('2.0')}"
    precision = decimal.getcontext().prec
    assert world.call("square_root", {"number": 2, "precision": 40}).count("1") > 3
    assert decimal.getcontext().prec == precision
    assert "not an argument name" in world.call("add", {"a": 1, "b": 2, "c d": 3})
    assert world.call("round_number", {"number": 2.567, "decimal_places": 1}) == '{"result": 2.6}'
    assert world.call("add", {"a": IMPORT, "b": "!"}) == json.dumps({"result": IMPORT + "!"})  # text stays text


def test_precision_does_not_leak_between_threads():
    def work(precision, out):
        world = World({}, ["MathAPI"])
        out.append({world.call("logarithm", {"value": 10, "base": 3, "precision": precision}) for _ in range(300)})

    outs = [[] for _ in range(4)]
    threads = [threading.Thread(target=work, args=(5 + 20 * (index % 2), out)) for index, out in enumerate(outs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(out[0]) for out in outs] == [1] * 4 and outs[0] == outs[2] != outs[1] == outs[3]


def test_too_many_calls_in_one_step_are_answered_not_run(tasks, monkeypatch):
    monkeypatch.setattr(bfcl_env, "MAX_STEP_CALLS", 3)
    environment = Bfcl()
    environment.reset(tasks[0])
    messages = environment.step(Action("", (ToolCall("ls", {}),) * 5)).messages
    assert ["more than 3 calls" in message["content"] for message in messages] == [False] * 3 + [True] * 2


# --- options ---


def test_options_are_checked_and_prompts_are_filtered(tmp_path, caplog):
    assert resolve("bfcl") is Bfcl
    with pytest.raises(UserError, match="no option 'max_prompt_char'.*max_prompt_chars"):
        Bfcl(max_prompt_char=1)
    with pytest.raises(UserError, match="max_observation_chars 1 or more"):
        Bfcl(max_observation_chars=0)
    with pytest.raises(UserError, match="no train task fits into max_prompt_chars=10; the smallest needs 1"):
        Bfcl.tasks("train", str(tmp_path), max_prompt_chars=10)
    kept = Bfcl.tasks("train", str(tmp_path), categories=("multi_turn_base",), max_prompt_chars=16_000)
    assert 10 < len(kept) < 100 and f"{len(kept)} of 100 tasks kept, {100 - len(kept)} dropped" in caplog.text
    for task in kept:
        start = Bfcl().reset(task)
        assert sum(len(json.dumps(tool)) for tool in start.tools) + len(start.messages[0]["content"]) <= 16_000
