"""The update: trunk and branches against one row per target, accumulation, the single division, optimizer, EMA,
skipping, donation, adapters, the number of compilations."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models_lora import merge

from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import LoraConfig, PolicyConfig
from hintsd_jax.models.sharding import make_mesh, put_rows, shardings
from hintsd_jax.training.batching import Shapes, blank_batch, pack
from hintsd_jax.training.examples import Branch, Row, single
from hintsd_jax.training.losses import LossConfig
from hintsd_jax.training.state import OptimConfig, TrainState, create, learning_rate, moment_shardings, optimizer
from hintsd_jax.training.train_step import Accumulator, accumulate, apply, batch_losses, update, zeros

POLICY = PolicyConfig(
    vocab_size=31, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24,
    rope_theta=1e4, norm_eps=1e-6, tie_embeddings=True, max_positions=64, remat=False,
)  # fmt: skip
ADAPTED = dataclasses.replace(
    POLICY, lora=LoraConfig(rank=2, alpha=3.0, dropout=0.3, targets=("q_proj", "o_proj", "up_proj"))
)
LOSS = LossConfig(top_k=5, chunk=12)
SFT = LossConfig(loss="sft", chunk=12)
OPTIM = OptimConfig(lr=1e-2, schedule="constant", total_steps=10, ema_decay=0.9, clip_norm=0.5, weight_decay=0.1)
MESH = make_mesh(devices=jax.devices()[:1])
# Nearly every test packs to one of these: a compilation costs far more than running it.
SHAPES = Shapes((32,), (24,), (8,), rows=6)
ALONE = Shapes((32,), (40,), (4,), rows=6, trunk=False)


def make_rows(number=5, seed=0):
    """Rows of one or two targets; the first 5 are one batch in SHAPES."""
    rng = np.random.default_rng(seed)
    ids = lambda n: tuple(int(i) for i in rng.integers(0, POLICY.vocab_size, n))
    rows = []
    for n in range(number):
        branches, at = [], int(rng.integers(1, 4))
        for step in range(1, 2 + n % 2):
            start, size = at + int(rng.integers(1, 3)), 1 + (n + step) % 3
            seen, at = start - int(rng.integers(1, 3)), start + size
            branches.append(
                Branch(step, start, at, seen, ids(int(rng.integers(1, 4))), tuple(rng.normal(-3, 1, size).tolist()))
            )
        rows.append(Row(n, ids(at), tuple(branches), micro=n // 3, key=(seed, n)))
    return rows


def alone(rows):
    return [part for row in rows for part in single(row)]


def tokens_of(rows):
    return sum(branch.size for row in rows for branch in row.branches)


def batches_of(*micro_batches, shapes=SHAPES, **options):
    """One packed batch for each of the lists of rows."""
    packed = [pack(rows, shapes, **options) for rows in micro_batches]
    assert not any(count for each in packed for count in each.dropped.values())
    return [batch for each in packed for batch in each.batches]


def laid_out(tree, axes):
    return jax.device_put(tree, shardings(tree, axes, MESH, "train"))


def make_params(seed=0):
    return laid_out(decoder.init_params(POLICY, jax.random.key(seed)), decoder.logical_axes(POLICY))


def make_state(seed=0):
    """A state whose teacher is not the student."""
    state = create(make_params(seed), OPTIM)
    return state.replace(ema=jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, state.params, make_params(seed + 100)))


def make_adapter_state():
    """An adapter with no zero in it, and another one as its teacher."""
    shapes, rng = (
        jax.eval_shape(functools.partial(lora.init_adapter, ADAPTED), jax.random.key(0)),
        np.random.default_rng(8),
    )
    draw = lambda: jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    student, teacher = (laid_out(draw(), lora.logical_axes(ADAPTED)) for _ in range(2))
    return create(student, OPTIM).replace(ema=teacher)


def gather(batches, state=None, loss=LOSS, frozen=None, policy=POLICY):
    state = shared_state() if state is None else state
    with jax.set_mesh(MESH):
        accumulator = zeros(state.params, loss)
        for batch in batches:
            accumulator, _ = accumulate(frozen, state, accumulator, put_rows(batch, MESH), policy=policy, loss=loss)
    return accumulator


def step(state, batches, loss=LOSS, frozen=None, policy=POLICY):
    return update(frozen, state, batches, policy=policy, loss=loss, optim=OPTIM, mesh=MESH)[:2]


def assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@functools.cache
def shared_state():
    """For tests that only read it."""
    return make_state()


def host(tree):
    return jax.tree.map(np.array, tree)


def oracle_log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.log(np.sum(np.exp(logits)))


def assert_same_update(actual, expected, rtol=1e-5):
    """Of two accumulators: sums within rtol of each, gradients within rtol of the largest entry of each array."""
    for name in expected.sums:
        np.testing.assert_allclose(actual.sums[name], expected.sums[name], rtol=rtol, atol=1e-5, err_msg=name)

    def close(path, a, b):
        a, b = np.array(a), np.array(b)
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(close, actual.grads, expected.grads)


def test_sums_match_scoring_every_target_on_its_own():
    """Targets one by one, and the reference's formula in float64, against the packed batch."""
    state, rows = make_state(), make_rows()
    sums = gather(batches_of(rows), state).sums
    score = jax.jit(lambda params, tokens: decoder.project(params, POLICY, decoder.forward(params, POLICY, tokens)))
    expected = dict.fromkeys(LOSS.sum_names, 0.0)
    for row, branch in [(row, branch) for row in rows for branch in row.branches]:
        logits, action = [], row.tokens[branch.start : branch.stop]
        for params, context in (
            (state.params, row.tokens[: branch.start]),
            (state.ema, row.tokens[: branch.seen] + branch.words),
        ):
            tokens = np.zeros((1, 24), np.int32)  # one length, one compilation
            tokens[0, : len(context + action)] = context + action
            logits.append(np.array(score(params, tokens))[0, len(context) - 1 : len(context + action) - 1])
        for student, teacher, token, sampled in zip(*logits, action, branch.sampled, strict=True):
            s, t = oracle_log_softmax(student), oracle_log_softmax(teacher)
            top = np.argsort(-s)[: LOSS.top_k]
            p, q = (
                np.append(x[top], np.log(1 - np.exp(np.minimum(np.log(np.exp(x[top]).sum()), -1e-7)))) for x in (s, t)
            )
            expected["loss"] += np.sum(np.exp(p) * (p - q))
            expected["divergence"] += np.sum(np.exp(p) * (p - q))
            expected["tokens"] += 1
            expected["taught"] += 1
            expected["entropy"] -= np.sum(np.exp(s) * s)
            expected["logprob"] += s[token]
            expected["teacher_gap"] += t[token] - s[token]
            expected["mismatch"] += abs(s[token] - sampled)
            expected["mismatch_max"] = max(expected["mismatch_max"], abs(s[token] - sampled))
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    sft = gather(batches_of(rows), state, SFT).sums
    assert "teacher_gap" not in sft
    np.testing.assert_allclose(sft["loss"], -expected["logprob"], rtol=1e-5)
    for name in ("mismatch", "mismatch_max", "entropy"):
        np.testing.assert_allclose(sft[name], expected[name], rtol=1e-5, err_msg=name)


