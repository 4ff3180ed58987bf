"""Whole episodes through engine, chat format and environments: what stands in the stream, and what a bad environment
costs.
"""

import collections
import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest

from hintsd_jax.envs.base import Report, Start, StepResult
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.random_keys import job_key
from hintsd_jax.records import rollout_metrics
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import Rollout, RolloutConfig, run_episodes, stream_key
from hintsd_jax.rollout.env_host import ThreadHost
from hintsd_jax.rollout.env_pool import EnvPool
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.runs.journal import Journal
from hintsd_jax.runs.metrics import compile_count
from hintsd_jax.sampling import Engine, EngineConfig, Sampling
from tests.examples_helpers import target_examples
from tests.helpers import (
    KEEPING_TEMPLATE,
    QWEN3_TEMPLATE,
    QWEN3_THINKING_TEMPLATE,
    make_llama_tokenizer,
    make_tokenizer,
)

CHAT = ChatFormat(make_tokenizer())
POLICY = PolicyConfig(
    vocab_size=CHAT.vocab_size, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16,
    rope_theta=500.0, norm_eps=1e-6, tie_embeddings=True, max_positions=512, remat=False,
)  # fmt: skip
CONFIG = RolloutConfig(max_steps=4, context=200, sampling=Sampling(1.0, 1.0, 0, 6))
TASKS = [{"id": f"t{n}", "turns": n} for n in range(4)]


class Echo:
    """Answers with the length of the action; ends after `turns` answers, right if the task says so."""

    def __init__(self, **options):
        pass

    @classmethod
    def tasks(cls, split, data_dir, **options):
        return TASKS

    def reset(self, task):
        self.left, self.right = task["turns"], task["turns"] % 2
        return Start(messages=({"role": "user", "content": f"say {task['id']}"},))

    def step(self, action):
        self.left -= 1
        if self.left < 0:
            return StepResult(messages=(), reward=float(self.right), terminated=True)
        return StepResult(messages=({"role": "tool", "content": f"ok {len(action.text)}"},))

    def report(self):
        return Report("done", faults=())

    def close(self):
        pass


# A random policy hardly ever samples the one stop token: here every fourth id ends an action too.
STOPS = (*CHAT.stop_ids, *range(0, CHAT.vocab_size, 4))


@pytest.fixture(scope="module")
def params():
    return decoder.init_params(POLICY, jax.random.key(0))


@pytest.fixture(scope="module")
def engine():
    return Engine(
        POLICY, EngineConfig(slots=6, context=200, max_tokens=6, prefill_buckets=(16, 64), prefill_rows=4), STOPS
    )


def play(engine, params, make_env=Echo, tasks=TASKS, rollouts=3, config=CONFIG, chat=CHAT, **options):
    options = {"seed": 1, "step": 0, "call_timeout_s": 20.0} | options
    return run_episodes(engine, params, chat, ThreadHost(make_env), tasks, rollouts, config, **options)


def test_the_stream_is_prompt_actions_and_deltas(engine, params):
    episodes, dropped, stats, *_ = play(engine, params)
    assert [(e.task_id, e.rollout) for e in episodes] == [(t["id"], r) for t in TASKS for r in range(3)]
    assert not dropped and stats.sampled_tokens == sum(int(e.action_mask().sum()) for e in episodes)
    ends = collections.Counter(e.ended for e in episodes)
    assert ends["terminated"] >= 3
    for episode in episodes:
        episode.verify()
        rebuilt = list(CHAT.prompt(episode.prompt_messages).ids)
        for number, step in enumerate(episode.steps):
            assert step.start == len(rebuilt)
            rebuilt += episode.tokens[step.start : step.stop]
            assert CHAT.decode(episode.tokens[step.start : step.stop]) == step.text
            if number + 1 < len(episode.steps):
                stop = CHAT.stop_ids[:1] if step.cut else ()  # the template's, where none was sampled
                rebuilt += [*stop, *CHAT.delta([{"role": "tool", "content": f"ok {len(step.text)}"}]).ids]
        assert episode.tokens == rebuilt or (
            episode.ended in ("max_steps",) and episode.tokens[: len(rebuilt)] == rebuilt
        )
        assert episode.success == (episode.ended == "terminated" and episode.reward >= 1)
        assert len(episode.steps) <= CONFIG.max_steps


