"""Losses against float64 NumPy oracles, gradients against finite differences, chunking and padding as properties."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.errors import UserError
from hintsd_jax.training import losses
from hintsd_jax.training.losses import LossConfig

V, D = 11, 5
GRID = [
    LossConfig(divergence=divergence, support=support, top_k=3, alpha=alpha)
    for support in losses.SUPPORTS
    for divergence, alpha in [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.0), ("jsd", 0.3), ("jsd", 1.0)]
]
REINFORCED = [
    LossConfig(loss="policy"),
    LossConfig(loss="distill+policy", top_k=3, clip_high=0.5),
    LossConfig(loss="judged", top_k=3, clip_low=0.4),
]
SDPO = LossConfig(divergence="jsd", top_k=3, importance_clip=2.0)
ALL = [*GRID, LossConfig(loss="sft"), SDPO, *REINFORCED]
TAUGHT = [config for config in ALL if config.taught]


def name(config):
    if config.loss != "distill":
        return config.loss
    return f"{config.support}-{config.divergence}-{config.alpha}-{config.importance_clip}"


@pytest.fixture(autouse=True)
def no_silent_broadcast():
    with jax.numpy_rank_promotion("raise"):
        yield


# The oracle: plain loops in float64, written from the formulas and not from the code.


def oracle_log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits)))


def oracle_divergence(student_logits, teacher_logits, config):
    """One token: logits [V] of both sides -> the divergence of the distributions on the reduced support."""
    s, t = oracle_log_softmax(np.float64(student_logits)), oracle_log_softmax(np.float64(teacher_logits))
    if config.support != "full" and config.top_k < len(s):
        kept = sorted(range(len(s)), key=lambda v: -(s if config.support == "student_topk" else t)[v])[: config.top_k]
        tail = lambda x: np.log(1 - np.exp(min(np.log(np.sum(np.exp(x[kept]))), -1e-7)))
        s, t = np.append(s[kept], tail(s)), np.append(t[kept], tail(t))
    kl = lambda p, q: sum(np.exp(p[v]) * (p[v] - q[v]) for v in range(len(p)))
    a = config.alpha
    if config.divergence == "forward_kl" or (config.divergence == "jsd" and a == 0):
        return kl(t, s)
    if config.divergence == "reverse_kl" or (config.divergence == "jsd" and a == 1):
        return kl(s, t)
    m = np.log((1 - a) * np.exp(s) + a * np.exp(t))
    return (1 - a) * kl(s, m) + a * kl(t, m)


def make_span(seed=0, rows=3, span=4, scale=2.0):
    """Random hidden states, heads, actions, log-probs and a ragged mask, float64; the tokens' weights differ."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, span + 1, rows)
    lengths[0] = span
    return {
        "student_BAD": rng.normal(size=(rows, span, D)),
        "teacher_BAD": rng.normal(size=(rows, span, D)),
        "student_DV": rng.normal(size=(D, V)) * scale / D**0.5,
        "teacher_DV": rng.normal(size=(D, V)) * scale / D**0.5,
        "actions_BA": rng.integers(0, V, (rows, span)),
        "mask_BA": np.arange(span)[None] < lengths[:, None],
        "sampled_BA": -rng.uniform(0.5, 4.0, (rows, span)),
        "weight_BA": rng.uniform(0.5, 2.0, (rows, span))
        * (np.arange(span) != 1),  # no teacher has scored the second tokens
        "advantage_BA": rng.normal(size=(rows, span)),
    }


def head(kernel, hidden):
    return hidden @ kernel


def span_losses(x, config, dtype=jnp.float32):
    x = {k: jnp.asarray(v, dtype if jnp.issubdtype(v.dtype, jnp.floating) else None) for k, v in x.items()}
    student, teacher = functools.partial(head, x["student_DV"]), functools.partial(head, x["teacher_DV"])
    spans = losses.Spans(*(x[field] for field in losses.Spans._fields))
    return losses.span_losses(
        x["student_BAD"], spans, student=student, config=config, teacher_BAD=x["teacher_BAD"], teacher=teacher
    )


def span_sums(*args):
    return span_losses(*args)[0]


def oracle_surrogate(ratio, advantage, config):
    """PPO's clipped objective by its cases, as a loss; whether the clip holds it."""
    if advantage > 0 and ratio > 1 + config.clip_high:
        return -(1 + config.clip_high) * advantage, True
    if advantage < 0 and ratio < 1 - config.clip_low:
        return -(1 - config.clip_low) * advantage, True
    return -ratio * advantage, False


