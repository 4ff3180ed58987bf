"""Environments of OpenEnv: rewards are those of its own runner; who is to blame; one line for what is refused.

The package's runner plays the same actions, by its own client, on the same server.
"""

import importlib
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.envs.base import Action, CallTimeout, ToolCall
from hintsd_jax.envs.openenv import OpenEnv, actions, options, served, session, words
from hintsd_jax.envs.protocol import checked, checked_tasks
from hintsd_jax.envs.tool_calls import parse_action, render_call
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_process import host_for
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import EngineConfig, Sampling
from tests.helpers import make_tokenizer

pytest.importorskip("openenv", reason="the package is not installed: run `make openenv`")

WORLDS = str(Path(__file__).parent / "fixtures" / "openenv")
GUESSING, COINS, WALKING = ({"environment": f"oe_worlds:{name}"} for name in ("guessing", "coins", "Walking"))
MOST = 1 << 20
LOOKS = [("look", {"drawer": n}) for n in range(7)] + [("look", {"drawer": "x"}), ("look", {}), ("shake", {})]
MOVES: dict[str, tuple[dict[str, Any], list[Any]]] = {  # what is played at random, some of it against the rules
    "texts": (GUESSING, [*map(str, range(1, 9)), "no number", ""]),
    "tools": (COINS, [*LOOKS, *(("hand_in", {"drawer": n}) for n in range(1, 6))]),
    "fields": (WALKING, [("Walk", {"direction": d, "fields": n}) for d in ("left", "right") for n in range(1, 4)]),
}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.syspath_prepend(WORLDS)


def served_here(name):
    """A server of one of the worlds, that runs on its own."""
    return served.Place(options.Options(environment=f"oe_worlds:{name}"))


def task_of(given, number=0, split="test"):
    return checked_tasks(OpenEnv, split, "unused", {**given, "size": number + 1}, "openenv")[number]


def acted(move):
    """A move as an action: a text, or the call of a tool."""
    return Action(move) if isinstance(move, str) else Action("", (ToolCall(*move),))


def played(given, task, moves) -> Any:
    """The start, the results and the report of one episode."""
    game = OpenEnv(**given)
    try:
        start, results = checked("reset", game.reset(task)), []
        for move in moves:
            results.append(checked("step", game.step(move if isinstance(move, Action) else acted(move))))
            if results[-1].terminated:
                break
        return start, results, checked("report", game.report(), len(results))
    finally:
        game.close()


def by_the_package(url, task, moves, field="") -> tuple[list[Any], float | None]:
    """(each observation that the package's own runner was given, its reward or None where it knows none) of the moves
    up to the end.
    """
    from openenv.core.env_server.mcp_types import Tool
    from openenv.core.generic_client import GenericEnvClient
    from openenv.core.harness.rollout import (
        HarnessRunLimits,
        MCPHarnessAdapter,
        ModelStepResult,
        StepEnvSessionAdapter,
        build_harness_rollout_func,
    )
    from openenv.core.llm_client import LLMResponse
    from openenv.core.llm_client import ToolCall as Call

    calls = [(field, {field: move}) if isinstance(move, str) else move for move in moves]
    script, seen = iter(calls), []

    class Factory:
        def create(self, task, seed=None, episode_id=None):
            def build(name, arguments):
                if name in (field, "Walk"):
                    return arguments
                return {"type": "call_tool", "tool_name": name, "arguments": arguments}

            class Seen(StepEnvSessionAdapter):
                def call_tool(self, name, arguments):
                    result = super().call_tool(name, arguments)
                    seen.append(self._last_result.observation)
                    return result

            return Seen(
                GenericEnvClient(base_url=url),
                seed=task["seed"],
                tool_specs=[Tool(name=name, description="", input_schema={}) for name, _ in calls],
                action_builder=build,
                initial_messages_builder=lambda result, task: [{"role": "user", "content": "go"}],
            )

    def step(messages, tools, sampling):
        call = next(script, None)
        return ModelStepResult(LLMResponse("", [Call("c", *call)] if call else []))

    play = build_harness_rollout_func(
        session_factory=Factory(),
        harness_adapter=MCPHarnessAdapter(),
        model_step_builder=lambda trainer, session: step,
        limits=HarnessRunLimits(max_turns=MOST),
    )
    try:
        return seen, play([task], None)["env_reward"][0]
    except ValueError as error:
        assert "did not produce an environment reward" in str(error)
        return seen, None