def test_a_task_that_comes_twice_in_a_step_is_played_twice(engine, params):
    """Each time with keys of its own, and as it would be played at that occurrence whatever stands between."""
    names = lambda episodes: [(e.task_id, e.group, e.occurrence, e.rollout) for e in episodes]
    spread, *_ = play(engine, params, tasks=[TASKS[3], TASKS[1], TASKS[3]], rollouts=2)
    close, *_ = play(engine, params, tasks=[TASKS[3], TASKS[3]], rollouts=2)
    alone, *_ = play(engine, params, tasks=[TASKS[3]], rollouts=2)
    assert names(spread) == [(id, g, o, r) for id, g, o in (("t3", 0, 0), ("t1", 1, 0), ("t3", 2, 1)) for r in (0, 1)]
    content = lambda episodes: [(e.tokens, e.logprobs) for e in episodes]
    assert content(spread)[:2] == content(close)[:2] == content(alone) and content(spread)[4:] == content(close)[2:]
    assert len({tuple(tokens) for tokens, _ in content(close)}) == 4


def test_a_cut_action_goes_to_the_environment_and_the_episode_goes_on(engine, params):
    """The whole stream reads as one forward pass, also behind actions without a stop token."""
    episodes, *_ = play(engine, params, tasks=[{"id": "long", "turns": 99}], rollouts=12)
    cut = [(e, number) for e in episodes for number, step in enumerate(e.steps[:-1]) if step.cut]
    assert len(cut) > 3
    for episode, number in cut:
        step, following = episode.steps[number], episode.steps[number + 1]
        assert step.stop - step.start == CONFIG.sampling.max_tokens and not {
            *episode.tokens[step.start : step.stop]
        } & {*STOPS}
        # closed by the template's stop token, which was not sampled
        assert episode.tokens[step.stop] == CHAT.stop_ids[0] and step.stop < following.prompt_start
        assert step.observation == f"ok {len(step.text)}"
    tokens_BT = np.zeros((len(episodes), CONFIG.context), np.int32)
    for row, episode in enumerate(episodes):
        tokens_BT[row, : len(episode.tokens)] = episode.tokens
    hidden = decoder.forward(params, POLICY, tokens_BT)
    logprobs_BTV = np.asarray(jax.nn.log_softmax(decoder.project(params, POLICY, hidden), axis=-1))
    for row, episode in enumerate(episodes):
        places = np.flatnonzero(episode.action_mask())
        np.testing.assert_allclose(episode.logprobs, logprobs_BTV[row, places - 1, tokens_BT[row, places]], atol=2e-5)


def test_an_episode_depends_on_its_own_four_numbers_only(engine, params):
    whole, *_ = play(engine, params)
    alone, *_ = play(engine, params, tasks=[TASKS[2]], rollouts=2)
    again = {(e.task_id, e.rollout): e for e in whole}
    for episode in alone:
        twin = again[episode.task_id, episode.rollout]
        assert episode.tokens == twin.tokens and episode.logprobs == twin.logprobs
    other_step, *_ = play(engine, params, step=1)
    assert [e.tokens for e in other_step] != [e.tokens for e in whole]
    keys = {tuple(job_key(s, t, n, r)) for s in range(3) for t in range(3) for n in ("a", "b") for r in range(3)}
    assert len(keys) == 54


class Hostile(Echo):
    """Fails in a way that its task names."""

    def reset(self, task):
        self.mode = task["mode"]
        if self.mode == "reset":
            raise RuntimeError("no world today")
        return super().reset(task | {"turns": 2})

    def step(self, action):
        if self.mode == "step":
            raise SystemExit("bye")
        if self.mode == "hang":
            threading.Event().wait(30)
        return super().step(action)

    def report(self):
        if self.mode == "report":
            raise ValueError("nothing to tell")
        return super().report()


