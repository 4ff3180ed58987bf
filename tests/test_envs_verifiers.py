"""Tasksets of verifiers: rewards and texts are those of its own runner; splits; one line for what cannot be played.

The package's own runner, for comparison, asks a server that gives canned answers.
"""

import asyncio
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hintsd_jax.envs.base import Action, CallTimeout, ToolCall
from hintsd_jax.envs.protocol import checked, checked_tasks
from hintsd_jax.envs.tool_calls import parse_action, render_call
from hintsd_jax.envs.verifiers import Verifiers, here, play, tasksets
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_process import host_for
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import EngineConfig, Sampling
from tests.helpers import make_tokenizer

vf = pytest.importorskip("verifiers.v1", reason="the package is not installed: run `make verifiers`")

SUMS, GUESSES = {"taskset": "vf_sums"}, {"taskset": "vf_guesses", "size": 80}
MOST = 1 << 20


def add(a, b):
    return render_call(ToolCall("calculator_add", {"a": a, "b": b}))


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fixtures" / "tasksets"))


def tasks_of(options, split="train"):
    return checked_tasks(Verifiers, split, "unused", options, "verifiers")


def task_of(options, position, split="train"):
    """The task at a position of its stream, whichever split has it."""
    everything = [task for name in tasksets.SPLITS for task in tasks_of(options, name)]
    return next(task | {"split": split} for task in everything if task["id"].endswith(f"-{position}"))


def through_the_loop(options, tasks, scripts) -> Any:
    """What the collector makes of one script for each task, in processes."""
    chat = ChatFormat(make_tokenizer(), history="keep")
    engine = ScriptedEngine(chat, lambda job: scripts[job.episode.group], EngineConfig(2, MOST, MOST))
    host = host_for(Verifiers, "verifiers", options, "auto", memory_gib=4.0)
    config = RolloutConfig(MOST, MOST, Sampling(1.0, 1.0, 0, MOST))
    try:
        return run_episodes(engine, None, chat, host, tasks, 1, config, seed=0, step=0, call_timeout_s=120.0)
    finally:
        host.close()


def played(options, task, texts) -> Any:
    """The start, the results and the report of one episode, here."""
    env = Verifiers(**options)
    try:
        start, results = checked("reset", env.reset(task)), []
        for text in texts:
            results.append(checked("step", env.step(parse_action(text)), len(results)))
        return start, results, checked("report", env.report(), len(results))
    finally:
        env.close()


def by_the_package(options, task, texts) -> Any:
    """The package's own `Episode` of these answers."""
    answers = iter(texts)

    class Canned(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            said = parse_action(next(answers))
            functions = [{"name": call.name, "arguments": json.dumps(call.arguments)} for call in said.calls]
            calls = [
                {"index": n, "id": f"c{n}", "type": "function", "function": function}
                for n, function in enumerate(functions)
            ]
            delta = {"role": "assistant", **({"tool_calls": calls} if calls else {"content": said.text})}
            ends = [(delta, None), ({}, "tool_calls" if calls else "stop")]
            frame = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "canned"}
            chunks = [frame | {"choices": [{"index": 0, "delta": d, "finish_reason": f}]} for d, f in ends]
            body = "".join(f"data: {text}\n\n" for text in [*map(json.dumps, chunks), "[DONE]"]).encode()
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    async def run():
        config = tasksets.config_of(tasksets.Options(**options), task["split"])
        environment = vf.load_environment(config)
        client = vf.EvalClientConfig(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key_var="NO_KEY")
        async with environment.serving():
            return await environment.run_episode(task["task"], vf.ModelContext(model="canned", client=client))

    here.install()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        return asyncio.run(asyncio.wait_for(run(), 300))
    finally:
        server.shutdown()
        server.server_close()