def through_the_loop(given, tasks, rollouts, script, isolation="auto", slots=2) -> Any:
    """What the collector makes of the scripts of all episodes."""
    chat = ChatFormat(make_tokenizer(), history="keep")
    engine = ScriptedEngine(chat, lambda job: script(job.episode), EngineConfig(slots, MOST, MOST))
    host = host_for(OpenEnv, "openenv", given, isolation, memory_gib=4.0)
    config = RolloutConfig(MOST, MOST, Sampling(1.0, 1.0, 0, MOST))
    try:
        return run_episodes(engine, None, chat, host, tasks, rollouts, config, seed=0, step=0, call_timeout_s=120.0)
    finally:
        host.close()


@pytest.mark.parametrize("kind", MOVES)
def test_rewards_ends_and_texts_are_those_of_the_packages_own_runner(kind):
    given, choices = MOVES[kind]
    server, ended, scored = served_here(given["environment"].partition(":")[2]), 0, set()
    try:
        for number in range(6):
            task, rng = task_of(given, number), random.Random(f"{kind} {number}")
            moves = [rng.choice(choices) for _ in range(9)]
            seen, reward = by_the_package(server.url, task, moves, "guess")
            _, results, report = played({"environment": server.url}, task, moves)
            assert len(results) == len(seen) and results[-1].reward == (reward or 0.0)
            assert results[-1].terminated or len(seen) == len(moves)
            assert [result.messages[0]["content"] for result in results] == [said(each) for each in seen]
            assert report.faults is None and "State: " in report.summary
            ended, scored = ended + results[-1].terminated, scored | {results[-1].reward}
    finally:
        server.close()
    assert ended and len(scored) > 1  # not all ran out of moves, nor ended alike


def said(observation):
    """What an agent should read of an observation of these worlds."""
    if "said" in observation:
        return observation["said"]
    if "at" in observation:
        return f'{{"at": {observation["at"]}, "goal": {observation["goal"]}}}'
    if observation["error"]:
        return "Error: " + observation["error"]["message"].strip()
    return observation["result"]["content"][0]["text"]


def test_whole_episodes_through_the_loop_in_processes_on_a_class_of_this_machine():
    """Four ways to deal with the drawers; the environment is served in each episode's own process."""
    tasks = OpenEnv.tasks("train", "unused", **COINS, size=2)
    gold = [int(str(played(COINS, task, [])[2].summary).partition('"gold": ')[2].rstrip("}")) for task in tasks]
    call = lambda name, drawer: render_call(ToolCall(name, {"drawer": drawer}))

    def script(episode):
        right = gold[episode.group]
        wrong = right % 5 + 1
        return [
            [call("look", wrong) + call("look", 9), call("hand_in", right)],
            [call("hand_in", wrong)],
            [call("look", right), "I give up."],
            ["<tool_call>{", render_call(ToolCall("shake", {})), call("look", right), call("hand_in", right)],
        ][episode.rollout]

    result = through_the_loop(COINS, tasks, 4, script)
    assert not result.failures and len(result.episodes) == 8
    server = served_here("coins")
    try:
        for episode in result.episodes:
            steps = [parse_action(text) for text in script(episode)]
            moves = [(call.name, call.arguments) for step in steps for call in step.calls]
            seen, reward = by_the_package(server.url, tasks[episode.group], moves)
            assert episode.reward == reward and episode.success == (reward == 1)
            answers = map(said, seen)
            told = [
                [f"Error: {step.problem}."] if step.problem else [next(answers) for _ in step.calls] for step in steps
            ]
            heard = [message["content"] for message in episode.dialogue(len(steps)) if message["role"] == "tool"]
            assert heard == [text for texts in told[:-1] for text in texts]
    finally:
        server.close()
    assert [episode.reward for episode in result.episodes[:4]] == [1.0, 0.0, -0.125, 1.0]