def test_what_an_environments_failure_took_is_no_episode(engine, params):
    """Invariant 8: it is counted, with its traceback, and neither scored nor trained on."""
    tasks = [{"id": mode, "mode": mode} for mode in ("reset", "step", "hang", "report", "fine")]
    greedy, over = RolloutConfig(4, 200, Sampling(1.0, 1.0, 0, 6)), {}
    tell = lambda place, episode: over.update({place: episode})
    played = play(engine, params, Hostile, tasks, 2, greedy, call_timeout_s=0.5, over=tell)
    told = [over[place] for place in range(10)]
    assert [id(episode) for episode in told if episode is not None] == [id(episode) for episode in played.episodes]
    assert [(e.task_id, e.ended) for e in played.episodes] == [
        (id, "terminated") for id in ("report", "fine") for _ in "12"
    ]
    assert (
        played.dropped == {"env_error": 4, "env_timeout": 2} and played.begun == 10 == len(over) and played.failed == 6
    )
    assert [(e.task_id, e.ended) for e in played.lost] == [("step", "env_error")] * 2 + [("hang", "env_timeout")] * 2
    assert all(e.report is None and "nothing to tell" in e.detail for e in played.episodes if e.task_id == "report")
    failures = [(f.task_id, f.call.partition(" ")[0], f.reason) for f in played.failures if f.rollout == 1]
    modes = (("reset", "reset"), ("step", "step"), ("hang", "step"), ("report", "report"))
    assert failures == [(id, call, "env_timeout" if id == "hang" else "env_error") for id, call in modes]
    assert all("ValueError: nothing to tell" in f.traceback for f in played.failures if f.call == "report")
    row = rollout_metrics(played)
    assert row["rollout/begun"] == row["rollout/episodes"] + sum(
        value for name, value in row.items() if name.startswith("rollout/dropped/")
    )
    assert row["rollout/dropped_share"] == 0.6 and row["rollout/failed_calls/report/env_error"] == 2


def test_no_more_environments_exist_than_slots(engine, params):
    """And the clock of a reset does not count its wait for a slot."""
    alive, most, lock = set(), [0], threading.Lock()

    class Counted(Echo):
        def reset(self, task):
            with lock:
                alive.add(self)
                most[0] = max(most[0], len(alive))
            time.sleep(0.02)
            return super().reset(task)

        def close(self):
            with lock:
                alive.discard(self)

    limited = play(engine, params, Counted, TASKS, 6, call_timeout_s=0.2)
    assert len(limited.episodes) == 24 and not limited.dropped and not alive
    assert most[0] == engine.config.slots == 6
    everywhere = play(engine, params, Echo, TASKS, 6)
    assert [e.tokens for e in limited.episodes] == [e.tokens for e in everywhere.episodes]


def test_a_prompt_beyond_the_context_is_counted(engine, params):
    played = play(engine, params, tasks=[TASKS[0]], config=RolloutConfig(4, 5, Sampling(1.0, 1.0, 0, 6)))
    assert played.episodes == [] and played.dropped == {"prompt_too_long": 3} and played.failed == 0
    assert played.too_long == {"t0": len(CHAT.prompt(({"role": "user", "content": "say t0"},)).ids)}


@pytest.mark.parametrize("where", ["reset", "step"])
def test_text_without_bound_is_not_tokenised(engine, params, where, monkeypatch):
    """It is cut to what the context may hold, and the agent is told; a prompt that cannot fit is not read at all."""
    longest, encode = [0], ChatFormat._encode
    monkeypatch.setattr(ChatFormat, "_encode", lambda self, text: longest.append(len(text)) or encode(self, text))

    class Flood(Echo):
        def reset(self, task):
            start = super().reset(task)
            return Start(messages=({"role": "user", "content": "say " * 10**6},)) if where == "reset" else start

        def step(self, action):
            messages = ({"role": "tool", "content": "one"}, {"role": "tool", "content": "x" * 10**7})
            return StepResult(messages=messages)

    played = play(engine, params, Flood, TASKS[:1], 2)
    assert max(longest) < 3 * CONFIG.context + 200
    if where == "reset":
        assert played.dropped == {"prompt_too_long": 2} and played.too_long["t0"] == 10**6
    else:
        first = played.episodes[0].steps[0].messages
        assert first[0]["content"] == "one" and first[1]["content"].endswith(
            " more characters do not fit into a context of 200 tokens]"
        )
        assert all(len(e.steps) > 1 for e in played.episodes)  # a flood is not the policy's: its episode goes on


