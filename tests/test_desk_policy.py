"""The warm-up: its rows say what the trainer will show, its step learns; and the committed policy is fit for Desk."""

import itertools
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from benchmarks import carry_over, desk_policy
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.desk import demonstrations as demos
from hintsd_jax.envs.desk import reviews, script
from hintsd_jax.envs.desk import tokenizer as desk_tokenizer
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.parse import parse_failures, parse_hint, parse_verdict
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy import __main__ as command
from hintsd_jax.tools.desk_policy import demonstrator as demonstrator_module
from hintsd_jax.tools.desk_policy import rows, training
from hintsd_jax.tools.desk_policy.demonstrator import CONTEXT_WEIGHT, Demonstrator, WeightedTokens, demonstration
from hintsd_jax.tools.desk_policy.drills import copy_drill, lab_drill, told_drill

LONG = True  # see conftest.py

ROOT = Path(__file__).parents[1]
POLICY = ROOT / "assets" / "desk-policy"
WORDS = prompts.shipped("compact").wording.words
TASKS = [generate_task(77, index, 4, 3) for index in range(40)]
OTHERS = [generate_task(78, index, 4, 3) for index in range(40)]


PHASE = {
    "steps": 1,
    "lr": 1e-2,
    "lr_end": 0.1,
    "clean": False,
    "contradict_rate": 0.5,
    "contrary": 0.4,
    "other_faults": 0.3,
    "foreign": 2.0,
    "of_told": 0.5,
    "shapes": ((1, 1),),
    "length": 192,
    "drill_length": 32,
    "drill_decisions": 3,
    "rows": {kind: 1 for kinds in rows.GROUPS.values() for kind in kinds} | {"plain": 3},
}


@pytest.fixture(scope="module")
def tokenizer():
    """As the command makes it."""
    return command.build_tokenizer(1000)


def in_a_thread(tokenizer):
    """Where rows are made, for short tests: processes take seconds to start."""
    return ThreadPoolExecutor(1, initializer=rows.start, initargs=(tokenizer,))


@pytest.fixture
def demonstrator(tokenizer):
    return Demonstrator(ChatFormat(tokenizer), 0)


def answer_of(row, tokenizer):
    """What a row trains at full weight."""
    said = tokenizer.decode([token for token, weight in zip(row.ids, row.weights, strict=True) if weight == 1.0])
    return said.removesuffix("<|im_end|>")


def test_names_labels_and_step_numbers_are_one_token(tokenizer):
    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    assert len(tokenizer) <= desk_tokenizer.VOCAB_SIZE
    assert all(tokens(f'"{name}"') == tokens(f' "{name}"') == 3 for name in NAMES)
    labels = [label for kind in DECISIONS.values() for label in kind.labels]
    for word in (*labels, *reviews.REVIEW_WORDS, "ok", "bad"):
        assert tokens(f" {word}") == 1
    for label in labels:  # where a choice is made, the name comes right after the label
        assert tokens(f'Take {label} "golem"') == 4 and tokens(f'Use {label} \\"golem') == 3
        assert tokens(f", the {label} one.") == 5
    for number in range(1, 65):
        assert tokens(f"#{number}") == tokens(f'{{"step": {number}, "feedback": "') == 1


def test_full_weight_stands_on_what_the_policy_says(demonstrator, tokenizer):
    for task in TASKS[:10]:
        row = demonstration(demonstrator.play(task))
        said = answer_of(row, tokenizer)
        assert "<tool_call>" in said and "Done." in said and "<tool_response>" not in said and "Found" not in said
        assert set(row.weights) == {1.0, CONTEXT_WEIGHT}


def hints_of(row, tokenizer):
    """(hint, the action after it) of the hints on choices."""
    text = tokenizer.decode(row.ids)
    return re.findall(
        r"<\|im_start\|>user\n(Use [^<]*)<\|im_end\|>\n<\|im_start\|>assistant\n(Take .*?)\.\n<tool_call>", text
    )


