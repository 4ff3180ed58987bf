"""Checksums of arrays: the same wherever an array lies, another for any array that differs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.checkpoints.checksums import changed, checksums

ROOT = Path(__file__).parents[1]


def by_hand(array):
    """The formula in Python's whole numbers, one element after another."""
    sums = [0, 0]
    size = min(array.dtype.itemsize, 4)
    raw = np.ascontiguousarray(array).tobytes()
    for place in range(len(raw) // size):
        word = int.from_bytes(raw[place * size : (place + 1) * size], "little")
        for lane, (added, factor) in enumerate(((0x9E3779B9, 0x85EBCA6B), (0x7F4A7C15, 0xC2B2AE35))):
            mixed = (word + added) % 2**32 ^ place * factor % 2**32
            mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
            mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
            sums[lane] += mixed ^ mixed >> 16
    return "".join(f"{total % 2**32:08x}" for total in sums)


VALUES = {
    "f32": jax.random.normal(jax.random.key(0), (3, 5, 7)),
    "bf16": jax.random.normal(jax.random.key(1), (4, 6)).astype(jnp.bfloat16),
    "i8": jnp.arange(-4, 5, dtype=jnp.int8),
    "bool": jnp.array([[True, False, True]]),
    "scalar": jnp.int32(7),
    "none": jnp.zeros((0, 3)),
}


@pytest.mark.parametrize("name", VALUES)
def test_devices_the_host_and_arithmetic_by_hand_agree(name):
    value = VALUES[name]
    (text,) = checksums([value]).values()
    assert text == f"{value.dtype}{list(value.shape)} {by_hand(np.asarray(value))}"
    assert checksums([np.asarray(value)]) == checksums([value])


def test_names_and_keys():
    key = jax.random.key(3)
    given = {"layers": [{"kernel": jnp.ones(2)}], "key": key}
    assert list(checksums(given)) == ["key", "layers.0.kernel"]
    assert checksums({"key": key})["key"] == checksums({"key": jax.random.key_data(key)})["key"]
    assert changed(checksums(given), given) == []
    assert changed(checksums({"key": key}), given) == ["layers.0.kernel"]


def test_every_single_bit_is_seen():
    array = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    stored = checksums([array])
    for bit in range(array.size * 32):
        flipped = array.copy()
        flipped.view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        assert changed(stored, [flipped]) == ["0"]


def test_what_else_a_disk_does_is_seen():
    """Elements that change places, blocks that are lost or repeated, another dtype or shape with the same bytes."""
    array = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    lost, twice = array.copy(), array.copy()
    lost[2:4], twice[4:6] = 0, array[2:4]
    others = [array[::-1], array[:, ::-1], lost, twice, array.reshape(16, 8), array.view(np.int32), -array, array.T]
    assert len({checksums([each])["0"] for each in (array, *others)}) == len(others) + 1
    assert checksums([np.zeros(8, np.float32)]) != checksums([np.zeros(9, np.float32)])
    long = np.arange(200_000, dtype=np.int32)  # more than the host takes at a time
    assert checksums([long]) == checksums([jnp.asarray(long)])


SHARDED = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from hintsd_jax.checkpoints import checksums as sums
x = jax.random.normal(jax.random.key(0), (8, 6, 16))
found = [sums.checksums([x])["0"]]
for count, spec in ((8, P("x")), (4, P(None, None, "x")), (8, P("x", "y")), (8, P())):
    devices = np.array(jax.devices()[:count]).reshape(-1, 2 if "y" in spec else 1)
    laid = jax.device_put(x, NamedSharding(Mesh(devices, ("x", "y")), spec))
    found.append(sums.checksums([laid])["0"])
    text = sums._summed(sums._everywhere([laid]), False).lower(laid).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
print(json.dumps(found))
"""


def test_the_same_on_every_mesh_and_nothing_is_gathered():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # Twice the threads: see tests/test_meshes.py.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "PJRT_NPROC": "16"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(set(json.loads(done.stdout))) == 1
