"""Replays: with the record's own key and no message the record comes out again; a message stands where the template
would write it; an environment that answers otherwise is noticed."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.base import Report, Start, StepResult
from hintsd_jax.envs.desk import Desk, script
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.replay import Continuation, continue_episodes, replayed_prefix
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import Engine, EngineConfig, Sampling
from tests.helpers import FORGETTING_TEMPLATE, make_tokenizer

CHAT = ChatFormat(load_tokenizer(str(Path(__file__).parents[1] / "assets" / "desk-policy")))
CONFIG = RolloutConfig(max_steps=6, context=230, sampling=Sampling(1.0, 1.0, 0, 6))
WIDE = RolloutConfig(max_steps=200, context=1 << 20, sampling=Sampling(1.0, 1.0, 0, 1 << 20))
TASKS = [generate_task(1, n) for n in range(4)]
KEY = np.zeros(2, np.uint32)
STOPS = (*CHAT.stop_ids, *range(0, CHAT.vocab_size, 4))  # a random policy hardly ever samples the one stop token


def record(engine, params=None, config=WIDE, chat=CHAT, make_env=Desk, tasks=TASKS, rollouts=2):
    host = ThreadHost(make_env)
    return run_episodes(engine, params, chat, host, tasks, rollouts, config, seed=1, step=0, call_timeout_s=20.0)[0]


def again(engine, plans, params=None, config=WIDE, chat=CHAT, make_env=Desk):
    return continue_episodes(engine, params, chat, ThreadHost(make_env), plans, config, call_timeout_s=20.0)


def task_of(episode):
    return next(task for task in TASKS if task["id"] == episode.task_id)


def test_with_its_own_key_and_no_message_the_record_comes_out_again():
    """Through the real engine: ids, log-probs of what is sampled anew, texts and outcome."""
    policy = PolicyConfig(
        vocab_size=CHAT.vocab_size, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
        rope_theta=500.0, norm_eps=1e-6, tie_embeddings=True, max_positions=512, remat=False,
    )  # fmt: skip
    params = decoder.init_params(policy, jax.random.key(0))
    engine = Engine(
        policy, EngineConfig(slots=4, context=230, max_tokens=6, prefill_buckets=(64, 230), prefill_rows=4), STOPS
    )
    chat = ChatFormat(load_tokenizer(str(Path(__file__).parents[1] / "assets" / "desk-policy")), stop_ids=STOPS)
    recorded = record(engine, params, CONFIG, chat)
    assert max(len(episode.steps) for episode in recorded) > 2
    plans = [
        Continuation(
            task_of(episode), episode, step, job_key(1, 0, episode.task_id, episode.rollout), index=episode.rollout
        )
        for episode in recorded
        for step in (1, len(episode.steps))
    ]
    episodes, dropped, stats = again(engine, plans, params, CONFIG, chat)
    assert not dropped and len(episodes) == len(plans)
    for plan, episode in zip(plans, episodes, strict=True):
        assert episode.to_json()["streams"] == plan.recorded.to_json()["streams"]
        assert [step.text for step in episode.steps] == [step.text for step in plan.recorded.steps]
        np.testing.assert_allclose(episode.logprobs, plan.recorded.logprobs, atol=1e-5)
        assert (episode.ended, episode.reward, episode.report) == (
            plan.recorded.ended,
            plan.recorded.reward,
            plan.recorded.report,
        )
    assert stats.sampled_tokens == sum(
        len(e.tokens[s.start : s.stop]) for p, e in zip(plans, episodes) for s in e.steps[p.step - 1 :]
    )
    other, _, _ = again(
        engine, [Continuation(TASKS[0], recorded[0], 1, job_key(9, 0, "other", 0))], params, CONFIG, chat
    )
    assert other[0].tokens != recorded[0].tokens


@pytest.mark.parametrize("position", ["target", "start"])
def test_a_message_stands_where_the_template_writes_it_and_the_outcome_is_repaired(position):
    """A script as the policy: the first fault of a forgetful office, and what it does after a message."""
    faulty = {task["id"]: script.with_fault(task, "dropped_call", 0) for task in TASKS}
    recorded = record(ScriptedEngine(CHAT, lambda job: faulty[job.episode.task_id].actions), rollouts=1)
    assert not any(episode.success for episode in recorded)
    plans = [
        Continuation(
            task_of(episode),
            episode,
            faulty[episode.task_id].step,
            np.zeros(2, np.uint32),
            "Do not forget.",
            position,
            3,
        )
        for episode in recorded
    ]
    right = {task["id"]: script.ground_truth(task).actions for task in TASKS}
    engine = ScriptedEngine(CHAT, lambda job: right[job.episode.task_id][len(job.episode.steps) :])
    episodes, dropped, _ = again(engine, plans)
    assert not dropped
    for plan, episode in zip(plans, episodes, strict=True):
        assert episode.success and episode.rollout == 3 and episode.report.faults == ()
        message = {"role": "user", "content": "Do not forget."}
        dialogue, before = episode.dialogue(plan.step), plan.recorded.dialogue(plan.step)
        at = len(before) if position == "target" else len(plan.recorded.prompt_messages)
        assert dialogue == [*before[:at], message, *before[at:]]
        # the template's own rendering of that dialogue is what stands in the stream, and what was recorded is in it
        # untouched
        truth = CHAT.prompt(dialogue, episode.tools).ids
        assert tuple(episode.tokens[: episode.steps[plan.step - 1].start]) == truth
        for old, new in zip(plan.recorded.steps[: plan.step - 1], episode.steps, strict=False):
            assert (
                episode.tokens[new.start : new.stop] == plan.recorded.tokens[old.start : old.stop]
                and new.text == old.text
            )
        assert episode.action_mask()[: len(truth)].sum() == sum(
            s.stop - s.start for s in plan.recorded.steps[: plan.step - 1]
        )
        assert [step.text for step in episode.steps] == list(right[episode.task_id])


class Moody(Desk):
    """Answers as its mood of the day is."""

    mood = "good"

    def reset(self, task):
        start = super().reset(task)
        return (
            start
            if self.mood != "rude"
            else Start((start.messages[0], {"role": "user", "content": "You again?"}), start.tools)
        )

    def step(self, action):
        turn = super().step(action)
        if self.mood == "broken" and self._steps == 2:
            raise RuntimeError("no more")
        if self.mood == "sloppy" and self._steps == 2:
            return StepResult(({"role": "tool", "content": "Ok?"},))
        return StepResult(turn.messages, 0.5) if self.mood == "generous" and self._steps == 2 else turn

    def report(self):
        return Report("none")


DEPARTS = {"rude": "replay_differs", "sloppy": "replay_differs", "generous": "replay_differs", "broken": "env_error"}


@pytest.mark.parametrize("mood, reason", DEPARTS.items())
def test_a_replay_that_departs_from_its_record_is_dropped_and_counted(mood, reason):
    right = {task["id"]: script.ground_truth(task).actions for task in TASKS}
    engine = ScriptedEngine(CHAT, lambda job: right[job.episode.task_id][len(job.episode.steps) :])
    recorded = record(engine, make_env=Moody, rollouts=1)
    plans = [Continuation(task_of(episode), episode, step, KEY) for episode in recorded for step in (2, 5)]

    class Today(Moody):
        pass

    Today.mood = mood
    episodes, dropped, _ = again(engine, plans, make_env=Today)
    # those that continue from step 2: what follows that step is not compared any more
    early = [episode is None for episode in episodes[::2]]
    assert early == [mood == "rude"] * 4 and episodes[1::2] == [None] * 4
    assert dropped == Counter({reason: 8 if mood == "rude" else 4})


def test_what_cannot_be_continued():
    right = {task["id"]: script.ground_truth(task).actions for task in TASKS}
    engine = ScriptedEngine(CHAT, lambda job: right[job.episode.task_id][len(job.episode.steps) :])
    episode = record(engine, rollouts=1)[0]
    for step in (0, len(episode.steps) + 1):
        with pytest.raises(ValueError, match="they count from 1"):
            Continuation(TASKS[0], episode, step, KEY)
    with pytest.raises(ValueError, match="position"):
        Continuation(TASKS[0], episode, 1, KEY, "Hm.", "middle")
    plan = Continuation(TASKS[0], episode, 3, KEY, "Hm.")
    room = len(replayed_prefix(plan, CHAT).tokens)
    tight = RolloutConfig(200, room, WIDE.sampling)
    assert again(engine, [plan], config=tight)[:2] == ([None], Counter(prompt_too_long=1))
    assert again(engine, [])[:2] == ([], Counter())

    forgetting = ChatFormat(make_tokenizer(FORGETTING_TEMPLATE), history="template")
    thinking = ScriptedEngine(
        forgetting, lambda job: [f"<think>\nhm\n</think>\n\n{text}" for text in right[TASKS[0]["id"]]]
    )
    rewritten = record(thinking, chat=forgetting, tasks=TASKS[:1], rollouts=1)[0]
    assert len(rewritten.streams) > 1
    with pytest.raises(UserError, match="history = keep"):
        Continuation(TASKS[0], rewritten, 1, KEY)
