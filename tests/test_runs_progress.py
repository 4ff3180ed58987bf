"""What a person sees: phases with a running clock, lines that never wrap, an honest time left, the last table."""

import fcntl
import io
import os
import pty
import re
import struct
import termios
import time

import pytest

from benchmarks.terminal_recording import Frame, Terminal, worst_factor
from hintsd_jax.runs import progress
from hintsd_jax.runs.live_line import Screen
from hintsd_jax.runs.time_left import EVALUATED, ROLLED_OUT, Plan, TimeLeft
from hintsd_jax.runs.watch import FAILURES, MOST_BYTES, Watch

PLAN = Plan(steps=4, eval_every=2, eval_episodes=10, test_episodes=(100, 20))
ROW = {"rollout/success": 0.5, "train/loss": 0.01234, "train/tokens": 9, "rollout/tokens": 3000, "time/step": 2.0}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run(shown, clock, *, first_step=0, step_s=10.0, episode_s=0.5, drift=0.0, compiled=None):
    """A whole run by the clock: (the time, announced seconds left) all along, and the end."""
    announced = []

    def wait(seconds, parts=4):
        for _ in range(parts):
            clock.now += seconds / parts
            announced.append((clock.now, shown._seconds_left()))

    def evaluate(episodes):
        shown.began("episodes", episodes)
        wait(episode_s * episodes)

    shown.began("programs", 3)
    wait(100.0)
    if not first_step:
        for episodes in (*PLAN.test_episodes, PLAN.eval_episodes):
            evaluate(episodes)
    for step in range(first_step + 1, PLAN.steps + 1):
        shown.step_began()
        for what in ("episodes", "answers", "batches"):
            shown.began(what, 6)
            wait(step_s / 3)
        if step == first_step + 1 and compiled is not None:
            wait(70.0)  # something was compiled after all
            compiled.now += 70.0
        step_s += drift
        if PLAN.is_evaluation_step(step):
            evaluate(PLAN.eval_episodes)
        shown.completed(step, ROW)
        announced.append((clock.now, shown._seconds_left()))
    for episodes in PLAN.test_episodes:
        evaluate(episodes)
    return announced, clock.now


@pytest.mark.parametrize("first_step", [0, 2])
@pytest.mark.parametrize("drift", [0.0, -1.5, 1.5])
def test_the_time_left_is_honest(first_step, drift):
    """Evaluations to come count, compilations do not; steps that get shorter or longer are followed."""
    clock, compiled = Clock(), Clock()
    shown = progress.Progress(PLAN, first_step, io.StringIO(), clock, compiled)
    announced, end = run(shown, clock, first_step=first_step, drift=drift, compiled=compiled)
    shown.close()
    assert all(left is None for _, left in announced[: 4 + 12 * (not first_step)])  # nothing is known yet
    known = [(end - now, left) for now, left in announced if left is not None and end - now > 5]
    assert len(known) > 15
    factors = [max(left / truth, truth / left) for truth, left in known]
    assert max(factors) < (1.05 if not drift and not first_step else 1.5)


def test_what_was_never_played_is_guessed_from_rollouts():
    left = TimeLeft(PLAN)
    left.played(ROLLED_OUT, 10, 5.0)
    left.step_done(30.0)
    assert left.seconds(1) == 3 * 30 + (10 + 10 + 100 + 20) / 2
    left.played(EVALUATED, 10, 4.0)
    assert left.seconds(1) == pytest.approx(3 * 30 + 2 * 4 + 120 * 0.4)
    left.step_done(10.0)  # the first of a process does not count any more
    assert left.seconds(2, spent=4) == pytest.approx(6 + 10 + 4 + 120 * 0.4)


def test_an_evaluation_that_goes_faster_or_slower_than_the_one_before_says_so_in_time():
    left = TimeLeft(Plan(steps=1, test_episodes=(100, 50)))
    left.played(EVALUATED, 100, 10.0)
    left.played(EVALUATED, 50, 4.0)
    left.step_done(1.0)
    assert left.seconds(1) == 14.0 and left.seconds(1, playing=(100, 0, 2.0)) == 12.0
    for speed in (0.5, 2.0):  # at the end of the first one the second is expected to go alike
        assert left.seconds(1, playing=(100, 99, 10.0 * speed)) == pytest.approx(4 * speed ** (2 / 3), rel=0.1)
    left.played(EVALUATED, 100, 5.0)
    assert left.seconds(1, evaluated=1) == pytest.approx(4 * 0.5 ** (2 / 3))
    left.played(EVALUATED, 1, 1.0)
    left.played(EVALUATED, 1, 100.0)  # a single episode says nothing
    assert left.seconds(1, evaluated=1) == pytest.approx(4 * 0.5 ** (2 / 3), rel=0.1)