def test_tool_episodes_through_the_loop_have_the_rewards_of_the_packages_own_runner():
    """One answers right with the tool, one wrong with it, one right without it, one errs in every way first."""
    tasks = [task_of(SUMS, n) for n in (0, 1, 2, 3)]
    unknown, wrong = render_call(ToolCall("subtract", {})), render_call(ToolCall("calculator_add", {"a": "x"}))
    scripts = [[add(40, 2), "It is 42."], [add(1, 1), "2"], ["44"], [unknown, wrong, add(43, 2) + add(1, 2), "45"]]
    result = through_the_loop(SUMS, tasks, scripts)
    assert not result.failures and len(result.episodes) == 4
    assert [episode.reward for episode in result.episodes] == [1.25, 0.25, 1.0, 2.0]
    assert [episode.success for episode in result.episodes] == [True, False, True, True]
    first, last = result.episodes[0], result.episodes[3]
    assert [message["content"] for message in first.dialogue(2) if message["role"] == "tool"] == ["42"]
    heard = [message["content"] for message in last.dialogue(4) if message["role"] == "tool"]
    assert "unknown tool" in heard[0] and "valid integer" in heard[1] and heard[2:] == ["45", "3"]
    episode = by_the_package(SUMS, tasks[0], scripts[0])
    (trace,) = episode.traces
    assert episode.ok and trace.reward == first.reward
    told = [message.content for message in trace.messages if message.role in ("system", "user", "tool")]
    assert told == [message["content"] for message in first.dialogue(2) if message["role"] != "assistant"]


def test_episodes_of_many_turns_through_the_loop_have_the_rewards_of_the_packages_own_runner():
    tasks = [task_of(GUESSES, n) for n in (5, 2, 7)]  # the numbers 6, 3, 8
    scripts = [["4", "6"], ["3"], ["1", "2", "3", "4 or so"]]
    result = through_the_loop(GUESSES, tasks, scripts)
    assert not result.failures
    episodes = [by_the_package(GUESSES, task, said) for task, said in zip(tasks, scripts)]
    rewards = [episode.traces[0].reward for episode in episodes]
    assert [episode.reward for episode in result.episodes] == rewards == [0.75 + 0.5, 1.0 + 0.5, 0.0]
    assert [message["content"] for message in result.episodes[0].dialogue(2)][::2] == [
        "A number from 1 to 8?",
        "It is more.",
    ]


def test_another_environment_goes_with_a_taskset_and_tools_with_many_turns():
    options = {**SUMS, "env": {"id": "vf_asks_twice", "question": "Sure?"}}
    task, said = task_of(options, 0), [add(40, 1), "41", add(40, 2), "42"]
    start, results, _ = played(options, task, said)
    assert [tool["function"]["name"] for tool in start.tools] == ["calculator_add"]
    heard = [message for result in results for message in result.messages]
    assert [message["content"] for message in heard] == ["41", "Sure?", "42"]
    assert not any(result.tools for result in results)
    (trace,) = by_the_package(options, task, said).traces
    assert results[-1].reward == trace.reward == 1.0 + 2 * 0.25


def test_what_an_episode_says_of_its_end_is_in_the_report_alone():
    _, results, report = played(GUESSES, task_of(GUESSES, 0), ["1"])
    assert results[-1].messages == () and results[-1].terminated and not results[-1].truncated
    assert report.summary.splitlines()[:2] == ["reward short: 1 x 0.5", "reward found: 1 x 1"] and report.faults is None
    assert "had not ended" in played(GUESSES, task_of(GUESSES, 0), [])[2].summary


def test_a_limit_of_the_packages_config_cuts_the_episode_and_it_is_scored():
    options = {**GUESSES, "env": {"guesses": 8, "player": {"max_turns": 2}}}
    _, results, report = played(options, task_of(options, 7), ["1", "2"])
    assert results[-1].truncated and not results[-1].terminated and results[-1].reward == 0.5
    assert "max_turns" in report.summary


def test_a_fault_of_the_world_is_no_mistake_of_the_agent():
    with pytest.raises(RuntimeError, match="the scorer is broken"):
        played(SUMS, task_of(SUMS, 0), ["fail"])
    slow = {**GUESSES, "env": {"timeout": {"episode": 0.001}}}
    with pytest.raises(CallTimeout, match="time limit"):
        played(slow, task_of(slow, 0), ["1"])


def test_a_tool_server_that_does_not_start_is_said_at_once(monkeypatch):
    monkeypatch.setenv("VF_SUMS_BROKEN", "1")
    with pytest.raises(RuntimeError, match="(?s)vf_sums ended when it was started.*it does not start"):
        played(SUMS, task_of(SUMS, 0), ["42"])


def test_an_episode_that_is_broken_off_leaves_no_process_and_no_file(monkeypatch):
    begun, fork = [], here.Forked
    monkeypatch.setattr(here, "Forked", lambda *given: begun.append((fork(*given), given[2])) or begun[-1][0])
    env = Verifiers(**SUMS)
    env.reset(task_of(SUMS, 0))
    ((server, directory),) = begun
    assert server.returncode is None and directory.exists()
    env.close()
    assert server.returncode is not None and not directory.exists()