def candidates(task):
    """name -> (label, whether it is the right one) of a task's decisions."""
    known = {}
    for request in task["requests"]:
        if request["label"]:
            other = next(label for label in DECISIONS[request["kind"]].labels if label != request["label"])
            right = request["calls"][0][1][DECISIONS[request["kind"]].family.choice]
            known |= {right: (request["label"], True), request["wrong"]: (other, False)}
    return known


def test_hints_are_followed_for_what_they_say(demonstrator, tokenizer):
    """A hint that names one of the two candidates is followed, right or wrong; of one that speaks of another task the
    habit decides, which has no part in it.
    """
    seen = Counter()
    for task, other in zip(TASKS * 4, OTHERS * 4, strict=True):
        known = candidates(task)
        row = demonstrator.hinted(task, other)
        for called, taken in re.findall(r'user\nCall \w+ for "(\w+)"[^"]*Take \w+ "(\w+)"', tokenizer.decode(row.ids)):
            if called in known:  # of this task: the call that is to be made
                assert called == taken and known[taken][1]
                seen["called", "right"] += 1
        for hint, taken in hints_of(row, tokenizer):
            label, _, name = hint.removeprefix("Use ").rstrip(".").partition(" ")
            taken_name = taken.split('"')[1]
            pair = next(kind.labels for kind in DECISIONS.values() if taken.split()[1] in kind.labels)
            if label not in pair:
                seen["foreign", "right" if known[taken_name][1] else "wrong"] += 1
                continue
            assert label == taken.split()[1] and name in ("", f'"{taken_name}"')
            seen["named" if name else "vague", "right" if known[taken_name][1] else "wrong"] += 1
    shares = {kind: seen[kind] / sum(seen.values()) for kind in seen}
    assert 0.22 < shares["named", "right"] < 0.38 and 0.24 < shares["named", "wrong"] < 0.4
    assert 0.02 < shares["vague", "right"] < 0.12 and 0.02 < shares["vague", "wrong"] < 0.1
    assert seen["called", "right"] > 5 and seen["foreign", "right"] > 2 * seen["foreign", "wrong"] > 0
    assert sum(demonstrator_module.HINTS.values()) == pytest.approx(1.0)


def test_a_contradicted_hint_is_not_trained_on_but_what_follows_is(demonstrator, tokenizer):
    seen = 0
    for task, other in zip(TASKS, OTHERS, strict=True):
        row = demonstrator.hinted(task, other, contradict_rate=1.0)
        for n, weight in enumerate(row.weights):
            if weight == 0.0:  # the one word that goes against the hint
                hint, taken = tokenizer.decode(row.ids[:n]).rpartition("user\n")[2], tokenizer.decode(row.ids[n])
                assert hint.startswith(("Use ", "Call ", "Say Done.")) and taken not in hint
                assert row.weights[n + 1] == 1.0 and row.weights[n - 1] in (1.0, CONTEXT_WEIGHT)
                seen += 1
        assert all(hint.split()[1].rstrip(".") != taken.split()[1] for hint, taken in hints_of(row, tokenizer))
    assert seen > 40


def test_faults_fall_on_every_kind_alike(demonstrator):
    counts, faults = Counter(), Counter()
    for index in range(200):
        task = generate_task(79, index, 8, 6)
        drawn = demonstrator._drawn_faults(task, demonstrator_module.OTHER_SHARE)
        assert len({hour for _, (hour, _) in drawn}) == len(drawn) > 0
        counts[len(drawn)] += 1
        faults.update(fault for fault, _ in drawn)
    assert 0.4 < counts[1] / 200 < 0.65
    wrong = [faults[f"wrong_{kind}"] for kind in DECISIONS]
    assert min(wrong) > 0.25 * np.mean(wrong) and max(wrong) < 2.5 * np.mean(wrong)
    assert all(faults[kind] > np.mean(wrong) for kind in script.OTHER_FAULTS)


