"""The product of hidden states and a weight: values and gradients by NumPy in float64; no product without need."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.models.product import product


def draw(D, E, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 5, D), (D, E), (2, 5, E))]


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 0.2)])
@pytest.mark.parametrize("D, E", [(7, 12), (12, 7)], ids=["wider", "narrower"])
def test_values_and_gradients(D, E, dtype, atol):
    x, kernel, pull = draw(D, E, dtype)
    exact = [np.float64(np.asarray(value, np.float32)) for value in (x, kernel, pull)]
    for out in ("float32", dtype):  # a product with a bias is rounded after it
        y, back = jax.vjp(lambda x, kernel, out=out: product(x, kernel, out), x, kernel)
        of_x, of_kernel = back(pull.astype(out))
        assert (y.dtype, of_x.dtype, of_kernel.dtype) == (out, dtype, dtype)
        np.testing.assert_allclose(np.float64(y), exact[0] @ exact[1], atol=atol)
        np.testing.assert_allclose(np.float64(of_x), exact[2] @ exact[1].T, atol=atol)
        np.testing.assert_allclose(np.float64(of_kernel), np.einsum("btd,bte->de", exact[0], exact[2]), atol=atol)


@pytest.mark.parametrize("argnums, products, in_layers", [((0,), 2, 3), ((1,), 2, 4), ((0, 1), 3, 4)])
def test_what_gets_no_gradient_costs_no_product(argnums, products, in_layers):
    """An adapter's base has none, in each layer of a scan; there a layer is computed again, and its input follows from
    the layers before it.
    """
    x, kernel, _ = draw(7, 7)

    def loss(x, kernel):
        step = jax.checkpoint(lambda x, kernel: (jnp.sin(product(x, kernel, jnp.float32)), None))
        return jnp.sum(jax.lax.scan(step, x, jnp.stack([kernel] * 3))[0])

    plain = lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel, jnp.float32)))
    count = lambda f: str(jax.make_jaxpr(jax.grad(f, argnums))(x, kernel)).count("dot_general")
    assert count(plain) == products
    assert count(loss) == in_layers


def test_it_is_the_plain_product_to_the_bit_forward():
    x, kernel, _ = draw(64, 48)
    same = jax.jit(partial(product, dtype=jnp.float32))(x, kernel)
    np.testing.assert_array_equal(same, jax.jit(jnp.matmul)(x, kernel))
