"""The update: accumulation, the single division, optimizer, EMA, skipping, donation, the number of compilations."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hintsd_jax.distill.losses import LossConfig
from hintsd_jax.distill.packing import Row, blank_batch, pack
from hintsd_jax.distill.state import OptimConfig, create, learning_rate, optimizer
from hintsd_jax.distill.step import accumulate, apply, batch_sums, update, zeros
from hintsd_jax.errors import UserError
from hintsd_jax.policy import decoder
from hintsd_jax.policy.config import PolicyConfig

POLICY = PolicyConfig(
    vocab_size=31, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24,
    rope_theta=1e4, norm_eps=1e-6, tie_embeddings=True, max_positions=64, remat=False,
)  # fmt: skip
LOSS = LossConfig(top_k=5, chunk=4)
SFT = LossConfig(loss="sft", chunk=4)
OPTIM = OptimConfig(lr=1e-2, schedule="constant", total_steps=10, ema_decay=0.9, clip_norm=0.5, weight_decay=0.1)
# Nearly every test packs to this one shape: a compilation costs far more than running it.
BUCKETS = {"length_buckets": (16,), "action_buckets": (4,), "teacher_extra": 4, "rows_per_batch": 6}


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)



def make_rows(number=5, seed=0):
    rng = np.random.default_rng(seed)
    ids = lambda n: tuple(int(i) for i in rng.integers(0, POLICY.vocab_size, n))
    rows = []
    for n in range(number):
        student, hint = ids(int(rng.integers(2, 9))), ids(int(rng.integers(1, 4)))
        rows.append(Row(episode=n, step=1, student=student, teacher=student + hint, action=ids(1 + n % 4), micro=n // 3))
    return rows


def batches_of(*micro_batches, **options):
    """One packed batch for each of the lists of rows."""
    packed = [pack(rows, **(BUCKETS | options)) for rows in micro_batches]
    assert not any(count for _, dropped in packed for count in dropped.values())
    return [batch for batches, _ in packed for batch in batches]


def make_state(seed=0):
    """A state whose teacher is not the student."""
    state = create(decoder.init_params(POLICY, jax.random.key(seed)), OPTIM)
    other = decoder.init_params(POLICY, jax.random.key(seed + 100))
    return state.replace(ema=jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, state.params, other))


def gather(batches, state=None, loss=LOSS):
    state = make_state() if state is None else state
    accumulator = zeros(state.params, loss)
    for batch in batches:
        accumulator = accumulate(state, accumulator, batch, policy=POLICY, loss=loss)
    return accumulator


def assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def host(tree):
    return jax.tree.map(np.array, tree)


def oracle_log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.log(np.sum(np.exp(logits)))


def test_sums_match_scoring_every_row_on_its_own():
    """Rows one by one, and the reference's formula in float64, against the packed batch."""
    state, rows = make_state(), make_rows()
    sums = gather(batches_of(rows), state).sums
    score = jax.jit(lambda params, tokens: decoder.project(params, POLICY, decoder.forward(params, POLICY, tokens)))
    expected = dict.fromkeys(LOSS.sum_names, 0.0)
    for row in rows:
        logits = []
        for params, context in ((state.params, row.student), (state.ema, row.teacher)):
            tokens = np.zeros((1, 20), np.int32)  # one length, one compilation
            tokens[0, : len(context + row.action)] = context + row.action
            logits.append(np.array(score(params, tokens))[0, len(context) - 1 : len(context + row.action) - 1])
        for student, teacher, token in zip(*logits, row.action, strict=True):
            s, t = oracle_log_softmax(student), oracle_log_softmax(teacher)
            top = np.argsort(-s)[: LOSS.top_k]
            p, q = (np.append(x[top], np.log(1 - np.exp(np.minimum(np.log(np.exp(x[top]).sum()), -1e-7)))) for x in (s, t))
            expected["loss"] += np.sum(np.exp(p) * (p - q))
            expected["tokens"] += 1
            expected["entropy"] -= np.sum(np.exp(s) * s)
            expected["logprob"] += s[token]
            expected["teacher_gap"] += t[token] - s[token]
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    sft = gather(batches_of(rows), state, SFT).sums
    assert "teacher_gap" not in sft
    np.testing.assert_allclose(sft["loss"], -expected["logprob"], rtol=1e-5)


@pytest.mark.parametrize("loss", [LOSS, SFT], ids=["distill", "sft"])
def test_micro_batches_add_up_to_the_big_batch(loss):
    rows = make_rows()
    whole, parts = gather(batches_of(rows), loss=loss), gather(batches_of(rows[3:], rows[:1], rows[1:3]), loss=loss)
    assert_trees_close(parts, whole)
    assert float(whole.sums["tokens"]) == sum(len(row.action) for row in rows)


