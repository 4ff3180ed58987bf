"""The scripted policy: a job cannot tell it from the engine, and an episode through it is the same actions stepped by
hand.
"""

import importlib.util

import jax
import pytest

from hintsd_jax.algorithms.hint_sd import HintSD
from hintsd_jax.config import base
from hintsd_jax.config.build import build
from hintsd_jax.envs.base import Report, Start, StepResult
from hintsd_jax.envs.bfcl import Bfcl
from hintsd_jax.envs.bfcl.script import ground_truth, with_fault
from hintsd_jax.envs.bfcl.tasks import bfcl_tasks
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import held_out
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import Engine, EngineConfig, Sampling
from hintsd_jax.session import Session
from tests.helpers import FORGETTING_TEMPLATE, QWEN3_THINKING_TEMPLATE, make_tokenizer

CHAT = ChatFormat(make_tokenizer())
WIDE = RolloutConfig(max_steps=200, context=1 << 20, sampling=Sampling(1.0, 1.0, 0, 1 << 20))


class Echo:
    """Answers with the length of the action; ends after `turns` answers."""

    def reset(self, task):
        self.left = task["turns"]
        return Start(messages=({"role": "user", "content": f"say {task['id']}"},))

    def step(self, action):
        self.left -= 1
        if self.left < 0:
            return StepResult(messages=(), reward=1.0, terminated=True)
        return StepResult(messages=({"role": "tool", "content": f"ok {len(action.text)}"},))

    def report(self):
        return Report("done", faults=())

    def close(self):
        pass


def play(engine, params, chat, tasks, config, make_env=Echo, rollouts=1):
    host = ThreadHost(make_env)
    return run_episodes(engine, params, chat, host, tasks, rollouts, config, seed=1, step=0, call_timeout_s=20.0)


class Replay(ChatFormat):
    """Takes an action's ids where a script has a text."""

    def encode(self, text):
        return text


@pytest.mark.parametrize("template, history", [(None, "keep"), (FORGETTING_TEMPLATE, "template")])
def test_a_job_cannot_tell_it_from_the_engine(template, history):
    tokenizer = make_tokenizer(*([template] if template else []))
    stops = tuple(range(0, 400, 4))  # a random policy hardly ever samples the one stop token
    chat = Replay(tokenizer, history=history, stop_ids=stops)
    policy = PolicyConfig(
        vocab_size=chat.vocab_size, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
        rope_theta=500.0, norm_eps=1e-6, tie_embeddings=True, max_positions=512, remat=False,
    )  # fmt: skip
    limits = EngineConfig(slots=4, context=110, max_tokens=8, prefill_buckets=(16, 64), prefill_rows=4)
    config = RolloutConfig(max_steps=12, context=104, sampling=Sampling(1.0, 1.0, 0, 8))
    tasks = [{"id": f"t{n}", "turns": n} for n in (0, 1, 3, 20)]
    engine = Engine(policy, limits, chat.stop_ids)
    params = decoder.init_params(policy, jax.random.key(0))
    episodes, _, stats, *_ = play(engine, params, chat, tasks, config, rollouts=4)
    assert {"terminated", "context"} <= {episode.ended for episode in episodes}
    assert any(step.cut for episode in episodes for step in episode.steps[:-1])
    spans = {
        (e.task_id, e.rollout): [tuple(e.streams[step.stream].tokens[step.start : step.stop]) for step in e.steps]
        for e in episodes
    }

    def script(job):
        for ids in spans[job.episode.task_id, job.episode.rollout]:
            # what the engine cut would have gone on
            yield ids if ids[-1] in chat.stop_ids else ids + (1,) * 50

    again, _, scripted, *_ = play(ScriptedEngine(chat, script, limits), None, chat, tasks, config, rollouts=4)
    for one, other in zip(again, episodes, strict=True):
        record, wanted = one.to_json(), other.to_json()
        assert record.pop("logprobs") == [0.0] * len(wanted.pop("logprobs"))
        assert record == wanted
    assert scripted.sampled_tokens == stats.sampled_tokens


@pytest.mark.parametrize("template", [None, QWEN3_THINKING_TEMPLATE])
def test_texts_come_back_from_their_ids(template):
    chat = ChatFormat(make_tokenizer(*([template] if template else [])), history="keep")
    opening = chat.decode(())
    assert bool(opening) == bool(template)
    for text in ("Done.", "<tool_call>\n{}\n</tool_call>", "naïve ☃\n\n", ""):
        ids = chat.encode(opening + text)
        assert chat.decode(ids) == opening + text and ids[-1] == chat.stop_ids[0] and chat.stop_ids[0] not in ids[:-1]
    assert chat.encode(f"{opening}a<|im_end|>b") == chat.encode(f"{opening}a")


