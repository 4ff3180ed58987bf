"""The loss of whole spans: sums against float64 oracles, gradients against finite differences, chunking and padding as
properties. What a part costs, token by token: see test_training_loss_parts.py.
"""

import dataclasses
import functools
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.errors import UserError
from hintsd_jax.models.sampling_distribution import SamplingDistribution, without_unknown
from hintsd_jax.training import losses
from hintsd_jax.training.loss_parts import CrossEntropy, Divergence, LossPart, PolicyGradient, ReferenceKL, TokenLosses
from hintsd_jax.training.losses import Loss
from tests import loss_oracles

V, D = 11, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement(LossPart):
    """A part from outside of the package: how much of its mass the student puts where the teacher's is, squared."""

    name: ClassVar[str] = "agreement"
    reports: ClassVar[tuple[str, ...]] = ("overlap", "doubt")
    power: float = 2.0

    @property
    def needs_teacher(self):
        return True

    def token_losses(self, tokens):
        teacher_XV, _ = tokens.teacher()
        overlap_X = jnp.sum(jnp.exp(tokens.student_XV + teacher_XV), axis=-1)
        return TokenLosses(-(overlap_X**self.power), {"overlap": overlap_X, "doubt": 1.0 - overlap_X})


DISTIL = Loss((Divergence(top_k=3),))
SUPERVISED = Loss((CrossEntropy(),))
ALL_PARTS = Loss(
    (
        Divergence(kind="jsd", support="teacher_topk", top_k=3, alpha=0.3, importance_clip=2.0),
        CrossEntropy(),
        PolicyGradient(clip_low=0.4, clip_high=0.5, teacher_advantage=0.7),
        Agreement(),
        ReferenceKL(),
    ),
    sampling=SamplingDistribution(0.6, top_p=0.9, top_k=6),
)
HOT, FILTERED = SamplingDistribution(0.6), SamplingDistribution(0.6, top_p=0.8)
LOSSES = [
    DISTIL,
    Loss((Divergence(kind="forward_kl", support="full"),)),
    SUPERVISED,
    Loss((PolicyGradient(),)),
    Loss((PolicyGradient(),), sampling=FILTERED),
    Loss((PolicyGradient(clip_low=0.4, teacher_advantage=1.0),), sampling=FILTERED),
    Loss((Divergence(top_k=3), PolicyGradient(clip_high=0.5, coefficient=3.0))),  # coefficients stand in the weights
    Loss((PolicyGradient(), ReferenceKL(coefficient=0.1)), sampling=HOT),
    Loss((Agreement(power=1.0), CrossEntropy())),
]


def name(loss):
    return "+".join(part.name for part in loss.parts)


@pytest.fixture(autouse=True, scope="module")
def no_silent_broadcast():
    with jax.numpy_rank_promotion("raise"):
        yield