@pytest.mark.parametrize(("name", "sessions"), [("Guessing", 1), ("guessing", 2)])
def test_a_server_with_as_many_sessions_as_there_are_slots_plays_one_episode_after_the_other(name, sessions):
    """It learns a moment too late that an episode is over, and has no session for the next one until then."""
    server = served_here(name)
    script = ["3", "4", "<think>5</think>6", "8"]
    try:
        given = {"environment": server.url}
        tasks = OpenEnv.tasks("train", "unused", **given, size=3)
        result = through_the_loop(given, tasks, 2, lambda episode: script, "thread", sessions)
        expected = [by_the_package(server.url, task, ["3", "4", "6", "8"], "guess")[1] for task in tasks]
    finally:
        server.close()
    assert not result.failures and len(result.episodes) == 6
    assert [episode.reward for episode in result.episodes] == [each for each in expected for _ in range(2)]


def test_a_server_that_stays_full_is_said(monkeypatch):
    monkeypatch.setattr(session, "_ROOM_SECONDS", 0.2)
    server = served_here("guessing")
    held = [session.begun(server.url, False, {})[0] for _ in range(2)]
    try:
        with pytest.raises(RuntimeError, match="max_concurrent_envs"):
            session.begun(server.url, False, {})
    finally:
        for each in held:
            each.close()
        server.close()


def test_the_reward_may_be_the_sum_and_arguments_reach_the_class_and_its_reset():
    moves = [("Walk", {"direction": "right", "fields": 1}), ("Walk", {"direction": "left", "fields": 1})]
    task = task_of(WALKING)
    assert played(WALKING, task, moves)[1][-1].reward == -played(WALKING, task, moves[:1])[1][-1].reward != 0
    assert played({**WALKING, "reward": "sum"}, task, moves)[1][-1].reward == 0
    given = {"environment": "oe_worlds:Guessing", "arguments": {"guesses": 1}, "reset": {"most": 2}}
    start, results, report = played({**given, "system": "Guess."}, task_of(given), ["7"])
    assert [message["content"] for message in start.messages] == ["Guess.", "A number from 1 to 2?"]
    assert results[0].terminated and "The environment ended it." in report.summary


def test_an_action_with_fields_is_a_tool_whose_mistakes_are_told():
    calls = [("Walk", {"direction": "up"}), ("Walk", {"direction": "left", "fields": 9}), ("Run", {}), ("Walk", {})]
    start, results, _ = played(WALKING, task_of(WALKING), calls)
    (tool,) = start.tools
    assert tool["function"]["name"] == "Walk" and "metadata" not in tool["function"]["parameters"]["properties"]
    assert tool["function"]["parameters"]["properties"]["direction"]["enum"] == ["left", "right"]
    heard = [result.messages[0]["content"] for result in results]
    assert "'up' is not one of" in heard[0] and "maximum of 3" in heard[1] and "no tool 'Run'" in heard[2]
    assert "'direction' is a required property" in heard[3] and not any(result.terminated for result in results)
    broken = parse_action("<tool_call>{</tool_call>")
    _, results, report = played(WALKING, task_of(WALKING), [broken, "I stop."])
    assert results[0].messages[0]["content"] == f"Error: {broken.problem}."
    assert results[1].terminated and results[1].reward == 0 and "called nothing" in report.summary


def test_what_only_the_environment_knows_is_in_the_report_alone():
    start, results, report = played(GUESSING, task_of(GUESSING), ["9"])
    assert '"number": ' in report.summary and "had not ended" in report.summary
    assert not any("answer" in message["content"] for message in (*start.messages, *results[0].messages))


@pytest.mark.parametrize(
    ("name", "move", "told"),
    [
        ("Guessing", "crash", "the world broke"),
        ("Guessing", "bug", "fits its schema"),
        ("Guessing", "unscored", "no reward"),
        ("OverAtOnce", None, "over when it had been reset"),
    ],
)
def test_a_fault_of_the_world_is_no_mistake_of_the_agent(name, move, told):
    given = {"environment": f"oe_worlds:{name}"}
    with pytest.raises(RuntimeError, match=told):
        played(given, {"id": "x", "seed": 0}, [move])


def test_a_server_that_goes_or_is_slow_is_a_fault_of_the_world():
    server = served_here("guessing")
    game = OpenEnv(environment=server.url)
    game.reset({"id": "x", "seed": 0})
    server.close()
    failures = through_the_loop({"environment": server.url}, [{"id": "x", "seed": 0}], 1, lambda _: ["1"], "thread")
    assert not failures.episodes and failures.failures
    with pytest.raises(Exception, match="(?i)clos|connect") as error:
        game.step(Action("1"))
    assert not isinstance(error.value, UserError)
    game.close()
    slow = served_here("Slow")
    asked = session.Session(slow.url, seconds=0.2)
    asked.reset(seed=1)
    with pytest.raises(CallTimeout, match="in time"):
        asked.step({"guess": "1"})
    asked.close()
    slow.close()