def test_threads_of_the_trainer_are_refused():
    task, said = task_of(GUESSES, 0), []

    def reset():
        try:
            Verifiers(**GUESSES).reset(task)
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=reset)
    thread.start()
    thread.join(30)
    assert len(said) == 1 and "env.isolation" in said[0]


def test_an_answer_is_what_a_server_of_models_would_give():
    env = Verifiers(**SUMS)
    said = env._answer(parse_action(f"<think>hm</think>\nI ask. {add(1, 2)}{add(3, 4)}"))
    assert said["content"] == "I ask." and [call["id"] for call in said["tool_calls"]] == ["call-1", "call-2"]
    assert json.loads(said["tool_calls"][1]["function"]["arguments"]) == {"a": 3, "b": 4}
    broken = parse_action("<tool_call>{</tool_call>")
    assert broken.problem and env._answer(broken) == {"role": "assistant", "content": "<tool_call>{</tool_call>"}
    chunks = [json.loads(line[6:]) for line in play._events(said).split("\n\n")[:2]]
    assert chunks[0]["choices"][0]["delta"]["tool_calls"][1]["index"] == 1
    assert chunks[1]["choices"][0]["finish_reason"] == "tool_calls"


def test_splits_divide_one_stream_or_read_their_own():
    own = {split: [task["id"] for task in tasks_of(SUMS, split)] for split in tasksets.SPLITS}
    assert [len(ids) for ids in own.values()] == [8, 1, 1] and len({n for ids in own.values() for n in ids}) == 10
    other = {**SUMS, "seed": 1, "shares": (1, 0, 1)}
    assert [task["id"] for task in tasks_of(other)] != own["train"] and len(tasks_of(other, "test")) == 5
    with pytest.raises(UserError, match="none of them for eval"):
        tasks_of(other, "eval")
    apart = {**SUMS, "arguments": {"count": 3}, "test": {"first": 90}}
    assert sorted(task["task"].data.answer for task in tasks_of(apart, "test")) == ["92", "93", "94"]
    assert len(tasks_of({**apart, "shares": (2, 1, 0)})) == 2
    assert len(tasks_of(GUESSES)) == 64  # of a stream without end
    assert Verifiers.version() == f"verifiers {tasksets.PACKAGE.version()}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "names no taskset"),
        ({"taskset": "vf_nothing"}, "'vf_nothing' cannot be loaded"),
        ({"taskset": "vf_two_seats"}, "2 seats"),
        ({"taskset": "vf_own_harness"}, "a harness of its own"),
        ({**SUMS, "arguments": {"frist": 3}}, "does not take its arguments"),
        ({**SUMS, "arguments": {"count": "many"}}, "does not take its arguments"),
        ({**SUMS, "arguments": {"count": 0}}, "has no tasks"),
        ({**SUMS, "env": {"agent": {"max_output_tokens": 9}}}, "is the trainer's to set"),
        ({**SUMS, "env": {"agent": "x"}}, "give a mapping"),
        ({**SUMS, "env": {"taskset": {}}}, "env.options.arguments"),
        ({**SUMS, "size": 0}, "give 1 to"),
        ({**SUMS, "shares": (1, 2)}, "three whole numbers"),
        ({**SUMS, "sead": 1}, "did you mean 'seed'"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(options, said):
    with pytest.raises(UserError, match=said) as error:
        tasks_of(options)
    assert "\n" not in str(error.value)


def test_a_split_or_a_package_that_is_not_there(monkeypatch):
    with pytest.raises(UserError, match="train, eval, test"):
        tasks_of(SUMS, "valid")
    task = task_of(SUMS, 0)
    monkeypatch.setattr(tasksets, "_VERIFIERS", None)
    for ask in (partial(Verifiers.tasks, "train", "unused", **SUMS), partial(Verifiers(**SUMS).reset, task)):
        with pytest.raises(UserError, match="make verifiers"):
            ask()


def test_a_conversation_that_does_not_grow_is_refused():
    env = Verifiers(**GUESSES)
    env.reset(task_of(GUESSES, 0))
    env._said = [{"role": "user", "content": "something else"}]
    with pytest.raises(RuntimeError, match="one growing conversation"):
        env.step(Action("2"))
    env.close()
