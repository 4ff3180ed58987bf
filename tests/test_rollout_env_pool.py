"""Environment calls: whatever an environment does comes back as a value, in time, and never stops the run."""

import json
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from hintsd_jax.envs.base import Action, CallTimeout, Fault, Report, Start, StepResult
from hintsd_jax.rollout.env_pool import ENV_ERROR, ENV_TIMEOUT, EnvPool, Failure
from hintsd_jax.runs.journal import Journal

USER = {"role": "user", "content": "Go."}
START = Start((USER,))


class World:
    """Does in `step` what `behaviour` says, and remembers what was called."""

    def __init__(
        self, behaviour=lambda action: StepResult((USER,)), start=START, report=Report("fine"), close=lambda: None
    ):
        self.behaviour, self.start, self.the_report, self.closing = behaviour, start, report, close
        self.called = []

    def reset(self, task):
        self.called.append("reset")
        return self.start

    def step(self, action):
        self.called.append("step")
        return self.behaviour(action)

    def report(self):
        self.called.append("report")
        return self.the_report

    def close(self):
        self.called.append("close")
        self.closing()


def make_pool(*worlds: World, limit: float = 5.0) -> EnvPool:
    supply = iter(worlds)
    return EnvPool(lambda: next(supply), size=len(worlds), limit_seconds=limit)


def step_once(world: World, limit: float = 5.0):
    with make_pool(world, limit=limit) as pool:
        assert isinstance(pool.submit(0, "reset", {"id": "t"}).result(), Start)
        return pool.submit(0, "step", Action("x")).result()


def assert_no_threads_left():
    deadline = time.monotonic() + 5
    while left := [thread for thread in threading.enumerate() if thread.name.startswith("env-")]:
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
    world = World(
        lambda action: StepResult([USER], reward=np.float32(0.5), terminated=np.bool_(True)),
        report=Report("r", [Fault(1, "f")]),
    )
    with make_pool(world) as pool:
        assert pool.submit(0, "reset", {}).result() == START
        turn = pool.submit(0, "step", Action("x")).result()
        assert turn == StepResult((USER,), 0.5, True) and type(turn.reward) is float and type(turn.terminated) is bool
        assert turn.messages[0] is not USER  # a copy: what the environment changes later stays its own
        call = pool.submit(0, "report")
        assert call.result() == call.result() == Report("r", (Fault(1, "f"),))
        pool.submit(0, "reset", {}).result()
    assert world.called == ["reset", "step", "report", "reset", "close"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("boom\nand more"), "ValueError: boom and more (in behaviour, line"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (RecursionError("deep"), "RecursionError: deep"),
        (Unspeakable(), "Unspeakable: (its message cannot be read: SystemExit)"),
    ],
)
def test_whatever_is_raised_is_an_error_value(error, words):
    failure = step_once(world := World(raising(error)))
    assert failure.reason == ENV_ERROR and words in failure.detail and "\n" not in failure.detail
    assert_no_threads_left()
    assert world.called == ["reset", "step", "close"]


@pytest.mark.parametrize(
    ("rubbish", "words"),
    [
        (None, "returned NoneType, not a StepResult"),
        ("done", "returned str, not a StepResult"),
        (START, "returned Start, not a StepResult"),
        (StepResult(()), "must end the episode"),
        (StepResult(None), "not iterable"),
        (StepResult(("hello",)), "a message is str"),
        (StepResult(({"role": "assistant", "content": "x"},)), "role 'assistant': use user, tool"),
        (StepResult(({"role": "user"},)), "content is NoneType"),
        (StepResult(({"role": "user", "content": "\ud800"},)), "not Unicode"),
        (StepResult((USER,), reward=float("nan")), "not a finite number"),
        (StepResult((USER,), reward="1"), "not a finite number"),
    ],
)
def test_whatever_is_returned_is_checked(rubbish, words):
    failure = step_once(World(lambda action: rubbish))
    assert failure.reason == ENV_ERROR and words in failure.detail


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (Start(()), "no messages"),
        (Start((USER, {"role": "system", "content": "x"})), "may only come first"),
        (Start((USER,), tools=({1, 2},)), "not JSON"),
        (Start((USER,), tools=("cat",)), "must be a JSON object"),
        (StepResult((USER,)), "not a Start"),
    ],
)
def test_a_start_is_checked(start, words):
    with make_pool(World(start=start)) as pool:
        failure = pool.submit(0, "reset", {}).result()
    assert failure.reason == ENV_ERROR and words in failure.detail


@pytest.mark.parametrize(
    "report", [None, Report(3), Report("x", (Fault(0, "f"),)), Report("x", ((1, "f"),)), Report("x", 3)]
)
def test_a_report_is_checked(report):
    with make_pool(World(report=report)) as pool:
        pool.submit(0, "reset", {}).result()
        assert pool.submit(0, "report").result().reason == ENV_ERROR


