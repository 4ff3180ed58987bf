"""The update: trunk and branches against one example per target, accumulation, the single division, optimizer, EMA,
skipping, donation, adapters, the number of compilations.
"""

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

from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import LoraConfig, PolicyConfig
from hintsd_jax.models.sharding import make_mesh, put_batch, shardings
from hintsd_jax.training.batching import BatchShapes, blank_batch, make_batches
from hintsd_jax.training.examples import Branch, Example
from hintsd_jax.training.loss_parts import CrossEntropy, Divergence, PolicyGradient, ReferenceKL
from hintsd_jax.training.losses import Loss
from hintsd_jax.training.state import OptimConfig, TrainState, create, optimizer
from hintsd_jax.training.train_step import Accumulator, When, accumulate, apply, batch_losses, update, zeros
from tests import loss_oracles

POLICY = PolicyConfig(
    vocab_size=31, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24,
    rope_theta=1e4, norm_eps=1e-6, tie_embeddings=True, max_positions=64, remat=False,
)  # fmt: skip
ADAPTED = dataclasses.replace(
    POLICY, lora=LoraConfig(rank=2, alpha=3.0, dropout=0.3, targets=("q_proj", "o_proj", "up_proj"))
)
# Two losses for all: one with a teacher and parts that act on different tokens, one without a teacher.
LOSS = Loss((Divergence(top_k=5), PolicyGradient(coefficient=0.5)), chunk_tokens=12)
SFT = Loss((CrossEntropy(),), chunk_tokens=12)
DISTIL = Loss((Divergence(top_k=5),), chunk_tokens=12)  # the only one with adapter dropout
OPTIM = OptimConfig(lr=1e-2, schedule="constant", total_steps=10, ema_decay=0.9, clip_norm=0.5, weight_decay=0.1)
MESH = make_mesh(devices=jax.devices()[:1])
# Nearly every test's batches have one of these shapes: a compilation costs far more than running it.
SHAPES = BatchShapes((32,), (24,), (8,), batch_size=6, parts=2)
ALONE = BatchShapes((32,), (40,), (4,), batch_size=6, parts=2, trunk=False, packed=False)


def make_branch(rng, step, start, stop, prefix_length, context):
    """Trained on by both parts of LOSS where a teacher reads it, else by the policy gradient alone."""
    weights = ({"divergence": 1.0} if context else {}) | {"policy_gradient": 1.0}
    logprobs = tuple(rng.normal(-3, 1, stop - start).tolist())
    return Branch(step, start, stop, prefix_length, context, logprobs, weights, advantage=float(rng.normal()))