def test_plain_lines_and_rare_heartbeats():
    stream, clock = io.StringIO(), Clock()
    shown = progress.Progress(PLAN, 1, stream, clock)
    shown.began("programs", 9)
    assert shown._compose(0) == ""
    heard = []
    for now in range(0, 1000, 5):
        clock.now = float(now)
        heard += [text] if (text := shown._compose(0)) else []
    assert heard == [f"compiling program 1 of 9 ({m}:00)" for m in (1, 2, 4, 8, 16)]
    shown.step_began()
    clock.now += 3
    shown.completed(2, ROW)
    shown.close()
    assert re.fullmatch(
        r"step 2 of 4: success 50\.0 %, loss 0\.0123, 1,500 tokens/s, \d:\d\d left\n", stream.getvalue()
    )


class Pseudo:
    """A pseudo-terminal: what was written to it, as lines."""

    def __init__(self, columns):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")

    def close(self):
        self.stream.close()
        os.close(self.master)

    def frames(self):
        time.sleep(0.02)
        text = os.read(self.master, 10**6).decode().replace("\r\n", "\n")
        return list(Terminal().feed(text, 0.0))


@pytest.mark.parametrize("columns, width", [(40, 40), (80, 80), (130, 130), (0, 80)])
def test_no_line_wraps_and_every_phase_has_a_clock(columns, width):
    terminal, clock = Pseudo(columns), Clock()
    shown = progress.Progress(PLAN, 0, terminal.stream, clock)
    shown.note("a note from outside \x1b]0;title\x07 " + "that goes on and on " * 9)
    for what, total in (("programs", 12), ("episodes", 1000), ("something of its own", 3)):
        shown.began(what, total)
        shown.tick(total // 2)
        clock.now += 75
        shown._screen.refresh()
    shown.step_began()
    shown.began("episodes", 640)
    clock.now += 4000
    shown.completed(1, ROW | {"hindsight/questions": 640, "hindsight/dropped/unparsable": 640})
    shown.step_began()
    for what in ("episodes", "answers", "batches", "episodes"):
        shown.began(what, 12_345)
        clock.now += 65
        shown._screen.refresh()
    shown.close()
    frames = terminal.frames()
    assert max(len(frame.text) for frame in frames) < width
    text = "\n".join(frame.text for frame in frames)
    assert "step 1 of 4: success 50.0 %" in text and "\x1b" not in text
    terminal.close()


def live(columns, phase, seconds, step, share, left):
    return progress._live_line(phase, seconds, step, share, left, columns)


def test_the_fullest_form_that_fits():
    arguments = ("rollout, episode 12 of 64", 5.0, "step 7 of 40", 0.15, 200.0)
    assert live(129, *arguments) == f"[####{'-' * 26}] step 7 of 40: rollout, episode 12 of 64 (0:05), 3:20 left"
    assert live(79, *arguments) == "[##---------] step 7 of 40: rollout, episode 12 of 64 (0:05), 3:20 left"
    assert live(60, *arguments) == "step 7 of 40: rollout, episode 12 of 64 (0:05), 3:20 left"
    assert live(40, *arguments) == "rollout, episode 12/64 (0:05), 3:20 left"
    assert live(39, *arguments) == "episode 12/64 (0:05), 3:20 left"
    assert live(19, "compiling program 1 of 9", 5.0, "", 0.0, None) == "compiling program 1"
    assert live(0, *arguments) == "step 7 of 40: rollout, episode 12 of 64 (0:05), 3:20 left"


def test_the_clock_runs_while_nothing_happens():
    terminal = Pseudo(80)
    calls = []
    screen = Screen(terminal.stream, lambda columns: calls.append(columns) or "live", every=0.01)
    deadline = time.monotonic() + 10
    while len(calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    screen.close()
    screen.close()
    assert calls[:3] == [79] * 3
    assert os.read(terminal.master, 10**6).decode().startswith("\r\x1b[Klive\r\x1b[Klive")
    terminal.close()


def test_a_stream_that_goes_away_costs_nothing_but_what_it_would_have_shown():
    reader, writer = os.pipe()
    os.close(reader)
    stream, clock = os.fdopen(writer, "w"), Clock()
    shown = progress.Progress(PLAN, 0, stream, clock)
    shown.note("nobody reads this")
    shown.step_began()
    clock.now += 5
    shown.completed(1, ROW)
    shown.note("nor this")
    shown.close()
    assert shown._screen._gone and shown._seconds_left() == 15
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_text_that_the_stream_cannot_hold_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    shown = progress.Progress(PLAN, 0, stream)
    shown.note("é \ud800\x07\ttab")
    shown.close()
    assert raw.getvalue() == b"\\xe9 ?? tab\n"


class Failure:
    def __init__(self, n, traceback="Traceback:\n  boom"):
        self.task_id, self.rollout, self.call = f"task {n}", n, "step 2"
        self.reason, self.detail, self.traceback = "env_error", f"ValueError:\n{n}", traceback


def test_the_first_failure_is_shown_once_and_all_are_kept(tmp_path):
    stream = io.StringIO()
    shown = progress.Progress(None, 0, stream)
    watch = Watch(shown, tmp_path / FAILURES)
    watch.failed([])
    assert not (tmp_path / FAILURES).exists()
    watch.failed([Failure(1), Failure(2)])
    watch.failed([Failure(3, "half a \udc80")])
    shown.close()
    first = "task task 1, rollout 1, step 2: env_error: ValueError: 1"
    assert stream.getvalue().splitlines()[0] == f"first failure of an environment: {first}"
    assert stream.getvalue().count("boom") == 1 and str(tmp_path / FAILURES) in stream.getvalue()
    kept = (tmp_path / FAILURES).read_text()
    assert [f"task task {n}" in kept for n in (1, 2, 3)] == [True] * 3 and kept.startswith(f"{first}\n    Traceback:")
    watch.failed([Failure(n, "x" * 4000) for n in range(2000)])
    assert MOST_BYTES < (tmp_path / FAILURES).stat().st_size < MOST_BYTES + 5000


def test_last_table():
    results = [progress.Result("held-out Avg@4", 0.4, 0.575, None, (0.5, 0.65)), progress.Result("greedy", None, 0.5)]
    facts = {"wall time": progress.format_seconds(3725), "analyser": "environment (PRIVILEGED)"}
    plain, markdown = (make(results, facts).splitlines() for make in (progress.plain_table, progress.markdown_table))
    cells = lambda line, mark: [cell.strip() for cell in re.split(mark, line.strip("| "))]
    expected = [
        ["success, %", "before", "after", "change"],
        ["held-out Avg@4", "40.0", "57.5 (50.0 to 65.0)", "+17.5"],
        ["greedy", "-", "50.0"],
    ]
    assert [cells(plain[n], "  +") for n in (0, 2, 3)] == expected
    assert [cells(markdown[n], r"\|") for n in (0, 2, 3)] == expected
    assert len({line.find(word) + len(word) for line, word in ((plain[0], "after"), (plain[3], " 50.0"))}) == 1
    assert plain[4:] == ["wall time: 1:02:05", "analyser: environment (PRIVILEGED)"]
    assert markdown[4:] == ["", "- wall time: 1:02:05", "- analyser: environment (PRIVILEGED)"]
    assert progress.format_seconds(59.6) == "1:00"


def test_a_recording_reads_the_terminal_and_measures_the_time_left():
    """Of `benchmarks/terminal_recording.py`: what is written over is gone, and only the time after step 2 counts."""
    text = "\r\x1b[Kone line\r\x1b[Ktwo\r\x1b[Kstays\nlive"
    assert list(Terminal().feed(text, 1.0)) == [Frame(1.0, "stays", True), Frame(1.0, "live", False)]
    frames = [Frame(1.0, "step 1 of 9 (0:01), 9:00 left", False), Frame(2.0, "step 2 of 9: fine", True)]
    frames += [Frame(10.0, "x (0:03), 1:20 left", False), Frame(70.0, "y, 0:25 left", False), Frame(110.0, "", True)]
    assert worst_factor(frames) == (1.6, 2)