@st.composite
def training_steps(draw):
    """Rows of up to three targets, of any layout that SHAPES and ALONE hold; some rows become several in SHAPES."""
    rng, rows = np.random.default_rng(draw(st.integers(0, 10**6))), []
    ids = lambda n: tuple(int(i) for i in rng.integers(0, POLICY.vocab_size, n))
    for n in range(draw(st.integers(1, 9))):
        branches, at = [], 0
        for number in range(1, draw(st.integers(1, 3)) + 1):
            start = at + draw(st.integers(1, 5))
            at = start + draw(st.integers(1, 4))
            seen, words = start - draw(st.integers(0, min(start, 5))), ids(draw(st.integers(1, 6)))
            branches.append(Branch(number, start, at, seen, words, tuple(rng.normal(-3, 1, at - start).tolist())))
        rows.append(Row(n, ids(at), tuple(branches), micro=n // 2, key=(n, 5)))
    return rows


@given(training_steps(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_trunk_and_branches_equal_one_row_per_target(rows, mean_of_micro_means):
    """Losses and gradients within 1e-5 in fp32, whatever the episodes."""
    options = {"mean_of_micro_means": mean_of_micro_means}
    together, apart = batches_of(rows, **options), batches_of(alone(rows), shapes=ALONE, **options)
    state = shared_state()
    assert_same_update(gather(together, state), gather(apart, state))


@pytest.mark.parametrize("loss", [LOSS, SFT], ids=["distill", "sft"])
def test_micro_batches_add_up_to_the_big_batch(loss):
    rows = make_rows()
    whole, parts = gather(batches_of(rows), loss=loss), gather(batches_of(rows[3:], rows[:1], rows[1:3]), loss=loss)
    assert_trees_close(parts, whole)
    assert float(whole.sums["tokens"]) == tokens_of(rows)


def test_padding_adds_nothing():
    rows = make_rows()
    tight = gather(batches_of(rows))
    assert_trees_close(gather([blank_batch(SHAPES, 32, 0), *batches_of(rows)]), tight)
    # what stands in the padding does not matter; longer buckets: see the test of both forms
    (loose,) = batches_of(rows)
    ends = np.where(loose.mask_BA, loose.student_at_BA + 2, 0).max(axis=1)
    for tokens_BT in (loose.student_BT, loose.trunk_BP):
        tokens_BT[np.arange(32) >= ends[:, None]] = 17
    nothing = loose.branch_id_BM < 0
    loose.stream_BM[nothing], loose.position_BM[nothing], loose.prefix_length_BM[nothing] = 17, 3, 30
    loose.actions_BA[~loose.mask_BA], loose.sampled_BA[~loose.mask_BA] = 13, -99.0
    loose.student_at_BA[~loose.mask_BA], loose.teacher_at_BA[~loose.mask_BA] = 31, 23
    assert_trees_close(gather([loose]), tight)


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
    with jax.set_mesh(MESH):
        state, metrics = apply(state, accumulator, optim=OPTIM)
    # Adam's first step: m / (1 - b1) = g and v / (1 - b2) = g^2
    params = jax.tree.map(lambda p, g: p - 1e-2 * (g / (np.abs(g) + 1e-8) + 0.1 * p), before.params, clipped)
    # entries whose gradient is rounding noise beside eps have no well-defined first step
    solid = jax.tree.map(lambda g: np.abs(g) > 1e-6, clipped)
    jax.tree.map(
        lambda a, b, s: np.testing.assert_allclose(np.array(a)[s], b[s], atol=2e-5), state.params, params, solid
    )
    ema = jax.tree.map(lambda old, new: old + 0.1 * (np.float64(new) - old), before.ema, host(state.params))
    assert_trees_close(state.ema, ema, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema, accumulator.grads))} == {
        jnp.dtype("float32")
    }
    counts = [int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")]
    assert int(state.step) == 1 and set(counts) == {1}
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for name in LOSS.sum_names:
        divisor = 1.0 if name in ("tokens", "taught", "mismatch_max") else tokens
        np.testing.assert_allclose(metrics[name], accumulator.sums[name] / divisor, rtol=1e-6)
    assert float(metrics["skipped"]) == 0.0


@pytest.mark.parametrize("batches", [[], [blank_batch(SHAPES, 32, 0)]], ids=["no batch", "only padding"])
def test_a_step_without_target_tokens_changes_nothing_and_says_so(batches):
    state, _ = step(make_state(), batches_of(make_rows()))
    before = host(state)  # moments are not zero, and weight decay would move the weights without any gradient
    state, metrics = step(state, batches)
    assert_trees_equal(state, before)
    assert float(metrics["skipped"]) == 1.0 and float(metrics["tokens"]) == 0.0
    assert all(np.isfinite(value) for value in metrics.values())


def test_teacher_gets_no_gradient_and_is_not_the_student():
    state = make_state()
    (batch,) = batches_of(make_rows())
    loss = lambda params, ema: batch_losses(params, ema, batch, POLICY, LOSS)[0]["loss"]
    assert not any(
        np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, argnums=1))(state.params, state.ema))
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gather([batch], state).grads))
    # and yet the loss does depend on it
    losses = [gather([batch], state.replace(ema=ema)).sums["loss"] for ema in (state.ema, state.params)]
    assert losses[0] != losses[1]


