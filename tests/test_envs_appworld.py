"""AppWorld on the trainer's side, without its engine: the client against servers that speak the protocol wrongly in
every way, the environment against workers that fail in every way, tasks, gradings and scripts of an invented folder.
"""

import contextlib
import gc
import json
import os
import socket
import threading
import time

import pytest

from hintsd_jax.envs.appworld import client, env, prompt, script
from hintsd_jax.envs.appworld.client import WorkerFailed, post
from hintsd_jax.envs.appworld.env import AppWorld
from hintsd_jax.envs.appworld.options import Options
from hintsd_jax.envs.appworld.score import Grading
from hintsd_jax.envs.base import Action, CallTimeout, ToolCall
from hintsd_jax.envs.protocol import checked
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.env_call import CallFailure
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.env_pool import EnvPool


@pytest.fixture
def serve(tmp_path):
    """`serve(answer)`: the path of a socket at which `answer(connection, request)` answers everybody."""
    listeners = []

    def start(answer):
        path = str(tmp_path / f"{len(listeners)}.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        listeners.append(listener)

        def loop():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        request += connection.recv(65_536)
                    head, _, body = request.partition(b"\r\n\r\n")
                    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                    while len(body) < length:
                        body += connection.recv(65_536)
                    with contextlib.suppress(OSError):  # the client has gone
                        answer(connection, head + b"\r\n\r\n" + body)

        threading.Thread(target=loop, daemon=True).start()
        return path

    yield start
    for listener in listeners:
        listener.close()


def http(body: bytes, status: str = "200 OK", length: int | None = None, more: str = "") -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{more}\r\n".encode() + body


def test_a_right_answer_comes_back_however_it_is_cut_into_pieces(serve):
    seen = []

    def answer(connection, request):
        seen.append(request)
        for byte in http(json.dumps({"output": {"text": "é\U0001f600", "n": [1, None]}}).encode()):
            connection.sendall(bytes([byte]))

    assert post(serve(answer), "/execute", {"code": "print('é')"}, 5, 1000) == {"text": "é\U0001f600", "n": [1, None]}
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /execute HTTP/1.1\r\n") and json.loads(body) == {"code": "print('é')"}


GOOD = b'{"output": 1}'


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "no answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "cut after 27 bytes, before its headers' end"),
        (http(GOOD, length=400), "cut after 13 bytes, before its 400 bytes"),
        (http(GOOD, length=5), "longer than its Content-Length"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + GOOD, "no Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n", "no Content-Length"),
        (http(GOOD, more="Content-Length: 14\r\n"), "no Content-Length"),
        (http(b"x" * 2000), "2,000 bytes, of 1,000 at most"),
        (http(b"", length=10**14), "of 1,000 at most"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "headers have no end"),
        (b"hello\r\n\r\n", "no HTTP: 'hello'"),
        (http(b'{"detail": "boom"}', "500 Internal Server Error"), 'status 500: .*"detail": "boom"'),
        (http(b'{"detail": "boom", "kind": "KeyError"}', "500 Internal Server Error"), r"status 500 \(KeyError\): "),
        (http(b'{"detail": "boom", "kind": "a text"}', "500 Internal Server Error"), "status 500: "),
        (http(GOOD, "302 Found"), "status 302"),
        (http(b"not json"), "not JSON: 'not json'"),
        (http(b"\xff\xfe"), "not JSON"),
        (http(b'{"output": NaN}'), "not JSON"),
        (http(b"[" * 900), "not JSON"),
        (http(b'{"result": 1}'), 'no "output"'),
        (http(b'"output"'), 'no "output"'),
    ],
)
def test_an_answer_that_is_not_whole_or_not_right_is_a_failure(serve, sent, message):
    path = serve(lambda connection, request: connection.sendall(sent))
    with pytest.raises(WorkerFailed, match=message) as failure:
        post(path, "/execute", {}, 5, 1000, quote=True)
    assert str(failure.value).startswith("/execute: ") and len(str(failure.value)) < 700


