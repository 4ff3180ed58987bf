"""Rotary positions against complex numbers, and scalings against their definitions by wavelengths and rotations."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from test_models_decoder import CONFIG

from hintsd_jax.models import rope
from hintsd_jax.models.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling

LONG = dataclasses.replace(
    CONFIG, head_dim=64, rope_theta=500_000.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)
)  # Llama 3.1


def test_rotation_turns_half_split_pairs():
    """Each pair (i, i + C/2), read as a complex number, turns by position * theta^(-2i/C)."""
    config = dataclasses.replace(CONFIG, head_dim=8)
    x = np.random.default_rng(0).normal(size=(1, 5, 1, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 30, 1000]])
    angles = positions[..., None] * 500.0 ** (-2 * np.arange(4) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, :, None]
    actual = rope.rotate(x, rope.rotations(jnp.asarray(positions), config).full)
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


def test_yarn_by_rotations_within_the_first_context():
    """Pairs that rotate more than 32 times there stay, those that do less than once rotate 8 times slower; between
    them, straight in the pair's number. The values are those of OLMo 3.
    """
    scaling = YarnScaling(8.0, 8192, attention_factor=1.2079441541679836)
    config = dataclasses.replace(LONG, head_dim=128, rope_scaling=scaling)
    plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    times = 8192 * plain / (2 * np.pi)
    kept = (np.asarray(rope.frequencies(config)) / plain - 1 / 8) / (1 - 1 / 8)
    np.testing.assert_allclose(kept[times > 34], 1.0, atol=1e-5)
    np.testing.assert_allclose(kept[times < 0.9], 0.0, atol=1e-5)
    first, last = np.flatnonzero(times > 32)[-1], np.flatnonzero(times < 1)[0]
    np.testing.assert_allclose(np.diff(kept[first : last + 1]), -1 / (last - first), atol=1e-5)
    # A rotated vector is so much longer: scores grow by the square.
    rotation = rope.rotations(jnp.array([[0, 7]]), config).full
    np.testing.assert_allclose(rotation.cos**2 + rotation.sin**2, 1.2079441541679836**2, rtol=1e-5)
    assert YarnScaling(8.0, 8192).magnitude == 1.2079441541679836 and YarnScaling(1.0, 8192).magnitude == 1.0


def test_linear_scaling_slows_all_down():
    scaled = rope.frequencies(dataclasses.replace(LONG, rope_scaling=LinearScaling(8.0)))
    np.testing.assert_allclose(scaled, 500_000.0 ** (-np.arange(0, 64, 2) / 64) / 8, rtol=2e-6)
