# SPDX-License-Identifier: Apache-2.0

"""Keys of everything that is drawn: what a draw belongs to goes in, raw key data comes out.

Invariant 4: a key follows from (seed, step, name, index) alone, never from a slot, a neighbour or the clock.
"""

from __future__ import annotations

import hashlib
import zlib

import jax
import numpy as np


def job_key(seed: int, step: int, name: str, index: int) -> np.ndarray:
    """Raw key data (uint32 [2]), folded from the run's seed, the step, a name (task id and purpose) and an index."""
    key = jax.random.key(seed)
    for part in (step, zlib.crc32(name.encode()), index):
        key = jax.random.fold_in(key, part)
    return np.asarray(jax.random.key_data(key))


def subkey(key: np.ndarray, number: int) -> np.ndarray:
    """Raw key data (uint32 [2]) of part `number` of what has `key`.

    A hash and not `jax.random.fold_in`: that would cost a dispatch for each of thousands of questions, and, called
    while the engine runs under its mesh, compile once more.
    """
    digest = hashlib.blake2b(key.astype("<u4").tobytes() + number.to_bytes(4, "little"), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)