@pytest.mark.parametrize(
    "sent",
    [
        http(b'{"detail": "SECRET", "kind": "SECRET of the benchmark"}', "500 Internal Server Error"),
        http(b"SECRET"),
        http(b'{"SECRET": 1}'),
        b"SECRET\r\n\r\n",
        b"HTTP/1.1 200 SECRET\r\nSECRET: 1\r\n\r\nSECRET",
        http(b'{"output": "SECRET"}', length=500),
    ],
)
def test_a_failure_quotes_nothing_of_the_benchmark_unless_that_is_asked_for(serve, sent):
    """It stands in environment_failures.txt, with its traceback."""
    path = serve(lambda connection, request: connection.sendall(sent))
    with pytest.raises(WorkerFailed) as failure:
        post(path, "/execute", {"code": "1"}, 5, 1000)
    written = CallFailure.of(failure.value)
    assert "SECRET" not in written.detail + written.traceback and "/execute: " in written.detail


def test_a_server_that_hangs_or_trickles_is_a_time_out(serve):
    def trickle(connection, request):
        for _ in range(100):
            connection.sendall(b"H")
            time.sleep(0.05)

    for answer in (lambda connection, request: time.sleep(3), trickle):
        path, start = serve(answer), time.monotonic()
        with pytest.raises(CallTimeout, match="no answer in 0.3 s"):
            post(path, "/execute", {}, 0.3, 1000)
        assert time.monotonic() - start < 2


def test_a_worker_that_is_gone_is_a_failure(tmp_path, serve):
    with pytest.raises(WorkerFailed, match="No such file"):
        post(tmp_path / "none.sock", "/execute", {}, 1, 1000)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "dead.sock"))
    listener.close()
    with pytest.raises(WorkerFailed, match="refused"):
        post(tmp_path / "dead.sock", "/execute", {}, 1, 1000)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(WorkerFailed):
            post(tmp_path / "dead.sock", "/execute", {}, 1, 1000)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert client.MAX_HEAD < 100_000


STARTED = {
    "task_id": "abc1def_1",
    "instruction": "Which note is the oldest?",
    "supervisor": {"first_name": "Ada", "last_name": "Quill", "email": "ada@example.com", "phone_number": "555"},
    "datetime": "2023-05-18T12:00:00",
}
TASK = {"id": "abc1def_1", "split": "train", "scenario": "abc1def", "scenario_size": 1, "category": ""}
PASSED = {"task_id": "abc1def_1", "success": True, "num_tests": 2, "passes": [{}, {}], "failures": []}
FAILURES = [{"requirement": "assert\n answers match.", "trace": "AssertionError: '4' == '5'", "label": "no_op_fail"}]
FAILED = {"task_id": "abc1def_1", "success": False, "num_tests": 4, "passes": [{}, {}, {}], "failures": FAILURES}
RUN = parse_action("```python\nprint(1)\n```", "code")


class FakeWorkers:
    """In place of `Workers`: answers are looked up, and an exception among them is raised."""

    def __init__(self, *options):
        self.made, self.task, self.answers, self.graded = (
            [],
            STARTED,
            {"/execute": "1\n", "/task_completed": False},
            PASSED,
        )
        self.warm = self.stop = lambda: None

    def start(self, task_id):
        if isinstance(self.task, Exception):
            raise self.task
        self.made.append(FakeWorker(self))
        return self.made[-1]

    def grade(self, worker, task_id):
        assert worker.alive and task_id == TASK["id"]
        if isinstance(self.graded, Exception):
            raise self.graded
        return self.graded


class FakeWorker:
    def __init__(self, workers):
        self.workers, self.task, self.alive, self.asked = workers, workers.task, True, []

    def request(self, path, body, deadline_s):
        assert self.alive and body["task_id"] == TASK["id"] and deadline_s < 60
        self.asked.append((path, body.get("code")))
        answer = self.workers.answers[path]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self):
        self.alive = False


@pytest.fixture
def workers(monkeypatch):
    made = FakeWorkers()
    monkeypatch.setattr(env, "Workers", lambda *given: made)
    monkeypatch.setattr(env, "_workers", {})
    return made


