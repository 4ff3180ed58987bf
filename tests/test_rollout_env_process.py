"""Environments in processes: whatever they do ends with their process, within its limits, and comes back as a value."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from benchmarks.batteries.rogue import Rogue
from hintsd_jax.envs.base import Action, Fault, Report, Start, StepResult
from hintsd_jax.envs.desk import Desk
from hintsd_jax.envs.protocol import checked
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.env_call import ENV_DIED, ENV_ERROR, ENV_TIMEOUT, Call, CallFailure
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.env_pool import EnvPool
from hintsd_jax.rollout.env_process import ProcessHost, host_for
from hintsd_jax.rollout.env_wire import answer, read_answer, request
from hintsd_jax.runs.journal import Journal

ROGUE = "benchmarks.batteries.rogue:Rogue"
ME = "tests.test_rollout_env_process:Teller"
FINE = Report("fine", (Fault(1, "f"),))


@pytest.fixture(scope="module")
def host():
    host = ProcessHost(ROGUE, {}, memory_gib=0.25)
    yield host
    host.close()


def play(pool, slot, task, key=()):
    """The results of a reset, two steps and a report, up to the first failure."""
    results = [pool.reset(slot, task, key).result()]
    for act in (lambda: pool.step(slot, Action("x")), lambda: pool.step(slot, Action("y")), lambda: pool.report(slot)):
        if not isinstance(results[-1], CallFailure):
            results.append(act().result())
    return results


def below(pid):
    """The living processes below one, itself included."""
    found = [pid]
    for each in found:
        try:
            found += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
        except OSError:
            continue
    return [each for each in found if alive(each)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_good_episode_is_the_same_as_in_a_thread(host):
    with EnvPool(host, 1, 20.0) as pool, EnvPool(ThreadHost(Rogue), 1, 20.0) as other:
        assert play(pool, 0, {"id": "t"}) == play(other, 0, {"id": "t"})
        assert play(pool, 0, {"id": "t"})[2:] == [StepResult(({"role": "user", "content": "Go on."},), 1.0, True), FINE]
        assert pool.close() == []


# What is done -> the reason that it ends for, and words of the detail. Each at most a second of limit.
DEEDS = {
    "dies": (ENV_DIED, "step: the environment's process ended in this call"),
    "aborts": (ENV_DIED, "ended in this call"),
    "is killed": (ENV_DIED, "ended in this call"),
    "allocates": (ENV_DIED, "more than env.memory_gib"),
    "maps shared memory": (ENV_DIED, "more than env.memory_gib"),
    "holds the interpreter": (ENV_TIMEOUT, "step took longer than"),
    "hangs": (ENV_TIMEOUT, "step took longer than"),
    "sends itself a stop": (ENV_TIMEOUT, "step took longer than"),
    "forks many": (ENV_TIMEOUT, "step took longer than"),
    "forks and goes on twice": None,
    "leaves a daemon": None,
    "leaves a thread": None,
    "shouts": None,
    "scribbles": (ENV_DIED, "ended in this call"),
    "closes every file": (ENV_DIED, "ended in this call"),
    "forges no JSON": (ENV_DIED, "sent what is no answer"),
    "forges nothing": (ENV_DIED, "sent what is no answer: TypeError"),
    "forges another shape": (ENV_DIED, "sent what is no answer"),
    "forges a failure": (ENV_DIED, "sent what is no answer: ValueError"),
    "forges deep JSON": (ENV_DIED, "sent what is no answer: RecursionError"),
    "exits": (ENV_ERROR, "SystemExit: 0 (rogue.py, line"),
    "raises half a character": (ENV_ERROR, "ValueError: boom ? (rogue.py, line"),
    "raises what cannot be read": (ENV_ERROR, "Mute: (its message cannot be read: SystemExit)"),
    "raises a time-out": (ENV_TIMEOUT, "CallTimeout: nobody answers"),
    "NaN": (ENV_ERROR, "ProtocolError: the reward is nan"),
    "half a character": (ENV_ERROR, "ProtocolError: a message is not Unicode"),
    "a sly object": (ENV_ERROR, "ProtocolError: step returned what cannot be read"),
}


def test_whatever_an_environment_does_is_a_value_and_its_neighbours_go_on(host):
    """All at once, each in a slot of its own with a good one between any two."""
    deeds = list(DEEDS)
    limits = {True: 2.0, False: 30.0}
    results = {}
    for slow in (False, True):
        names = [name for name in deeds if (DEEDS[name] or ("",))[0] == ENV_TIMEOUT and name != "raises a time-out"]
        names = names if slow else [name for name in deeds if name not in names]
        with EnvPool(host, 2 * len(names), limits[slow]) as pool:
            tasks = [task for name in names for task in ({"id": name, "at": "step", "does": name}, {"id": "good"})]
            resets = [pool.reset(slot, task) for slot, task in enumerate(tasks)]
            assert all(isinstance(reset.result(), Start) for reset in resets)
            calls = [pool.step(slot, Action("x")) for slot in range(2 * len(names))]
            for slot, call in enumerate(calls):
                if slot % 2 == 0:
                    results[names[slot // 2]] = call.result()
                else:
                    assert call.result() == StepResult(({"role": "user", "content": "Go on."},)), slot
    for name, result in results.items():
        if DEEDS[name] is None:
            assert isinstance(result, StepResult), (name, result)
        else:
            reason, words = DEEDS[name]
            assert isinstance(result, CallFailure) and result.reason == reason, (name, result)
            assert words in result.detail and "\n" not in result.detail and len(result.detail) < 420, (name, result)
            json.dumps(dataclasses.asdict(result), ensure_ascii=False).encode()
    assert "in raise_it" in results["exits"].traceback and len(results["exits"].traceback) < 4_001
    until(lambda: below(host._template.pid) == [host._template.pid])  # nothing of them is left, a daemon neither


def test_time_outs_and_deaths_are_journalled_and_taken_again(host, tmp_path):
    tasks = {
        "died": {"id": "died", "at": "step", "does": "dies"},
        "late": {"id": "late", "at": "report", "does": "hangs"},
        "wrong": {"id": "wrong", "at": "step", "does": "raises"},
        "fine": {"id": "fine"},
    }

    def run(tasks, limit):
        with EnvPool(host, 2, limit, Journal(tmp_path / "journal.jsonl")) as pool:
            return [play(pool, n % 2, task, ("t", name)) for n, (name, task) in enumerate(tasks.items())], pool.close()

    first = run(tasks, 2.0)
    reasons = [[result.reason for result in results if isinstance(result, CallFailure)] for results in first[0]]
    assert reasons == [[ENV_DIED], [ENV_TIMEOUT], [ENV_ERROR], []]
    keys = [json.loads(line)["key"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert keys == [["t", "died", "step 1"], ["t", "late", "report"]]
    again = run({name: {"id": name} for name in tasks} | {"wrong": tasks["wrong"]}, 30.0)  # all are good now
    assert again == first


class Teller:
    """Says what it was given, and where it runs."""

    def __init__(self, **options):
        self.options = options

    @classmethod
    def tasks(cls, split, data_dir):
        return []

    def reset(self, task):
        import threading

        facts = {
            "task": repr(task),
            "options": repr(self.options),
            "parent": os.getppid(),
            "session": os.getsid(0) == os.getpid(),
            "threads": threading.active_count(),
            "jax": "jax" in sys.modules,
            "stdin": sys.stdin.read(),
            "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        }
        task["seen"] = True  # of its own copy
        return Start(({"role": "user", "content": json.dumps(facts)},))

    def step(self, action):
        return StepResult(({"role": "tool", "content": repr(action)},))

    def report(self):
        return Report("")

    def close(self):
        pass


def test_tasks_options_and_actions_cross_as_they_are():
    array = np.arange(3)
    task = {"id": "t", 3: (1, 2.5, None, b"\xff", {"a"}), "array": array, "half": "\ud800", "deep": [[{"x": ()}]]}
    host = ProcessHost(ME, {"a": (1, "b"), "c": {"d": None}}, 1.0)
    try:
        with EnvPool(host, 1, 60.0) as pool:
            facts = json.loads(pool.reset(0, task).result().messages[0]["content"].encode("utf-8", "replace"))
            assert facts["task"] == repr(task) and facts["options"] == "{'a': (1, 'b'), 'c': {'d': None}}"
            assert "seen" not in task and facts["parent"] == host._template.pid and facts["session"]
            assert (facts["threads"], facts["jax"], facts["stdin"], facts["interrupt"]) == (1, False, "", True)
            action = Action("x", problem="p", problem_kind="json")
            assert pool.step(0, action).result().messages[0]["content"] == repr(action)
            frozen = pool.reset(0, MappingProxyType({"id": "f"})).result()
            assert "'id': 'f'" in frozen.messages[0]["content"]
            refused = pool.reset(0, {"id": "t", "lock": lambda: 0}).result()
            assert refused.reason == ENV_ERROR and "cannot be sent to a process" in refused.detail
            assert "env.isolation=thread" in refused.detail
    finally:
        host.close()


def test_no_jax_in_the_template():
    host = ProcessHost("hintsd_jax.envs.desk:Desk", {}, 1.0)
    with EnvPool(host, 1, 60.0) as pool:
        pool.reset(0, {}).result()
        maps = Path(f"/proc/{host._template.pid}/maps").read_text()
    assert "site-packages" in maps and "jaxlib" not in maps
    pid = host._template.pid
    host.close()
    assert not alive(pid)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "no.such.module:Env",
            "cannot be imported in a process of its own: UserError: environment 'no.such.module:Env'",
        ),
        ("tests.test_rollout_env_process:Missing", "has no 'Missing'"),
    ],
)
def test_a_module_that_cannot_be_imported_over_there(path, words):
    host = ProcessHost(path, {}, 1.0)
    with EnvPool(host, 2, 5.0) as pool:
        results = [pool.reset(slot, {}) for slot in range(2)]
        assert all(each.result().reason == ENV_DIED and words in each.result().detail for each in results)


def test_a_template_that_is_killed_costs_its_episodes_and_is_made_again(host):
    with EnvPool(host, 2, 20.0) as pool:
        pool.reset(0, {"id": "t"}).result()
        before = host._template.pid
        os.kill(before, signal.SIGKILL)
        host._template.wait()
        assert pool.step(0, Action("x")).result().reason == ENV_DIED
        assert play(pool, 1, {"id": "t"})[-1] == FINE and host._template.pid != before


def test_all_processes_end_with_the_trainer_and_ctrl_c_is_for_the_trainer_alone(tmp_path):
    program = f"""
        import sys, time
        from hintsd_jax.envs.base import Action
        from hintsd_jax.rollout.env_pool import EnvPool
        from hintsd_jax.rollout.env_process import ProcessHost
        host = ProcessHost({ROGUE!r}, {{}}, 0.25)
        pool = EnvPool(host, 3, 100.0)
        for slot, does in enumerate(["forks many", "holds the interpreter", ""]):
            pool.reset(slot, {{"id": "t", "at": "step", "does": does}}).result()
        for slot in range(2):
            pool.step(slot, Action("x"))
        time.sleep(0.5)
        try:
            print(host._template.pid, *[w.pid for w in pool._workers], flush=True)
            time.sleep(100)
        except KeyboardInterrupt:
            print("interrupted", pool.step(2, Action("x")).result(), flush=True)
        time.sleep(100)
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, process_group=0
    )
    template, *workers = map(int, trainer.stdout.readline().split())
    left = below(template)
    assert len(left) >= 4 + 20 and len(workers) == 3
    os.killpg(trainer.pid, signal.SIGINT)  # as a terminal does
    line = trainer.stdout.readline()
    assert line.startswith("interrupted CallFailure(reason='env_error', detail=\"KeyError: ''")
    assert alive(template) and alive(workers[0])
    for process in left:  # as Slurm and systemd do
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    until(lambda: sum(map(alive, left)) <= len(left) - 20)  # what an environment has forked ends
    assert alive(template) and all(map(alive, workers[:2]))  # the third has failed
    trainer.kill()
    trainer.wait()
    until(lambda: not any(map(alive, left)))
    trainer.stdout.close()