def make_span(seed=0, rows=3, span=4, scale=2.0):
    """Random hidden states, heads, actions, log-probs and a ragged mask, float64; the tokens' weights differ, and every
    part leaves some tokens out.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, span + 1, rows)
    lengths[0] = span
    columns = np.arange(span)
    left_out = [columns == 1, columns % 4 == 2, columns % 4 == 3, columns % 4 == 0, columns % 4 == 2]
    acts_AP = ~np.stack(left_out, axis=-1)
    return {
        "student_BAD": rng.normal(size=(rows, span, D)),
        "teacher_BAD": rng.normal(size=(rows, span, D)),
        "reference_BAD": rng.normal(size=(rows, span, D)),
        "reference_DV": rng.normal(size=(D, V)) * scale / D**0.5,
        "student_DV": rng.normal(size=(D, V)) * scale / D**0.5,
        "teacher_DV": rng.normal(size=(D, V)) * scale / D**0.5,
        "actions_BA": rng.integers(0, V, (rows, span)),
        "mask_BA": columns[None] < lengths[:, None],
        "scored_BA": np.tile(columns != 1, (rows, 1)),  # no teacher has scored the second tokens
        "sampler_logprob_BA": -rng.uniform(0.5, 4.0, (rows, span)),
        "weight_BAP": rng.uniform(0.5, 2.0, (rows, span, 5)) * acts_AP,
        "advantage_BA": rng.normal(size=(rows, span)),
    }


def head(kernel, hidden):
    return hidden @ kernel


def span_losses(x, loss, dtype=jnp.float32, teacher=True):
    """The weights of as many parts as the loss has are read."""
    x = {k: jnp.asarray(v, dtype if jnp.issubdtype(v.dtype, jnp.floating) else None) for k, v in x.items()}
    x["weight_BAP"] = x["weight_BAP"][..., : len(loss.parts)]
    side = lambda name: losses.Side(x[f"{name}_BAD"], functools.partial(head, x[f"{name}_DV"]))
    spans = losses.Spans(*(x[field] for field in losses.Spans._fields))
    return losses.span_losses(
        side("student"), spans, loss=loss, teacher=side("teacher") if teacher else None, reference=side("reference")
    )


def oracle_token(part, s, t, *rest):
    if isinstance(part, Agreement):
        overlap = np.sum(np.exp(loss_oracles.log_softmax(s) + loss_oracles.log_softmax(t)))
        return -(overlap**part.power), {"overlap": overlap, "doubt": 1 - overlap}
    return loss_oracles.token_loss(part, s, t, *rest)


def oracle_sums(x, loss):
    sums = dict.fromkeys(loss.sum_names, 0.0)
    per_token = ("actions_BA", "sampler_logprob_BA", "advantage_BA", "scored_BA")
    for b, a in zip(*np.nonzero(x["mask_BA"]), strict=True):
        s, t, r = (x[f"{side}_BAD"][b, a] @ x[f"{side}_DV"] for side in ("student", "teacher", "reference"))
        log_s, log_t = loss_oracles.log_softmax(s), loss_oracles.log_softmax(t)
        action, sampler, advantage, scored = (x[key][b, a] for key in per_token)
        off = abs(loss_oracles.sampled_logprob(s, action, loss.sampling) - sampler)
        sums["tokens"] += 1
        sums["entropy"] -= np.sum(np.exp(log_s) * log_s)
        sums["logprob"] += log_s[action]
        sums["logprob_mismatch"] += off
        sums["logprob_mismatch_max"] = max(sums["logprob_mismatch_max"], off)
        if loss.needs_teacher and scored:
            sums["teacher_scored_tokens"] += 1
            sums["teacher_gap"] += log_t[action] - log_s[action]
        for p, part in enumerate(loss.parts):
            weight = x["weight_BAP"][b, a, p]
            if weight:
                value, reported = oracle_token(part, s, t, action, sampler, advantage, scored, loss.sampling, r)
                sums["loss"] += weight * value
                sums[f"{part.name}_tokens"] += 1
                for key in part.reports:
                    sums[key] += reported[key]
    return sums


def assert_sums(actual, expected, label="", rtol=2e-5, atol=1e-5):
    assert set(actual) == set(expected)
    for key in expected:
        np.testing.assert_allclose(actual[key], expected[key], rtol=rtol, atol=atol, err_msg=f"{label} {key}")


SIDES = ("student_BAD", "student_DV", "teacher_BAD", "teacher_DV", "reference_BAD", "reference_DV")


@jax.jit
def _of_every_loss(x):
    """Of every loss its value, sums and tokens, and its gradient for each of SIDES; in float64."""

    def value(sides, loss):
        sums, tokens = span_losses(x | dict(zip(SIDES, sides, strict=True)), loss, jnp.float64)
        return sums["loss"], (sums, tokens)

    sides = tuple(x[side] for side in SIDES)
    return [jax.value_and_grad(value, has_aux=True)(sides, loss) for loss in [*LOSSES, ALL_PARTS]]


def of_every_loss(x):
    """Triples (loss, its sums and tokens, its gradients); one compilation for all."""
    with jax.enable_x64(True):
        values = zip([*LOSSES, ALL_PARTS], jax.device_get(_of_every_loss(x)), strict=True)
    return [(loss, aux, grads) for loss, ((_, aux), grads) in values]


@pytest.fixture(scope="module")
def doubles(no_silent_broadcast):
    x = make_span(seed=1)
    return x, of_every_loss(x)


def test_sums_match_the_oracle(doubles):
    x, values = doubles
    for loss, (sums, _), _ in values:
        expected = oracle_sums(x, loss)
        assert_sums(sums, expected, name(loss), rtol=1e-9, atol=1e-12)
        own = [expected[f"{part.name}_tokens"] for part in loss.parts]
        assert all(0 < tokens < expected["tokens"] for tokens in own)
        assert set(loss.mean_over) | set(loss.mean_over.values()) | {"logprob_mismatch_max"} == set(sums)


def test_gradients_match_finite_differences(doubles):
    x, values = doubles
    rng = np.random.default_rng(2)
    for _ in range(3):
        way = {key: rng.normal(size=x[key].shape) for key in SIDES[:2]}
        moved = lambda sign, way=way: x | {key: x[key] + sign * 1e-6 * way[key] for key in way}
        ahead, behind = (of_every_loss(moved(sign)) for sign in (1, -1))
        for (loss, _, grads), (_, (above, _), _), (_, (below, _), _) in zip(values, ahead, behind, strict=True):
            if loss is not ALL_PARTS:  # its importance weights have no gradient: see the test of that part
                slope = sum(np.sum(grads[n] * way[key]) for n, key in enumerate(way))
                difference = (above["loss"] - below["loss"]) / 2e-6
                np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-7, err_msg=name(loss))


def test_no_gradient_reaches_teacher_or_reference(doubles):
    for loss, _, (hidden, kernel, *others) in doubles[1]:
        assert not any(np.any(grad) for grad in others), name(loss)
        assert np.any(hidden) and np.any(kernel)


def test_tokens_say_what_the_sums_add_up(doubles):
    x, values = doubles
    best = np.argmax(x["teacher_BAD"] @ x["teacher_DV"], axis=-1)
    for loss, (sums, tokens), _ in values:
        by_part = {key: p for p, part in enumerate(loss.parts) if part.needs_teacher for key in part.reports}
        assert set(tokens) == ({*by_part, "teacher_gap", "teacher_best"} if loss.needs_teacher else set())
        for key, p in by_part.items():
            own = x["mask_BA"] & (x["weight_BAP"][..., p] != 0)
            np.testing.assert_allclose(np.sum(tokens[key], where=own), sums[key], rtol=1e-9)
        if loss.needs_teacher:
            scored = x["mask_BA"] & x["scored_BA"]
            np.testing.assert_allclose(np.sum(tokens["teacher_gap"], where=scored), sums["teacher_gap"], rtol=1e-9)
            np.testing.assert_array_equal(tokens["teacher_best"], best)


@functools.cache
def sums_and_grad(chunk, rows, span):
    """Of ALL_PARTS, in single precision; one compilation per shape and chunk."""

    def value(kernel, x):
        sums, _ = span_losses(x | {"student_DV": kernel}, dataclasses.replace(ALL_PARTS, chunk_tokens=chunk))
        return sums["loss"], sums

    compiled = jax.jit(jax.grad(value, has_aux=True))
    return lambda x: compiled(jnp.float32(x["student_DV"]), {k: jnp.asarray(v) for k, v in x.items()})


def assert_same(actual, expected):
    assert_sums(actual[1], expected[1])
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-5)


def test_sums_in_single_precision_match_the_oracle():
    x = make_span(seed=3)
    assert_sums(sums_and_grad(6, 3, 4)(x)[1], oracle_sums(x, ALL_PARTS))


def test_sums_of_batches_add_up_but_for_the_largest_mismatch():
    a, b = ({name: float(n + offset) for n, name in enumerate(ALL_PARTS.sum_names)} for offset in (0, 10))
    added = losses.add_sums(a, b)
    assert added.pop("logprob_mismatch_max") == b["logprob_mismatch_max"]
    assert added == {name: a[name] + b[name] for name in added} and len(added) > 10


@given(chunk=st.sampled_from([1, 6]), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_chunk_size_does_not_change_the_result(chunk, seed):
    """4 columns of 3 rows: one at a time, two at a time, all at once; a chunk is at least a column of every row."""
    x = make_span(seed)
    assert_same(sums_and_grad(chunk, 3, 4)(x), sums_and_grad(12, 3, 4)(x))


def test_masked_positions_contribute_nothing():
    x = make_span(seed=7)
    out = ~x["mask_BA"]
    assert out.any()
    junk = x | {key: np.where(out[..., None], 1e4, x[key]) for key in ("student_BAD", "teacher_BAD", "reference_BAD")}
    junk |= {"actions_BA": np.where(out, V - 1, x["actions_BA"]), "scored_BA": out | x["scored_BA"]}
    junk |= {"sampler_logprob_BA": np.where(out, -1e4, x["sampler_logprob_BA"])}
    junk |= {"advantage_BA": np.where(out, 9.0, x["advantage_BA"])}
    junk |= {"weight_BAP": np.where(out[..., None], 9.0, x["weight_BAP"])}
    expected = sums_and_grad(6, 3, 4)(x)
    assert_same(sums_and_grad(6, 3, 4)(junk), expected)
    longer = {k: np.pad(v, [(0, 2), (0, 3)] + [(0, 0)] * (v.ndim - 2)) for k, v in junk.items() if "_BA" in k}
    assert_same(sums_and_grad(10, 5, 7)(junk | longer), expected)  # 2 columns of 5 rows: the last chunk is half padding


@pytest.mark.parametrize("loss", [*LOSSES[:3], ALL_PARTS], ids=name)
def test_logits_exist_for_one_chunk_only(loss):
    """No array of the forward or backward pass holds more than `chunk_tokens` tokens x vocabulary, in whole columns, or
    one column.
    """
    x = make_span(rows=6, span=10)
    for chunk, tokens in ((15, 12), (2, 6), (999, 60)):
        chunked = dataclasses.replace(loss, chunk_tokens=chunk)
        value = lambda kernel, chunked=chunked: span_losses(x | {"student_DV": kernel}, chunked)[0]["loss"]
        jaxpr = str(jax.make_jaxpr(jax.grad(value))(jnp.float32(x["student_DV"])))
        shapes = set(re.findall(rf"\[([\d,]*\b{V}\b[\d,]*)\]", jaxpr))
        assert f"{tokens},{V}" in shapes
        assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == max(tokens, D) * V


def test_what_a_loss_needs_follows_from_its_parts():
    assert [loss.needs_teacher for loss in LOSSES] == [True, True, *3 * [False], True, True, False, True]
    assert [loss.needs_reference for loss in LOSSES] == [*7 * [False], True, False]
    assert [loss.uses_ratio for loss in LOSSES] == [*3 * [False], *5 * [True], False]
    weighed = Loss((Divergence(importance_clip=2.0),))
    assert weighed.uses_ratio and not weighed.trains_unscored_tokens
    assert [loss.trains_unscored_tokens for loss in LOSSES] == [*5 * [False], True, True, False, True]
    assert hash(ALL_PARTS) == hash(dataclasses.replace(ALL_PARTS)) and ALL_PARTS != DISTIL  # a static argument
    assert ALL_PARTS.mean_over["overlap"] == "agreement_tokens" and ALL_PARTS.mean_over["loss"] == "tokens"


def test_a_loss_whose_parts_cannot_be_told_apart_is_refused():
    for parts in ((), (Divergence(), Divergence(kind="jsd"))):
        with pytest.raises(UserError, match="needs parts with different names"):
            Loss(parts)


def test_a_distribution_of_its_own_costs_nothing_where_it_is_the_softmax():
    """Temperature 1 without filters, and greedy rollouts: the same program."""
    x = make_span()
    traced = lambda sampling: str(
        jax.make_jaxpr(lambda x: span_losses(x, dataclasses.replace(LOSSES[3], sampling=sampling)))(x)
    )
    plain = traced(SamplingDistribution())
    assert traced(SamplingDistribution(0.0, top_p=0.5)) == plain != traced(HOT)


def test_without_a_teacher_the_sums_are_those_of_unscored_tokens():
    """Batches that no teacher reads have no teacher's side; parts of scored tokens have no token in them."""
    x = make_span(seed=1)
    acts_P = np.array([not part.scored_tokens_only for part in ALL_PARTS.parts])
    unscored = x | {"scored_BA": np.zeros_like(x["scored_BA"]), "weight_BAP": x["weight_BAP"] * acts_P}
    sums, tokens = jax.jit(lambda x: span_losses(x, ALL_PARTS, teacher=False))(unscored)
    assert_sums(sums, oracle_sums(unscored, ALL_PARTS))
    assert tokens == {} and sums["policy_gradient_tokens"] > 0 == sums["divergence_tokens"]


