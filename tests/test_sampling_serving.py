"""Weights for serving: no copy where none is needed, the compute dtype where it is, and one copy only of what never
changes.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.models import decoder, lora
from hintsd_jax.models.config import LoraConfig, PolicyConfig
from hintsd_jax.models.sharding import make_mesh, shardings
from hintsd_jax.sampling.serving import ServingLayout

POLICY = PolicyConfig(
    vocab_size=40, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=48,
    rope_theta=500.0, norm_eps=1e-6, tie_embeddings=False, max_positions=128, lora=LoraConfig(2, 4.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def weights(mesh, seed=0):
    draw = lambda leaf: np.random.default_rng([seed, leaf.size]).normal(size=leaf.shape).astype(np.float32)
    base = jax.tree.map(draw, jax.eval_shape(partial(decoder.init_params, POLICY), jax.random.key(0)))
    adapter = jax.tree.map(draw, jax.eval_shape(partial(lora.init_adapter, POLICY), jax.random.key(0)))
    place = lambda tree, axes: jax.device_put(tree, shardings(tree, axes, mesh, "train"))
    return place(base, decoder.logical_axes(POLICY)), place(adapter, lora.logical_axes(POLICY))


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_on_one_device_and_in_one_dtype_nothing_is_copied(mesh):
    base, adapter = weights(mesh)
    for params in (base, lora.attach(base, adapter)):
        assert pointers(ServingLayout(POLICY, mesh, by_layer=False)(params)) == pointers(params)


def test_kernels_are_served_in_the_compute_dtype_and_norms_in_theirs(mesh):
    base, adapter = weights(mesh)
    layout = ServingLayout(dataclasses.replace(POLICY, compute_dtype="bfloat16"), mesh, by_layer=False)
    served = layout(lora.attach(base, adapter))
    for path, leaf in jax.tree_util.tree_flatten_with_path(served)[0]:
        assert leaf.dtype == (jnp.float32 if path[-1].key == "scale" else jnp.bfloat16), path
    kernel = lambda params: params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel(served), kernel(base).astype(jnp.bfloat16))


def test_frozen_weights_are_laid_out_once_and_trained_ones_every_time(mesh):
    layout = ServingLayout(dataclasses.replace(POLICY, compute_dtype="bfloat16"), mesh, by_layer=False)
    base, adapter = weights(mesh)
    first = layout(lora.attach(base, adapter))
    changed = jax.tree.map(lambda leaf: leaf + 1.0, adapter)
    second = layout(lora.attach(base, changed))
    without = lambda params: {name: tree for name, tree in params.items() if name != "lora"}
    assert pointers(without(first)) == pointers(without(second))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), second["lora"], changed)
    trained, again = layout(base | {}), layout(jax.tree.map(lambda leaf: leaf * 2.0, base))
    assert pointers(trained["layers"]) != pointers(again["layers"])
    np.testing.assert_array_equal(again["lm_head"]["kernel"], (base["lm_head"]["kernel"] * 2.0).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_that_stand_apart_are_the_stacked_ones_and_what_is_not_of_a_layer_stays(mesh, dtype):
    policy = dataclasses.replace(POLICY, compute_dtype=dtype)
    params = lora.attach(*weights(mesh))
    stacked, apart = (ServingLayout(policy, mesh, by_layer)(params) for by_layer in (False, True))
    for n in range(POLICY.num_layers):
        for one, other in ((stacked, apart), (stacked["lora"], apart["lora"])):
            same = lambda a, b, n=n: np.testing.assert_array_equal(a[n], b)
            jax.tree.map(same, one["layers"], other["layers"][n])
    kept = lambda served: {name: tree for name, tree in served.items() if name not in ("layers", "lora")}
    jax.tree.map(np.testing.assert_array_equal, kept(stacked), kept(apart))
    if dtype == "float32":
        assert pointers(kept(apart)) == pointers(kept(params))