def test_no_second_session_goes_on_with_an_episode():
    """The client of the package would connect again, and play on in an environment that was never reset."""
    server = served_here("guessing")
    asked, _, _ = session.begun(server.url, False, {"seed": 1})
    client = asked._client
    client._run(client.async_client._ws.close())
    with pytest.raises(ConnectionError, match="closed the session before its end"):
        asked.step({"guess": "1"})
    asked.close()
    server.close()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "give the URL of a running server"),
        ({"environment": "Guessing"}, "package.module:name"),
        ({"environment": "http://127.0.0.1:9"}, "no environment server answers at http://127.0.0.1:9"),
        ({"environment": "ws://127.0.0.1:9"}, "no environment server answers"),
        ({"environment": "http://127.0.0.1:9", "arguments": {"a": 1}}, "are for a class"),
        ({"environment": "oe_nowhere:Guessing"}, "cannot import 'oe_nowhere'"),
        ({"environment": "oe_worlds:Gessing"}, "has no 'Gessing'"),
        ({"environment": "oe_worlds:nothing"}, "neither an app nor a class"),
        ({"environment": "oe_worlds:Unsaid"}, "which class its actions have"),
        ({"environment": "oe_worlds:Unseeded"}, "with the same seed"),
        ({"environment": "oe_worlds:Unbegun"}, "the world cannot begin"),
        ({"environment": "oe_worlds:Guessing", "arguments": {"x": 1}}, "cannot be begun"),
        ({**GUESSING, "arguments": {"x": 1}}, "is an app"),
        ({**GUESSING, "field": "gess"}, "did you mean 'guess'"),
        ({**WALKING, "field": "fields"}, "needs direction too"),
        ({**GUESSING, "reset": {"seed": 1}}, "is the task's"),
        ({**GUESSING, "reset": {"a": object}}, "have to be JSON"),
        ({**GUESSING, "reward": "mean"}, "give 'last' or 'sum'"),
        ({**GUESSING, "size": 0}, "give 1 to"),
        ({**GUESSING, "seed": 101}, "give 0 to"),
        ({**GUESSING, "sead": 1}, "did you mean 'seed'"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(given, told):
    with pytest.raises(UserError, match=told) as error:
        OpenEnv.tasks("train", "unused", **given)
    assert "\n" not in str(error.value)


def test_a_split_or_a_package_that_is_not_there(monkeypatch):
    with pytest.raises(UserError, match="train, eval, test"):
        OpenEnv.tasks("valid", "unused", **GUESSING)
    monkeypatch.setattr(options, "_OPENENV", None)
    reset = partial(OpenEnv(**GUESSING).reset, {"id": "x", "seed": 0})
    for ask in (partial(OpenEnv.tasks, "train", "unused", **GUESSING), reset):
        with pytest.raises(UserError, match="make openenv"):
            ask()


def test_splits_share_no_seed_and_the_same_task_begins_the_same():
    seeds = [{task["seed"] for task in OpenEnv.tasks(split, "x", **GUESSING, size=50)} for split in options.SPLITS]
    assert all(len(own) == 50 for own in seeds) and len(set.union(*seeds)) == 150
    assert not {task["seed"] for task in OpenEnv.tasks("train", "x", **GUESSING, seed=1)} & set.union(*seeds)
    starts = [played(WALKING, task_of(WALKING, number), [])[0] for number in (0, 0, 1, 2, 3)]
    assert starts[0] == starts[1] and len({start.messages[0]["content"] for start in starts}) > 1
    assert OpenEnv.version() == f"openenv {importlib.import_module('openenv').__version__}"


def test_the_environment_that_the_package_makes_for_everybody(tmp_path, monkeypatch):
    """`openenv init`: its app answers each text with the same, and rewards its length."""
    from openenv.cli.__main__ import app
    from typer.testing import CliRunner

    made = CliRunner().invoke(app, ["init", "oe_made", "--output-dir", str(tmp_path)])
    assert made.exit_code == 0, made.output
    monkeypatch.syspath_prepend(tmp_path)
    try:
        given = {"environment": "oe_made.server.app:app"}
        start, results, _ = played(given, task_of(given), ["Hello", "Hello, world"])
        heard = [json.loads(message["content"]) for result in results for message in result.messages]
        assert heard[0] == {"echoed_message": "Hello", "message_length": 5}
        assert [result.reward for result in results] == [0.5, 1.0] and not results[1].terminated
        assert "ready" in start.messages[0]["content"] and start.tools == ()
        _, results, _ = played({**given, "text": "echoed_message"}, task_of(given), ["Hello"])
        assert results[0].messages[0]["content"] == "Hello"
    finally:
        for name in [name for name in sys.modules if name.startswith("oe_made")]:
            del sys.modules[name]


NAMES = st.sampled_from(["said", "board", "reward", "done", "metadata"])
JSON = st.none() | st.integers() | st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.booleans())