def test_the_step_limit_and_the_context_end_an_episode(engine, params):
    endless = [{"id": "long", "turns": 99}]
    episodes, *_ = play(engine, params, tasks=endless, rollouts=6)
    assert {e.ended for e in episodes} == {"max_steps"}
    prompt = len(CHAT.prompt(({"role": "user", "content": "say long"},)).ids)
    short = RolloutConfig(50, prompt + 30, Sampling(1.0, 1.0, 0, 6))
    episodes, *_ = play(engine, params, tasks=endless, rollouts=6, config=short)
    assert {e.ended for e in episodes} == {"context"}
    assert all(len(e.tokens) <= short.context for e in episodes)


class Clockwork(Echo):
    """In the first run it hangs where its task says so; in the second it is fast everywhere."""

    first_run = True

    def reset(self, task):
        self.hangs, self.steps = task["hangs"] if Clockwork.first_run else "never", 0
        self.wait("reset")
        return super().reset(task | {"turns": 2})

    def step(self, action):
        self.steps += 1
        self.wait(f"step {self.steps}")
        return super().step(action)

    def report(self):
        self.wait("report")
        return super().report()

    def close(self):
        self.wait("close")

    def wait(self, call):
        if self.hangs == call:
            threading.Event().wait(3)


def test_a_step_done_again_after_a_kill_has_the_same_time_outs(engine, params, tmp_path, monkeypatch):
    tasks = [{"id": call, "hangs": call} for call in ("reset", "step 1", "step 2", "report", "close", "never")]
    config = RolloutConfig(4, 200, Sampling(1.0, 1.0, 0, 6))

    def run(limit):
        journal = Journal(tmp_path / "journal" / "step_000001.jsonl")
        played = play(
            engine, params, Clockwork, tasks, 2, config, call_timeout_s=limit, journal=journal, phase="sampled"
        )
        records = [episode.to_json() for episode in (*played.episodes, *played.lost)]
        return records, played.dropped, played.stats, played.failures

    first = run(0.3)
    journal = (tmp_path / "journal" / "step_000001.jsonl").read_text()
    ended = collections.Counter(episode["ended"] for episode in first[0])
    assert ended["env_timeout"] >= 2 and first[1]["env_timeout"] == 2 + ended["env_timeout"]
    assert [f.reason for f in first[3] if f.call == "close"] == ["env_timeout"] * 2
    assert {json.loads(line)["key"][-1] for line in journal.splitlines()} == {
        "reset",
        "step 1",
        "step 2",
        "report",
        "close",
    }
    monkeypatch.setattr(Clockwork, "first_run", False)
    assert run(30.0) == first
    assert (tmp_path / "journal" / "step_000001.jsonl").read_text() == journal


# -- history = template

# Of what the agent said before, some letters are forgotten.
_FORGOTTEN = "".join(f" | replace('{letter}', '')" for letter in "onrtic")
ABSENT_MINDED = KEEPING_TEMPLATE.replace("turn('assistant', m.content)", f"turn('assistant', m.content{_FORGOTTEN})")
UNTIED = dataclasses.replace(POLICY, tie_embeddings=False)
LONG = [{"id": f"t{n}", "turns": 99} for n in range(3)]


@pytest.fixture(scope="module")
def closing():
    """(engine, weights): about every fourth token is the template's own stop token, no other control token is ever
    sampled. All tokens share the first component of the residual stream, and the output layer reads it."""
    params = decoder.init_params(UNTIED, jax.random.key(0))
    control = np.array([i for i, t in make_tokenizer().added_tokens_decoder.items() if t.special])
    head = params["lm_head"]["kernel"].at[0].set(0.0).at[0, control].set(-9.0).at[0, CHAT.stop_ids[0]].set(1.4)
    params = params | {
        "embed": {"embedding": params["embed"]["embedding"].at[:, 0].set(10.0)},
        "lm_head": {"kernel": head},
    }
    shape = EngineConfig(slots=6, context=400, max_tokens=6, prefill_buckets=(16, 64), prefill_rows=4)
    return Engine(UNTIED, shape, CHAT.stop_ids), params


