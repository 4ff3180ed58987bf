"""Shares, and how processes meet and stop: threads as processes, over a store like that of `jax.distributed`."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax import processes
from hintsd_jax.config.schema import DistributedSection
from hintsd_jax.errors import UserError
from hintsd_jax.runs.interruption import Interrupted


class Store:
    """Keys and values as `jax.distributed` keeps them."""

    def __init__(self):
        self.values, self.lock = {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.lock:
            if key in self.values and not allow_overwrite:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value

    def key_value_dir_get(self, place):
        with self.lock:
            return [(key, value) for key, value in self.values.items() if key.startswith(place)]

    def key_value_delete(self, place):
        with self.lock:
            self.values = {key: value for key, value in self.values.items() if not key.startswith(place)}


def as_threads(patch, n, play):
    """Calls play(number, its meetings) in n threads, each as one process: their results or errors, and the store."""
    own, store, results = threading.local(), Store(), [None] * n
    patch.setattr(processes, "count", lambda: n)
    patch.setattr(processes, "index", lambda: own.number)

    def process(number):
        own.number = number
        table = object.__new__(processes._Meetings)  # without watching: no process dies here
        table._store, table._number, table._at, table._stopped = store, 0, "", False
        try:
            results[number] = play(number, table)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=process, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads), "a process waits for ever"
    return results, store


@given(st.integers(0, 400), st.integers(1, 70))
def test_shares_are_the_whole_in_order_and_alike(things, n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "count", lambda: n)
        shares = []
        for number in range(n):
            patch.setattr(processes, "index", lambda number=number: number)
            shares.append(processes.share(things))
    assert [thing for share in shares for thing in share] == list(range(things))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_meets_nobody():
    value = object()
    assert processes.gather(value, "anything") == [value] and processes.leads()
    with processes.joined(DistributedSection(coordinator="none")):
        assert processes.count() == 1 and processes.screen() is None
    processes.stop_together()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whoever_is_asked_to_stop_all_stop_at_the_same_point(data):
    """Each process has work of its own between meetings, in which it may be asked; the update that follows a meeting is
    done by all or by none.
    """
    n, meetings = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    asked = data.draw(st.lists(st.one_of(st.none(), st.integers(1, meetings)), min_size=n, max_size=n))
    delays = data.draw(st.lists(st.sampled_from((0.0, 0.001, 0.01)), min_size=n, max_size=n))

    def play(number, table):
        updates = 0
        try:
            for meeting in range(1, meetings + 1):
                time.sleep(delays[number])
                if asked[number] == meeting:
                    raise Interrupted("asked")
                table.meet("rollouts")
                updates += 1
        except Interrupted:
            table.stop()  # as the recorder does, before all save together
            table.meet("the end", may_stop=False)
        return updates

    with pytest.MonkeyPatch.context() as patch:
        results, _ = as_threads(patch, n, play)
    first = min((meeting for meeting in asked if meeting), default=meetings + 1)
    assert results == [first - 1] * n


def test_a_meeting_that_is_past_leaves_nothing(monkeypatch):
    def play(number, table):
        for _ in range(6):
            table.meet("rollouts")

    results, store = as_threads(monkeypatch, 3, play)
    assert results == [None] * 3
    assert {key.split("/")[2] for key in store.values} == {"5", "6"}


def test_other_settings_are_refused():
    processes._check_same(["a", "a"])
    with pytest.raises(UserError, match="process 2 was started with other settings than process 0"):
        processes._check_same(["a", "a", "b"])


@pytest.mark.parametrize(
    "settings",
    [
        {"coordinator": "127.0.0.1:1", "processes": 2},
        {"coordinator": "127.0.0.1:1", "process": 0},
        {"coordinator": "127.0.0.1:1", "processes": 2, "process": 2},
        {"coordinator": "localhost", "processes": 2, "process": 0},
        {"coordinator": "localhost:x", "processes": 2, "process": 0},
        {"coordinator": "autp", "processes": 2, "process": 0},
    ],
)
def test_a_run_that_cannot_be_joined_is_refused(settings):
    with pytest.raises(UserError, match=r"distributed.coordinator = host:port.*distributed.processes"):
        processes._join(DistributedSection(**settings))