def make_examples(number=5, seed=0):
    """Examples of one or two actions; a teacher reads all but the second of the fourth. The first 5 are one batch in
    SHAPES.
    """
    rng = np.random.default_rng(seed)
    ids = lambda n: tuple(int(i) for i in rng.integers(0, POLICY.vocab_size, n))
    result = []
    for n in range(number):
        branches, at = [], int(rng.integers(1, 4))
        for step in range(1, 2 + n % 2):
            start, size = at + int(rng.integers(1, 3)), 1 + (n + step) % 3
            prefix_length, at = start - int(rng.integers(1, 3)), start + size
            context = ids(int(rng.integers(1, 4)))
            where = (0, ()) if n % 4 == 3 and step == 2 else (prefix_length, context)
            branches.append(make_branch(rng, step, start, at, *where))
        result.append(Example(n, ids(at), tuple(branches), micro_step=n // 3, key=(seed, n)))
    return result


def reweighted(example, weights):
    branches = [dataclasses.replace(branch, weights=weights) for branch in example.branches]
    return dataclasses.replace(example, branches=tuple(branches))


def separated(examples):
    return [part for example in examples for part in example.separated()]


def tokens_of(examples):
    return sum(branch.action_tokens for example in examples for branch in example.branches)


def batches_of(*micro_batches, shapes=SHAPES, loss=LOSS, **options):
    """One batch for each of the lists of examples; a loss of one part acts on all tokens."""
    batches = []
    for examples in micro_batches:
        if loss is not LOSS:
            examples = [reweighted(example, {part.name: 1.0 for part in loss.parts}) for example in examples]
        result = make_batches(examples, dataclasses.replace(shapes, parts=len(loss.parts)), loss, **options)
        assert not any(result.dropped.values())
        batches += result.batches
    return batches


def laid_out(tree, axes):
    return jax.device_put(tree, shardings(tree, axes, MESH, "train"))


@functools.cache
def initial(seed):
    """Random weights; drawn by NumPy, because compiling `init_params` takes longer than most tests here."""
    shapes = jax.eval_shape(functools.partial(decoder.init_params, POLICY), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        norm = "norm" in jax.tree_util.keystr(path)
        return np.float32(rng.normal(float(norm), 0.1 if norm else 0.25, leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_params(seed=0):
    return laid_out(initial(seed), decoder.logical_axes(POLICY))


def with_teacher(state, teacher, axes):
    return state.replace(ema=laid_out(teacher, axes))


@functools.cache
def shared_state():
    """A state whose teacher is not the student; for tests that only read it."""
    teacher = jax.tree.map(lambda a, b: np.float32(0.7) * a + np.float32(0.3) * b, initial(0), initial(100))
    return with_teacher(create(make_params(), OPTIM), teacher, decoder.logical_axes(POLICY))


def make_state():
    """A copy that may be donated; `create` would compile anew."""
    return jax.tree.map(lambda leaf: jax.device_put(np.array(leaf), leaf.sharding), shared_state())


def make_adapter_state():
    """An adapter with no zero in it, and another one as its teacher."""
    shapes = jax.eval_shape(functools.partial(lora.init_adapter, ADAPTED), jax.random.key(0))
    rng, axes = np.random.default_rng(8), lora.logical_axes(ADAPTED)
    student, teacher = (
        jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes) for _ in range(2)
    )
    return with_teacher(create(laid_out(student, axes), OPTIM), teacher, axes)


def gather(batches, state=None, loss=LOSS, frozen=None, policy=POLICY, reference=None):
    state = shared_state() if state is None else state
    with jax.set_mesh(MESH):
        accumulator = zeros(state.params, loss)
        for batch in batches:
            arrays = (frozen, state, accumulator, put_batch(batch, MESH), reference)
            accumulator, _ = accumulate(*arrays, policy=policy, loss=loss)
    return accumulator


def step(state, batches, loss=LOSS, frozen=None, policy=POLICY):
    return update(frozen, state, batches, policy=policy, loss=loss, optim=OPTIM, mesh=MESH)[:2]


def assert_trees_close(actual, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_same_update(actual, expected, rtol=1e-5):
    """Of two accumulators: sums within rtol of each, gradients within rtol of the largest entry of each array, or of a
    tenth of the largest of all: in the gradients of queries and keys terms as large as that cancel, of a lone token to
    0, and 1e-6 of them are eight roundings of float32.
    """
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected.grads))
    for name in expected.sums:
        np.testing.assert_allclose(actual.sums[name], expected.sums[name], rtol=rtol, atol=1e-5, err_msg=name)

    def close(path, a, b):
        a, b = np.array(a), np.array(b)
        assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), largest / 10), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(close, actual.grads, expected.grads)


def test_sums_match_scoring_every_target_on_its_own():
    """Actions one by one, and the reference's formulas in float64, against the batch."""
    state, examples = make_state(), make_examples()
    sums = gather(batches_of(examples), state).sums
    score = jax.jit(lambda params, tokens: decoder.project(params, POLICY, decoder.forward(params, POLICY, tokens)))
    expected = dict.fromkeys(LOSS.sum_names, 0.0)
    part_sums = dict.fromkeys((part.name for part in LOSS.parts), 0.0)
    pairs = [(example, branch) for example in examples for branch in example.branches]
    for example, branch in pairs:
        logits, action = [], example.tokens[branch.start : branch.stop]
        for params, context in (
            (state.params, example.tokens[: branch.start]),
            (state.ema, example.tokens[: branch.prefix_length] + branch.context),
        ):
            tokens = np.zeros((1, 24), np.int32)  # one length, one compilation
            tokens[0, : len(context + action)] = context + action
            logits.append(np.array(score(params, tokens))[0, max(len(context), 1) - 1 :][: len(action)])
        scored = bool(branch.context)
        for student, teacher, token, sampler in zip(*logits, action, branch.logprobs, strict=True):
            s, t = loss_oracles.log_softmax(student), loss_oracles.log_softmax(teacher)
            for part in (part for part in LOSS.parts if part.name in branch.weights):
                value, reported = loss_oracles.token_loss(
                    part, student, teacher, token, sampler, branch.advantage, scored
                )
                part_sums[part.name] += value
                expected[f"{part.name}_tokens"] += 1
                for name in part.reports:
                    expected[name] += reported[name]
            expected["tokens"] += 1
            expected["entropy"] -= np.sum(np.exp(s) * s)
            expected["logprob"] += s[token]
            expected["teacher_scored_tokens"] += scored
            expected["teacher_gap"] += scored * (t[token] - s[token])
            expected["logprob_mismatch"] += abs(s[token] - sampler)
            expected["logprob_mismatch_max"] = max(expected["logprob_mismatch_max"], abs(s[token] - sampler))
    assert 0 < expected["divergence_tokens"] < expected["policy_gradient_tokens"] == expected["tokens"]
    # each part's mean over its own tokens, times its coefficient; the sum is divided by all tokens later
    means = [part.coefficient * part_sums[part.name] / expected[f"{part.name}_tokens"] for part in LOSS.parts]
    expected["loss"] = expected["tokens"] * sum(means)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    sft = gather(batches_of(examples, loss=SFT), state, SFT).sums
    assert "teacher_gap" not in sft
    np.testing.assert_allclose(sft["loss"], -expected["logprob"], rtol=1e-5)
    for name in ("logprob_mismatch", "logprob_mismatch_max", "entropy"):
        np.testing.assert_allclose(sft[name], expected[name], rtol=1e-5, err_msg=name)


@st.composite
def training_steps(draw):
    """Examples of up to three actions, of any layout that SHAPES and ALONE hold; some become several in SHAPES."""
    rng, result = np.random.default_rng(draw(st.integers(0, 10**6))), []
    ids = lambda n: tuple(int(i) for i in rng.integers(0, POLICY.vocab_size, n))
    for n in range(draw(st.integers(1, 9))):
        branches, at = [], 0
        for number in range(1, draw(st.integers(1, 3)) + 1):
            start = at + draw(st.integers(1, 5))
            at = start + draw(st.integers(1, 4))
            prefix_length, context = start - draw(st.integers(0, min(start, 5))), ids(draw(st.integers(1, 6)))
            where = (prefix_length, context) if draw(st.integers(0, 4)) else (0, ())
            branches.append(make_branch(rng, number, start, at, *where))
        result.append(Example(n, ids(at), tuple(branches), micro_step=n // 2, key=(n, 5)))
    return result


@given(training_steps(), st.sampled_from([0, 6]))
@settings(max_examples=25, deadline=None)
def test_trunk_and_branches_equal_one_example_per_target(examples, micro_steps):
    """Losses and gradients within 1e-5 in fp32, whatever the episodes; so do they where what no teacher reads stands in
    batches without a teacher's pass.
    """
    options, state = {"micro_steps": micro_steps}, shared_state()
    together, alone = batches_of(examples, **options), batches_of(separated(examples), shapes=ALONE, **options)
    expected = gather(alone, state)
    assert_same_update(gather(together, state), expected)
    apart = batches_of(separated(examples), shapes=dataclasses.replace(ALONE, unscored=True), **options)
    assert any(not batch.branch_BM.shape[1] for batch in apart) == any(
        not branch.context for example in examples for branch in example.branches
    )
    assert_same_update(gather(apart, state), expected)


def test_packed_rows_are_one_row_for_each_example():
    """Losses and gradients, and the masks of an adapter's dropout with them: another key, place or neighbour would be
    another loss.
    """
    frozen, state = make_params(), make_adapter_state()
    examples = [one for one in make_examples(9, seed=4) if all(branch.context for branch in one.branches)]
    packed, alone = (
        batches_of(examples, shapes=dataclasses.replace(SHAPES, packed=packed), loss=DISTIL) for packed in (True, False)
    )
    rows = [sum(int(batch.mask_BA.any(axis=1).sum()) for batch in batches) for batches in (packed, alone)]
    assert rows[0] < rows[1] == len(examples)
    got, expected = (gather(batches, state, DISTIL, frozen, ADAPTED) for batches in (packed, alone))
    assert_same_update(got, expected, rtol=2e-6)
    for batch in packed:
        batch.dropout_key_BT2[...] += 1
    moved = gather(packed, state, DISTIL, frozen, ADAPTED)
    assert abs(moved.sums["loss"] / expected.sums["loss"] - 1) > 1e-3


def test_openclaw_rl_is_the_same_in_batches_without_a_teacher():
    loss = Loss((PolicyGradient(teacher_advantage=1.0),), 12)
    examples = separated(make_examples())
    with_one, apart = (
        batches_of(examples, shapes=dataclasses.replace(ALONE, unscored=unscored), loss=loss)
        for unscored in (False, True)
    )
    assert sum(batch.scored_BA.sum() for batch in apart) < tokens_of(examples)
    assert [batch.branch_BM.shape[1] for batch in apart] == [40, 0] and len(with_one) == 2
    assert_same_update(gather(apart, loss=loss), gather(with_one, loss=loss))


def test_the_reference_scores_the_students_context():
    """KL(student || reference) of every action token, by float64; with an adapter the reference is one as well."""
    loss = Loss((PolicyGradient(), ReferenceKL(coefficient=0.5)), chunk_tokens=12)
    examples = make_examples()
    shapes = dataclasses.replace(SHAPES, branch_buckets=(0,), trunk=False)
    unread = [
        dataclasses.replace(
            example,
            branches=tuple(dataclasses.replace(b, context=(), prefix_length=0) for b in example.branches),
        )
        for example in examples
    ]
    batches, state, start = batches_of(unread, shapes=shapes, loss=loss), shared_state(), make_params(7)
    sums = gather(batches, state, loss, reference=start).sums
    score = jax.jit(lambda params, tokens: decoder.project(params, POLICY, decoder.forward(params, POLICY, tokens)))
    expected = 0.0
    for example in unread:
        tokens = np.zeros((1, 24), np.int32)
        tokens[0, : len(example.tokens)] = example.tokens
        student, reference = (np.array(score(params, tokens))[0] for params in (state.params, start))
        for branch in example.branches:
            for at in range(branch.start - 1, branch.stop - 1):
                s, r = loss_oracles.log_softmax(student[at]), loss_oracles.log_softmax(reference[at])
                expected += np.sum(np.exp(s) * (s - r))
    np.testing.assert_allclose(sums["reference_kl"], expected, rtol=1e-4)
    assert sums["reference_kl_tokens"] == tokens_of(unread)
    at_the_start = gather(batches, state, loss, reference=state.params).sums
    np.testing.assert_allclose(at_the_start["reference_kl"], 0, atol=1e-5)
    with pytest.raises(ValueError, match="give the reference"):
        gather(batches, state, loss)


@pytest.mark.parametrize("loss", [LOSS, SFT], ids=["distil", "sft"])
def test_micro_batches_add_up_to_the_big_batch(loss):
    """Where weights are one: with parts that act on some of the tokens, these are scaled by the whole step's counts."""
    examples = [example for example in make_examples() if example.episode != 3]
    examples = [*examples, dataclasses.replace(examples[-1], episode=5)]
    whole = gather(batches_of(examples, loss=loss), loss=loss)
    parts = gather(batches_of(examples[3:], examples[:1], examples[1:3], loss=loss), loss=loss)
    assert_trees_close(parts, whole)
    assert float(whole.sums["tokens"]) == tokens_of(examples)


def test_padding_adds_nothing():
    examples = make_examples()
    tight = gather(batches_of(examples))
    assert_trees_close(gather([blank_batch(SHAPES, 32, 0), *batches_of(examples)]), tight)
    # what stands in the padding does not matter; longer buckets: see the test of both layouts
    (loose,) = batches_of(examples)
    ends = np.where(loose.mask_BA, loose.student_at_BA + 2, 0).max(axis=1)
    for tokens_BT in (loose.student_BT, loose.trunk_BP):
        tokens_BT[np.arange(32) >= ends[:, None]] = 17
    nothing, out = loose.branch_id_BM < 0, ~loose.mask_BA
    loose.branch_BM[nothing], loose.position_BM[nothing] = 17, 3
    loose.prefix_start_BM[nothing], loose.prefix_stop_BM[nothing] = 2, 30
    loose.actions_BA[out], loose.sampler_logprob_BA[out] = 13, -9.0
    loose.student_at_BA[out], loose.teacher_at_BA[out] = 31, 23
    loose.weight_BAP[out], loose.advantage_BA[out], loose.scored_BA[out] = 2.0, -1.0, True
    assert_trees_close(gather([loose]), tight)


def test_the_mean_of_micro_means_is_another_update_on_unequal_micro_steps():
    """Equal to averaging the micro-steps' own token means, one without a token as 0, and not the token mean."""
    examples, state = make_examples(), make_state()
    mean = lambda examples, **options: (
        lambda a: jax.tree.map(lambda g: np.array(g) / np.array(a.sums["tokens"]), (a.grads, a.sums["loss"]))
    )(gather(batches_of(examples, loss=SFT, **options), state, SFT))
    released = mean(examples, micro_steps=3)
    by_hand = jax.tree.map(lambda a, b: (a + b + 0) / 3, mean(examples[:3]), mean(examples[3:]))
    assert_trees_close(released, by_hand)
    assert abs(released[1] - mean(examples)[1]) > 1e-3 * abs(released[1])


def test_apply_is_adamw_and_the_ema_follows_it():
    state = make_state()
    accumulator = gather(batches_of(make_examples()), state)
    tokens = float(accumulator.sums["tokens"])
    grads = jax.tree.map(lambda g: np.array(g, np.float64) / tokens, accumulator.grads)
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    clipped = jax.tree.map(lambda g: g * min(1.0, 0.5 / norm), grads)
    before = host(state)
    with jax.set_mesh(MESH):
        state, metrics = apply(state, accumulator, When.at(), loss=LOSS, optim=OPTIM)
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
        counted = LOSS.mean_over.get(name)
        divisor = float(accumulator.sums[counted]) if counted else 1.0
        np.testing.assert_allclose(metrics[name], accumulator.sums[name] / divisor, rtol=1e-6)
    own = LOSS.mean_over
    assert (own["divergence"], own["clip_fraction"]) == ("divergence_tokens", "policy_gradient_tokens")
    assert (own["loss"], own["teacher_gap"]) == ("tokens", "teacher_scored_tokens")
    assert float(metrics["skipped"]) == 0.0


BLANKS = {"no batch": [], "only padding": [blank_batch(SHAPES, 32, 0)]}


@pytest.mark.parametrize("batches", BLANKS.values(), ids=BLANKS)
def test_a_step_without_target_tokens_changes_nothing_and_says_so(batches):
    state, _ = step(make_state(), batches_of(make_examples()))
    before = host(state)  # moments are not zero, and weight decay would move the weights without any gradient
    state, metrics = step(state, batches)
    assert_trees_equal(state, before)
    assert float(metrics["skipped"]) == 1.0 and float(metrics["tokens"]) == 0.0
    assert all(np.isfinite(value) for value in metrics.values())


def spoiled(name, value):
    """The batches of the first examples with one number of one array spoiled, in a place that counts."""
    (batch,) = batches_of(make_examples())
    array = getattr(batch, name).copy()
    array[tuple(np.argwhere(batch.mask_BA)[-1])] = value
    return [batch._replace(**{name: array})]


@pytest.mark.parametrize(
    "name, value",
    [("sampler_logprob_BA", math.nan), ("sampler_logprob_BA", -math.inf), ("advantage_BA", math.nan)]
    + [("advantage_BA", 1e25), ("weight_BAP", math.inf)],  # 1e25: the loss is finite, the square of its gradient is not
)
def test_a_batch_with_a_number_that_is_not_finite_leaves_no_trace(name, value):
    """Weights, EMA and Adam's moments are, bit for bit, those of a run that never saw it."""
    first, last = batches_of(make_examples()), batches_of(make_examples(seed=1))
    state, metrics = step(make_state(), first)
    assert float(metrics["nonfinite"]) == 0.0
    state, metrics = step(state, first + spoiled(name, value))
    assert (float(metrics["nonfinite"]), float(metrics["skipped"]), float(metrics["lr"])) == (1.0, 1.0, 0.0)
    state, _ = step(state, last)
    without, _ = step(make_state(), first)
    without, _ = step(without, last)
    assert_trees_equal(state, without)


def test_an_update_that_breaks_the_weights_says_so():
    """An absurd learning rate: the gradient is finite, what becomes of it is not."""
    batches = batches_of(make_examples())
    run = functools.partial(update, None, policy=POLICY, loss=LOSS, optim=OPTIM, mesh=MESH)
    _, metrics, _ = run(make_state(), batches, When.at(lr_scale=math.inf))
    assert (float(metrics["nonfinite"]), float(metrics["skipped"])) == (1.0, 0.0)
    state = make_state()
    weights = jax.tree.map(lambda leaf: leaf * np.float32(math.nan), state.params)
    state = state.replace(params=weights)
    _, metrics, _ = run(state, batches)
    assert (float(metrics["nonfinite"]), float(metrics["skipped"])) == (1.0, 1.0)


def test_empty_updates_as_released_step_adam_with_a_gradient_of_0():
    """Its moments decay and move the weights on, and the EMA follows; a call that only compiles changes nothing still,
    not even with tokens.
    """
    released = dataclasses.replace(OPTIM, empty_updates="step")
    run = functools.partial(update, None, policy=POLICY, loss=LOSS, optim=released, mesh=MESH)
    batches = batches_of(make_examples())
    state, _, _ = run(make_state(), batches)
    before = host(state)
    for given_batches in ([], batches):
        state, metrics, _ = run(state, given_batches, When.at(real=False))
        assert_trees_equal(state, before)
    state, metrics, _ = run(state, [], When.at(1, lr_scale=0.5))
    (mu, nu), (m, v) = (adam_moments(each) for each in (before, host(state)))
    assert_trees_close(m, jax.tree.map(lambda x: 0.9 * x, mu), rtol=1e-6)
    assert_trees_close(v, jax.tree.map(lambda x: 0.999 * x, nu), rtol=1e-6)

    def moved(p, m, v):  # Adam's second step, with half the learning rate
        direction = m / (1 - 0.9**2) / (np.sqrt(v / (1 - 0.999**2)) + 1e-8)
        return p - 0.5e-2 * (direction + 0.1 * p)

    params = jax.tree.map(moved, before.params, m, v)
    assert_trees_close(state.params, params, rtol=1e-4)
    ema = jax.tree.map(lambda old, new: old + 0.1 * (np.float64(new) - old), before.ema, host(state.params))
    assert_trees_close(state.ema, ema, rtol=1e-6)
    assert int(state.step) == 2 and float(metrics["skipped"]) == 0.0 and float(metrics["tokens"]) == 0.0
    np.testing.assert_allclose(metrics["lr"], 0.5e-2, rtol=1e-6)
    assert all(np.isfinite(value) for value in metrics.values())


def adam_moments(state):
    (moments,) = (part for part in state.opt_state if hasattr(part, "mu"))
    return moments.mu, moments.nu


def test_the_learning_rate_follows_the_training_step_whatever_was_skipped():
    """It rises and falls by training steps, so that it reaches its end; alarms halve it all along."""
    optim = dataclasses.replace(OPTIM, schedule="linear", warmup_steps=2)
    run = functools.partial(update, None, policy=POLICY, loss=SFT, optim=optim, mesh=MESH)
    state, batches, rates = make_state(), batches_of(make_examples(), loss=SFT), []
    for training_step in range(11):
        skipped = training_step % 3 == 1
        when = When.at(training_step, 0.5 if training_step == 6 else 1.0)
        state, metrics, _ = run(state, [] if skipped else batches, when)
        rates.append(float(metrics["lr"]))
        assert float(metrics["skipped"]) == skipped
    full = [0, None, 1, 7 / 8, None, 5 / 8, 4 / 8 / 2, None, 2 / 8, 1 / 8, None]
    np.testing.assert_allclose(rates, [1e-2 * (rate or 0) for rate in full], rtol=1e-5, atol=1e-12)
    assert int(state.step) == 7


def test_teacher_gets_no_gradient_and_is_not_the_student():
    state = make_state()
    (batch,) = batches_of(make_examples())
    loss = lambda params, ema: batch_losses(params, ema, batch, POLICY, LOSS)[0]["loss"]
    assert not any(
        np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, argnums=1))(state.params, state.ema))
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gather([batch], state).grads))
    # and yet the loss does depend on it
    losses = [gather([batch], state.replace(ema=ema)).sums["loss"] for ema in (state.ema, state.params)]
    assert losses[0] != losses[1]