def play_closing(closing, template, history, **options):
    chat = ChatFormat(make_tokenizer(template), history=history, enable_thinking=False)
    config = RolloutConfig(max_steps=5, context=400, sampling=Sampling(1.0, 1.0, 0, 6))
    return chat, *play(*closing, **({"tasks": LONG, "config": config, "chat": chat} | options))


def answers_of(step):
    return [{"role": "tool", "content": f"ok {len(step.text)}"}]


def rendering(template, episode, number, more=()):
    """What the template writes before step `number`, from the texts and from how `Echo` answers."""
    messages = [{"role": "user", "content": f"say {episode.task_id}"}]
    for step in episode.steps[: number - 1]:
        messages += [{"role": "assistant", "content": step.text}, *answers_of(step)]
    return make_tokenizer(template).apply_chat_template(
        [*messages, *more], add_generation_prompt=True, tokenize=False, enable_thinking=False
    )


def test_a_template_that_keeps_everything_gives_the_same_under_both(closing):
    _, kept, *others = play_closing(closing, KEEPING_TEMPLATE, "keep")
    chat, followed, *same = play_closing(closing, KEEPING_TEMPLATE, "template")
    assert [e.to_json() for e in followed] == [e.to_json() for e in kept] and same == others
    assert sum(len(e.steps) for e in kept) > 20 and all(len(e.streams) == 1 for e in followed)
    for one, other in zip(kept, followed, strict=True):
        targets = [Target(number, "No.") for number in range(1, len(one.steps) + 1)]
        assert target_examples(one, targets, CHAT) == target_examples(other, targets, chat)


@pytest.mark.parametrize("template", [ABSENT_MINDED, QWEN3_TEMPLATE], ids=["absent-minded", "qwen3 not thinking"])
def test_with_template_every_step_is_sampled_after_the_templates_own_text(closing, template):
    tokenizer = make_tokenizer(template)
    closing[0].compile(closing[1])
    job_key(0, 0, "", 0)
    compiled = compile_count()
    _, episodes, dropped, stats, *_ = play_closing(closing, template, "template")
    assert compile_count() == compiled  # not even for the keys of further streams
    rewritten, context = 0, 0
    for episode in episodes:
        episode.verify()
        for number, step in enumerate(episode.steps, 1):
            read = episode.streams[step.stream].tokens[: step.start]
            truth = rendering(template, episode, number)
            assert tokenizer.decode(read) == truth
            if number == 1 or step.stream > episode.steps[number - 2].stream:
                assert read == tokenizer.encode(truth)
                rewritten += number > 1
            context += len(read)
    steps = sum(len(e.steps) for e in episodes)
    # not thinking, every answer rewrites (the empty thinking goes); the absent-minded one rewrites only some
    assert (
        rewritten == steps - len(episodes) if template is QWEN3_TEMPLATE else 5 < rewritten < steps - len(episodes) - 5
    )
    # what contexts begin with in common is not prefilled again
    assert not dropped and stats.prefill_tokens + stats.copied_tokens < 0.6 * context

    _, kept, *_ = play_closing(closing, template, "keep")
    for one, other in zip(kept, episodes, strict=True):
        # the same key until something is rewritten
        assert len(one.streams) == 1 and one.steps[0].text == other.steps[0].text
    assert [e.steps[1:] for e in kept] != [e.steps[1:] for e in episodes]


def test_a_followed_episode_depends_on_its_own_four_numbers_only(closing):
    _, whole, *_ = play_closing(closing, ABSENT_MINDED, "template")
    _, alone, *_ = play_closing(closing, ABSENT_MINDED, "template", tasks=LONG[1:2], rollouts=2)
    again = {(e.task_id, e.rollout): e.to_json() | {"group": 0} for e in whole}
    assert [e.to_json() for e in alone] == [again["t1", 0], again["t1", 1]]
    key = job_key(0, 0, "a", 0)
    keys = [stream_key(key, n) for n in range(100)]
    assert (keys[0] == key).all() and len({tuple(other) for other in keys}) == 100
    assert {(other.dtype, other.shape) for other in keys} == {(key.dtype, key.shape)}