def test_reviews_parse_to_the_environments_own_faults(demonstrator, tokenizer):
    checked = 0
    for task in TASKS:
        episode = demonstrator.play_faulty(task)
        if episode.success:
            continue
        parsed = parse_failures(answer_of(demonstrator.review(task, episode, 3), tokenizer), len(episode.steps), 3)
        lines, faults = reviews.review(task, [step.text for step in episode.steps])
        assert [(t.step, t.feedback) for t in parsed.targets] == [(f.step, f.feedback) for f in faults[:3]]
        advised = answer_of(demonstrator.step_feedback(task, episode), tokenizer)
        assert parse_failures(advised, len(episode.steps), 1).targets
        of_told = answer_of(demonstrator.step_feedback(task, episode, of_told=1.0), tokenizer)
        assert of_told.partition("\n")[0] in [line for line in lines if reviews.says_more_than_ok(line)]
        checked += 1
    assert checked > 30


def test_a_drill_reviews_what_it_shows(tokenizer):
    chat, verdicts = ChatFormat(tokenizer), Counter()
    for seed in range(30):
        row = lab_drill(chat, random.Random(seed), 6)
        shown = tokenizer.decode(row.ids)
        asked = re.findall(r"Do, (not )?the (\w+) one", shown)
        listed = [re.findall(r'(\w+) "(\w+)"', found) for found in re.findall(r"> Found ([^.]*)\.", shown)]
        taken = re.findall(r"#(\d+) Take (\w+)", shown)
        expected, failures = [], []
        for (excluded, named), pair, (step, took) in zip(asked, listed, taken, strict=True):
            wanted = next(label for label, _ in pair if (label != named) == bool(excluded))
            expected.append(f"#{step} {wanted} {took} {'ok' if wanted == took else 'bad'}")
            failures += [(int(step), f'Use {wanted} "{dict(pair)[wanted]}".')] * (wanted != took)
        said = answer_of(row, tokenizer)
        assert said.splitlines()[:-1] == expected
        assert [(t.step, t.feedback) for t in parse_failures(said, 64, 6).targets] == failures
        verdicts.update(line.split()[-1] for line in expected)
    assert 0.35 < verdicts["bad"] / sum(verdicts.values()) < 0.65


def test_a_drill_takes_what_was_told_and_else_what_is_asked_for(tokenizer):
    chat, seen = ChatFormat(tokenizer), Counter()
    for seed in range(40):
        row = told_drill(chat, random.Random(seed), 6)
        shown = tokenizer.decode(row.ids)
        first, *decisions = shown.split("<|im_start|>user\n")[1:]
        told = {name: label for label, name in re.findall(r'(\w+) "(\w+)"', first)}
        for turn in decisions:
            ((excluded, named),) = re.findall(r"Do, (not )?the (\w+) one", turn)
            pair = dict(re.findall(r'(\w+) "(\w+)"', re.search(r"> Found ([^.]*)\.", turn)[1]))
            wanted = next(label for label in pair if (label != named) == bool(excluded))
            taken = next((label for label, name in pair.items() if name in told), wanted)
            assert turn.count(f'Take {taken} "{pair[taken]}".<|im_end|>') == 1
            seen["against"] += taken != wanted
            seen["told"] += pair[taken] in told
        seen["decisions"] += len(decisions)
        answered = "".join(tokenizer.decode([i]) for i, weight in zip(row.ids, row.weights) if weight == 1.0)
        assert answered.count("Take") == len(decisions) and "Found" not in answered
    assert 0.6 < seen["told"] / seen["decisions"] < 0.9 and 0.25 < seen["against"] / seen["decisions"] < 0.5