def test_identical_contexts_and_weights_have_no_loss():
    def same(example, branch):
        context = example.tokens[branch.prefix_length : branch.start] if branch.context else ()
        return dataclasses.replace(branch, context=context, advantage=0.0)

    examples = [
        dataclasses.replace(example, branches=tuple(same(example, branch) for branch in example.branches))
        for example in make_examples()
    ]
    sums = gather(batches_of(examples), create(make_params(), OPTIM)).sums
    for name in ("loss", "divergence", "teacher_gap"):
        np.testing.assert_allclose(sums[name], 0, atol=1e-4)


@pytest.mark.parametrize("loss, metric", [(LOSS, "divergence"), (SFT, "loss")], ids=["distil", "sft"])
def test_updates_lower_the_loss(loss, metric):
    state, batches = make_state(), batches_of(make_examples(), loss=loss)
    history = []
    for _ in range(8):
        state, metrics = step(state, batches, loss)
        history.append(float(metrics[metric]))
    assert history[-1] < 0.8 * history[0]


def test_buffers_are_donated_and_the_callers_weights_survive():
    params = make_params()
    state = create(params, OPTIM)
    (batch,) = batches_of(make_examples())
    with jax.set_mesh(MESH):
        accumulator = zeros(state.params, LOSS)
        added, _ = accumulate(None, state, accumulator, put_batch(batch, MESH), policy=POLICY, loss=LOSS)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(accumulator))
        after, _ = apply(state, added, When.at(), loss=LOSS, optim=OPTIM)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, after)))


