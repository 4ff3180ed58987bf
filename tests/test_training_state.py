"""The train state apart from the update: where its arrays lie, schedules, options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.models import decoder
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.sharding import make_mesh, shardings
from hintsd_jax.training.state import OptimConfig, learning_rate, moment_shardings, optimizer

POLICY = PolicyConfig(
    vocab_size=32, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24,
    rope_theta=1e4, norm_eps=1e-6, tie_embeddings=True, max_positions=64,
)  # fmt: skip


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_moments_lie_as_their_parameters(clip_norm):
    """Adam's two are as large as the weights: they are scattered with them, not on every device."""
    mesh = jax.sharding.AbstractMesh((2, 2, 2), make_mesh(devices=jax.devices()[:1]).axis_names)
    params = jax.eval_shape(functools.partial(decoder.init_params, POLICY), jax.random.key(0))
    layout = shardings(params, decoder.logical_axes(POLICY), mesh, "train")
    assert len({str(sharding.spec) for sharding in jax.tree.leaves(layout)}) > 3
    opt_state = jax.eval_shape(optimizer(OptimConfig(clip_norm=clip_norm)).init, params)
    moments = moment_shardings(opt_state, layout)
    assert jax.tree.structure(moments) == jax.tree.structure(opt_state)
    named = lambda name: [tree for _, tree in optax.tree_utils.tree_get_all_with_path(moments, name)]
    assert named("mu") == named("nu") == [layout]
    assert named("count") and all(sharding.is_fully_replicated for sharding in named("count"))


def test_schedules():
    at = lambda step, **options: float(learning_rate(OptimConfig(lr=1.0, total_steps=10, **options))(step))
    assert [at(s, schedule="constant") for s in (0, 5, 20)] == [1.0, 1.0, 1.0]
    np.testing.assert_allclose([at(s, schedule="linear") for s in (0, 4, 10, 12)], [1.0, 0.6, 0.0, 0.0], atol=1e-7)
    np.testing.assert_allclose([at(s, warmup_steps=2) for s in (0, 1, 2, 6, 10)], [0.0, 0.5, 1.0, 0.5, 0.0], atol=1e-7)
    np.testing.assert_allclose([at(s, schedule="constant", warmup_steps=2) for s in (0, 1, 2, 9)], [0.0, 0.5, 1.0, 1.0])


def test_weight_decay_is_off_by_default_and_clipping_can_be():
    assert OptimConfig().weight_decay == 0.0
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.asarray([30.0, 40.0])}
    optim = OptimConfig(eps=1.0, clip_norm=0.0)  # eps = 1: the size of the gradient shows
    step = jax.jit(lambda: optimizer(optim).update(grads, optimizer(optim).init(params), params)[0])
    np.testing.assert_allclose(step()["w"], [30 / 31, 40 / 41], rtol=1e-5)  # times -lr: the update


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosine"},
        {"warmup_steps": 5, "total_steps": 5},
        {"ema_decay": 1.1},
        {"lr": -1.0},
        {"empty_updates": "no"},
    ],
)
def test_impossible_options_are_refused_by_name(options):
    with pytest.raises(UserError, match=f"optim.{next(iter(options))}"):
        OptimConfig(**options)