def test_an_episode(workers):
    world = AppWorld(max_observation_chars=20)
    start = checked("reset", world.reset(TASK))
    assert [message["role"] for message in start.messages] == ["system", "user"] and start.tools == ()
    said = start.messages[1]["content"]
    assert all(each in said for each in ("Ada Quill", "ada@example.com", "555", STARTED["instruction"], "2023-05-18"))
    assert world.step(RUN).messages == ({"role": "user", "content": "Output:\n```\n1\n```"},)
    told = world.step(parse_action("I am done.", "code"))
    assert told.messages[0]["content"].startswith("Nothing was run: no code was found") and told.reward == 0
    assert workers.made[0].asked == [("/execute", "print(1)\n"), ("/task_completed", None)]  # nothing for plain text
    workers.answers["/execute"] = "x" * 50 + "\ud800"
    cut = checked("step", world.step(RUN)).messages[0]["content"]
    assert cut == f"Output:\n```\n{'x' * 20}\n... [cut: the first 20 of 51 characters; print less at once]\n```"
    workers.answers["/execute"] = "\ud800"
    assert checked("step", world.step(RUN)).messages[0]["content"] == "Output:\n```\n?\n```"
    workers.answers["/task_completed"] = True
    last = world.step(RUN)
    assert (last.reward, last.terminated, last.truncated) == (1.0, True, False)
    assert not workers.made[0].alive  # as soon as it is graded
    assert checked("report", world.report(), 5).summary == "abc1def_1: completed, 2 of 2 tests pass."
    world.close()


@pytest.mark.parametrize(("kind", "reward"), [("fraction", 0.75), ("sparse", 0.0)])
def test_rewards_and_reports_of_a_failure(workers, kind, reward):
    workers.graded, workers.answers["/task_completed"] = FAILED, True
    said = {}
    for split, traces in (("train", False), ("train", True), ("dev", True), ("test_normal", True)):
        world = AppWorld(reward=kind, traces_in_report=traces)
        world.reset({**TASK, "split": split})
        last = world.step(RUN)
        assert (last.reward, last.terminated) == (reward, True)
        assert "assert" not in last.messages[0]["content"]
        report = world.report()
        assert report.faults is None
        said[split, traces] = report.summary
    head = "abc1def_1: completed, 3 of 4 tests pass."
    assert said["train", False] == f"{head}\n- failed: assert answers match."
    assert said["train", True] == f"{said['train', False]}\n  AssertionError: '4' == '5'"
    assert (
        said["dev", True]
        == said["test_normal", True]
        == f"{head} What failed is told of tasks of the train split only."
    )


def test_an_episode_that_did_not_complete_its_task_is_graded_for_its_report_alone(workers):
    workers.graded = FAILED
    world = AppWorld()
    world.reset(TASK)
    assert world.step(RUN).reward == 0
    assert world.report().summary.startswith("abc1def_1: not completed, 3 of 4 tests pass.\n- failed: ")
    assert not workers.made[0].alive


@pytest.mark.parametrize("failure", [WorkerFailed("/execute: status 500"), CallTimeout("hangs"), RuntimeError("bug")])
@pytest.mark.parametrize("where", ["start", "/execute", "/task_completed", "grade"])
def test_a_failure_anywhere_raises_and_leaves_no_worker(workers, failure, where):
    if where == "start":
        workers.task = failure
    elif where == "grade":
        workers.graded, workers.answers["/task_completed"] = failure, True
    else:
        workers.answers[where] = failure
    world = AppWorld()
    with pytest.raises(type(failure)):
        world.reset(TASK)
        world.step(RUN)
    assert not any(worker.alive for worker in workers.made)
    with pytest.raises(WorkerFailed, match="the worker is gone"):
        world.step(RUN)


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": None},
        {"task": {**STARTED, "task_id": "abc1def_2"}},
        {"task": {**STARTED, "supervisor": None}},
        {"task": {**STARTED, "instruction": 3}},
        {"/execute": None},
        {"/execute": {"output": "1"}},
        {"/task_completed": 1},
        {"graded": {**FAILED, "success": True}},
        {"graded": {**FAILED, "num_tests": 5}},
        {"graded": {**PASSED, "num_tests": 0, "passes": []}},
        {"graded": {**PASSED, "num_tests": True}},
        {"graded": {**FAILED, "failures": [{"requirement": None, "trace": ""}]}},
        {"graded": {**PASSED, "task_id": "abc1def_2"}},
        {"graded": {}},
        {"graded": "fine"},
    ],
)
def test_answers_that_are_not_what_they_should_be_are_failures_of_the_world(workers, wrong):
    workers.answers["/task_completed"] = True
    for name, value in wrong.items():
        if name.startswith("/"):
            workers.answers[name] = value
        else:
            setattr(workers, name, value)
    world = AppWorld()
    with pytest.raises(WorkerFailed):
        world.reset(TASK)
        world.step(RUN)
    assert not any(worker.alive for worker in workers.made)


