"""The warm-up: its rows say what the trainer will show, its step learns, and the committed policy came from it."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.desk.demonstrations import review
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.parse import parse_failures
from hintsd_jax.hindsight.prompts import compact
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy import __main__ as command
from hintsd_jax.tools.desk_policy import training
from hintsd_jax.tools.desk_policy.demonstrator import CONTEXT_WEIGHT, Demonstrator, demonstration

OPTIMIZED = True  # real rollouts: see conftest.py

POLICY = Path(__file__).parents[1] / "assets" / "desk-policy"
TASKS = [generate_task(77, index) for index in range(40)]


PHASE = {
    "steps": 1,
    "lr": 1e-2,
    "clean": False,
    "contradict_rate": 0.5,
    "vague_rate": 0.5,
    "shapes": ((1, 1),),
    "episode_length": 96,
    "answer_length": 160,
    "guided_length": 176,
    "drill_length": 32,
    "rows": {"plain": 3, "drill": 1, "hinted": 1, "review": 1, "step_feedback": 1, "judgement": 1, "guided": 1},
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(POLICY)


@pytest.fixture
def demonstrator(tokenizer):
    return Demonstrator(ChatFormat(tokenizer), 0)


def test_the_committed_tokenizer_is_the_one_that_the_command_makes(tokenizer):
    config = {}
    exec((POLICY.parents[1] / "configs" / "desk_warmup.py").read_text(), config)
    made = command.build_tokenizer(config["get_config"]().seed)
    assert json.loads(made.backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())
    assert made.chat_template == tokenizer.chat_template
    for name in NAMES:
        assert len(tokenizer.encode(f'" "{name}"', add_special_tokens=False)) <= 4


def test_full_weight_stands_on_what_the_policy_says(demonstrator, tokenizer):
    for task in TASKS[:10]:
        row = demonstration(demonstrator.play(task))
        said = tokenizer.decode([token for token, weight in zip(row.ids, row.weights) if weight == 1.0])
        assert "<tool_call>" in said and "Done." in said and "<tool_response>" not in said and "Found" not in said
        assert set(row.weights) == {1.0, CONTEXT_WEIGHT}


def test_a_hint_stands_right_before_the_action_that_follows_it(demonstrator, tokenizer):
    followed = 0
    for task in TASKS:
        text = tokenizer.decode(demonstrator.hinted(task).ids)
        hints = re.findall(
            r"<\|im_start\|>user\nUse (.*?)\.<\|im_end\|>\n<\|im_start\|>assistant\nTake (.*?)\.\n<tool_call>", text
        )
        assert len(hints) == text.count("user\nUse ")
        assert all(hint == taken for hint, taken in hints)
        followed += len(hints)
    assert followed > 40


def test_reviews_parse_to_the_environments_own_faults(demonstrator, tokenizer):
    checked = 0
    for task in TASKS:
        episode = demonstrator.play(task)
        if episode.success:
            continue
        row = demonstrator.review(task, episode, max_targets=3)
        answer = tokenizer.decode([token for token, weight in zip(row.ids, row.weights) if weight == 1.0])
        parsed = parse_failures(answer.removesuffix("<|im_end|>"), len(episode.steps), 3)
        _, faults = review(task, [step.text for step in episode.steps])
        assert [(t.step, t.feedback) for t in parsed.targets] == [(f.step, f.feedback) for f in faults[:3]]
        advised = demonstrator.step_feedback(task, episode)
        answer = tokenizer.decode([token for token, weight in zip(advised.ids, advised.weights) if weight == 1.0])
        assert parse_failures(answer.removesuffix("<|im_end|>"), len(episode.steps), 1).targets
        checked += 1
    assert checked > 10


def test_the_step_learns(demonstrator):
    policy = PolicyConfig(
        vocab_size=1024, num_layers=1, d_model=32, num_heads=1, num_kv_heads=1, head_dim=16, d_ff=32,
        rope_theta=500.0, norm_eps=1e-6, tie_embeddings=True, max_positions=512, remat=False,
    )  # fmt: skip
    phase = ConfigDict(PHASE)
    tx = optax.adam(1e-2)
    params = decoder.init_params(policy, jax.random.key(0))
    state, step, losses = tx.init(params), training.make_step(policy, tx), []
    rows = training.prefetched(training.batches(phase, demonstrator, task_seed=5))
    for _ in range(12):
        params, state, metrics = step(params, state, next(rows))
        losses.append(float(metrics["loss"]))
    rows.close()
    assert losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == 1


def test_a_policy_is_made_and_saved_and_trained_on(tmp_path, capsys):
    """The command's function, with a policy and phases as small as they can be."""
    shape = {"num_layers": 1, "d_model": 16, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "d_ff": 16}
    shape |= {"rope_theta": 500.0, "norm_eps": 1e-6, "tie_embeddings": True, "max_positions": 512, "remat": False}
    phase = PHASE | {"rows": dict.fromkeys(PHASE["rows"], 0) | {"plain": 1}}
    settings = {"seed": 1000, "policy": shape, "b2": 0.98, "weight_decay": 0.05, "warmup_steps": 1, "eval_tasks": 1}
    settings |= {"log_every": 1, "save_every": 9, "phases": {"1_a": phase, "2_b": phase | {"lr": 0.0}}}
    config = ConfigDict(settings)
    command.make_policy(config, str(tmp_path / "first"))
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if " 1/1 " in line] == ["1_a", "2_b"]
    assert printed.count("right when hinted") == 2 and "saved to" in printed
    with pytest.raises(UserError, match="can begin with the phases that have an lr: 1_a"):
        command.make_policy(config, str(tmp_path / "more"), str(tmp_path / "first"), "2_b")
    config.phases["2_b"].lr = 1e-2
    command.make_policy(config, str(tmp_path / "more"), str(tmp_path / "first"), "2_b")
    first, more = (load_policy(tmp_path / name)[1]["embed"]["embedding"] for name in ("first", "more"))
    assert 0 < np.abs(np.asarray(more) - np.asarray(first)).max() < 0.02  # one step of Adam from there