def test_identical_contexts_and_weights_have_no_loss():
    state = create(make_params(), OPTIM)
    same = lambda row, branch: dataclasses.replace(branch, words=row.tokens[branch.seen : branch.start])
    rows = [
        dataclasses.replace(row, branches=tuple(same(row, branch) for branch in row.branches)) for row in make_rows()
    ]
    accumulator = gather(batches_of(rows), state)
    np.testing.assert_allclose(accumulator.sums["loss"], 0, atol=1e-4)
    np.testing.assert_allclose(accumulator.sums["teacher_gap"], 0, atol=1e-4)


@pytest.mark.parametrize("loss", [LOSS, SFT], ids=["distill", "sft"])
def test_updates_lower_the_loss(loss):
    state, batches = make_state(), batches_of(make_rows())
    history = []
    for _ in range(8):
        state, metrics = step(state, batches, loss)
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.8 * history[0]


def test_buffers_are_donated_and_the_callers_weights_survive():
    params = make_params()
    state = create(params, OPTIM)
    (batch,) = batches_of(make_rows())
    with jax.set_mesh(MESH):
        accumulator = zeros(state.params, LOSS)
        added, _ = accumulate(None, state, accumulator, put_rows(batch, MESH), policy=POLICY, loss=LOSS)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(accumulator))
        after, _ = apply(state, added, optim=OPTIM)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, after)))


