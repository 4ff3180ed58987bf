"""Which shapes go to cuDNN's kernel, and the program that is made for a GPU; what the kernel computes is measured on a
GPU by `benchmarks.gpu`.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from hintsd_jax.models import attention, cudnn
from hintsd_jax.models.sharding import AXES


def heads(shape, kv_heads, dtype="bfloat16"):
    return [jax.ShapeDtypeStruct((*shape[:2], n, shape[3]), dtype) for n in (shape[2], kv_heads, kv_heads)]


@pytest.mark.parametrize(
    ("shape", "kv_heads", "tensor", "dtype", "fits"),
    [
        ((1, 4096, 32, 128), 8, 8, "bfloat16", True),
        ((2, 1000, 14, 64), 2, 1, "float16", True),
        ((1, 4096, 32, 128), 8, 1, "float32", False),
        ((1, 4096, 32, 256), 8, 1, "bfloat16", False),
        ((1, 4096, 32, 100), 8, 1, "bfloat16", False),
        ((1, 512, 32, 128), 8, 1, "bfloat16", False),  # one tile
        ((1, 4096, 32, 128), 2, 8, "bfloat16", False),  # a device would hold query heads without their keys
    ],
)
def test_only_shapes_that_it_takes_go_to_the_kernel(monkeypatch, shape, kv_heads, tensor, dtype, fits):
    q, k, _ = heads(shape, kv_heads, dtype)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, tensor), AXES)):
        assert not cudnn.fits(q, k)  # no GPU here
        monkeypatch.setattr(cudnn, "gpu_is_here", lambda: True)
        assert cudnn.fits(q, k) == fits


def test_a_program_for_a_gpu_calls_the_kernel_and_one_for_a_cpu_does_not(monkeypatch):
    """Lowered, with a GPU made up: forward and backward kernel, both causal; all else goes on as it was."""
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "gpu_is_here", lambda: True)
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    gradient = jax.jit(jax.grad(lambda *qkv: jnp.sum(attention.attend_causal(*qkv).astype(jnp.float32)), (0, 1, 2)))
    traced = gradient.trace(*heads((1, 1024, 4, 64), 2))
    for_gpu, for_cpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu"))
    assert "__cudnn$fmhaSoftmax" in for_gpu and "__cudnn$fmhaSoftmaxBackward" in for_gpu
    assert "NO_MASK" not in for_gpu and "CAUSAL" in for_gpu and "stablehlo.while" not in for_gpu
    assert "cudnn" not in for_cpu and "stablehlo.while" in for_cpu
