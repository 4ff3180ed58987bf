"""Rotary positions against complex numbers, and the llama3 scaling against its definition by wavelengths."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from test_models_decoder import CONFIG

from hintsd_jax.models import rope
from hintsd_jax.models.config import RopeScaling

LONG = dataclasses.replace(
    CONFIG, head_dim=64, rope_theta=500_000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)
)  # Llama 3.1


def test_rotation_turns_half_split_pairs():
    """Each pair (i, i + C/2), read as a complex number, turns by position * theta^(-2i/C)."""
    config = dataclasses.replace(CONFIG, head_dim=8)
    x = np.random.default_rng(0).normal(size=(1, 5, 1, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 30, 1000]])
    angles = positions[..., None] * 500.0 ** (-2 * np.arange(4) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None]
    actual = rope.rotate(x, rope.rotation(jnp.asarray(positions), config))
    np.testing.assert_allclose(actual, np.concatenate([turned.real, turned.imag], -1), atol=2e-4)


def test_llama3_scaling_by_wavelength():
    """Wavelengths below original / high_freq stay, those above original / low_freq are stretched, and between the two
    they are blended.
    """
    plain = 500_000.0 ** (-np.arange(0, 64, 2) / 64)
    expected = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            blend = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - blend) * frequency / 8 + blend * frequency)
    assert len({round(a / b, 3) for a, b in zip(expected, plain, strict=True)}) > 3  # all three kinds are there
    np.testing.assert_allclose(rope.frequencies(LONG), expected, rtol=2e-6)
    np.testing.assert_allclose(rope.frequencies(dataclasses.replace(LONG, rope_scaling=None)), plain, rtol=2e-6)
