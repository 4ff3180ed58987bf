"""AppWorld end to end on the real engine and the invented world: scripts go through tokens, code, engine, tests and
scores. `make appworld` makes both; without them these tests are skipped.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.injected_faults import ROLLOUT
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.appworld import AppWorld, env, script
from hintsd_jax.envs.appworld.prompt import render_code
from hintsd_jax.evaluate import Scores
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import run_episodes
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.replay import Continuation, continue_episodes
from hintsd_jax.rollout.scripted import ScriptedEngine

HERE = Path(__file__).parents[1]
PYTHON, ROOT = HERE / ".cache/appworld-venv/bin/python", HERE / ".cache/appworld-root"
pytestmark = pytest.mark.skipif(
    not (PYTHON.exists() and (ROOT / "data" / "version.txt").exists()), reason="needs `make appworld`"
)
OPTIONS = {"python": str(PYTHON), "root": str(ROOT), "cell_timeout_s": 1.0}
LOOP = "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass"
CALLS = "while True:\n    apis.supervisor.show_profile()"
NOTHING = ("I am done.", script.END)


def test_references_succeed_and_all_else_fails_or_is_lost_and_goal_completions_are_right(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "GRACE_S", 1.0)
    tasks = list(AppWorld.tasks("train", str(tmp_path), **OPTIONS))
    assert len(tasks) == 6 and len({task["scenario"] for task in tasks}) == 2
    right = {task["id"]: script.ground_truth(task, str(ROOT)).actions for task in tasks}
    faulty = script.with_fault(tasks[4], "dropped_step", 0, str(ROOT))
    plain_loop, caught_loop = (render_code("I wait.", code) for code in (CALLS, LOOP))
    second = {  # the second rollout of each task
        tasks[0]["id"]: NOTHING,
        tasks[3]["id"]: (caught_loop,),  # cannot be ended from within: its worker is killed
        tasks[4]["id"]: faulty.actions,
        tasks[5]["id"]: (plain_loop, *right[tasks[5]["id"]]),  # the engine ends it, and the agent goes on
    }
    chat = ChatFormat(load_tokenizer(str(HERE / "assets/desk-policy")), history="keep", call_style="code")
    engine = ScriptedEngine(
        chat, lambda job: (second if job.episode.rollout else {}).get(job.episode.task_id, right[job.episode.task_id])
    )
    host = ThreadHost(lambda: AppWorld(**OPTIONS))
    played = run_episodes(engine, None, chat, host, tasks, 2, ROLLOUT, seed=0, step=0, call_timeout_s=60.0)
    assert played.dropped == {"env_timeout": 1} and len(played.episodes) == 11 and played.begun == 12
    (failure,) = played.failures
    assert (failure.task_id, failure.rollout, failure.call) == (tasks[3]["id"], 1, "step 1")
    success_NK = np.full((6, 2), np.nan)
    for episode in played.episodes:
        assert episode.report is not None and episode.terminated
        success_NK[episode.group, episode.rollout] = episode.success
        assert (episode.reward == 1) == episode.success == ("- failed" not in episode.report.summary)
    assert np.array_equal(success_NK, [[1, 0], [1, 1], [1, 1], [1, np.nan], [1, 0], [1, 1]], equal_nan=True)
    ended = next(episode for episode in played.episodes if episode.group == 0 and episode.rollout)
    assert [step.problem for step in ended.steps] == ["no_code", ""] and ended.reward < 1
    scenarios = tuple(task["scenario"] for task in tasks)
    metrics = Scores(success_NK, 0, {}, scenarios=scenarios).metrics("train")
    assert metrics["train/avg@2"] == np.mean([0.5, 1, 1, 1, 0.5, 1])
    assert metrics["train/sgc@2"] == np.mean([0.5, 1])  # the second rollout of the second scenario was not played
    (workers,) = [each for key, each in env._workers.items() if key[1] == str(ROOT)]
    folder, zygote = workers._folder, workers._zygote
    group = zygote.pid
    workers.stop()
    assert not os.path.exists(folder) and zygote.poll() is not None
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _alive_in(pid, group)]


def test_a_failed_episode_is_replayed_to_the_letter_and_goes_on_with_feedback(tmp_path):
    """What `benchmarks.placement` does, on the real engine: the same outputs come again, access tokens among them."""
    task = AppWorld.tasks("train", str(tmp_path), **OPTIONS)[0]
    right = script.ground_truth(task, str(ROOT))
    faulty = script.with_fault(task, "wrong_answer", 0, str(ROOT))
    assert faulty is not None
    chat = ChatFormat(load_tokenizer(str(HERE / "assets/desk-policy")), history="keep", call_style="code")

    def policy(job):
        while True:
            number = len(job.episode.steps) + 1
            told = job.episode.dialogue(number)[-1]["content"] == "Take care."
            yield from right.actions[number - 1 :] if told else faulty.actions[number - 1 : number]

    host, engine = ThreadHost(lambda: AppWorld(**OPTIONS)), ScriptedEngine(chat, policy)
    (failed,) = run_episodes(engine, None, chat, host, [task], 1, ROLLOUT, seed=0, step=0, call_timeout_s=60.0).episodes
    assert not failed.success and faulty.step > 1
    plans = [
        Continuation(task, failed, step, np.zeros(2, np.uint32), message, position, index)
        for index, (step, message, position) in enumerate(
            [(faulty.step, "", "target"), (faulty.step, "Take care.", "target"), (1, "Take care.", "start")]
        )
    ]
    episodes, dropped, _ = continue_episodes(engine, None, chat, host, plans, ROLLOUT, call_timeout_s=60.0)
    assert not dropped and [episode.success for episode in episodes] == [False, True, True]


def _alive_in(pid: str, session: int) -> str:
    """The line of a process of that session, dead ones that nobody has collected aside; "" else."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, _, _, of_session = line.rpartition(")")[2].split()[:4]
    return line if int(of_session) == session and state != "Z" else ""