@settings(max_examples=50)
@given(st.dictionaries(NAMES, JSON))
def test_nothing_that_an_observation_says_is_lost_and_nothing_hidden_is_told(observation):
    hidden = {"reward": 1.0, "done": True, "metadata": {"answer": 1}}
    text = words.text_of(observation | hidden)
    shown = {key: value for key, value in observation.items() if key not in hidden and value is not None}
    only = next(iter(shown.values()), "")
    if len(shown) < 2 and isinstance(only, str):
        assert text == only
    else:
        assert json.loads(text) == shown


@pytest.mark.parametrize("kind", ["timeout", "transport_error", "invalid_args"])
def test_errors_of_tools(kind):
    observation = {"tool_name": "look", "result": None, "error": {"error_type": kind, "message": "so it is"}, "left": 3}
    if kind == "invalid_args":
        assert words.text_of(observation) == 'Error: so it is\n{"left": 3}'
        return
    with pytest.raises(CallTimeout if kind == "timeout" else RuntimeError, match="so it is"):
        words.text_of(observation)


def test_texts_of_tools():
    say = lambda result: words.text_of({"tool_name": "look", "result": result, "error": None})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert [say(each) for each in ({"content": parts}, "c", None, [1])] == ["a\nb", "c", "", "[1]"]
    with pytest.raises(RuntimeError, match="more than text"):
        say({"content": [{"type": "image", "data": ""}]})
    assert words.text_of({"metadata": {"message": "m"}, "x": 1}, "metadata.message") == "m"
    messages = {"messages": [{"content": "a", "sender": 1}, {"content": "b"}], "prompt": "p"}
    assert words.text_of(messages, "messages") == "a\nb" and words.text_of({"m": [{"x": 1}]}, "m") == '[{"x": 1}]'
    assert words.text_of({"x": 1}, "metadata.message") == '{"x": 1}'


def test_forms_of_actions():
    base = {"metadata": {"type": "object"}}
    text, choice = {"type": "string"}, {"type": "string", "enum": ["a"]}
    of = lambda fields, field="": actions.form_of({"properties": base | fields}, field).kind
    assert of({"code": text}) == actions.TEXT and of({"move": choice}) == of({"a": text, "b": text}) == actions.CALL
    assert of({"a": text, "b": text}, "b") == actions.TEXT
    assert of({}) == of({"type": {"const": "call_tool"}, "tool_name": text}) == actions.TOOLS
    assert actions.form_of({"properties": base | {"n": {}}}).name == "act"
    with pytest.raises(UserError, match="takes no text"):
        of({"move": choice}, "move")


def test_the_class_of_an_environments_actions():
    worlds = importlib.import_module("oe_worlds")
    expected = {
        "Guessing": "Guess",
        "Walking": "Walk",
        "Coins": "CallToolAction",
        "Both": "Guess",
        "Calls": "CallToolAction",
    }
    found = {name: served.action_class(getattr(worlds, name)) for name in expected}
    assert {name: action.__name__ for name, action in found.items()} == expected
    assert served.action_class(worlds.Unsaid) is None


def test_addresses_of_this_machine():
    urls = {"http://localhost:1": True, "ws://127.0.0.1": True, "http://[::1]:8": True, "https://localhost.org": False}
    assert {url: session.is_local(url) for url in urls} == urls