def test_one_compilation_per_bucket_whatever_the_rows(caplog):
    """Blank batches compile everything; what comes later compiles nothing."""
    shapes = dataclasses.replace(SHAPES, length_buckets=(9, 32))
    caplog.set_level("WARNING", "jax")
    compiled = lambda name: sum(record.getMessage().startswith(f"Compiling jit({name})") for record in caplog.records)
    with jax.log_compiles():
        state, _ = step(make_state(), [blank_batch(shapes, *which) for which in shapes.all()], SFT)
        assert compiled("accumulate") in (1, 2)  # one is every other test's
        assert compiled("apply") <= 1
        caplog.clear()
        seen = set()
        for seed in range(5):
            batches = batches_of(make_rows(7 + seed, seed), shapes=shapes)
            seen |= {(batch.student_BT.shape, batch.actions_BA.shape) for batch in batches}
            state, _ = step(state, batches, SFT)
    assert len(seen) == len(shapes.all()) == 2 and int(state.step) == 5
    assert compiled("accumulate") == compiled("apply") == 0


def test_no_array_holds_the_vocabulary_for_a_whole_row():
    policy = dataclasses.replace(POLICY, vocab_size=997)
    params = jax.eval_shape(functools.partial(decoder.init_params, policy), jax.random.key(0))
    state = TrainState(np.int32(0), params, params, jax.eval_shape(optimizer(OPTIM).init, params))
    (batch,) = batches_of(make_rows())
    sums = jax.eval_shape(lambda: {name: jnp.zeros(()) for name in LOSS.sum_names})
    run = functools.partial(accumulate, None, policy=policy, loss=LOSS)
    jaxpr = jax.make_jaxpr(run)(state, Accumulator(grads=state.params, sums=sums), batch)
    shapes = set(re.findall(r"\[([\d,]*\b997\b[\d,]*)\]", str(jaxpr)))
    assert "12,997" in shapes  # the logits of a chunk
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == 997 * POLICY.d_model  # the embedding


# Adapters: ADAPTED on frozen weights.


def test_an_adapter_is_all_that_is_trained():
    frozen, state = make_params(), make_adapter_state()
    before, shapes = host((frozen, state)), [leaf.shape for leaf in jax.tree.leaves(state.params)]
    state, metrics = step(state, batches_of(make_rows()), frozen=frozen, policy=ADAPTED)
    assert float(metrics["skipped"]) == 0.0 and int(state.step) == 1
    assert_trees_equal(frozen, before[0])  # it is alive, and as it was
    structure = jax.tree.structure(before[1].params)
    assert jax.tree.structure(state.params) == jax.tree.structure(state.ema) == structure
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert [leaf.shape for leaf in moments] == 2 * shapes
    for old, new in ((before[1].params, state.params), (before[1].ema, state.ema)):
        assert all(np.all(a != b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(host(new)), strict=True))
    ema = jax.tree.map(lambda old, new: old + 0.1 * (np.float64(new) - old), before[1].ema, host(state.params))
    assert_trees_close(state.ema, ema, rtol=1e-6)


