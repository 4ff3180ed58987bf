"""Environment calls: whatever an environment does comes back as a value, in time, and never stops the run."""

import json
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pytest

from hintsd_jax.envs.base import Action, CallTimeout, Fault, Report, Start, StepResult
from hintsd_jax.rollout.env_call import ENV_ERROR, ENV_TIMEOUT, CallFailure
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.env_pool import EnvPool
from hintsd_jax.runs.journal import Journal

USER = {"role": "user", "content": "Go."}
START = Start((USER,))
FINE = Report("fine")


class FakeEnv:
    """Does in `step` what `behaviour` says, and remembers what was called."""

    def __init__(self, behaviour=lambda action: StepResult((USER,)), report=FINE, close=lambda: None):
        self.behaviour, self.the_report, self.closing = behaviour, report, close
        self.called = []

    def reset(self, task):
        self.called.append("reset")
        return START

    def step(self, action):
        self.called.append("step")
        return self.behaviour(action)

    def report(self):
        self.called.append("report")
        return self.the_report

    def close(self):
        self.called.append("close")
        self.closing()


def make_pool(*envs: FakeEnv, limit: float = 5.0) -> EnvPool:
    supply = iter(envs)
    return EnvPool(ThreadHost(lambda: next(supply)), size=len(envs), limit_seconds=limit)


def step_once(env: FakeEnv, limit: float = 5.0):
    with make_pool(env, limit=limit) as pool:
        assert isinstance(pool.reset(0, {"id": "t"}).result(), Start)
        return pool.step(0, Action("x")).result()


OF_OTHER_TESTS = weakref.WeakSet()


@pytest.fixture(autouse=True)
def threads_of_other_tests():
    OF_OTHER_TESTS.update(threading.enumerate())


def assert_no_threads_left():
    deadline = time.monotonic() + 5
    while left := [t for t in threading.enumerate() if t.name.startswith("env-") and t not in OF_OTHER_TESTS]:
        assert time.monotonic() < deadline, left
        left[0].join(0.1)


def raising(error):
    def behaviour(action):
        raise error

    return behaviour


class Unspeakable(Exception):
    def __str__(self):
        raise SystemExit("even this")


def test_a_good_environment():
    env = FakeEnv(
        lambda action: StepResult([USER], reward=np.float32(0.5), terminated=np.bool_(True)),
        report=Report("r", [Fault(1, "f")]),
    )
    second, supply = FakeEnv(), iter([env])
    with EnvPool(ThreadHost(lambda: next(supply, second)), 1, 5.0) as pool:
        assert pool.reset(0, {}).result() == START
        turn = pool.step(0, Action("x")).result()
        assert turn == StepResult((USER,), 0.5, True) and type(turn.reward) is float and type(turn.terminated) is bool
        assert turn.messages[0] is not USER  # a copy: what the environment changes later stays its own
        call = pool.report(0)
        assert call.result() == call.result() == Report("r", (Fault(1, "f"),))
        pool.reset(0, {}).result()
        assert env.called == ["reset", "step", "report", "close"]  # an episode has an environment of its own
    assert second.called == ["reset", "close"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("boom\nand more"), "ValueError: boom and more (test_rollout_env_pool.py, line"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (RecursionError("deep"), "RecursionError: deep"),
        (Unspeakable(), "Unspeakable: (its message cannot be read: SystemExit)"),
    ],
)
def test_whatever_is_raised_is_an_error_value(error, message):
    failure = step_once(env := FakeEnv(raising(error)))
    assert failure.reason == ENV_ERROR and message in failure.detail and "\n" not in failure.detail
    assert_no_threads_left()
    assert env.called == ["reset", "step", "close"]


def test_a_value_that_the_protocol_refuses_is_an_error_value():
    failure = step_once(env := FakeEnv(lambda action: StepResult((USER,), reward=float("nan"))))
    assert failure.reason == ENV_ERROR and "ProtocolError" in failure.traceback
    assert failure.detail.startswith("ProtocolError: the reward is nan, not a finite number")
    assert_no_threads_left()
    assert env.called == ["reset", "step", "close"]


def test_a_constructor_that_fails_is_a_failed_reset_and_is_tried_again():
    answers = [ZeroDivisionError("no"), FakeEnv()]

    def make():
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    with EnvPool(ThreadHost(make), size=1, limit_seconds=5.0) as pool:
        assert "ZeroDivisionError: no" in pool.reset(0, {}).result().detail
        assert pool.step(0, Action("x")).result().reason == ENV_ERROR
        assert pool.reset(0, {}).result() == START