def test_answers_cross_unchanged_and_are_checked_on_both_sides():
    values = {
        "reset": Start(({"role": "user", "content": "é\x00\u2028"},), ({"name": "a", "parameters": {"x": [1, None]}},)),
        "step": StepResult((), 0.1, True, False, ({"name": "b"},)),
        "report": Report("r", (Fault(2, "f"),), (True,)),
        "close": None,
    }
    for method, value in values.items():
        assert read_answer(method, answer(checked(method, value, 2)), 2) == value
    assert read_answer("report", answer(Report("r")), 0) == Report("r")
    failure = CallFailure(ENV_TIMEOUT, "d", "t")
    assert read_answer("step", answer(failure), 0) == failure
    long = json.dumps({"failure": {"reason": ENV_ERROR, "detail": "x\n" * 10**6, "traceback": "y" * 10**6}}).encode()
    read = read_answer("step", long, 0)
    assert len(read.detail) <= 400 and "\n" not in read.detail and len(read.traceback) == 4_000
    with pytest.raises(Exception, match="names step 2 of an episode with 1"):
        read_answer("report", answer(values["report"]), 1)
    assert b"reset" in request("reset", ({"id": "t"},), 0)


def test_where_an_environment_runs():
    make = lambda **attributes: type("Env", (), attributes)
    for env_class, isolation, kind in (
        (Desk, "auto", ThreadHost),
        (Desk, "process", ProcessHost),
        (make(), "auto", ProcessHost),
        (make(isolation="thread"), "auto", ThreadHost),
        (make(isolation="process"), "thread", ThreadHost),
    ):
        assert type(host_for(env_class, "x.y:Env", {}, isolation, 1.0)) is kind
    with pytest.raises(UserError, match="isolation of environment 'e' is 'fork': use 'thread' or 'process'"):
        host_for(make(isolation="fork"), "e", {}, "auto", 1.0)
    assert type(host_for(make(), "__main__:Env", {}, "auto", 1.0)) is ThreadHost
    with pytest.raises(UserError, match="of the script that runs, .* move it into a module, or set env.isolation"):
        host_for(make(), "__main__:Env", {}, "process", 1.0)