def test_what_a_producer_raises_reaches_the_consumer():
    def broken():
        yield 1
        raise ValueError("no more rows")

    rows = training.prefetched(broken())
    assert next(rows) == 1
    with pytest.raises(ValueError, match="no more rows"):
        next(rows)


def test_a_contradicted_hint_is_not_trained_on_but_what_follows_is(demonstrator, tokenizer):
    seen = 0
    for task in TASKS:
        row = demonstrator.hinted(task, hint_rate=1.0, neutral_rate=0.0, contradict_rate=1.0)
        for n, weight in enumerate(row.weights):
            if weight == 0.0:  # the one word that goes against the hint
                hint, taken = tokenizer.decode(row.ids[:n]).rpartition("user\n")[2], tokenizer.decode(row.ids[n])
                assert hint.startswith(("Use ", "Call notify")) and taken not in hint
                assert row.weights[n + 1] == 1.0 and row.weights[n - 1] in (1.0, CONTEXT_WEIGHT)
                seen += 1
    assert seen > 100


def test_the_committed_policy_is_what_desk_needs(demonstrator):
    """Warm enough to learn from (the issue's bounds are on 200 tasks x 4; here a cheap look), obedient to hints."""
    policy, params = load_policy(POLICY)
    policy = dataclasses.replace(policy, remat=False)
    hinted = training.decision_probabilities(params, policy, demonstrator, TASKS, hinted=True)
    plain = training.decision_probabilities(params, policy, demonstrator, TASKS, hinted=False)
    assert hinted["all"]["sampled"] >= 0.95 and hinted["all"]["greedy"] >= 0.95
    assert 0.4 < plain["all"]["sampled"] < 0.85
    usual_mistakes = np.mean([plain[kind]["greedy"] for kind in ("delete", "forward")])
    assert usual_mistakes < 0.5  # on two kinds the likeliest action is the wrong one


def test_a_judgement_shows_one_step_and_says_the_truth_without_names(demonstrator, tokenizer):
    verdicts = set()
    for task in TASKS:
        episode = demonstrator.play(task, error_scale=1.5)
        row = demonstrator.judgement(task, episode)
        question, _, answer = tokenizer.decode(row.ids).rpartition("<|im_start|>assistant\n")
        verdict, _, found = answer.removesuffix("<|im_end|>").partition("\n")
        failures = json.loads(found)["failures"]
        assert verdict in ("#1 ok", "#1 bad") and bool(failures) == (verdict == "#1 bad")
        assert all('"' not in failure["feedback"] and failure["step"] == 1 for failure in failures)
        assert task["requests"][0]["text"] not in question
        shown = [n for n, step in enumerate(episode.steps, 1) if f"#1 {step.text}\n>" in question]
        faults = {fault.step for fault in review(task, [step.text for step in episode.steps])[1]}
        assert shown and bool(failures) in {number in faults for number in shown}
        verdicts.add(verdict)
    assert verdicts == {"#1 ok", "#1 bad"}


def test_feedback_at_the_start_is_followed_where_it_speaks(demonstrator, tokenizer):
    sorts = set()
    for task in TASKS:
        row = demonstrator.guided(task)
        text = tokenizer.decode(row.ids)
        advice = text.split("<|im_start|>user\n")[2].split("<|im_end|>")[0]  # after the first request
        actions = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
        sorts.add(
            "solution"
            if advice.startswith(compact.WORKED)
            else "several"
            if advice.startswith(compact.FIXED)
            else "one"
        )
        played = "\n".join(actions)
        if advice.startswith(compact.WORKED):
            assert advice == "\n".join([compact.WORKED, *(f"#{n} {action}" for n, action in enumerate(actions, 1))])
        else:
            named = re.findall(r'Use (\w+) "(\w+)"', advice)
            assert all(f'Take {label} "{name}".' in played for label, name in named)
            assert all(
                f'"notify", "arguments": {{"name": "{name}"}}' in played
                for name in re.findall(r'notify for "(\w+)"', advice)
            )
    assert sorts == {"solution", "several", "one"}


def test_vague_hints_have_no_names(demonstrator, tokenizer):
    rows = [demonstrator.hinted(task, hint_rate=1.0, neutral_rate=0.0, vague_rate=1.0) for task in TASKS]
    hints = [hint for row in rows for hint in re.findall(r"user\n((?:Use|Call)[^<]*)<", tokenizer.decode(row.ids))]
    assert hints and all('"' not in hint and hint.endswith(".") for hint in hints)
