"""Signals: where they are raised, where they are only noted, and the second one, which nothing holds up."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from hintsd_jax.runs import interruption
from hintsd_jax.runs.interruption import Interrupted, deferred, handled, requested


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def noted():
    """Waits until a signal that was sent is noted."""
    end = time.monotonic() + 5
    while not requested() and time.monotonic() < end:
        time.sleep(0.001)
    assert requested()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_as_a_rule_it_is_raised_wherever_the_program_is(number, status):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with handled(), pytest.raises(Interrupted, match=number.name) as raised:
        send(number)
        time.sleep(30)
    assert raised.value.status == status
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1 and not requested()


def test_deferred_it_is_raised_only_where_the_run_can_be_left(capfd):
    with handled(), deferred():
        interruption.check()
        send()
        noted()
        with pytest.raises(Interrupted):
            interruption.check()
    assert capfd.readouterr().err == f"{interruption.ASKED}\n"


@pytest.mark.parametrize(
    "wait", [lambda: interruption.wait(threading.Event()), lambda: interruption.get(queue.SimpleQueue())]
)
def test_a_wait_without_end_is_ended_by_it(wait):
    with handled(), deferred():
        threading.Timer(0.05, send).start()
        with pytest.raises(Interrupted):
            wait()


def test_one_that_python_ignores_is_raised_at_the_next_point():
    class Dying:
        def __del__(self):
            send()
            time.sleep(30)

    before = sys.unraisablehook
    with handled():
        Dying()
        assert requested()
        with pytest.raises(Interrupted):
            interruption.wait(threading.Event(), 30)
    assert sys.unraisablehook is before


def test_what_is_left_can_still_be_waited_for_and_other_threads_go_on():
    done, seen = threading.Event(), []
    with handled(), deferred():
        send()
        noted()
        thread = threading.Thread(target=lambda: seen.append(interruption.check()))
        thread.start()
        thread.join()
        with pytest.raises(Interrupted):
            interruption.check()
        threading.Timer(0.3, done.set).start()
        assert interruption.wait(done) and not interruption.wait(threading.Event(), 0.01)
    assert seen == [None]


def test_what_would_be_lost_is_finished_first():
    with handled(), deferred():
        with interruption.kept():
            send()
            noted()
            interruption.check()
            assert not interruption.wait(threading.Event(), 0.3)
        with pytest.raises(Interrupted):
            interruption.check()


def test_a_request_of_another_process_is_as_a_first_signal():
    interruption.request("nobody listens")
    assert not requested()
    with handled(), deferred():
        interruption.request("another process was asked to stop")
        with pytest.raises(Interrupted, match="another process") as raised:
            interruption.check()
        assert raised.value.status == interruption.GO_ON


def test_without_anybody_who_asks_nothing_is_raised():
    event = threading.Event()
    event.set()
    interruption.check()
    assert interruption.wait(event) and not interruption.wait(threading.Event(), 0.01) and not requested()


DEAF = """
import hashlib
from hintsd_jax.runs.interruption import deferred, handled
with handled(), deferred():
    print("deaf", flush=True)
    print("held back", end="")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C without a look at signals, as a compiler
"""


@pytest.mark.parametrize(
    ("numbers", "status"),
    [((signal.SIGINT,) * 2, 130), ((signal.SIGTERM,) * 2, 75), ((signal.SIGTERM, signal.SIGINT), 130)],
)
def test_a_second_signal_leaves_at_once_whatever_the_main_thread_does(numbers, status):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen([sys.executable, "-c", DEAF], env=environment, **pipes) as process:
        assert process.stdout.readline() == "deaf\n"
        time.sleep(0.1)
        process.send_signal(numbers[0])
        assert process.stderr.readline() == f"{interruption.ASKED}\n" and process.poll() is None
        process.send_signal(numbers[1])
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (status, "held back", f"{interruption.LEFT}\n")