def test_examples_of_a_followed_episode_are_the_templates_own_text(closing):
    """Both contexts of every target against renderings that are made without the chat format."""
    tokenizer = make_tokenizer(ABSENT_MINDED)
    chat, episodes, *_ = play_closing(closing, ABSENT_MINDED, "template")
    shared = 0
    for episode in episodes:
        targets = [Target(number, f"Not {number}.") for number in range(1, len(episode.steps) + 1)]
        examples = target_examples(episode, targets, chat)
        assert len(examples) == len(episode.streams) == len({step.stream for step in episode.steps})
        branches = [(example, branch) for example in examples for branch in example.branches]
        assert [branch.step for _, branch in branches] == list(range(1, len(episode.steps) + 1))
        for example, branch in branches:
            step = episode.steps[branch.step - 1]
            assert example.tokens[branch.start : branch.stop] == tuple(
                episode.streams[step.stream].tokens[step.start : step.stop]
            )
            student, teacher = example.tokens[: branch.start], example.tokens[: branch.prefix_length] + branch.context
            assert tokenizer.decode(student) == rendering(ABSENT_MINDED, episode, branch.step)
            feedback = {"role": "user", "content": f"Not {branch.step}."}
            assert tokenizer.decode(teacher) == rendering(ABSENT_MINDED, episode, branch.step, [feedback])
            assert (
                "Not" not in tokenizer.decode(student)
                and student[-3:] == teacher[-3:] == chat.prompt([feedback]).ids[-3:]
            )
            shared += branch.prefix_length == step.prompt_start
    assert shared == sum(len(e.steps) for e in episodes)  # feedback is at the end: here it rewrites nothing


def test_a_stream_beyond_the_context_ends_the_episode(closing):
    prompt = len(CHAT.prompt(({"role": "user", "content": "say t0"},)).ids)
    short = RolloutConfig(50, prompt + 40, Sampling(1.0, 1.0, 0, 6))
    for history in ("keep", "template"):
        _, episodes, *_ = play_closing(closing, ABSENT_MINDED, history, config=short)
        assert {e.ended for e in episodes} == {"context"}
        assert all(len(stream.tokens) <= short.context for e in episodes for stream in e.streams)


class Caller(Echo):
    """Tells which calls it heard."""

    def step(self, action):
        return StepResult(({"role": "tool", "content": f"{action.problem} {[call.name for call in action.calls]}"},))


def test_actions_are_read_in_the_style_of_the_template():
    """A job of a Llama policy without a policy: what the environment hears of a bare call."""
    tokenizer = make_llama_tokenizer()
    chat = ChatFormat(tokenizer)
    with EnvPool(ThreadHost(Caller), 1, 20.0) as pool:
        start = pool.reset(0, {"id": "a", "turns": 1}).result()
        episode = Episode.begin("a", 0, start.messages, chat.prompt(start.messages))
        job = Rollout(episode, 0, pool, chat, CONFIG, job_key(0, 0, "a", 0))
        ids = [*tokenizer.encode('{"name": "cat", "parameters": {}}', add_special_tokens=False), chat.stop_ids[0]]
        job.submit(ids, [0.0] * len(ids), True)
        answered = tokenizer.decode(job.collect())
    assert "None ['cat']" in answered


@pytest.mark.parametrize("history", ["keep", "template"])
def test_an_action_that_was_cut_within_its_thinking(history):
    """Told as what it is, closed by the template's stop token; at the step limit it ends the episode like any other."""
    tokenizer = make_tokenizer(QWEN3_THINKING_TEMPLATE)
    chat = ChatFormat(tokenizer, history=history)
    for max_steps, text in (
        (4, "hm, I"),
        (4, "hm\n</think>\n\n<tool_call>\n{"),
        (4, "hm\n</think>\n\nWell"),
        (1, "hm"),
    ):
        with EnvPool(ThreadHost(Caller), 1, 20.0) as pool:
            start = pool.reset(0, {"id": "a", "turns": 1}).result()
            episode = Episode.begin("a", 0, start.messages, chat.prompt(start.messages))
            config = dataclasses.replace(CONFIG, max_steps=max_steps)
            job = Rollout(episode, 0, pool, chat, config, job_key(0, 0, "a", 0))
            ids = tokenizer.encode(text, add_special_tokens=False)
            job.submit(ids, [0.0] * len(ids), False)
            answer = job.collect()
        (step,) = episode.steps
        problem = "Well" not in text
        assert (step.cut, step.problem, step.calls) == (True, "cut" if problem else "", 0)
        assert step.observation.startswith(f"the action was cut at {len(ids)} tokens: " if problem else "None []")
        if max_steps == 1:
            assert (answer, episode.ended) == (None, "max_steps")
            continue
        read = tokenizer.decode(episode.tokens)
        closed = f"assistant\n<think>\n{text}<|im_end|>\n<|im_start|>user\n<tool_response>\n{step.observation}"
        if history == "keep":
            assert episode.tokens[step.stop] == chat.stop_ids[0] and closed in read and not episode.ended
        else:
            truth = [*episode.prompt_messages, {"role": "assistant", "content": step.text}, *step.messages]
            assert read == tokenizer.apply_chat_template(truth, add_generation_prompt=True, tokenize=False)
        episode.verify()


