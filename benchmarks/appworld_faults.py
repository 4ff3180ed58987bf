"""AppWorld on its worst days: reference solutions of which a fifth meets a cell that hangs, dies or takes all it can,
or a world that does.

  python -m benchmarks.appworld_faults [--episodes 200] [--share 0.2] [--slots 8] [--seed 0]

Three runs of scripts through the collector, with as many worlds at once as slots and two ahead. In the first the code
of an action is at fault; in the second the world itself: its process, that of its code, or the one that grades is
killed or stopped for ever, or asked so that it answers 500 or for another task, in a reset, a step, or the grading. In
the third the process that all others are forked from is killed in the midst of the run.

It prints how each kind ended, that begun = played + dropped, and what is left behind: processes, sockets, folders, open
files. Exit status 1 if an episode ended otherwise than it should, one with a fault of the world was scored, or anything
is left. Written to benchmarks/results/appworld_faults.md.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import hindsight_setup
from benchmarks.pages import RESULTS, markdown_table
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.appworld import AppWorld, env, script, workers
from hintsd_jax.envs.appworld.prompt import render_code
from hintsd_jax.envs.base import StepResult
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.played import Rollouts
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import EngineConfig, Sampling

POLICY = "hintsd_jax/assets/desk-policy"  # its tokenizer alone is used
SPLITS = ("train", "dev", "test_normal", "test_challenge")
LONG = 1 << 30
AHEAD = 2
RESET_S, GRADE_S, GRACE_S = 15.0, 15.0, 3.0  # in place of minutes: nothing is learnt while a world hangs
SUCCESS, ERROR, TIMEOUT = "success", "dropped: env_error", "dropped: env_timeout"
# Leads past the check of the code, to the whole of Python.
_OUT = """
D = "_" * 2
_import = getattr(json.dumps, D + "globals" + D)[D + "builtins" + D][D + "import" + D]
posix, threads = _import("posix"), _import("thread" + "ing")
"""
# What the code of an action does before the reference goes on, and how the episode should end.
CODE = {
    "swallows its time-out": (
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        TIMEOUT,
    ),
    "one long C call": ("x = sum(range(10**13))", TIMEOUT),
    "takes all memory at once": ("x = 'a' * 10**10\nprint(len(x))", SUCCESS),
    "takes all memory bit by bit": ("xs = []\nwhile True: xs.append([0] * 10**6)", SUCCESS),
    "interrupts": ("raise KeyboardInterrupt", SUCCESS),
    "exits": ("raise SystemExit(1)", SUCCESS),
    "threads without end": (
        f"{_OUT}while True: threads.Thread(target=threads.Event().wait, args=(1,), daemon=True).start()",
        SUCCESS,
    ),
    "an endless output": ("while True:\n    print('x' * 1000)", SUCCESS),
    "ends its process": (f"{_OUT}posix._exit(0)", ERROR),
    "crashes its process": (f"{_OUT}_import('cty' + 'pes').CDLL(None).strlen(1)", ERROR),
    "lies to the world": (
        f"{_OUT}for n in range(3, 64):\n    try: posix.write(n, b'x' * 99)\n    except OSError: pass",
        ERROR,
    ),
}
KILLED, STOPPED = "killed", "stopped for ever"
# (where, what) -> how the episode should end.
WORLD = {
    (where, what): TIMEOUT if STOPPED in what else ERROR
    for where, whats in {
        "reset": (KILLED, STOPPED, "its cell killed", f"its cell {STOPPED}", "answers 500", "answers for another task"),
        "step": (KILLED, STOPPED, "its cell killed", f"its cell {STOPPED}", "answers 500", "asked for another task"),
        "grading": (KILLED, STOPPED, "answers 500", "answers for another task"),
    }.items()
    for what in whats
}
_now = threading.local()  # what goes wrong in this thread: `fault`, a key of WORLD or None; `other`, a task's id


def _strikes(where: str) -> str:
    fault = getattr(_now, "fault", None)
    return fault[1] if fault and fault[0] == where else ""


def _signal(what: str, pids: Sequence[int]) -> None:
    """Kills or stops a process, as `what` says."""
    if KILLED in what or STOPPED in what:
        os.kill(pids["cell" in what], signal.SIGKILL if KILLED in what else signal.SIGSTOP)


class StruckWorker(workers.Worker):
    """A Worker that is asked wrong questions."""

    def request(self, path: str, body: Mapping[str, Any], deadline_s: float) -> Any:
        if path == "/initialize" and (what := _strikes("reset")).startswith("answers"):
            body = {**body, "no_such": 1} if "500" in what else {**body, "task_id": _now.other}
        if path == "/execute" and (what := _strikes("step")):
            _signal(what, self.pids)
            path = "/nowhere" if "500" in what else path
            body = {**body, "task_id": _now.other} if "another" in what else body
        return super().request(path, body, deadline_s)


class StruckWorkers(workers.Workers):
    """Workers whose processes are killed and stopped at their birth."""

    def _fork(self, name: str, asked: dict[str, Any]) -> tuple[Path, list[int]]:
        where = "grading" if asked["make"] == "grader" else "reset"
        if _strikes(where) == "answers for another task" and where == "reset":
            self._show_task(self._running(), _now.other)
        if _strikes("grading") == "answers 500" and where == "grading":
            asked = {**asked, "root": f"{asked['root']}/absent"}
        path, pids = super()._fork(name, asked)
        _signal(_strikes(where), pids)
        return path, pids

    def grade(self, worker: workers.Worker, task_id: str, deadline_s: float = GRADE_S) -> dict[str, Any]:
        return super().grade(worker, _now.other if "another" in _strikes("grading") else task_id, deadline_s)


class Struck(AppWorld):
    """An AppWorld whose world fails as its task says: "fault", with "other", another task's id."""

    def reset(self, task: Mapping[str, Any]) -> Any:
        self._fault, self._steps = task["fault"], 0
        _now.fault, _now.other = self._fault, task["other"]
        return super().reset(task)

    def step(self, action: Any) -> StepResult:
        self._steps += 1
        _now.fault = None if self._fault and self._fault[0] == "step" and self._steps != 2 else self._fault
        return super().step(action)


