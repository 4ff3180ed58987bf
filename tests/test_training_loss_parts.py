"""Every part of a loss, token by token: values against float64 oracles, gradients against finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.training.loss_parts import CrossEntropy, Divergence, LossPart, PolicyGradient, ReferenceKL, TokenInputs
from tests import loss_oracles

V, X = 11, 12
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.0), ("jsd", 0.3), ("jsd", 1.0)]
DIVERGENCES = [
    Divergence(kind=kind, support=support, top_k=3, alpha=alpha)
    for support in ("student_topk", "teacher_topk", "full")
    for kind, alpha in KINDS
]
SDPO = Divergence(kind="jsd", top_k=3, importance_clip=2.0)
UNWEIGHTED = dataclasses.replace(SDPO, importance_clip=0.0)
GRPO, OPENCLAW = PolicyGradient(), PolicyGradient(clip_low=0.4, clip_high=0.5, teacher_advantage=0.7)
NEAR = ReferenceKL()  # the teacher of these tokens is its reference
PARTS = [*DIVERGENCES, SDPO, UNWEIGHTED, CrossEntropy(), GRPO, OPENCLAW, NEAR]


@pytest.fixture(autouse=True, scope="module")
def no_silent_broadcast():
    with jax.numpy_rank_promotion("raise"):
        yield


def make_tokens(seed=0):
    """Logits of both sides and the rest of what is known of X tokens, float64; no teacher has scored some of them."""
    rng = np.random.default_rng(seed)
    return {
        "student": rng.normal(size=(X, V)) * 2,
        "teacher": rng.normal(size=(X, V)) * 2,
        "actions": rng.integers(0, V, X),
        "sampler": -rng.uniform(0.5, 4.0, X),
        "advantage": rng.normal(size=X),
        "scored": np.arange(X) % 4 != 1,
        "weight": rng.uniform(0.5, 2.0, X),
    }


@jax.jit
def _of_every_part(x):
    at = lambda logp: jnp.take_along_axis(logp, x["actions"][:, None], axis=-1)[:, 0]

    def weighted(student, part):
        student_XV, teacher_XV = jax.nn.log_softmax(student), jax.nn.log_softmax(x["teacher"])
        teacher = (teacher_XV, at(teacher_XV), at(teacher_XV)) if part.needs_teacher else ()
        constants = (x["sampler"], x["advantage"], x["scored"])
        inputs = TokenInputs(student_XV, at(student_XV), at(student_XV), *constants, *teacher)
        if part.needs_reference:
            inputs = inputs._replace(reference_XV=teacher_XV)
        losses = part.token_losses(inputs)
        return jnp.sum(x["weight"] * losses.loss_X), losses

    return [jax.value_and_grad(weighted, has_aux=True)(x["student"], part) for part in PARTS]


def of_every_part(x, dtype=jnp.float32):
    """Part -> (its weighted sum, its losses token by token, the gradient of the sum); one compilation for all."""
    x = {name: jnp.asarray(a, dtype if a.dtype == np.float64 else None) for name, a in x.items()}
    return {part: (*values, grad) for part, (values, grad) in zip(PARTS, _of_every_part(x), strict=True)}


def oracle(part, x):
    rows = zip(*(x[name] for name in ("student", "teacher", "actions", "sampler", "advantage", "scored")), strict=True)
    losses, reported = zip(*(loss_oracles.token_loss(part, *row, reference_logits=row[1]) for row in rows), strict=True)
    return np.array(losses), {name: np.array([each[name] for each in reported]) for name in part.reports}


def test_every_part_matches_the_oracle():
    x = make_tokens()
    for part, (_, actual, _) in of_every_part(x).items():
        expected, reported = oracle(part, x)
        np.testing.assert_allclose(actual.loss_X, expected, rtol=2e-5, atol=1e-5, err_msg=repr(part))
        assert set(actual.reported) == set(reported) == set(part.reports)
        for name, values in reported.items():
            np.testing.assert_allclose(actual.reported[name], values, rtol=2e-5, atol=1e-5, err_msg=repr(part))


def test_gradients_match_finite_differences():
    with jax.enable_x64(True):
        x, rng = make_tokens(seed=1), np.random.default_rng(2)
        grads = of_every_part(x, jnp.float64)
        for _ in range(3):
            way = rng.normal(size=(X, V))
            ahead, behind = (
                of_every_part(x | {"student": x["student"] + sign * 1e-6 * way}, jnp.float64) for sign in (1, -1)
            )
            for part in set(PARTS) - {SDPO}:  # whose weights have no gradient, see below
                slope = np.sum(np.asarray(grads[part][2]) * way)
                difference = (ahead[part][0] - behind[part][0]) / 2e-6
                np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-7, err_msg=repr(part))


def logprobs(x):
    return np.array([loss_oracles.log_softmax(row)[a] for row, a in zip(x["student"], x["actions"], strict=True)])


def test_importance_weights_are_constants():
    """The gradient of SDPO's loss is that of the divergence, each token times its clipped ratio."""
    with jax.enable_x64(True):
        x = make_tokens(seed=8)
        trusted = np.minimum(np.exp(logprobs(x) - x["sampler"]), 2.0)
        assert np.any(trusted == 2.0) and np.any(trusted < 1.0)
        expected = of_every_part(x | {"weight": x["weight"] * trusted}, jnp.float64)[UNWEIGHTED]
        np.testing.assert_allclose(of_every_part(x, jnp.float64)[SDPO][2], expected[2], rtol=1e-9)