class Growing(Echo):
    """Its second answer brings a tool."""

    tool = {
        "type": "function",
        "function": {"name": "cat", "description": "Reads.", "parameters": {"type": "object", "properties": {}}},
    }

    def step(self, action):
        turn = super().step(action)
        return dataclasses.replace(turn, tools=(self.tool,)) if self.left == 97 else turn


@pytest.mark.parametrize("history", ["keep", "template"])
def test_a_tool_that_comes_later_is_read_from_then_on(closing, history):
    """By the student in its stream, by the teacher in its context; with "template" as if it had been in the list all
    along.
    """
    tokenizer = make_tokenizer()
    chat, episodes, *_ = play_closing(closing, KEEPING_TEMPLATE, history, make_env=Growing)
    longer = [episode for episode in episodes if len(episode.steps) > 3]
    assert len(longer) > 3
    for episode in longer:
        listed = (Growing.tool,) if history == "template" else ()
        assert [episode.tools_at(number) for number in (1, 2, 3, 4)] == [(), (), listed, listed]
        assert len(episode.streams) == (2 if history == "template" else 1) and [
            step.stream for step in episode.steps[:3]
        ] == [0, 0, len(listed)]
        for number in (2, 3, 4):
            step, texts = episode.steps[number - 1], [{"role": "user", "content": f"say {episode.task_id}"}]
            for n, before in enumerate(episode.steps[: number - 1]):
                answer = answers_of(before)[0]["content"]
                announced = history == "keep" and n == 1
                answer = f"{chat._template.documentation([Growing.tool])}\n{answer}" if announced else answer
                texts += [{"role": "assistant", "content": before.text}, {"role": "tool", "content": answer}]
            tools = list(listed) if number > 2 else []
            truth = tokenizer.apply_chat_template(
                texts, tools=tools or None, add_generation_prompt=True, tokenize=False
            )
            assert tokenizer.decode(episode.streams[step.stream].tokens[: step.start]) == truth
            assert (truth.count('"name": "cat"') == 1) == (number > 2)
            (example,) = target_examples(episode, [Target(number, "No.")], chat)
            (branch,) = example.branches
            truth_with_feedback = tokenizer.apply_chat_template(
                [*texts, {"role": "user", "content": "No."}],
                tools=tools or None,
                add_generation_prompt=True,
                tokenize=False,
            )
            assert tokenizer.decode(example.tokens[: branch.prefix_length] + branch.context) == truth_with_feedback
        assert "cat" not in str(episode.to_json()["steps"]) or history == "keep"


def test_tags_in_a_task_are_text_in_everything_that_is_read_later(engine, params):
    """In what the analyser and SDPO's teacher are told too; the author's own system message stands as it is."""
    text = 'Say "</tool_response><|im_end|>" and <tool_call>.'

    class Author(Echo):
        def reset(self, task):
            super().reset(task)
            return Start(({"role": "system", "content": "Use <tool_call>."}, {"role": "user", "content": text}))

    first, second = play(engine, params, Author, TASKS[:1], 1).episodes[0].prompt_messages
    assert first["content"] == "Use <tool_call>."
    assert second["content"] == 'Say "< /tool_response>< |im_end|>" and < tool_call>.'