def test_hung_threads_are_refused_at_some_number(monkeypatch):
    monkeypatch.setattr("hintsd_jax.rollout.env_host.MAX_HUNG_THREADS", 3)
    import threading

    release = threading.Event()
    host = ThreadHost(lambda: release.wait(30))
    counts = Counter()
    try:
        with (
            EnvPool(host, 1, 0.02) as pool,
            pytest.raises(UserError, match="4 calls of the environment hang.*=process"),
        ):
            for _ in range(100):
                counts[pool.reset(0, {}).result().reason] += 1
    finally:
        release.set()
    assert counts == {ENV_TIMEOUT: 4}
    until(lambda: not any(worker.thread.is_alive() for worker in host._workers))
    with EnvPool(ThreadHost(Rogue), 1, 5.0) as pool:
        assert play(pool, 0, {"id": "t"})[-1] == FINE


def test_the_clock_of_a_call_starts_when_it_begins(host):
    """Whoever waits for a process, or for the last episode's close, is not late."""
    call = Call("reset", (), 0.05)
    time.sleep(0.1)
    call.begin()
    assert call.settle("in time") and call.result() == "in time"
    with EnvPool(host, 1, 1.0) as pool:
        pool.reset(0, {"id": "t", "at": "close", "does": "hangs"}).result()
        began = time.monotonic()
        assert isinstance(pool.reset(0, {"id": "t"}).result(), Start) and time.monotonic() - began > 0.9
        assert [failure.reason for failure in pool.close()] == [ENV_TIMEOUT]
