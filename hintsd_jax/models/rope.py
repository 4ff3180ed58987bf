# SPDX-License-Identifier: Apache-2.0

"""Rotary positions (RoFormer, arXiv:2104.09864): positions flow in, rotated heads flow out.

Angles are float32 whatever the heads are in, computed once in a pass and shared by all layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.rope_scaling import Llama3Scaling, YarnScaling


class Rotation(NamedTuple):
    """Cosine and sine of the rotary angles, float32, [B or 1, T, C / 2]."""

    cos: jax.Array
    sin: jax.Array


class Rotations(NamedTuple):
    """windowed: of layers with windows, where those rotate apart; None: as all others."""

    full: Rotation
    windowed: Rotation | None


def frequencies(config: PolicyConfig) -> jax.Array:
    """Radians a position, of the C / 2 pairs of a head: theta^(-2i/C), float32; scaled by `config.rope_scaling`."""
    plain, scaling = _plain(config.rope_theta, config.head_dim), config.rope_scaling
    if scaling is None:
        return plain
    keep = 0.0
    if isinstance(scaling, Llama3Scaling):
        keep = _kept_by_llama3(plain, scaling)
    elif isinstance(scaling, YarnScaling):
        keep = _kept_by_yarn(config.rope_theta, config.head_dim, scaling)
    return keep * plain + (1.0 - keep) * plain / scaling.factor


def _plain(theta: float, head_dim: int) -> jax.Array:
    return theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def _kept_by_llama3(plain: jax.Array, scaling: Llama3Scaling) -> jax.Array:
    """How much of a pair's own frequency stays (Llama 3.1, arXiv:2407.21783)."""
    rotations = scaling.original_positions * plain / (2 * math.pi)  # of a pair within the first context
    return jnp.clip((rotations - scaling.low_freq) / (scaling.high_freq - scaling.low_freq), 0.0, 1.0)


def _kept_by_yarn(theta: float, head_dim: int, scaling: YarnScaling) -> jax.Array:
    """How much of a pair's own frequency stays (YaRN, arXiv:2309.00071): the blend is straight in the pair's number,
    between whole ones.
    """
    # The pair that rotates so many times within the first context.
    pair = lambda rotations: (
        head_dim * math.log(scaling.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    )
    low, high = max(math.floor(pair(scaling.fast)), 0), min(math.ceil(pair(scaling.slow)), head_dim - 1)
    return 1.0 - jnp.clip((jnp.arange(head_dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)


def rotations(positions_BT: jax.Array, config: PolicyConfig) -> Rotations:
    """Cosine and sine of position * frequency, for all layers of a pass."""

    def of(frequencies: jax.Array, factor: float = 1.0) -> Rotation:
        angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
        return Rotation(factor * jnp.cos(angles), factor * jnp.sin(angles))

    scaling, windowed = config.rope_scaling, None
    if config.windowed and config.window_rope_theta is not None:
        windowed = of(_plain(config.window_rope_theta, config.head_dim))
    factor = scaling.magnitude if isinstance(scaling, YarnScaling) else 1.0
    return Rotations(of(frequencies(config), factor), windowed)


def of_layer(by: Rotations, config: PolicyConfig, layer: int | jax.Array) -> Rotation:
    """A layer's own: that of windows where it has one, none where `config.unrotated` names it (NoPE,
    arXiv:2305.19466).
    """
    rotation = by.full
    if by.windowed is not None:
        is_windowed = among(config.windowed, config, layer)
        rotation = Rotation(*(jnp.where(is_windowed, *both) for both in zip(by.windowed, by.full, strict=True)))
    if config.unrotated:
        is_not = among(config.unrotated, config, layer)
        rotation = Rotation(jnp.where(is_not, 1.0, rotation.cos), jnp.where(is_not, 0.0, rotation.sin))
    return rotation


def among(layers: tuple[int, ...], config: PolicyConfig, layer: int | jax.Array) -> jax.Array:
    """Whether a layer is one of `layers`, bool."""
    return jnp.array([n in layers for n in range(config.num_layers)])[layer]


def rotate(x_BTHC: jax.Array, by: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + C/2) of every head, the half-split layout of Hugging Face. Keeps the dtype."""
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHC.dtype)