def test_one_compilation_per_bucket_whatever_the_examples(caplog):
    """Blank batches compile everything; what comes later compiles nothing."""
    shapes = dataclasses.replace(SHAPES, length_buckets=(9, 32), parts=1)
    caplog.set_level("WARNING", "jax")
    compiled = lambda name: sum(record.getMessage().startswith(f"Compiling jit({name})") for record in caplog.records)
    with jax.log_compiles():
        state, _ = step(make_state(), [blank_batch(shapes, *which) for which in shapes.all()], SFT)
        assert compiled("accumulate") in (1, 2)  # one is every other test's
        assert compiled("apply") <= 1
        caplog.clear()
        shapes_met = set()
        for seed in range(5):
            batches = batches_of(make_examples(7 + seed if seed else 1, seed), shapes=shapes, loss=SFT)
            shapes_met |= {(batch.student_BT.shape, batch.actions_BA.shape) for batch in batches}
            state, _ = step(state, batches, SFT)
    assert len(shapes_met) == len(shapes.all()) == 2 and int(state.step) == 5
    assert compiled("accumulate") == compiled("apply") == 0


def test_no_array_holds_the_vocabulary_for_a_whole_row():
    policy = dataclasses.replace(POLICY, vocab_size=997)
    params = jax.eval_shape(functools.partial(decoder.init_params, policy), jax.random.key(0))
    state = TrainState(np.int32(0), params, params, jax.eval_shape(optimizer(OPTIM).init, params))
    (batch,) = batches_of(make_examples())
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
    # where the student is compared with the sampler, which has no dropout, it has none either
    batches = batches_of(make_examples())
    undropped = gather(batches, merged(frozen, state)).sums
    state, metrics = step(state, batches, frozen=frozen, policy=ADAPTED)
    np.testing.assert_allclose(metrics["logprob"], undropped["logprob"] / undropped["tokens"], rtol=1e-5)
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
    frozen, state, batches = make_params(), make_adapter_state(), batches_of(make_examples(), loss=SFT)
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


