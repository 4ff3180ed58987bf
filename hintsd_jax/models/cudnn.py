# SPDX-License-Identifier: Apache-2.0

"""Causal attention of whole rows by cuDNN's flash kernel (NVIDIA GPU), each device its own rows and heads: heads flow
in, mixed values flow out.

On an H200 it reached 250 to 424 TFLOP/s at 4,096 and 8,192 tokens, a third to a half of what a plain product does there
(benchmarks/results/gpu_h200.md).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from hintsd_jax.models import splash

_SHORTEST = 512  # shorter rows are one tile
_CAPABILITY = 8.0  # Ampere: what the kernel asks for


def fits(q_BTHC: jax.Array, k_BTKC: jax.Array) -> bool:
    """Whether the kernel takes these shapes on the current mesh, and there is a GPU here: jax asks the GPU for what it
    can do when it traces the call, so a program for one cannot be made without it.
    """
    _, T, _, C = q_BTHC.shape
    if q_BTHC.dtype not in (jnp.bfloat16, jnp.float16) or T <= _SHORTEST or C > 128 or C % 8:
        return False
    return gpu_is_here() and splash.are_split_alike(q_BTHC, k_BTKC)


def gpu_is_here() -> bool:
    """Whether there is an NVIDIA GPU of at least Ampere's kind."""
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", None)  # AMD's devices have none of this form
    try:
        return capability is not None and float(capability) >= _CAPABILITY
    except ValueError:
        return False


def attend_causal(q_BTHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, _: None) -> jax.Array:
    """As `attention.attend_causal`, for shapes that `fits`, one sequence in a row."""
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return splash.on_each_device(attend, q_BTHC, k_BTKC, v_BTKC)