def test_a_constructor_that_fails_is_a_failed_reset_and_is_tried_again():
    answers = [ZeroDivisionError("no"), World()]

    def make():
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    with EnvPool(make, size=1, limit_seconds=5.0) as pool:
        assert "ZeroDivisionError: no" in pool.submit(0, "reset", {}).result().detail
        assert pool.submit(0, "step", Action("x")).result().reason == ENV_ERROR
        assert pool.submit(0, "reset", {}).result() == START


def test_a_slow_call_times_out_and_its_environment_is_never_touched_again():
    release, left = threading.Event(), threading.Event()

    def hang(action):
        release.wait(10)
        left.set()
        return StepResult((USER,))

    slow, fresh = World(hang), World()
    supply = iter((slow, fresh))
    pool = EnvPool(lambda: next(supply), size=1, limit_seconds=0.2)
    pool.submit(0, "reset", {}).result()
    began = time.monotonic()
    call = pool.submit(0, "step", Action("x"))
    failure = call.result()
    assert failure == Failure(ENV_TIMEOUT, "step took longer than 0.2 s") and time.monotonic() - began < 2
    assert pool.submit(0, "step", Action("x")).result().reason == ENV_ERROR  # the slot waits for its reset
    assert pool.submit(0, "reset", {}).result() == START
    release.set()
    left.wait(5)
    assert pool.close() == []
    assert call.result() == failure  # a late value changes nothing
    assert slow.called == ["reset", "step"] and fresh.called == ["reset", "close"]
    assert_no_threads_left()


def test_a_late_value_is_late_whenever_it_is_collected():
    world = World(lambda action: time.sleep(0.15) or StepResult((USER,)))
    pool = make_pool(world, limit=0.05)
    pool.submit(0, "reset", {}).result()
    call = pool.submit(0, "step", Action("x"))
    time.sleep(0.4)  # the value is long there
    assert call.result().reason == ENV_TIMEOUT


def test_slots_run_side_by_side_and_answer_for_themselves():
    barrier = threading.Barrier(3, timeout=5)  # passes only when all three are in their call at once
    worlds = [
        World(lambda action: (barrier.wait() and None) or StepResult((USER,), reward=float(action.text)))
        for _ in range(3)
    ]
    with make_pool(*worlds) as pool:
        for call in [pool.submit(slot, "reset", {}) for slot in range(3)]:
            call.result()
        calls = [pool.submit(slot, "step", Action(str(slot))) for slot in range(3)]
        assert [call.result().reward for call in calls] == [0.0, 1.0, 2.0]


def test_failures_in_closing_are_told():
    def fail():
        time.sleep(0.1)  # the failed one closes in its own thread, and is waited for
        raise OSError("cannot")

    pool = make_pool(World(close=fail), World(raising(ValueError("x")), close=fail), World())
    for slot in range(3):
        pool.submit(slot, "reset", {}).result()
    pool.submit(1, "step", Action("x")).result()
    failures = pool.close()
    assert [failure.reason for failure in failures] == [ENV_ERROR, ENV_ERROR]
    assert (
        failures[0].detail.startswith("close after an error: OSError: cannot")
        and "OSError: cannot" in failures[1].detail
    )
    assert pool.close() == []


def test_misuse_by_the_host_raises():
    release = threading.Event()
    pool = make_pool(World(lambda action: release.wait(5) and StepResult((USER,))))
    with pytest.raises(ValueError, match="before its reset"):
        pool.submit(0, "step", Action("x"))
    with pytest.raises(ValueError, match="no environment call 'close'"):
        pool.submit(0, "close")
    pool.submit(0, "reset", {}).result()
    call = pool.submit(0, "step", Action("x"))
    with pytest.raises(ValueError, match="while step is running"):
        pool.submit(0, "report")
    assert pool.close() == []  # does not wait for a running call
    release.set()
    assert call.result() == StepResult((USER,))
    with pytest.raises(ValueError, match="a pool of 0"):
        EnvPool(World, size=0, limit_seconds=1.0)