def test_in_the_pool_a_failure_ends_its_episode_only_and_no_worker_stays(workers):
    with EnvPool(ThreadHost(AppWorld), 2, 5.0) as pool:
        pool.reset(0, TASK).result()
        pool.reset(1, TASK).result()
        workers.answers["/execute"] = CallTimeout("no answer")
        assert pool.step(0, RUN).result().reason == "env_timeout"
        workers.answers["/execute"] = "1\n"
        assert pool.step(1, RUN).result().reward == 0
        pool.reset(0, TASK).result()
        assert [worker.alive for worker in workers.made] == [False, True, True]
    assert not any(worker.alive for worker in workers.made)
    world = AppWorld()
    world.reset(TASK)
    del world  # given up without a close, as after a call that was too late
    gc.collect()
    assert not workers.made[-1].alive


def test_options_are_checked():
    for options, message in {
        ("rot", "x"): "env.options.rot: .* has no such option; did you mean 'root'",
        ("reward", "dense"): "no reward 'dense'; known: fraction, sparse",
        ("require_fences", 1): "give a value of type bool",
        ("root", None): "give a value of type str",
        ("cell_timeout_s", 0): "seconds above 0",
        ("cell_timeout_s", float("nan")): "seconds above 0",
        ("max_observation_chars", 0): "1 or more",
    }.items():
        with pytest.raises(UserError, match=message):
            AppWorld(**dict([options]))
    assert Options.parse({"cell_timeout_s": 3}).cell_timeout_s == 3


SOLUTION = '''
import json

def solution(apis, requester):
    """What it does."""
    token = apis.notes.login(username='ada@example.com', password='pw')['access_token']
    found = apis.notes.search_notes(access_token=token, query='Garage')
    for note in found:
        apis.notes.delete_note(access_token=token, note_id=note['id'])
    apis.supervisor.complete_task(answer=len(found))
'''