def merged(frozen, state):
    """The same student and teacher without adapters."""
    whole = lambda tree: laid_out(merge(frozen, tree, ADAPTED.lora), decoder.logical_axes(POLICY))
    return shared_state().replace(params=whole(state.params), ema=whole(state.ema))


def test_gradients_of_an_adapter_follow_from_those_of_the_merged_weights():
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, with dL/dW from the update of all weights at W + s A B."""
    policy = dataclasses.replace(ADAPTED, lora=dataclasses.replace(ADAPTED.lora, dropout=0.0))
    frozen, state, batches = make_params(), make_adapter_state(), batches_of(make_rows())
    whole, adapted = gather(batches, merged(frozen, state), SFT), gather(batches, state, SFT, frozen, policy)
    grads = {}
    for part, modules in host(state.params["layers"]).items():
        for module, pair in modules.items():
            a, b = (pair[name].astype(np.float64) for name in "ab")
            rank, layers = policy.lora.rank, POLICY.num_layers
            a_NDR, b_NRE = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
            w_NDE = np.float64(whole.grads["layers"][part][module]["kernel"]).reshape(layers, a_NDR.shape[1], -1)
            by_a, by_b = np.einsum("nde,nre->ndr", w_NDE, b_NRE), np.einsum("ndr,nde->nre", a_NDR, w_NDE)
            scaled = {"a": 1.5 * by_a.reshape(a.shape), "b": 1.5 * by_b.reshape(b.shape)}
            grads.setdefault(part, {})[module] = scaled
    assert_same_update(adapted, Accumulator(grads={"layers": grads}, sums=whole.sums), rtol=3e-5)


def test_adapter_dropout_is_the_same_in_both_forms_and_on_the_students_side_only():
    frozen, state, rows = make_params(), make_adapter_state(), make_rows()
    scored = lambda rows: gather(batches_of(rows), state, frozen=frozen, policy=ADAPTED)
    together = scored(rows)
    assert len(alone(rows)) > len(rows)
    assert_same_update(together, scored(alone(rows)))  # in the same shape: no branch looks back
    # the mask is that of the row's key, wherever the row stands
    assert_same_update(scored([dataclasses.replace(row, episode=9 - row.episode) for row in rows]), together)
    other = scored([dataclasses.replace(row, key=(1, row.key[1])) for row in rows])
    assert abs(other.sums["loss"] - together.sums["loss"]) > 1e-3 * together.sums["loss"]
    # the teacher scores as without any dropout, the student does not
    plain = gather(batches_of(rows), merged(frozen, state))
    teacher = lambda accumulator: accumulator.sums["teacher_gap"] + accumulator.sums["logprob"]
    np.testing.assert_allclose([teacher(together), teacher(other)], 2 * [teacher(plain)], rtol=1e-5)
    assert abs(plain.sums["logprob"] - together.sums["logprob"]) > 1e-3 * abs(plain.sums["logprob"])


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_moments_lie_as_their_parameters(clip_norm):
    """Adam's two are as large as the weights: they are scattered with them, not on every device."""
    mesh = jax.sharding.AbstractMesh((2, 2, 2), MESH.axis_names)
    params = jax.eval_shape(functools.partial(decoder.init_params, POLICY), jax.random.key(0))
    layout = shardings(params, decoder.logical_axes(POLICY), mesh, "train")
    assert len({str(sharding.spec) for sharding in jax.tree.leaves(layout)}) > 3
    opt_state = jax.eval_shape(optimizer(dataclasses.replace(OPTIM, clip_norm=clip_norm)).init, params)
    lie = moment_shardings(opt_state, layout)
    assert jax.tree.structure(lie) == jax.tree.structure(opt_state)
    assert [found for _, found in optax.tree_utils.tree_get_all_with_path(lie, "mu")] == [layout]
    assert [found for _, found in optax.tree_utils.tree_get_all_with_path(lie, "nu")] == [layout]
    counters = [found for _, found in optax.tree_utils.tree_get_all_with_path(lie, "count")]
    assert counters and all(found.is_fully_replicated for found in counters)


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