def test_padding_rows_and_longer_buckets_add_nothing():
    rows = make_rows()
    tight = gather(batches_of(rows))
    assert_trees_close(gather([blank_batch(6, 16, 4, 4), *batches_of(rows)]), tight)
    loose = batches_of(rows, rows_per_batch=7, length_buckets=(24,), action_buckets=(9,), teacher_extra=8)
    # what stands in the padding does not matter either
    for batch in loose:
        for tokens_BT, start_B in ((batch.student_BT, batch.student_start_B), (batch.teacher_BT, batch.teacher_start_B)):
            for b, length in enumerate(start_B + batch.mask_BA.sum(axis=1)):
                tokens_BT[b, length:] = 17
        batch.actions_BA[~batch.mask_BA] = 13
    assert_trees_close(gather(loose), tight)


def test_the_mean_of_micro_means_is_another_update_on_unequal_micro_steps():
    """With `Row.micro` as micro-steps: equal to averaging the micro-steps' own token means, and not the token mean."""
    rows, state = make_rows(), make_state()
    mean = lambda rows, **options: (
        lambda a: jax.tree.map(lambda g: np.array(g) / np.array(a.sums["tokens"]), (a.grads, a.sums["loss"]))
    )(gather(batches_of(rows, **options), state))
    released = mean(rows, mean_of_micro_means=True)
    by_hand = jax.tree.map(lambda a, b: (a + b) / 2, mean(rows[:3]), mean(rows[3:]))
    assert_trees_close(released, by_hand)
    assert abs(released[1] - mean(rows)[1]) > 1e-3 * abs(released[1])


def test_apply_is_adamw_and_the_ema_follows_it():
    state = make_state()
    accumulator = gather(batches_of(make_rows()), state)
    tokens = float(accumulator.sums["tokens"])
    grads = jax.tree.map(lambda g: np.array(g, np.float64) / tokens, accumulator.grads)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    clipped = jax.tree.map(lambda g: g * min(1.0, 0.5 / norm), grads)
    before = host(state)
    state, metrics = apply(state, accumulator, optim=OPTIM)
    # Adam's first step: m / (1 - b1) = g and v / (1 - b2) = g^2
    params = jax.tree.map(lambda p, g: p - 1e-2 * (g / (np.abs(g) + 1e-8) + 0.1 * p), before.params, clipped)
    # entries whose gradient is rounding noise beside eps have no well-defined first step
    solid = jax.tree.map(lambda g: np.abs(g) > 1e-6, clipped)
    jax.tree.map(lambda a, b, s: np.testing.assert_allclose(np.array(a)[s], b[s], atol=2e-5), state.params, params, solid)
    ema = jax.tree.map(lambda old, new: old + 0.1 * (np.float64(new) - old), before.ema, host(state.params))
    assert_trees_close(state.ema, ema, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema, accumulator.grads))} == {jnp.dtype("float32")}
    counts = [int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")]
    assert int(state.step) == 1 and set(counts) == {1}
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for name in LOSS.sum_names:
        divisor = 1.0 if name == "tokens" else tokens
        np.testing.assert_allclose(metrics[name], accumulator.sums[name] / divisor, rtol=1e-6)
    assert float(metrics["skipped"]) == 0.0


@pytest.mark.parametrize("batches", [[], [blank_batch(6, 16, 4, 4)]], ids=["no batch", "only padding"])
def test_a_step_without_target_tokens_changes_nothing_and_says_so(batches):
    state, _ = update(make_state(), batches_of(make_rows()), policy=POLICY, loss=LOSS, optim=OPTIM)
    before = host(state)  # moments are not zero, and weight decay would move the weights without any gradient
    state, metrics = update(state, batches, policy=POLICY, loss=LOSS, optim=OPTIM)
    assert_trees_equal(state, before)
    assert float(metrics["skipped"]) == 1.0 and float(metrics["tokens"]) == 0.0
    assert all(np.isfinite(value) for value in metrics.values())


def test_teacher_gets_no_gradient_and_is_not_the_student():
    state = make_state()
    (batch,) = batches_of(make_rows())
    loss = lambda params, ema: batch_sums(params, ema, batch, POLICY, LOSS)["loss"]
    student, teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(state.params, state.ema)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(teacher))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(student))
    # and yet the loss does depend on it
    losses = [gather([batch], state.replace(ema=ema)).sums["loss"] for ema in (state.ema, state.params)]
    assert losses[0] != losses[1]