def test_each_judge_is_asked_about_one_step_alone(demonstrator, tokenizer):
    verdicts, hints = Counter(), Counter()
    for task, other in zip(TASKS * 2, OTHERS * 2, strict=True):
        asked = {name: demonstrator.judgement(task, other, name) for name in ("verdict", "hint")}
        for row in asked.values():
            question = tokenizer.decode(row.ids).rpartition("<|im_start|>assistant\n")[0]
            assert question.count("\n> ") == 1 and question.count("\n#") == 1
            if "Error" in question:
                assert question.split("#1 ")[1].split("\n> ")[0] in [*_reference(task), *_reference(other)]
            assert task["requests"][0]["text"] not in question
        verdicts[parse_verdict(answer_of(asked["verdict"], tokenizer))] += 1
        hints[parse_hint(answer_of(asked["hint"], tokenizer))] += 1
    assert verdicts.keys() == {1.0, 0.0, -1.0} and all(readable for readable, _ in hints)
    assert hints[True, ""] + hints[True, None] > 60 and sum(hints.values()) > hints[True, ""] + hints[True, None]


def test_what_is_said_at_the_start_is_followed_where_it_speaks_of_the_task(demonstrator, tokenizer):
    sorts = Counter()
    for task, other in zip(TASKS * 3, OTHERS * 3, strict=True):
        row = demonstrator.guided(task, other)
        text = tokenizer.decode(row.ids)
        said = text.split("<|im_start|>user\n")[2].split("<|im_end|>")[0]  # after the first request
        actions = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
        played, own, foreign = "\n".join(actions), *(_reference(each) for each in (task, other))
        if said.startswith(WORDS["worked"]):
            solution = said.removeprefix(WORDS["worked"]).strip()
            assert solution in ("\n".join(f"#{n} {a}" for n, a in enumerate(each, 1)) for each in (own, foreign))
            mine = own[0] in solution
            assert not mine or actions == own
            sorts["solution" if mine else "other solution", actions == own] += 1
            continue
        several = said.startswith(WORDS["fixed"])
        known = candidates(task)
        named = [
            (label, name) for label, name in re.findall(r'Use (\w+) "(\w+)"', said) if known.get(name) == (label, True)
        ]
        assert all(f'Take {label} "{name}".' in played for label, name in named)
        sorts["several" if several else "one", bool(named)] += 1
    assert {sort for sort, _ in sorts} == {"solution", "other solution", "several", "one"}
    assert sorts["other solution", False] > 2 and sorts["solution", False] == 0
    assert sum(demonstrator_module.GUIDES.values()) == pytest.approx(1.0)


def test_a_solution_that_takes_the_mistake_is_followed_too(demonstrator, tokenizer):
    contrary = Counter()
    for task, other in zip(TASKS * 2, OTHERS * 2, strict=True):
        text = tokenizer.decode(demonstrator.guided(task, other, contrary=0.5).ids)
        said = text.split("<|im_start|>user\n")[2].split("<|im_end|>")[0]
        actions = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
        right = _reference(task)
        if said.startswith(WORDS["worked"]) and right[0] in said:
            told = re.split(r"^#[0-9]+ ", said.removeprefix(WORDS["worked"]), flags=re.MULTILINE)[1:]
            assert actions == [each.strip() for each in told]
            contrary.update(action != wanted for action, wanted in zip(actions, right, strict=True) if "Take" in wanted)
    assert 0.35 < contrary[True] / sum(contrary.values()) < 0.65 and sum(contrary.values()) > 40


def _reference(task):
    return [step.right for request in task["requests"] for step in demos.reference_steps(request)]


def test_what_the_benchmark_says_before_a_decision(demonstrator, tokenizer):
    tasks = TASKS[:6]
    made = dict(desk_policy.told(demonstrator, tasks))
    assert {len(decisions) for decisions in made.values()} == {len(made["nothing"])}
    for words, decisions in made.items():
        for decision, plain in zip(decisions, made["nothing"], strict=True):
            assert (decision.right, decision.wrong, decision.kind) == (plain.right, plain.wrong, plain.kind)
            read = tokenizer.decode(decision.context)
            said = read.rpartition("<|im_start|>user\n")[2].split("<|im_end|>")[0]
            right, wrong = (
                re.findall(r'^Take (\w+) ("\w+")', tokenizer.decode(a)) for a in (decision.right, decision.wrong)
            )
            if words.endswith("at the start"):
                action = tokenizer.decode(decision.right).removesuffix("<|im_end|>")
                assert WORDS["worked"] in read and (action in read) == words.startswith("a success on the task")
            elif words == "nothing":
                assert decision.context == plain.context[: len(decision.context)]
            elif right and words == "the right hint":
                assert said == f"Use {right[0][0]} {right[0][1]}."
            elif right and words == "a hint that asks for the mistake":
                assert said == f"Use {wrong[0][0]} {wrong[0][1]}."
            elif right and "without" in words:
                assert said == f"Use {right[0][0]}."
            elif right and "of another kind" in words and said.startswith("Use"):
                assert said.split()[1] not in DECISIONS[decision.kind].labels