class Stage:
    """What the three runs have in common."""

    def __init__(self, arguments: argparse.Namespace):
        self.options = {"root": arguments.root, "python": arguments.python, "cell_timeout_s": 8.0, "memory_mib": 256}
        self.known = [task for split in SPLITS for task in AppWorld.tasks(split, arguments.data_dir, **self.options)]
        self.chat = ChatFormat(load_tokenizer(POLICY), history="keep", call_style="code")
        self.rng, self.slots, self.root = random.Random(arguments.seed), arguments.slots, arguments.root
        for each in env._workers.values():  # that `tasks` has started
            each.stop()
        workers.Worker = StruckWorker
        env.Workers = StruckWorkers
        env._workers.clear()
        workers.RESET_SECONDS, env.GRACE_S = RESET_S, GRACE_S
        self.workers = env.shared_workers(env.Options.parse(self.options))

    def tasks(self, count: int) -> list[dict[str, Any]]:
        """So many, drawn, without a fault."""
        drawn = [self.rng.sample(self.known, 2) for _ in range(count)]
        return [{**task, "fault": None, "other": other["id"]} for task, other in drawn]

    def faults(self, kinds: Sequence[Any], count: int, share: float) -> list[Any]:
        """For each episode its kind of fault, or None. Each kind is as frequent as every other."""
        number = round(share * count)
        faults = [kinds[n % len(kinds)] for n in range(number)] + [None] * (count - number)
        self.rng.shuffle(faults)
        return faults

    def play(self, tasks: Sequence[Mapping[str, Any]], code: list[str], tick: Callable[[], object]) -> Rollouts:
        """code: of the episodes, what an action does before the reference goes on; "" for nothing."""

        def texts(job: Any) -> list[str]:
            group = job.episode.group
            actions = list(script.ground_truth(tasks[group], self.root).actions)
            return [*actions[:1], *([render_code("A fault.", code[group])] if code[group] else []), *actions[1:]]

        engine: Any = ScriptedEngine(self.chat, texts, EngineConfig(self.slots, LONG, LONG))
        config = RolloutConfig(40, LONG, Sampling(0.0, 1.0, 0, LONG))
        host = ThreadHost(partial(Struck, **self.options))
        return run_episodes(
            engine,
            None,
            self.chat,
            host,
            tasks,
            1,
            config,
            seed=0,
            step=0,
            call_timeout_s=60.0,
            resets_ahead=AHEAD,
            over=lambda place, episode: tick(),
        )

    def left(self) -> tuple[int, int, int, int]:
        """(processes, sockets, entries of folders, files open here) of the engine that is running."""
        zygote, folder = self.workers._zygote, self.workers._folder
        if zygote is None or folder is None:
            return 0, 0, 0, len(os.listdir("/proc/self/fd"))
        sockets = sum(str(folder) in line for line in Path("/proc/net/unix").read_text().splitlines())
        entries = len(list(folder.glob("*.sock"))) + len(list((folder / "worker/experiments/outputs").iterdir()))
        return _in_session(zygote.pid), sockets, entries, len(os.listdir("/proc/self/fd"))


def _in_session(session: int) -> int:
    """Processes of a session that have not ended."""
    count = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it has ended
                continue
            count += int(of) == session and state != "Z"
    return count


def ends(played: Rollouts, count: int) -> list[str]:
    """How each episode ended."""
    ended = ["not begun"] * count
    for episode in played.episodes:
        ended[episode.group] = SUCCESS if episode.success else f"no success, {episode.ended}"
    return ended


