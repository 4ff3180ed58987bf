# SPDX-License-Identifier: Apache-2.0

"""Rotary positions (RoFormer, arXiv:2104.09864): positions flow in, rotated heads flow out.

Angles are float32 whatever the heads are in, computed once in a pass and shared by all layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hintsd_jax.models.config import PolicyConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosine and sine of the rotary angles, float32, [B or 1, T, C / 2]."""

    cos: jax.Array
    sin: jax.Array


def frequencies(config: PolicyConfig) -> jax.Array:
    """Radians a position, of the C / 2 pairs of a head: theta^(-2i/C), float32; scaled by `config.rope_scaling`."""
    plain = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    return plain if config.rope_scaling is None else _llama3(plain, config.rope_scaling)


def _llama3(plain: jax.Array, scaling: RopeScaling) -> jax.Array:
    """The scaling of Llama 3.1 (arXiv:2407.21783, "llama3" in Hugging Face): slow pairs rotate `factor` times slower,
    fast ones as before.
    """
    rotations = scaling.original_positions * plain / (2 * math.pi)  # of a pair within the first context
    keep = jnp.clip((rotations - scaling.low_freq) / (scaling.high_freq - scaling.low_freq), 0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / scaling.factor


def rotation(positions_BT: jax.Array, config: PolicyConfig) -> Rotation:
    """Cosine and sine of position * frequency."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies(config)[None, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def of_layer(by: Rotation, config: PolicyConfig, layer: int | jax.Array) -> Rotation:
    """A layer's own: by nothing where `config.unrotated` names it (NoPE, arXiv:2305.19466)."""
    if not config.unrotated:
        return by
    rotated = jnp.array([n not in config.unrotated for n in range(config.num_layers)])[layer]
    return Rotation(jnp.where(rotated, by.cos, 1.0), jnp.where(rotated, by.sin, 0.0))


def rotate(x_BTHC: jax.Array, by: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + C/2) of every head, the half-split layout of Hugging Face. Keeps the dtype."""
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHC.dtype)