def test_adapter_dropout_is_the_same_in_both_layouts_and_on_the_students_side_only():
    frozen, state = make_params(), make_adapter_state()
    examples = [example for example in make_examples() if example.episode != 3]  # a teacher reads all of these
    scored = lambda examples, loss=DISTIL: gather(batches_of(examples, loss=loss), state, loss, frozen, ADAPTED)
    together = scored(examples)
    assert len(separated(examples)) > len(examples)
    assert_same_update(together, scored(separated(examples)))  # in the same shape: no branch leaves the trunk
    # the mask is that of the example's key, wherever the example stands
    assert_same_update(scored([dataclasses.replace(each, episode=9 - each.episode) for each in examples]), together)
    other = scored([dataclasses.replace(each, key=(1, each.key[1])) for each in examples])
    assert abs(other.sums["loss"] - together.sums["loss"]) > 1e-3 * together.sums["loss"]
    # the teacher scores as without any dropout, the student does not
    plain = gather(batches_of(examples), merged(frozen, state))
    teacher = lambda accumulator: accumulator.sums["teacher_gap"] + accumulator.sums["logprob"]
    np.testing.assert_allclose([teacher(together), teacher(other)], 2 * [teacher(plain)], rtol=1e-5)
    assert abs(plain.sums["logprob"] - together.sums["logprob"]) > 1e-3 * abs(plain.sums["logprob"])