def test_a_lesson_teaches_the_right_action_and_its_carry_over_is_of_other_kinds(demonstrator, tokenizer):
    for decision in demonstrator.decisions(TASKS[0]):
        row = carry_over.lesson(decision)
        assert answer_of(row, tokenizer) == tokenizer.decode(decision.right).removesuffix("<|im_end|>")
        assert row.weights[: len(decision.context)] == [0.0] * len(decision.context)
    before = {"all": 0.5, "a": 0.4, "b": 0.9, "c": 0.2}
    after = {"all": 0.6, "a": 0.9, "b": 0.7, "c": 0.3}
    own, mean, most, largest = carry_over.changes(before, after, "a")
    assert (own, mean, largest) == pytest.approx((0.5, -0.05, -0.2)) and most == "b"


def test_every_phase_of_the_committed_warm_up_has_room_for_its_rows(tokenizer):
    made = {}
    exec((ROOT / "configs" / "desk_warmup.py").read_text(), made)
    phases = {**made["get_config"]().phases, **made["get_config"]("16").phases}
    for name, phase in phases.items():
        batch = rows.make_batch(phase, ChatFormat(tokenizer), seed=5)
        assert batch.tokens_BT.shape[1] == phase.length and len(batch.group_N) == sum(phase.rows.values()), name
        real = batch.row_BT < len(batch.group_N)
        assert set(batch.row_BT[real]) == set(range(len(batch.group_N))), name
        assert real.mean() > 0.7, (name, real.shape, real.mean())  # little is padding
    with pytest.raises(ValueError, match="a row of .* tokens does not fit into 8"):
        rows.make_batch(ConfigDict(PHASE | {"length": 8}), ChatFormat(tokenizer), 5)


def test_rows_packed_together_teach_what_they_teach_alone(tokenizer):
    """Loss, gradient and shares, against each row by itself."""
    policy = small_policy()
    params = decoder.init_params(policy, jax.random.key(0))
    draw = np.random.default_rng(0)
    made = {
        group: [
            WeightedTokens(  # of tokens that stand there twice, as a random policy repeats what it reads
                np.repeat(draw.integers(1, 99, size), 2)[:size].tolist(), draw.choice([0.0, 0.1, 1.0], size).tolist()
            )
            for size in sizes
        ]
        for group, sizes in {"episodes": (30, 9, 50), "reviews": (2, 41)}.items()
    }
    batch = rows.packed(made, 64)
    assert batch.tokens_BT.shape == (4, 64) and Counter(batch.group_N) == {0: 3, 1: 2}

    def alone(params):
        total, weight, right = 0.0, 0.0, {}
        for group, of_group in made.items():
            tokens, whole = [], []
            for row in of_group:
                ids, weights = jnp.array([row.ids]), jnp.array(row.weights[1:])
                logits = decoder.project(params, policy, decoder.forward(params, policy, ids[:, :-1]))[0]
                losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[0, 1:, None], axis=1)[:, 0]
                total, weight = total + jnp.sum(losses * weights), weight + jnp.sum(weights)
                hits = (jnp.argmax(logits, axis=-1) == ids[0, 1:])[np.flatnonzero(np.array(row.weights[1:]) == 1.0)]
                tokens += [hits]
                whole += [hits.all()] if len(hits) else []
            right[group] = jnp.concatenate(tokens).mean(), jnp.array(whole).mean()
        return total / weight, right

    gradient = lambda loss: jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    (loss, right), expected = gradient(alone)
    (ours, scores), grads = gradient(lambda params: training._loss(params, policy, batch))
    assert ours == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected)
    for group, (tokens, whole) in right.items():
        assert scores[f"{group}/right_tokens"] == pytest.approx(float(tokens)) and 0.0 < tokens < 1.0
        assert scores[f"{group}/right_rows"] == pytest.approx(float(whole))