def test_a_slow_call_times_out_and_its_environment_is_never_touched_again():
    release, left = threading.Event(), threading.Event()

    def hang(action):
        release.wait(10)
        left.set()
        return StepResult((USER,))

    slow, second = FakeEnv(hang), FakeEnv()
    supply = iter((slow, second))
    pool = EnvPool(ThreadHost(lambda: next(supply)), size=1, limit_seconds=0.2)
    pool.reset(0, {}).result()
    began = time.monotonic()
    call = pool.step(0, Action("x"))
    failure = call.result()
    assert failure == CallFailure(ENV_TIMEOUT, "step took longer than 0.2 s") and time.monotonic() - began < 2
    assert pool.step(0, Action("x")).result().reason == ENV_ERROR  # the slot waits for its reset
    assert pool.reset(0, {}).result() == START
    release.set()
    left.wait(5)
    assert pool.close() == []
    assert call.result() == failure  # a late value changes nothing
    assert slow.called == ["reset", "step"] and second.called == ["reset", "close"]
    assert_no_threads_left()


def test_a_late_value_is_late_whenever_it_is_collected():
    env = FakeEnv(lambda action: time.sleep(0.15) or StepResult((USER,)))
    pool = make_pool(env, limit=0.05)
    pool.reset(0, {}).result()
    call = pool.step(0, Action("x"))
    time.sleep(0.4)  # the value is long there
    assert call.result().reason == ENV_TIMEOUT


def test_slots_run_side_by_side_and_answer_for_themselves():
    barrier = threading.Barrier(3, timeout=5)  # passes only when all three are in their call at once
    envs = [
        FakeEnv(lambda action: (barrier.wait() and None) or StepResult((USER,), reward=float(action.text)))
        for _ in range(3)
    ]
    with make_pool(*envs) as pool:
        for call in [pool.reset(slot, {}) for slot in range(3)]:
            call.result()
        calls = [pool.step(slot, Action(str(slot))) for slot in range(3)]
        assert [call.result().reward for call in calls] == [0.0, 1.0, 2.0]


def test_failures_in_closing_are_returned():
    def fail():
        time.sleep(0.1)  # the failed one closes in its own thread, and is waited for
        raise OSError("cannot")

    pool = make_pool(FakeEnv(close=fail), FakeEnv(raising(ValueError("x")), close=fail), FakeEnv())
    for slot in range(3):
        pool.reset(slot, {}).result()
    pool.step(1, Action("x")).result()
    failures = pool.close()
    assert [failure.reason for failure in failures] == [ENV_ERROR, ENV_ERROR]
    assert (
        failures[0].detail.startswith("close after an error: OSError: cannot")
        and "OSError: cannot" in failures[1].detail
    )
    assert pool.close() == []


def test_misuse_by_the_host_raises():
    release = threading.Event()
    pool = make_pool(FakeEnv(lambda action: release.wait(5) and StepResult((USER,))))
    with pytest.raises(ValueError, match="before its reset"):
        pool.step(0, Action("x"))
    with pytest.raises(ValueError, match="report on slot 0 before its reset"):
        pool.report(0)
    pool.reset(0, {}).result()
    call = pool.step(0, Action("x"))
    with pytest.raises(ValueError, match="while step is running"):
        pool.report(0)
    assert pool.close() == []  # does not wait for a running call
    release.set()
    assert call.result() == StepResult((USER,))
    with pytest.raises(ValueError, match="a pool of 0"):
        EnvPool(ThreadHost(FakeEnv), size=0, limit_seconds=1.0)


class Counted(FakeEnv):
    """Knows how many of its kind are open, and which tasks were reset, in order."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def reset(self, task):
        self.log.append(("reset", task["id"]))
        if task.get("waits"):
            task["waits"][0].wait()
        if task.get("fails"):
            raise ValueError(task["id"])
        return Start(({"role": "user", "content": task["id"]},))

    def close(self):
        super().close()
        self.log.append("close")


def test_resets_run_ahead_of_need_and_no_more_than_that():
    log, tasks = [], [{"id": f"t{n}", "fails": n == 3} for n in range(7)]
    with EnvPool(ThreadHost(lambda: Counted(log)), 2, 20.0, ahead=2) as pool:
        for n, task in enumerate(tasks):
            pool.announce(task, ("e", n))
        assert not log, "nothing begins before a slot asks"
        calls = {n: pool.reset(n, tasks[n], ("e", n)) for n in range(2)}
        for n in range(2, 7):
            until = time.monotonic() + 5
            while ("reset", f"t{min(n + 1, 6)}") not in log:
                assert time.monotonic() < until, "it begins before its slot is free"
                time.sleep(0.01)
            assert sum(1 if name != "close" else -1 for name in log) <= 4, "two slots, and two ahead of them"
            calls[n - 2].result()
            calls[n] = pool.reset(n % 2, tasks[n], ("e", n))
        results = [calls[n].result() for n in range(7)]
    for n, result in enumerate(results):
        assert result.reason == ENV_ERROR if n == 3 else result.messages[0]["content"] == f"t{n}"
    assert sorted(each[1] for each in log if each != "close") == [task["id"] for task in tasks]
    assert log.count("close") == 7
    assert_no_threads_left()


def test_what_was_reset_ahead_is_closed_when_nobody_comes_for_it():
    """Also one that is still in its reset then, as is one in a slot: nobody waits, and each is closed in the end."""
    log, gate = [], [threading.Event()]
    with EnvPool(ThreadHost(lambda: Counted(log)), 1, 20.0, ahead=2) as pool:
        tasks = [{"id": "a"}, {"id": "b"}, {"id": "c", "waits": gate}]
        for task in tasks:
            pool.announce(task, (task["id"],))
        pool.reset(0, tasks[0], ("a",)).result()
        while len(log) < 3:
            time.sleep(0.01)
        start = time.monotonic()
        assert pool.close() == [] and time.monotonic() - start < 10
        gate[0].set()
        assert_no_threads_left()
    assert log.count("close") == 3


def test_a_hung_environment_does_not_keep_the_interpreter():
    program = """
        import threading
        from hintsd_jax.envs.base import Start
        from hintsd_jax.rollout.env_host import ThreadHost
        from hintsd_jax.rollout.env_pool import EnvPool
        class Hang:
            def reset(self, task):
                threading.Event().wait()
        pool = EnvPool(ThreadHost(Hang), size=2, limit_seconds=0.1)
        print(pool.reset(0, {}).result().reason)
        pool.reset(1, {})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=20)
    assert done.stdout.strip() == "env_timeout" and done.returncode == 0, done.stderr


