"""Leaves that are not finite are named, whatever their dtype and however they lie; weights that are not are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.models.finite import _sums_finite, non_finite
from hintsd_jax.models.sharding import make_mesh


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_leaves_with_a_nan_or_an_infinity_are_named(value, dtype):
    tree = {"a": {"b": jnp.zeros((3, 4), dtype), "c": jnp.ones(5, dtype)}, "n": jnp.arange(3), "x": 1.0}
    assert non_finite(tree) == [] == non_finite({}) == non_finite({"none": np.zeros((0, 3))})
    tree["a"]["c"] = tree["a"]["c"].at[4].set(value)
    tree["x"] = value
    assert non_finite(tree) == ["a.c", "x"]
    assert non_finite([tree["a"], {"deep": (np.ones(2), np.array([value, 1.0]))}]) == ["0.c", "1.deep.1"]


def test_the_largest_numbers_are_finite():
    assert non_finite({name: jnp.full(2, jnp.finfo(name).max, name) for name in ("float32", "bfloat16")}) == []


def test_split_leaves_are_read_where_they_lie():
    """Nothing as large as a leaf is made, on one device or on many."""
    mesh = make_mesh(devices=jax.devices()[:1])
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    split = jax.device_put(jnp.ones(8), layout)
    assert non_finite({"w": split}) == [] and non_finite({"w": split.at[7].set(jnp.nan)}) == ["w"]
    memory = _sums_finite.lower([jax.ShapeDtypeStruct((1 << 20,), jnp.float32)] * 3).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 16