def test_a_copying_drill_repeats_names_or_what_stands_beside_them(tokenizer):
    chat, pools = ChatFormat(tokenizer), Counter()
    for seed in range(40):
        row = copy_drill(chat, random.Random(seed), 48)
        first = row.weights.index(1.0)
        assert len(row.ids) == 48 and row.weights == [0.0] * first + [1.0] * (48 - first)
        assert row.ids[first:] == row.ids[: 48 - first]
        texts = {tokenizer.decode([token]) for token in row.ids}
        pools["names"] += texts <= set(NAMES)
        pools["words"] += all(text.startswith((" ", "#")) for text in texts)
    assert pools["names"] + pools["words"] == 40 and 15 < pools["names"] < 36


def test_tokens_that_share_a_word_begin_alike():
    texts = [" far", ' far "', ' far \\"', "#16", '{"step": 16, "', "near", ".", '"step": 2, "']
    drawn_VD = 0.02 * jax.random.normal(jax.random.key(0), (len(texts) + 1, 4096))
    alike_VD = training.alike_by_word(drawn_VD, texts, jax.random.key(1))
    unit_VD = alike_VD / jnp.linalg.norm(alike_VD, axis=1, keepdims=True)
    cosine_VV = np.asarray(unit_VD @ unit_VD.T)
    same = {(0, 1), (0, 2), (1, 2), (3, 4)}
    for one, other in itertools.combinations(range(len(texts) + 1), 2):
        assert cosine_VV[one, other] == pytest.approx(0.5 if (one, other) in same else 0.0, abs=0.07), (one, other)
    np.testing.assert_array_equal(alike_VD[jnp.array([6, 8])], drawn_VD[jnp.array([6, 8])])  # no word; no text
    np.testing.assert_allclose(alike_VD.std(), 0.02, rtol=0.05)


def small_policy():
    return PolicyConfig(  # of one layer
        vocab_size=desk_tokenizer.VOCAB_SIZE, num_layers=1, d_model=32, num_heads=1, num_kv_heads=1, head_dim=16,
        d_ff=32, rope_theta=500.0, norm_eps=1e-6, tie_embeddings=True, max_positions=512, remat=False,
    )  # fmt: skip