def test_a_time_out_is_journalled_and_taken_again(tmp_path):
    """The second run is fast everywhere; what timed out in the first times out again, and nothing is called for it."""

    def slow(seconds):
        return lambda *args: time.sleep(seconds) or StepResult((USER,))

    def run(*envs, limit):
        supply, names = iter(envs), [("t1", 0), ("t1", 1), ("t2", 2)]
        pool = EnvPool(ThreadHost(lambda: next(supply)), 3, limit, Journal(tmp_path / "step_000001.jsonl"))
        results = [pool.reset(slot, {}, names[slot]).result() for slot in range(3)]
        results += [pool.step(0, Action("a")).result() for _ in range(2)]
        results += [pool.report(1).result(), pool.report(0).result()]
        return results, pool.close()

    hanging = [FakeEnv(), FakeEnv(report=None, close=slow(1)), FakeEnv(close=slow(1))]
    hanging[0].behaviour = lambda action: slow(len(hanging[0].called) - 2)(action)  # the second step
    hanging[1].report = slow(1)
    first = run(*hanging, limit=0.3)
    reasons = [failure.reason if isinstance(failure, CallFailure) else None for failure in first[0] + first[1]]
    assert reasons == [None, None, None, None, ENV_TIMEOUT, ENV_TIMEOUT, ENV_ERROR, ENV_TIMEOUT]
    lines = [json.loads(line) for line in (tmp_path / "step_000001.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [["t1", 0, "step 2"], ["t1", 1, "report"], ["t2", 2, "close"]]
    fast = [FakeEnv(close=raising(ValueError("it was not closed the first time"))), FakeEnv(), FakeEnv()]
    assert run(*fast, limit=30.0) == first
    assert [env.called for env in fast] == [["reset", "step"], ["reset"], ["reset"]]
    assert len((tmp_path / "step_000001.jsonl").read_text().splitlines()) == 3


def test_a_reset_that_timed_out_is_not_called_again(tmp_path):
    journal = Journal(tmp_path / "journal" / "j.jsonl")
    with EnvPool(ThreadHost(lambda: time.sleep(1)), 1, 0.05, journal) as pool:
        first = pool.reset(0, {}, ("t", 0)).result()
    built = []
    with EnvPool(ThreadHost(lambda: built.append(1) or FakeEnv()), 1, 5.0, journal) as pool:
        assert pool.reset(0, {}, ("t", 0)).result() == first and first.reason == ENV_TIMEOUT
    assert not built and pool.close() == []


def test_nothing_is_journalled_without_a_time_out(tmp_path):
    host = ThreadHost(lambda: FakeEnv(raising(ValueError("x"))))
    with EnvPool(host, 1, 5.0, Journal(tmp_path / "journal" / "j.jsonl")) as pool:
        pool.reset(0, {}, ("t", 0)).result()
        assert pool.step(0, Action("x")).result().reason == ENV_ERROR
    assert list(tmp_path.iterdir()) == []


def test_a_time_out_that_the_environment_raises_counts_as_one_and_is_journalled(tmp_path):
    def late(action):
        raise CallTimeout("add took\nlonger than 5 s")

    def run(*envs):
        supply = iter(envs)
        pool = EnvPool(ThreadHost(lambda: next(supply)), 2, 5.0, Journal(tmp_path / "journal.jsonl"))
        for slot in range(2):
            pool.reset(slot, {"id": "t"}, ("a", slot)).result()
        return [pool.step(slot, Action("x")).result() for slot in range(2)], pool.close()

    envs = FakeEnv(late), FakeEnv()
    (failure, turn), closing = run(*envs)
    assert (
        failure.reason == ENV_TIMEOUT
        and "CallTimeout: add took longer than 5 s" in failure.detail
        and turn == StepResult((USER,))
        and not closing
    )
    assert envs[0].called == ["reset", "step"]  # like one that hangs it is not touched again
    again = FakeEnv(), FakeEnv()
    assert run(*again) == ([failure, turn], []) and again[0].called == ["reset"]