def oracle_sums(x, config):
    sums = dict.fromkeys(config.sum_names, 0.0)
    for b, a in zip(*np.nonzero(x["mask_BA"])):
        s, t = x["student_BAD"][b, a] @ x["student_DV"], x["teacher_BAD"][b, a] @ x["teacher_DV"]
        log_s, log_t, action = oracle_log_softmax(s), oracle_log_softmax(t), x["actions_BA"][b, a]
        sampled, weight, advantage = (x[key][b, a] for key in ("sampled_BA", "weight_BA", "advantage_BA"))
        sums["tokens"] += 1
        sums["entropy"] -= np.sum(np.exp(log_s) * log_s)
        sums["logprob"] += log_s[action]
        off = abs(log_s[action] - sampled)
        sums["mismatch"], sums["mismatch_max"] = sums["mismatch"] + off, max(sums["mismatch_max"], off)
        ratio = np.exp(log_s[action] - sampled)
        if config.taught and weight > 0:
            sums["taught"] += 1
            sums["teacher_gap"] += log_t[action] - log_s[action]
            sums["divergence"] += oracle_divergence(s, t, config)
        if config.loss == "sft":
            sums["loss"] -= weight * log_s[action]
        if config.loss in ("distill", "distill+policy"):
            trusted = min(ratio, config.importance_clip) if config.importance_clip else 1.0
            sums["loss"] += weight * trusted * oracle_divergence(s, t, config)
        if config.reinforced:
            told = weight * (log_t[action] - sampled) if config.loss == "judged" else 0.0
            loss, clipped = oracle_surrogate(ratio, advantage + told, config)
            sums["loss"], sums["clipped"] = sums["loss"] + loss, sums["clipped"] + clipped
    return sums


def assert_sums(actual, expected, label="", rtol=2e-5):
    assert set(actual) == set(expected)
    for key in expected:
        np.testing.assert_allclose(actual[key], expected[key], rtol=rtol, atol=1e-5, err_msg=f"{label} {key}")


def for_each(configs, function):
    """One compilation for all configs: (args) -> [function(config, *args) for every config]."""
    return jax.jit(lambda *args: [function(config, *args) for config in configs])


def test_sums_match_the_oracle():
    x = make_span()
    for config, sums in zip(ALL, for_each(ALL, lambda config: span_sums(x, config))()):
        assert_sums(sums, oracle_sums(x, config), name(config))


def test_the_oracle_meets_every_case_of_the_clip():
    config = LossConfig(loss="policy")
    cases = {
        (ratio > 1.28, ratio < 0.8, advantage > 0): oracle_surrogate(ratio, advantage, config)[1]
        for ratio in (0.5, 1.0, 2.0)
        for advantage in (-1.0, 1.0)
    }
    assert {case for case, clipped in cases.items() if clipped} == {(True, False, True), (False, True, False)} and len(
        cases
    ) == 6
    for config in REINFORCED:
        sums = oracle_sums(make_span(), config)
        assert 0 < sums["clipped"] < sums["tokens"]


def test_on_policy_the_policy_gradient_is_that_of_advantage_times_log_prob():
    """Where the student is the sampler, no clip holds, and d loss = -A d log p."""
    x = make_span(seed=8)
    config = LossConfig(loss="policy")
    logprobs = np.array(
        [
            [oracle_log_softmax(hidden @ x["student_DV"])[action] for hidden, action in zip(*row)]
            for row in zip(x["student_BAD"], x["actions_BA"])
        ]
    )
    x["sampled_BA"] = logprobs
    plain = x | {"weight_BA": x["advantage_BA"]}
    grads = for_each(
        [config, LossConfig(loss="sft")],
        lambda config, kernel: jax.grad(
            lambda k: span_sums((x if config.loss == "policy" else plain) | {"student_DV": k}, config)["loss"]
        )(kernel),
    )
    np.testing.assert_allclose(*grads(jnp.float32(x["student_DV"])), rtol=1e-4, atol=1e-5)
    assert float(jax.jit(lambda: span_sums(x, config))()["clipped"]) == 0.0


def test_importance_weights_are_held():
    """The gradient of SDPO's loss is that of the divergence, each token times its clipped ratio."""
    x = make_span(seed=8)
    logprobs = np.array(
        [
            [oracle_log_softmax(hidden @ x["student_DV"])[action] for hidden, action in zip(*row)]
            for row in zip(x["student_BAD"], x["actions_BA"])
        ]
    )
    trusted = np.minimum(np.exp(logprobs - x["sampled_BA"]), 2.0)
    assert np.any(trusted == 2.0) and np.any(trusted < 1.0)
    by_hand = x | {"weight_BA": x["weight_BA"] * trusted}
    plain = dataclasses.replace(SDPO, importance_clip=0.0)
    loss = lambda config, kernel: span_sums((x if config == SDPO else by_hand) | {"student_DV": kernel}, config)["loss"]
    np.testing.assert_allclose(
        *for_each([SDPO, plain], jax.grad(loss, argnums=1))(jnp.float32(x["student_DV"])), rtol=1e-4, atol=1e-5
    )