TABLE = np.random.default_rng(5).normal(size=(4, 3)) * 1.5
"""A policy of three tokens: logits of the first token, and of the second after each first one."""


def expected_gradient(rewards, sampling, ratio_under=None):
    """Of the policy gradient over every episode of two tokens, each as often as the sampling distribution has it; and
    their probabilities, by NumPy. Float64. ratio_under: what both sides of the ratio are taken of, if another one.
    """

    def logprobs(distribution):
        table = np.full(TABLE.shape, -np.inf)
        for row, logits in enumerate(TABLE):
            for token in loss_oracles.kept_tokens(logits, distribution):
                table[row, token] = loss_oracles.sampled_logprob(logits, token, distribution)
        return table[rows, np.array(episodes)]

    episodes = [(a, b) for a in range(3) for b in range(3)]
    rows = np.array([(0, 1 + a) for a, _ in episodes])
    probs, logprob_BA = np.exp(logprobs(sampling).sum(axis=1)), logprobs(ratio_under or sampling)
    everything = np.ones(rows.shape, bool)
    arrays = {
        "actions_BA": np.array(episodes),
        "sampler_logprob_BA": np.where(probs[:, None] > 0, logprob_BA, 0.0),
        "mask_BA": everything,
        "scored_BA": ~everything,
        "weight_BAP": np.repeat(probs, 2).reshape(*rows.shape, 1),
        "advantage_BA": np.repeat([float(rewards(*episode)) for episode in episodes], 2).reshape(rows.shape),
    }
    loss = Loss((PolicyGradient(),), sampling=ratio_under or sampling)

    def value(table):
        spans = losses.Spans(**{key: jnp.asarray(array) for key, array in arrays.items()})
        sums, _ = losses.span_losses(losses.Side(jnp.asarray(np.eye(4)[rows]), lambda x: x @ table), spans, loss=loss)
        return sums["loss"], sums

    with jax.enable_x64(True):
        gradient, sums = jax.device_get(jax.jit(jax.grad(value, has_aux=True))(jnp.asarray(TABLE)))
    assert sums["clip_fraction"] == 0
    return gradient, probs