@pytest.fixture
def root(tmp_path):
    """An invented folder of data: two scenarios, of which only what the trainer reads is there."""
    data = tmp_path / "root" / "data"
    splits = {"train": ["abc1def_1", "abc1def_2", "abc1def_3"], "test_normal": ["fed2cba_1", "fed2cba_2"]}
    for split, names in splits.items():
        for name in names:
            (data / "tasks" / name / "ground_truth").mkdir(parents=True)
            (data / "tasks" / name / "specs.json").write_text("{}")
            (data / "tasks" / name / "ground_truth" / "compiled_solution.py").write_text(SOLUTION)
            if split == "train":
                (data / "tasks" / name / "ground_truth" / "metadata.json").write_text('{"difficulty": 2}')
        (data / "datasets").mkdir(exist_ok=True)
        (data / "datasets" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return str(tmp_path / "root")


def test_tasks_are_the_benchmarks_splits_by_id_alone(workers, root, tmp_path):
    data_dir = str(tmp_path / "data")
    tasks = AppWorld.tasks("train", data_dir, root=root)
    assert [task["id"] for task in tasks] == ["abc1def_1", "abc1def_2", "abc1def_3"]
    known = {"split": "train", "scenario": "abc1def", "scenario_size": 3, "category": "difficulty_2"}
    assert tasks[0] == {"id": "abc1def_1", **known}
    assert [task["category"] for task in AppWorld.tasks("test_normal", data_dir, root=root)] == ["", ""]
    with pytest.raises(UserError, match="no split 'test_challenge'"):
        AppWorld.tasks("test_challenge", data_dir, root=root)
    os.remove(f"{root}/data/tasks/abc1def_2/specs.json")
    with pytest.raises(UserError, match=r"lists task 'abc1def_2' without its folder.*docs/appworld\.md"):
        AppWorld.tasks("train", data_dir, root=root)
    with pytest.raises(UserError, match=r"no data of AppWorld in .*env\.options\.root"):
        AppWorld.tasks("train", data_dir, root=str(tmp_path / "nothing"))


def test_without_the_second_environment_there_is_one_line(root, tmp_path):
    with pytest.raises(UserError, match="make appworld"):
        AppWorld.tasks("train", str(tmp_path / "data"), root=root, python=str(tmp_path / "python"))


def test_scripts_play_the_reference_one_statement_a_step(root):
    actions = script.ground_truth(TASK, root).actions
    codes = [parse_action(text, "code").code for text in actions]
    assert codes[0] == "import json\n" and len(codes) == 6 and actions[5] == script.END
    assert codes[3] == "for note in found:\n    apis.notes.delete_note(access_token=token, note_id=note['id'])\n"
    assert codes[4] == "apis.supervisor.complete_task(answer=len(found))\n"
    assert {fault: script.sites(TASK, fault, root) for fault in script.FAULTS} == {
        "dropped_step": [1, 2, 3],
        "wrong_argument": [1, 2],
        "wrong_answer": [4],
        "early_stop": [3],
    }
    for fault in script.FAULTS:
        for site in script.sites(TASK, fault, root):
            faulty = script.with_fault(TASK, fault, 0, root, site)
            assert (faulty.fault, faulty.step) == (fault, site + 1)
            assert faulty.actions[:site] == actions[:site] and faulty.actions[site] != actions[site]
            assert faulty.actions[-1] == script.END
            assert faulty == script.with_fault(TASK, fault, 0, root, site)
    with pytest.raises(ValueError, match="no fault"):
        script.sites(TASK, "typo", root)


def test_the_calls_that_a_code_makes():
    code = "x = apis.notes.show_note(note_id=found[0] + 1, access_token=token)\nprint(len(x), apis.supervisor.me())"
    assert set(map(str, script.calls_in(code))) == {
        str(ToolCall("notes.show_note", {"note_id": "found[0] + 1", "access_token": "token"})),
        str(ToolCall("supervisor.me", {})),
    }
    assert script.calls_in("x =") == script.calls_in("x.y.z(1)") == ()


def test_a_reference_that_returns_early_is_played_whole(root):
    folder = f"{root}/data/tasks/abc1def_1/ground_truth"
    with open(f"{folder}/compiled_solution.py", "w") as file:
        file.write("def solution(apis, requester):\n    if True:\n        return\n")
    text, end = script.ground_truth(TASK, root).actions
    assert end == script.END
    assert parse_action(text, "code").code.endswith("solution(apis, None)\n")
    assert not script.sites(TASK, "dropped_step", root) and script.with_fault(TASK, "dropped_step", 0, root) is None
    os.remove(f"{folder}/compiled_solution.py")
    with pytest.raises(UserError, match="no reference solution of task abc1def_1"):
        script.ground_truth(TASK, root)


def test_the_prompts_own_example_is_in_the_form_that_it_asks_for():
    answers = prompt.SYSTEM.split('Album Keeper collection?"\n\n')[1].split("\n\nOutput:\n")
    for text in answers:
        own = text.split("```\n\n", 1)[1] if text is not answers[0] else text
        action = parse_action(own, "code")
        assert action.problem is None
        compile(action.code, "example", "exec")
    assert parse_action(prompt.render_code("So.", "x = 1\n"), "code") == Action(
        "So.\n```python\nx = 1\n```", code="x = 1\n"
    )


def test_a_grading_counts_by_number_or_by_list():
    assert Grading.read({**FAILED, "passes": 3}).reward("fraction") == 0.75
    assert Grading.read(PASSED).success and Grading.read(PASSED).reward("sparse") == 1
