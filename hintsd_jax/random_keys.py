# SPDX-License-Identifier: Apache-2.0

"""Keys of everything that is drawn: what a draw belongs to goes in, raw key data comes out.

Invariant 4: a key follows from (seed, step, name, index, occurrence) alone, never from a slot, a neighbour or the
clock.
"""

from __future__ import annotations

import hashlib
import zlib

import jax
import numpy as np

# Numbers of parts: those from here on are further occurrences of a name, all below are parts of a job (its streams, its
# questions), of which there are never so many.
_OCCURRENCES = 2**31


def job_key(seed: int, step: int, name: str, index: int, occurrence: int = 0) -> np.ndarray:
    """Raw key data (uint32 [2]), folded from the run's seed, the step, a name (task id and purpose) and an index; where
    the name comes again in the step, `occurrence` says for which time, from 0 on.
    """
    key = jax.random.key(seed)
    for part in (step, zlib.crc32(name.encode()), index):
        key = jax.random.fold_in(key, part)
    data = np.asarray(jax.random.key_data(key))
    return data if occurrence == 0 else subkey(data, _OCCURRENCES + occurrence)


def subkey(key: np.ndarray, number: int) -> np.ndarray:
    """Raw key data (uint32 [2]) of part `number` of what has `key`.

    A hash and not `jax.random.fold_in`: that would cost a dispatch for each of thousands of questions, and, called
    while the engine runs under its mesh, compile once more.
    """
    digest = hashlib.blake2b(key.astype("<u4").tobytes() + number.to_bytes(4, "little"), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)