@pytest.mark.parametrize(
    "sampling",
    [HOT, FILTERED, SamplingDistribution(2.0, top_p=0.7, top_k=2)],
    ids=str,
)
def test_the_expected_gradient_is_that_of_the_expected_reward(sampling):
    """All episodes of two tokens counted: a constant advantage pulls nowhere, a token that does not matter is not
    moved, and what matters is moved as the expected reward under the sampling distribution says.
    """
    gradient, probs = expected_gradient(lambda a, b: 1.0, sampling)
    np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-15)
    gradient, _ = expected_gradient(lambda a, b: a == 2, sampling)
    np.testing.assert_allclose(gradient[1:], 0.0, atol=1e-15)  # the second token does not matter for the reward
    kept = loss_oracles.kept_tokens(TABLE[0], sampling)
    p = np.zeros(3)
    p[kept] = np.exp([loss_oracles.sampled_logprob(TABLE[0], token, sampling) for token in kept])
    slope = p[2] * (np.eye(3)[2] - p) / sampling.temperature  # d p(2) / d logits, of a softmax over the kept tokens
    np.testing.assert_allclose(gradient[0], -slope, atol=1e-12)


def test_with_ratios_at_temperature_1_an_irrelevant_token_would_be_moved():
    """What the distribution is for."""
    gradient, _ = expected_gradient(lambda a, b: a == 2, HOT, ratio_under=SamplingDistribution())
    assert np.abs(gradient[1:]).max() > 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clashing(CrossEntropy):
    name: ClassVar[str] = "likelihood"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shadowing(CrossEntropy):
    name: ClassVar[str] = "shadowing"
    reports: ClassVar[tuple[str, ...]] = ("entropy",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(LossPart):
    name: ClassVar[str] = "teacher"  # the tokens that the teacher goes through are counted by the batches


@pytest.mark.parametrize(
    "part, metric", [(Clashing(), "cross_entropy"), (Shadowing(), "entropy"), (Counting(), "teacher_tokens")]
)
def test_two_sums_of_one_name_are_refused(part, metric):
    """One would silently stand in for the other in the metrics."""
    with pytest.raises(UserError, match=f"loss part '{part.name}' reports '{metric}', .* another name"):
        Loss((CrossEntropy(), part))


@pytest.mark.parametrize("loss", [LOSSES[1], ALL_PARTS], ids=name)
def test_ids_that_the_tokenizer_does_not_know_take_no_part_in_a_loss(loss):
    """Whatever their logits, for student, teacher and reference: values and gradients are those of the other ids."""
    unknown = ((2, 4), (V - 1, V))

    def of(x, weights, rows=slice(None)):
        spans = losses.Spans(*(jnp.asarray(x[field]) for field in losses.Spans._fields))
        spans = spans._replace(weight_BAP=spans.weight_BAP[..., : len(loss.parts)])
        project = lambda kernel: lambda hidden: without_unknown(hidden @ kernel, unknown)
        side = lambda name: losses.Side(jnp.asarray(x[f"{name}_BAD"], jnp.float32), project(weights[name]))
        sums, _ = losses.span_losses(
            side("student"), spans, loss=loss, teacher=side("teacher"), reference=side("reference")
        )
        return sums["loss"], sums

    x = jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf, make_span(3))
    x["actions_BA"] = np.where(np.isin(x["actions_BA"], [2, 3, V - 1]), 0, x["actions_BA"])
    weights = {name: jnp.asarray(x[f"{name}_DV"], jnp.float32) for name in ("student", "teacher", "reference")}
    loud = {name: kernel.at[:, jnp.array([2, 3, V - 1])].add(30.0) for name, kernel in weights.items()}
    step = jax.value_and_grad(of, argnums=1, has_aux=True)
    (quiet_loss, quiet), quiet_gradient = step(x, weights)
    (loud_loss, sums), gradient = step(x, loud)
    assert np.isfinite(loud_loss) and loud_loss == quiet_loss
    jax.tree.map(np.testing.assert_array_equal, sums, quiet)
    jax.tree.map(np.testing.assert_array_equal, gradient, quiet_gradient)
    assert not np.asarray(gradient["student"])[:, [2, 3, V - 1]].any() and np.asarray(gradient["student"]).any()