def test_identical_contexts_and_weights_have_no_loss():
    state = create(decoder.init_params(POLICY, jax.random.key(0)), OPTIM)
    rows = [dataclasses.replace(row, teacher=row.student) for row in make_rows()]
    accumulator = gather(batches_of(rows), state)
    np.testing.assert_allclose(accumulator.sums["loss"], 0, atol=1e-4)
    np.testing.assert_allclose(accumulator.sums["teacher_gap"], 0, atol=1e-4)


@pytest.mark.parametrize("loss", [LOSS, SFT], ids=["distill", "sft"])
def test_updates_lower_the_loss(loss):
    state, batches = make_state(), batches_of(make_rows())
    history = []
    for _ in range(8):
        state, metrics = update(state, batches, policy=POLICY, loss=loss, optim=OPTIM)
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.8 * history[0]


def test_buffers_are_donated_and_the_callers_weights_survive():
    params = decoder.init_params(POLICY, jax.random.key(0))
    state = create(params, OPTIM)
    accumulator = zeros(state.params, LOSS)
    (batch,) = batches_of(make_rows())
    added = accumulate(state, accumulator, batch, policy=POLICY, loss=LOSS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(accumulator))
    after, _ = apply(state, added, optim=OPTIM)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, after)))


def test_one_compilation_per_bucket_whatever_the_rows():
    options = {"length_buckets": (8, 16), "action_buckets": (4,), "rows_per_batch": 2}
    state = make_state()
    update(make_state(1), [], policy=POLICY, loss=SFT, optim=OPTIM)  # the optimizer's only compilation, if it is still to come
    compiled, applied, shapes = accumulate._cache_size(), apply._cache_size(), set()
    for seed in range(5):
        batches = batches_of(make_rows(3 + seed, seed), **options)
        shapes |= {(batch.student_BT.shape, batch.actions_BA.shape) for batch in batches}
        state, _ = update(state, batches, policy=POLICY, loss=SFT, optim=OPTIM)
    assert len(shapes) == 2
    assert accumulate._cache_size() - compiled == len(shapes)
    assert apply._cache_size() == applied
    assert int(state.step) == 5


def test_no_array_holds_the_vocabulary_for_a_whole_row():
    policy = dataclasses.replace(POLICY, vocab_size=997)
    state = jax.eval_shape(lambda: create(decoder.init_params(policy, jax.random.key(0)), OPTIM))
    (batch,) = batches_of(make_rows())
    run = lambda state: accumulate(state, zeros(state.params, LOSS), batch, policy=policy, loss=LOSS)
    shapes = set(re.findall(r"\[([\d,]*\b997\b[\d,]*)\]", str(jax.make_jaxpr(run)(state))))
    assert "4,997" in shapes  # the logits of a chunk
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == 997 * POLICY.d_model  # the embedding


def test_schedules():
    at = lambda step, **options: float(learning_rate(OptimConfig(lr=1.0, total_steps=10, **options))(step))
    assert [at(s, schedule="constant") for s in (0, 5, 20)] == [1.0, 1.0, 1.0]
    np.testing.assert_allclose([at(s, schedule="linear") for s in (0, 4, 10, 12)], [1.0, 0.6, 0.0, 0.0], atol=1e-7)
    np.testing.assert_allclose([at(s, warmup_steps=2) for s in (0, 1, 2, 6, 10)], [0.0, 0.5, 1.0, 0.5, 0.0], atol=1e-7)
    np.testing.assert_allclose([at(s, schedule="constant", warmup_steps=2) for s in (0, 1, 2, 9)], [0.0, 0.5, 1.0, 1.0])


def test_weight_decay_is_off_by_default_and_clipping_can_be():
    assert OptimConfig().weight_decay == 0.0
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.asarray([30.0, 40.0])}
    optim = OptimConfig(lr=0.1, eps=1.0, clip_norm=0.0)  # eps = 1: the size of the gradient shows
    step = jax.jit(lambda: optimizer(optim).update(grads, optimizer(optim).init(params), params)[0])
    np.testing.assert_allclose(step()["w"], [-0.1 * 30 / 31, -0.1 * 40 / 41], rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"schedule": "cosine"}, {"warmup_steps": 5, "total_steps": 5}, {"ema_decay": 1.1}, {"lr": -1.0}]
)
def test_impossible_options_are_refused_by_name(options):
    with pytest.raises(UserError, match=f"optim.{next(iter(options))}"):
        OptimConfig(**options)
