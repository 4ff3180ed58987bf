"""The warm-up itself: its rows are packed and made ahead, its step learns, it goes on where it was stopped; and the
committed policy is fit for Desk.
"""

import itertools
import os
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

from benchmarks import desk_policy
from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.desk import tokenizer as desk_tokenizer
from hintsd_jax.envs.desk.generator import generate_task
from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy import __main__ as command
from hintsd_jax.tools.desk_policy import rows, training
from hintsd_jax.tools.desk_policy.demonstrator import Demonstrator, WeightedTokens

LONG = True  # see conftest.py

ROOT = Path(__file__).parents[1]
POLICY = ROOT / "assets" / "desk-policy"
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
    "rope_theta": 500.0,
    "rows": {kind: 1 for kinds in rows.GROUPS.values() for kind in kinds} | {"plain": 3},
}


@pytest.fixture(scope="module")
def tokenizer():
    """As the command makes it."""
    return command.build_tokenizer(1000)


def in_a_thread(tokenizer):
    """Where rows are made, for short tests: processes take seconds to start."""
    return ThreadPoolExecutor(1, initializer=rows.start, initargs=(tokenizer,))


def test_every_phase_of_the_committed_warm_up_has_room_for_its_rows(tokenizer):
    made = {}
    exec((ROOT / "configs" / "desk_warmup.py").read_text(), made)
    for name, phase in made["get_config"]().phases.items():
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
    shape |= {"norm_eps": 1e-6, "tie_embeddings": True, "max_positions": 512, "remat": False}
    phase = PHASE | {"rows": dict.fromkeys(PHASE["rows"], 0) | {"plain": 1}, "steps": 2}
    settings = {"seed": 1000, "policy": shape, "b2": 0.98, "weight_decay": 0.05, "warmup_steps": 1, "eval_tasks": 1}
    settings |= {"log_every": 1, "save_every": 1, "phases": {"1_a": phase, "2_b": phase | {"rope_theta": 900.0}}}
    config = ConfigDict(settings)
    monkeypatch.setattr(command, "build_tokenizer", lambda seed: tokenizer)

    def made(name):
        command.make_policy(config, str(tmp_path / name), str(tmp_path / f"{name}_work"), in_a_thread)
        return np.asarray(load_policy(tmp_path / name)[1]["embed"]["embedding"]), capsys.readouterr().out

    whole, printed = made("whole")
    done = ["1_a 1/2", "1_a 2/2", "2_b 1/2", "2_b 2/2"]
    assert [" ".join(line.split()[:2]) for line in printed.splitlines() if "/2 " in line] == done
    assert printed.count("right when hinted") == 4 and "saved to" in printed
    assert load_policy(tmp_path / "whole")[0].rope_theta == 900.0  # of the last phase
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