def test_tokens_say_what_the_sums_add_up():
    x = make_span(seed=9)
    spoken = x["mask_BA"] & (x["weight_BA"] > 0)
    best = np.argmax(x["teacher_BAD"] @ x["teacher_DV"], axis=-1)
    for config, (sums, tokens) in zip(ALL, for_each(ALL, lambda config: span_losses(x, config))()):
        assert set(tokens) == ({"divergence", "teacher_gap", "teacher_best"} if config.taught else set())
        for key in losses.PER_TAUGHT if config.taught else ():
            np.testing.assert_allclose(np.sum(tokens[key], where=spoken), sums[key], rtol=1e-5)
        if config.taught:
            np.testing.assert_array_equal(tokens["teacher_best"], best)


def test_gradient_matches_finite_differences():
    with jax.enable_x64(True):
        x = make_span(seed=1, rows=2, span=3)
        loss = lambda config, hidden, kernel: span_sums(
            x | {"student_BAD": hidden, "student_DV": kernel}, config, jnp.float64
        )["loss"]
        configs = [config for config in ALL if config != SDPO]  # whose weights are held, see below
        values = for_each(configs, loss)
        at = (x["student_BAD"], x["student_DV"])
        all_grads = for_each(configs, jax.grad(loss, argnums=(1, 2)))(*at)
        rng = np.random.default_rng(2)
        for _ in range(3):
            way = [rng.normal(size=p.shape) for p in at]
            ahead, behind = (np.array(values(*[p + sign * 1e-6 * w for p, w in zip(at, way)])) for sign in (1, -1))
            slopes = [sum(np.sum(np.asarray(g) * w) for g, w in zip(grads, way)) for grads in all_grads]
            np.testing.assert_allclose(slopes, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7)


def test_no_gradient_reaches_the_teacher():
    x = make_span(seed=3)
    loss = lambda config, hidden, kernel: span_sums(x | {"teacher_BAD": hidden, "teacher_DV": kernel}, config)["loss"]
    at = (jnp.float32(x["teacher_BAD"]), jnp.float32(x["teacher_DV"]))
    for grad in jax.tree.leaves(for_each(TAUGHT, jax.grad(loss, argnums=(1, 2)))(*at)):
        assert not np.any(grad)


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
@pytest.mark.parametrize("support", ["student_topk", "teacher_topk"])
def test_topk_with_tail_rises_to_the_full_divergence(support, divergence):
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        s, t = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(6, V)) * 2)) for _ in range(2))
        full = LossConfig(divergence=divergence, alpha=0.3, support="full")
        reduced = [dataclasses.replace(full, support=support, top_k=k) for k in (1, 3, 6, V - 1, V, V + 5)]
        full, *by_k = for_each([full, *reduced], lambda config: losses.token_divergence(s, t, config))()
        assert np.all(np.diff(by_k, axis=0) >= -1e-12)  # a finer partition cannot lower a divergence
        np.testing.assert_allclose(by_k[3], full, rtol=1e-9)  # V - 1: the tail is the one entry left
        np.testing.assert_array_equal(by_k[4], full)
        np.testing.assert_array_equal(by_k[5], full)


def test_jsd_ends_are_the_kls_and_the_middle_is_symmetric():
    rng = np.random.default_rng(5)
    s, t = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(6, V)), jnp.float32)) for _ in range(2))
    value = lambda s, t, divergence, alpha=0.5: losses.token_divergence(
        s, t, LossConfig(divergence=divergence, alpha=alpha, support="full")
    )
    np.testing.assert_array_equal(value(s, t, "jsd", 0.0), value(s, t, "forward_kl"))
    np.testing.assert_array_equal(value(s, t, "jsd", 1.0), value(s, t, "reverse_kl"))
    np.testing.assert_array_equal(value(s, t, "forward_kl"), value(t, s, "reverse_kl"))
    np.testing.assert_allclose(value(s, t, "jsd"), value(t, s, "jsd"), rtol=1e-5)


def logits_loss(config, logits, teacher):
    return losses.token_divergence(jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher), config).sum()


def test_equal_sides_diverge_by_nothing_and_pull_nowhere():
    logits = jnp.asarray(np.random.default_rng(6).normal(size=(6, V)), jnp.float32)
    for value, grad in for_each(GRID, jax.value_and_grad(logits_loss, argnums=1))(logits, logits):
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_a_certain_student_keeps_loss_and_gradient_finite():
    """All mass in the top k: the tail is log(1e-7) by the clamp and not -inf."""
    logits = jnp.asarray([[60.0] + [0.0] * (V - 1), [0.0] * (V - 1) + [60.0]], jnp.float32)
    for value, grad in for_each(GRID, jax.value_and_grad(logits_loss, argnums=1))(logits, logits[::-1]):
        assert np.isfinite(value) and value > 0.5
        assert np.all(np.isfinite(grad))


