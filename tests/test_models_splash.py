"""The TPU kernel's Python, run on this CPU, against plain attention: values and gradients; which shapes go to it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from hintsd_jax.models import attention, splash
from hintsd_jax.models.sharding import AXES


@pytest.mark.parametrize(("T", "query_block", "key_block"), [(256, 128, 128), (384, 256, 256), (384, 128, 512)])
def test_the_kernel_is_causal_attention_of_grouped_queries(monkeypatch, T, query_block, key_block):
    """Also where a block is cut because it does not divide the row."""
    monkeypatch.setattr(splash, "_QUERY_BLOCK", query_block)
    monkeypatch.setattr(splash, "_KEY_BLOCK", key_block)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, T, heads, 128)).astype(np.float32) for heads in (2, 1, 1))
    pick = rng.normal(size=q.shape).astype(np.float32)

    def run(attend):
        return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv) * pick), argnums=(0, 1, 2)))(q, k, v)

    seen_BTS = np.tri(T, dtype=bool)[None]
    expected = run(lambda *qkv: attention.attend(*qkv, seen_BTS))
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4),
        run(partial(splash.attend_causal, interpret=True)),
        expected,
    )
    # two sequences, of 100 and 150 tokens, and padding
    at_T = np.arange(T)
    first_BT = np.where(at_T < 250, np.where(at_T < 100, 0, 100), at_T)[None]
    within_BTS = seen_BTS & (at_T >= first_BT[..., None])
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4),
        run(lambda *qkv: splash.attend_causal(*qkv, jnp.asarray(first_BT, jnp.int32), interpret=True)),
        run(lambda *qkv: attention.attend(*qkv, within_BTS)),
    )
    everything = run(lambda *qkv: attention.attend(*qkv, np.ones_like(seen_BTS)))
    assert np.abs(everything[1][1] - expected[1][1]).max() > 0.1  # the comparison would notice another mask


@pytest.mark.parametrize(
    ("shape", "kv_heads", "tensor", "fits"),
    [
        ((1, 4096, 32, 128), 8, 8, True),
        ((1, 24576, 32, 128), 8, 1, True),
        ((1, 768, 32, 128), 8, 1, True),
        ((1, 512, 32, 128), 8, 1, False),  # short rows: nothing to gain
        ((1, 4100, 32, 128), 8, 1, False),
        ((1, 4096, 32, 64), 8, 1, False),  # lanes are 128 wide
        ((1, 4096, 32, 128), 2, 8, False),  # a device would hold query heads without their keys
    ],
)
def test_only_shapes_that_it_takes_go_to_the_kernel(shape, kv_heads, tensor, fits):
    q, k = (jax.ShapeDtypeStruct((*shape[:2], heads, shape[3]), "bfloat16") for heads in (shape[2], kv_heads))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, tensor), AXES)):
        assert splash.fits(q, k) == fits