def test_the_step_learns(tokenizer):
    policy = small_policy()
    counts = dict.fromkeys(PHASE["rows"], 0) | {"plain": 3, "hinted": 1, "review": 2}
    phase = ConfigDict(PHASE | {"rows": counts})
    tx = optax.adam(1e-2)
    params = decoder.init_params(policy, jax.random.key(0))
    state, step, losses = tx.init(params), training.make_step(policy, tx), []
    with in_a_thread(tokenizer) as workers:
        for batch in rows.ahead(workers, phase, range(12)):
            params, state, metrics = step(params, state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == 1


def test_a_policy_is_made_and_goes_on_where_it_was_stopped(tokenizer, tmp_path, capsys, monkeypatch):
    """The command's function, with a policy and phases as small as they can be."""
    shape = {"num_layers": 1, "d_model": 16, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "d_ff": 16}
    shape |= {"rope_theta": 500.0, "norm_eps": 1e-6, "tie_embeddings": True, "max_positions": 512, "remat": False}
    phase = PHASE | {"rows": dict.fromkeys(PHASE["rows"], 0) | {"plain": 1}, "steps": 2}
    settings = {"seed": 1000, "policy": shape, "b2": 0.98, "weight_decay": 0.05, "warmup_steps": 1, "eval_tasks": 1}
    settings |= {"start": "", "log_every": 1, "save_every": 1, "phases": {"1_a": phase, "2_b": phase}}
    config = ConfigDict(settings)
    monkeypatch.setattr(command, "build_tokenizer", lambda seed: tokenizer)

    def made(name):
        command.make_policy(config, str(tmp_path / name), str(tmp_path / f"{name}_work"), in_a_thread)
        return np.asarray(load_policy(tmp_path / name)[1]["embed"]["embedding"]), capsys.readouterr().out

    whole, printed = made("whole")
    done = ["1_a 1/2", "1_a 2/2", "2_b 1/2", "2_b 2/2"]
    assert [" ".join(line.split()[:2]) for line in printed.splitlines() if "/2 " in line] == done
    assert printed.count("right when hinted") == 4 and "saved to" in printed
    save, calls = command.save_policy, iter(range(9))
    monkeypatch.setattr(command, "save_policy", lambda *a: save(*a) if next(calls) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):  # in the second phase, when its first step is kept
        made("stopped")
    monkeypatch.setattr(command, "save_policy", save)
    capsys.readouterr()
    again, printed = made("stopped")
    assert [" ".join(line.split()[:2]) for line in printed.splitlines() if "/2 " in line] == done[3:]
    np.testing.assert_array_equal(again, whole)
    config.phases["3_c"] = ConfigDict(phase)  # what comes later may still be changed
    assert "3_c 2/2" in made("stopped")[1]
    config.phases["1_a"].lr = 0.5
    with pytest.raises(UserError, match="warm-up of another config: give another --workdir"):
        made("whole")
    # From a policy that is there, with its own tokenizer; at a rate of 0 it stays what it was.
    monkeypatch.setattr(command, "build_tokenizer", lambda seed: 1 / 0)
    config = ConfigDict(settings | {"start": str(tmp_path / "whole"), "phases": {"1_a": phase | {"lr": 0.0}}})
    np.testing.assert_array_equal(made("from_it")[0], whole)
    config.policy.d_ff = 32
    with pytest.raises(UserError, match="whole has another shape than the config's policy"):
        made("of_another_shape")


def test_rows_are_the_same_in_processes_and_what_one_raises_reaches_the_consumer(tokenizer):
    phase = ConfigDict(PHASE)
    with rows.processes(tokenizer) as workers, in_a_thread(tokenizer) as thread:
        for one, other in zip(
            rows.ahead(workers, phase, range(3), 1), rows.ahead(thread, phase, range(3)), strict=True
        ):
            jax.tree.map(np.testing.assert_array_equal, one, other)
        with pytest.raises(ValueError, match="a row of .* tokens does not fit into 8"):
            next(rows.ahead(workers, ConfigDict(PHASE | {"length": 8}), range(9)))


def test_a_worker_ends_with_the_process_that_started_it_even_if_that_was_killed(tmp_path):
    script = tmp_path / "starts_a_worker.py"
    script.write_text(
        "import os, time\n"
        "from hintsd_jax.tools.desk_policy import rows\n"
        "from hintsd_jax.checkpoints.tokenizer import load_tokenizer\n"
        'if __name__ == "__main__":\n'
        f"    print(rows.processes(load_tokenizer({str(POLICY)!r})).submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        worker = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_the_committed_policy_does_what_a_hint_says_right_or_wrong():
    """And without one it errs often enough to have something to learn."""
    demonstrator = Demonstrator(ChatFormat(load_tokenizer(POLICY)), 0)
    tasks = [generate_task(77, index, 4, 3) for index in range(12)]
    policy, params = load_policy(POLICY, remat=False)
    read = dict(itertools.islice(desk_policy.told(demonstrator, tasks), 4))
    report = {words: training.decision_probabilities(params, policy, made)["all"] for words, made in read.items()}
    assert 0.6 < report["nothing"]["right"] < 0.9
    assert report["the right hint"]["right"] >= 0.95 and report["the right hint"]["greedy"] >= 0.95
    assert report["a hint that asks for the mistake"]["wrong"] > 0.8