def test_tail_is_cut_exactly_as_in_the_reference():
    with jax.enable_x64(True):
        logp = jnp.log(jnp.asarray([[0.5, 0.3, 0.2], [1 - 2e-9, 1e-9, 1e-9]], jnp.float64))
        tail = losses.with_tail(logp, jnp.asarray([[0, 1], [0, 1]]))[:, -1]
        np.testing.assert_allclose(tail, [np.log(0.2), np.log(1 - np.exp(-1e-7))], rtol=1e-8)


@functools.cache
def sums_and_grad(chunk, rows, span):
    """One compilation per shape and chunk, the configs and values inside."""

    def run(config, x, kernel):
        def loss(kernel):
            sums = span_sums(x | {"student_DV": kernel}, dataclasses.replace(config, chunk=chunk))
            return sums["loss"], sums

        return jax.grad(loss, has_aux=True)(kernel)

    compiled = for_each([GRID[0], GRID[8], LossConfig(loss="sft"), *REINFORCED[1:]], run)
    return lambda x: compiled({k: jnp.asarray(v) for k, v in x.items()}, jnp.float32(x["student_DV"]))


def assert_same(actual, expected):
    for (grad, sums), (expected_grad, expected_sums) in zip(actual, expected):
        assert_sums(sums, expected_sums)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_sums_of_batches_add_up_but_for_the_largest_mismatch():
    a, b = ({name: float(n + offset) for n, name in enumerate(LossConfig().sum_names)} for offset in (0, 10))
    added = losses.add_sums(a, b)
    assert added.pop("mismatch_max") == b["mismatch_max"]
    assert added == {name: a[name] + b[name] for name in added}


@given(chunk=st.sampled_from([1, 6]), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_chunk_size_does_not_change_the_result(chunk, seed):
    """4 columns of 3 rows: one at a time, two at a time, all at once; `chunk` is at least a column of every row."""
    x = make_span(seed)
    assert_same(sums_and_grad(chunk, 3, 4)(x), sums_and_grad(12, 3, 4)(x))


def test_masked_positions_contribute_nothing():
    x = make_span(seed=7)
    out = ~x["mask_BA"]
    assert out.any()
    junk = x | {key: np.where(out[..., None], 1e4, x[key]) for key in ("student_BAD", "teacher_BAD")}
    junk |= {"actions_BA": np.where(out, V - 1, x["actions_BA"]), "sampled_BA": np.where(out, -1e4, x["sampled_BA"])}
    junk |= {key: np.where(out, 9.0, x[key]) for key in ("weight_BA", "advantage_BA")}
    longer = {
        k: np.pad(v, [(0, 2), (0, 3)] + [(0, 0)] * (v.ndim - 2)) for k, v in junk.items() if k.endswith(("_BAD", "_BA"))
    }
    expected = sums_and_grad(6, 3, 4)(x)
    assert_same(sums_and_grad(6, 3, 4)(junk), expected)
    assert_same(sums_and_grad(10, 5, 7)(junk | longer), expected)  # 2 columns of 5 rows: the last chunk is half padding


@pytest.mark.parametrize("config", [*GRID[::5], LossConfig(loss="sft")], ids=name)
def test_logits_exist_for_one_chunk_only(config):
    """No array of the forward or backward pass holds more than `chunk` tokens x vocabulary, in whole columns, or one
    column.
    """
    x = make_span(rows=6, span=10)
    for chunk, tokens in ((15, 12), (2, 6), (999, 60)):
        loss = lambda kernel: span_sums(x | {"student_DV": kernel}, dataclasses.replace(config, chunk=chunk))["loss"]
        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(jnp.float32(x["student_DV"])))
        shapes = set(re.findall(rf"\[([\d,]*\b{V}\b[\d,]*)\]", jaxpr))
        assert f"{tokens},{V}" in shapes
        assert max(math.prod(map(int, shape.split(","))) for shape in shapes) == max(tokens, D) * V


@pytest.mark.parametrize(
    "options", [{"loss": "ppo"}, {"divergence": "kl"}, {"support": "topk"}, {"top_k": 0}, {"chunk": 0}, {"alpha": 1.5}]
)
def test_impossible_options_are_refused_by_name(options):
    with pytest.raises(UserError, match=f"distill.{next(iter(options))}"):
        LossConfig(**options)