def rows(named: Sequence[str], ended: Sequence[str], expected: Sequence[str]) -> tuple[list[list[str]], bool]:
    """The table's rows, and whether all ended as they should."""
    counted = Counter(zip(named, ended, expected, strict=True))
    lines = [
        [name, end, "yes" if end == should else f"no: {should}", str(n)] for (name, end, should), n in counted.items()
    ]
    return sorted(lines), all(end == should for end, should in zip(ended, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=".cache/appworld-root")
    parser.add_argument("--python", default=".cache/appworld-venv/bin/python")
    parser.add_argument("--data_dir", default="data", help="where task sets are kept")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stage, parts, good = Stage(arguments), [], True
    count, head = arguments.episodes, ("fault", "the episode", "as it should", "number")
    for title, table in (("The code of an action is at fault", CODE), ("The world is at fault", WORLD)):
        tasks, faults = stage.tasks(count), stage.faults(list(table), count, arguments.share)
        code = [""] * count
        for n, fault in enumerate(faults):
            if fault is not None and table is CODE:
                code[n] = CODE[fault][0]
            elif fault is not None:
                tasks[n]["fault"] = fault
        named = ["none" if fault is None else ": ".join([fault] if table is CODE else fault) for fault in faults]
        should = {None: SUCCESS} | ({name: end for name, (_, end) in CODE.items()} if table is CODE else WORLD)
        before, began = stage.left(), time.monotonic()
        played = stage.play(tasks, code, lambda: None)
        seconds, ended = time.monotonic() - began, ends(played, count)
        for failure, where in _lost(played):
            ended[where] = f"dropped: {failure}"
        lines, right = rows(named, ended, [should[fault] for fault in faults])
        time.sleep(2)
        after = stage.left()
        good &= right and before == after and played.begun == count
        calls = Counter(f"{failure.call.partition(' ')[0]}: {failure.reason}" for failure in played.failures)
        parts.append(
            f"## {title}\n\n{seconds:.0f} s. Begun {played.begun} = played {len(played.episodes)} + dropped"
            f" {dict(sorted(played.dropped.items()))}; calls that failed: {dict(sorted(calls.items()))}. Processes,"
            f" sockets, files and folders of worlds, open files: {before} before, {after} after.\n\n"
            f"{markdown_table(head, lines, left=(0, 1, 2))}"
        )
        print(parts[-1], flush=True)
    text, right = killed_in_the_midst(stage)
    good &= right
    page = (
        f"# AppWorld with faults\n\n{time.strftime('%Y-%m-%d')}, `python -m benchmarks.appworld_faults"
        f" --episodes {count} --share {arguments.share:g} --slots {arguments.slots} --seed {arguments.seed}`,"
        f" the invented world; {AHEAD} resets ahead.\n\n" + "\n\n".join([*parts, text]) + "\n"
    )
    (RESULTS / "appworld_faults.md").write_text(page)
    print(text)
    sys.exit(not good)


def _lost(played: Rollouts) -> list[tuple[str, int]]:
    """(reason, group) of the episodes that were dropped."""
    seen = {episode.group for episode in played.episodes}
    lost = [(episode.ended, episode.group) for episode in played.lost]
    never = [failure for failure in played.failures if failure.call == "reset"]
    groups = iter(sorted(set(range(played.begun)) - seen - {group for _, group in lost}))
    return lost + [(failure.reason, group) for failure, group in zip(never, groups, strict=True)]


def killed_in_the_midst(stage: Stage) -> tuple[str, bool]:
    """The process that all others are forked from is killed after a third of the episodes: those that have a world then
    are lost, the others are played with new ones.
    """
    count, over, first = 3 * stage.slots, [0], stage.workers._zygote
    assert first is not None

    def tick() -> None:
        over[0] += 1
        if over[0] == stage.slots:
            os.kill(first.pid, signal.SIGKILL)

    before = stage.left()
    played = stage.play(stage.tasks(count), [""] * count, tick)
    time.sleep(2)
    after, old = stage.left(), _in_session(first.pid)
    folder = stage.workers._folder
    stage.workers.stop()
    last = stage.left()
    right = played.begun == count and set(played.dropped) <= {"env_error"} and not old
    right &= 0 < len(played.lost) + played.failed <= 2 * (stage.slots + AHEAD)
    right &= all(episode.success for episode in played.episodes) and before == after
    right &= last[:3] == (0, 0, 0) and not (folder and folder.exists())
    return (
        "## The process that all others are forked from is killed\n\nIn the midst of"
        f" {count} episodes. Begun {played.begun} = played {len(played.episodes)}, of which"
        f" {sum(episode.success for episode in played.episodes)} succeed, + dropped {dict(played.dropped)}. Left:"
        f" {before} before, {after} after, of the old processes {old}; and when the engine is stopped: {last}."
    ), right


if __name__ == "__main__":
    hindsight_setup.guarded(main)