def test_a_hung_environment_does_not_keep_the_interpreter():
    program = """
        import threading
        from hintsd_jax.envs.base import Start
        from hintsd_jax.rollout.env_pool import EnvPool
        class Hang:
            def reset(self, task):
                threading.Event().wait()
        pool = EnvPool(Hang, size=2, limit_seconds=0.1)
        print(pool.submit(0, "reset", {}).result().reason)
        pool.submit(1, "reset", {})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=20)
    assert done.stdout.strip() == "env_timeout" and done.returncode == 0, done.stderr


def test_a_time_out_is_put_down_and_taken_again(tmp_path):
    """The second life answers fast everywhere; what timed out in the first has still timed out, and nobody is called
    for it.
    """

    def slow(seconds):
        return lambda *args: time.sleep(seconds) or StepResult((USER,))

    def live(*worlds, limit):
        supply, names = iter(worlds), [("t1", 0), ("t1", 1), ("t2", 2)]
        pool = EnvPool(lambda: next(supply), 3, limit, Journal(tmp_path / "step_000001.jsonl"), names)
        told = [pool.submit(slot, "reset", {}).result() for slot in range(3)]
        told += [pool.submit(0, "step", Action("a")).result() for _ in range(2)]
        told += [pool.submit(1, "report").result(), pool.submit(0, "report").result()]
        return told, pool.close()

    hanging = [World(), World(report=None, close=slow(1)), World(close=slow(1))]
    hanging[0].behaviour = lambda action: slow(len(hanging[0].called) - 2)(action)  # the second step
    hanging[1].report = slow(1)
    first = live(*hanging, limit=0.3)
    reasons = [failure.reason if isinstance(failure, Failure) else None for failure in first[0] + first[1]]
    assert reasons == [None, None, None, None, ENV_TIMEOUT, ENV_TIMEOUT, ENV_ERROR, ENV_TIMEOUT]
    lines = [json.loads(line) for line in (tmp_path / "step_000001.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [["t1", 0, "step 2"], ["t1", 1, "report"], ["t2", 2, "close"]]
    fast = [World(close=raising(ValueError("it was not closed the first time"))), World(), World()]
    assert live(*fast, limit=30.0) == first
    assert [world.called for world in fast] == [["reset", "step"], ["reset"], ["reset"]]
    assert len((tmp_path / "step_000001.jsonl").read_text().splitlines()) == 3


def test_a_reset_that_timed_out_is_not_called_again(tmp_path):
    journal = Journal(tmp_path / "journal" / "j.jsonl")
    with EnvPool(lambda: time.sleep(1), 1, 0.05, journal, [("t", 0)]) as pool:
        first = pool.submit(0, "reset", {}).result()
    made = []
    with EnvPool(lambda: made.append(1) or World(), 1, 5.0, journal, [("t", 0)]) as pool:
        assert pool.submit(0, "reset", {}).result() == first and first.reason == ENV_TIMEOUT
    assert not made and pool.close() == []


def test_nothing_is_put_down_without_a_time_out(tmp_path):
    with EnvPool(
        lambda: World(raising(ValueError("x"))), 1, 5.0, Journal(tmp_path / "journal" / "j.jsonl"), [("t", 0)]
    ) as pool:
        pool.submit(0, "reset", {}).result()
        assert pool.submit(0, "step", Action("x")).result().reason == ENV_ERROR
    assert list(tmp_path.iterdir()) == []


def test_a_time_out_that_the_environment_tells_counts_as_one_and_is_journalled(tmp_path):
    def late(action):
        raise CallTimeout("add took\nlonger than 5 s")

    def run(*worlds):
        supply = iter(worlds)
        pool = EnvPool(lambda: next(supply), 2, 5.0, Journal(tmp_path / "answers"), [("a", slot) for slot in range(2)])
        for slot in range(2):
            pool.submit(slot, "reset", {"id": "t"}).result()
        return [pool.submit(slot, "step", Action("x")).result() for slot in range(2)], pool.close()

    worlds = World(late), World()
    (failure, turn), closing = run(*worlds)
    assert (
        failure.reason == ENV_TIMEOUT
        and "CallTimeout: add took longer than 5 s" in failure.detail
        and turn == StepResult((USER,))
        and not closing
    )
    assert worlds[0].called == ["reset", "step"]  # like one that hangs it is not touched again
    again = World(), World()
    assert run(*again) == ([failure, turn], []) and again[0].called == ["reset"]


def test_further_tools_and_valid_turns_are_checked_and_copied():
    tool = {"name": "cat", "parameters": {}}
    turn = step_once(World(lambda action: StepResult((USER,), tools=[tool])))
    tool["name"] = "dog"
    assert turn == StepResult((USER,), tools=({"name": "cat", "parameters": {}},))
    for tools, words in (
        ({"a": 1}, "must be a JSON object"),
        ([{"a": {1}}], "the tools are not JSON"),
        ([{"a": float("nan")}], "not JSON"),
    ):
        failure = step_once(World(lambda action: StepResult((USER,), tools=tools)))
        assert failure.reason == ENV_ERROR and words in failure.detail
    for valid, right in (((True, False), True), ([True], True), ((1,), False)):
        with make_pool(World(report=Report("fine", None, valid))) as pool:
            pool.submit(0, "reset", {"id": "t"}).result()
            found = pool.submit(0, "report").result()
        assert found == Report("fine", None, tuple(valid)) if right else "valid_turns" in found.detail
