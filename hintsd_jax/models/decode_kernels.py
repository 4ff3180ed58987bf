# SPDX-License-Identifier: Apache-2.0

"""Decoding attention by the libraries' kernels: one new token of every slot and the cache flow in, mixed values flow
out. Pallas' paged attention on TPU, its flash decoding (split keys) on GPU.

Both read each slot's keys and values up to its own length, from where the cache has them: [B, K, S, C] is taken for
B x K sequences of one kv head, which is a view and no copy. The plain form (`cached_attention.attend_all_slots`) reads
all slots up to the longest, and XLA's GPU compiler copies each block before its product, so that a byte of the cache
goes through memory three times.

Invariant: as in `cached_attention`; what a slot mixes depends on its own keys only; a slot of length 0 mixes zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import decode_attention
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from hintsd_jax.models import cudnn

# Positions of a page on TPU, all of which come into the chip at once (keys and values twice: 1 MiB of 1,024 x 128), and
# positions of a part that one block of threads reads on GPU; the largest that divides a slot is taken.
PAGES, PARTS = (1024, 512, 256, 128), (512, 256, 128, 64)
_KEYS = 64  # that a block of threads scores at once


def fits_tpu(q_BKGTC: jax.Array, keys_BKSC: jax.Array) -> bool:
    """Whether the TPU kernel takes these shapes; it computes with keys and values in bfloat16."""
    return keys_BKSC.dtype == jnp.bfloat16 and q_BKGTC.shape[-1] % 128 == 0 and _largest(PAGES, keys_BKSC) > 0


def fits_gpu(q_BKGTC: jax.Array, keys_BKSC: jax.Array) -> bool:
    """Whether the GPU kernel takes these shapes: 16 bits, because its products of float32 would be TF32. Programs for
    GPUs that are not here are made for such as can run it.
    """
    if jax.default_backend() == "gpu" and not cudnn.gpu_is_here():
        return False
    is_short = keys_BKSC.dtype in (jnp.bfloat16, jnp.float16)
    return is_short and q_BKGTC.shape[-1] in (32, 64, 128, 256) and _largest(PARTS, keys_BKSC) > 0


def attend_tpu(q_BKGTC, keys_BKSC, values_BKSC, slot_B, length_BT) -> jax.Array:
    """As `cached_attention.attend_all_slots`, for shapes of one token that fit."""
    B, K, S, C = keys_BKSC.shape
    P = _largest(PAGES, keys_BKSC)
    paged = lambda x_BKSC: x_BKSC.reshape(1, B * K * S // P, P, C)
    page = jnp.arange(B * K * S // P, dtype=jnp.int32).reshape(B * K, S // P)
    length = jnp.repeat(length_BT[:, 0], K)
    q = q_BKGTC.reshape(B * K, -1, C)
    mixed = paged_attention(q, paged(keys_BKSC), paged(values_BKSC), length, page, pages_per_compute_block=1)
    return mixed.reshape(q_BKGTC.shape).astype(jnp.float32)


def attend_gpu(q_BKGTC, keys_BKSC, values_BKSC, slot_B, length_BT, *, interpret: bool = False) -> jax.Array:
    """As `cached_attention.attend_all_slots`, for shapes of one token that fit. interpret: as Python on any backend."""
    B, K, S, C = keys_BKSC.shape
    part = _largest(PARTS, keys_BKSC)
    mixed = decode_attention.mqa(
        q_BKGTC.reshape(B * K, -1, C),
        keys_BKSC.reshape(B * K, S, C),
        values_BKSC.reshape(B * K, S, C),
        kv_seq_len=jnp.repeat(length_BT[:, 0], K),
        sm_scale=1.0,  # queries are scaled
        block_k=min(_KEYS, part),
        k_splits=S // part,
        interpret=interpret,
    )
    return mixed.reshape(q_BKGTC.shape).astype(jnp.float32)


def _largest(sizes: tuple[int, ...], keys_BKSC: jax.Array) -> int:
    """The first of the sizes that divides a slot, else 0."""
    return next((size for size in sizes if keys_BKSC.shape[2] % size == 0), 0)