def test_what_cannot_be_played():
    tasks = [{"id": "t", "turns": 3}]
    with pytest.raises(ValueError, match="a script ended before its job"):
        play(ScriptedEngine(CHAT, lambda job: ["one", "two"]), None, CHAT, tasks, WIDE)
    with pytest.raises(UserError, match="leaves no room in one of 8"):
        small = EngineConfig(slots=1, context=8, max_tokens=4)
        play(ScriptedEngine(CHAT, lambda job: ["one"], small), None, CHAT, tasks, WIDE)


needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="the benchmark's wheel is not installed: run `make bfcl`"
)


@needs_wheel
def test_an_episode_is_the_same_actions_stepped_by_hand(tmp_path):
    tasks = bfcl_tasks("eval", str(tmp_path), categories=("multi_turn_base", "multi_turn_long_context"))[:8]
    scripts = {task["id"]: ground_truth(task).actions for task in tasks}
    engine = ScriptedEngine(CHAT, lambda job: scripts[job.episode.task_id])
    episodes, dropped, stats, *_ = play(engine, None, CHAT, tasks, WIDE, Bfcl)
    assert not dropped and stats.sampled_tokens == sum(len(episode.logprobs) for episode in episodes)
    for task, episode in zip(tasks, episodes, strict=True):
        environment = Bfcl()
        assert environment.reset(task) == Start(episode.prompt_messages, episode.tools)
        texts = scripts[task["id"]]
        assert [step.text for step in episode.steps] == list(texts)
        for step in episode.steps:
            turn = environment.step(parse_action(step.text))
            assert (step.messages, step.reward) == (turn.messages, turn.reward)
        assert turn.terminated and episode.success and episode.ended == "terminated"
        assert episode.report == environment.report() and episode.report.faults == ()


@needs_wheel
def test_a_session_plays_scores_and_looks_back_on_it(tmp_path):
    options = base()
    options.policy.path, options.env.name, options.env.data_dir = "no policy", "bfcl", str(tmp_path)
    options.env.options = {"split": "clean", "categories": ("multi_turn_base", "multi_turn_long_context")}
    options.rollout.context, options.rollout.max_steps = WIDE.context, WIDE.max_steps
    options.rollout.max_action_tokens = 4096
    options.batch.length_buckets = options.batch.branch_buckets = options.batch.action_buckets = ()  # derived
    options.eval.rollouts, options.eval.greedy, options.hindsight.analyser = 2, True, "environment"
    config = build(options)

    def script(job):
        """The first rollout is right, the second gives up."""
        task = tasks[job.episode.task_id]
        return (with_fault(task, "early_stop", 0) if job.episode.rollout else ground_truth(task)).actions

    algorithm = HintSD(config)
    session = Session(config, algorithm, None, None, None, None, CHAT, ScriptedEngine(CHAT, script), Bfcl)
    tasks = {task["id"]: task for task in session.tasks("eval")}
    result = held_out(session, None, "eval", 8)
    assert result.success == [[1, 0]] * 8 and result.greedy == [1] * 8 and result.benchmark == "bfcl-eval 2026.3.23"
    for part, count in {"eval": 8, "eval/multi_turn_base": 4, "eval/multi_turn_long_context": 4}.items():
        metrics = {
            name: result.metrics[f"{part}/{name}"]
            for name in ("avg@2", "best@2", "greedy", "tasks", "avg_low", "best_high")
        }
        # of tasks that are all the same: 0 in `count` differ, so that fewer than 1 - 0.025^(1 / count) do
        low = pytest.approx(0.5 * 0.025 ** (1 / count))
        assert metrics == {"avg@2": 0.5, "best@2": 1.0, "greedy": 1.0, "tasks": count, "avg_low": low, "best_high": 1.0}
    chosen = session.tasks("eval")[:4]
    episodes, dropped, *_ = session.play({}, chosen, 2, step=0)
    assert not dropped and [episode.success for episode in episodes] == [True, False] * 4
    hindsight = algorithm.analyse(episodes, session.analyser({}, step=0))
    named = [[target.step for target in analysis.targets] for analysis in hindsight.analyses]
    assert named == [[with_fault(task, "early_stop", 0).step] for task in chosen]
