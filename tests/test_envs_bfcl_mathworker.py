"""MathAPI's own process: quick, killed when a call takes too long, replaced, and gone when we are."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("bfcl_eval", reason="the benchmark's wheel is not installed: run `make bfcl`")

from hintsd_jax.envs.bfcl import mathworker
from hintsd_jax.envs.bfcl.mathworker import MathTimeout, MathWorker

SLOW = ("power", (), {"base": 9, "exponent": 10**9})  # holds the interpreter for hours
ADD = ("add", (), {"a": 1, "b": 2})


def running(pid):
    """Whether there is such a process that has not ended; one that nobody has waited for yet is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_ends(pid, seconds):
    deadline = time.monotonic() + seconds
    while running(pid):
        assert time.monotonic() < deadline, f"process {pid} is left behind"
        time.sleep(0.02)


def test_a_call_beyond_its_limit_is_killed_and_the_next_one_finds_another_process():
    worker = MathWorker(limit_seconds=0.4)
    assert worker.pid is None and worker.call(*ADD) == '{"result": 3}'
    first = worker.pid
    assert worker.call("mean", ([1, 2],), {}) == '{"result": 1.5}' and worker.pid == first
    began = time.monotonic()
    with pytest.raises(MathTimeout, match="power took longer than 0.4 s"):
        worker.call(*SLOW)
    assert time.monotonic() - began < 3 and not running(first)
    assert worker.call(*ADD) == '{"result": 3}' and worker.pid != first
    os.kill(worker.pid, signal.SIGKILL)
    assert_ends(worker.pid, 5)
    assert worker.call(*ADD) == '{"result": 3}'  # one that died between calls is nobody's time-out
    worker._stop()


def test_a_process_that_dies_in_a_call_is_told_and_replaced():
    worker = MathWorker(limit_seconds=30)
    worker.call(*ADD)
    threading.Timer(0.3, os.kill, (worker.pid, signal.SIGKILL)).start()
    with pytest.raises(MathTimeout, match="died in this call"):
        worker.call(*SLOW)
    assert worker.call(*ADD) == '{"result": 3}'
    worker._stop()


def test_calls_from_many_threads_come_back_to_their_own():
    worker, wrong = MathWorker(limit_seconds=30), []

    def work(number):
        for value in range(50):
            if worker.call("add", (), {"a": number, "b": value}) != f'{{"result": {number + value}}}':
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    worker._stop()


def test_the_process_loads_neither_jax_nor_the_package():
    worker = MathWorker(limit_seconds=30)
    worker.call(*ADD)
    maps = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "jaxlib" in Path("/proc/self/maps").read_text()  # this is where it would be seen
    assert "jaxlib" not in maps and "numpy" not in maps and "array_record" not in maps
    worker._stop()


@pytest.mark.parametrize("end", ["exit", "killed", "killed in a call"])
def test_nothing_is_left_behind(end):
    code = f"""
        import os, sys, threading, time
        sys.path.insert(0, {str(Path(mathworker.__file__).parent)!r})
        from mathworker import MathWorker
        worker = MathWorker(limit_seconds=0.5)
        worker.call("add", (), {{"a": 1, "b": 2}})
        print(worker.pid, flush=True)
        if {end!r} == "killed in a call":
            threading.Thread(target=worker.call, args=("power", (), {{"base": 9, "exponent": 10**9}})).start()
            time.sleep(0.2)
        if {end!r} != "exit":
            os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == (0 if end == "exit" else -9) and not done.stderr
    assert_ends(int(done.stdout), 10)


def test_a_process_that_cannot_start_is_told(monkeypatch):
    monkeypatch.setattr(mathworker, "__file__", os.devnull)
    with pytest.raises(RuntimeError, match="ended as it started"):
        MathWorker(limit_seconds=1).call(*ADD)