def test_on_policy_the_policy_gradient_is_that_of_advantage_times_log_prob():
    """Where the student is the sampler, no clip acts, and d loss = -A d log p."""
    with jax.enable_x64(True):
        x = make_tokens(seed=8)
        x["sampler"] = logprobs(x)
        _, actual, grad = of_every_part(x, jnp.float64)[GRPO]
        supervised = of_every_part(x | {"weight": x["weight"] * x["advantage"]}, jnp.float64)[CrossEntropy()]
        np.testing.assert_allclose(grad, supervised[2], rtol=1e-9)
        assert not np.any(actual.reported["clip_fraction"])


def test_the_oracle_meets_every_case_of_the_clip():
    cases = {
        (ratio > 1.28, ratio < 0.8, advantage > 0): loss_oracles.clipped_surrogate(ratio, advantage, GRPO)[1]
        for ratio in (0.5, 1.0, 2.0)
        for advantage in (-1.0, 1.0)
    }
    assert {case for case, clipped in cases.items() if clipped} == {(True, False, True), (False, True, False)}
    assert len(cases) == 6
    for part in (GRPO, OPENCLAW):
        assert 0 < oracle(part, make_tokens())[1]["clip_fraction"].sum() < X


def test_a_teachers_advantage_counts_on_scored_tokens_alone():
    x = make_tokens()
    ours, others = (
        of_every_part(x)[OPENCLAW][1].loss_X,
        of_every_part(x | {"teacher": -x["teacher"]})[OPENCLAW][1].loss_X,
    )
    np.testing.assert_array_equal(ours[~x["scored"]], others[~x["scored"]])
    assert np.all(ours[x["scored"]] != others[x["scored"]])


def test_batches_that_no_teacher_reads_have_the_advantage_alone():
    """As tokens that no teacher has scored."""
    x = make_tokens()
    rest = (x["sampler"], x["advantage"], np.zeros(X, bool))
    alone = OPENCLAW.token_losses(TokenInputs(np.zeros((X, V)), *2 * (logprobs(x),), *rest)).loss_X
    unscored = of_every_part(x | {"scored": np.zeros(X, bool)})[OPENCLAW][1].loss_X
    np.testing.assert_allclose(alone, unscored, rtol=2e-5)


def test_equal_sides_diverge_by_nothing_and_pull_nowhere():
    x = make_tokens(seed=6)
    values = of_every_part(x | {"teacher": x["student"]})
    for part in DIVERGENCES:
        np.testing.assert_allclose(values[part][1].loss_X, 0, atol=1e-6)
        np.testing.assert_allclose(values[part][2], 0, atol=1e-6)


def test_a_certain_student_keeps_loss_and_gradient_finite():
    """All mass in the top k: the tail is log(1e-7) by the clamp and not -inf."""
    certain = np.zeros((X, V))
    certain[np.arange(X), np.arange(X) % 2 * (V - 1)] = 60.0
    values = of_every_part(make_tokens() | {"student": certain, "teacher": certain[::-1]})
    for part in DIVERGENCES:
        _, losses, grad = values[part]
        assert np.all(np.isfinite(losses.loss_X)) and np.all(losses.loss_X > 0.25)
        assert np.all(np.isfinite(grad))


def test_a_part_of_ones_own_has_to_say_what_a_token_costs():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Empty(LossPart):
        name = "empty"

    assert not Empty().needs_teacher and Empty(coefficient=2.0).coefficient == 2.0
    with pytest.raises(NotImplementedError, match="Empty must give token_losses"):
        Empty().token_losses(None)


def test_a_part_that_asks_for_a_teacher_must_have_said_so():
    inputs = TokenInputs(*(np.zeros(1),) * 5, np.zeros(1, bool))
    for asked in ("teacher", "reference"):
        with pytest.raises(ValueError, match=f"must say needs_{asked}"):
            getattr(inputs, asked)()
    assert Divergence().scored_tokens_only and not OPENCLAW.scored_tokens_only and not CrossEntropy().scored_tokens_only
