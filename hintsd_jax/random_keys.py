# SPDX-License-Identifier: Apache-2.0

"""Keys of everything that is drawn: what a draw belongs to goes in, raw key data comes out.

Invariant 4: a key follows from (seed, step, name, index, occurrence) alone, never from a slot, a neighbour or the
clock.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np

# Numbers of parts: those from here on are further occurrences of a name, all below are parts of a job (its streams, its
# questions), of which there are never so many.
_OCCURRENCES = 2**31
_WORD = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def job_key(seed: int, step: int, name: str, index: int, occurrence: int = 0) -> np.ndarray:
    """Raw key data (uint32 [2]), folded from the run's seed, the step, a name (task id and purpose) and an index; where
    the name comes again in the step, `occurrence` says for which time, from 0 on.

    What `jax.random.fold_in` makes of `jax.random.key(seed)`, computed here: each of a step's hundreds of jobs would
    cost some dispatches.
    """
    key = (0, seed & _WORD)
    for part in (step, zlib.crc32(name.encode()), index):
        key = _threefry(key, (0, part & _WORD))
    data = np.array(key, np.uint32)
    return data if occurrence == 0 else subkey(data, _OCCURRENCES + occurrence)


def subkey(key: np.ndarray, number: int) -> np.ndarray:
    """Raw key data (uint32 [2]) of part `number` of what has `key`: a hash of both."""
    digest = hashlib.blake2b(key.astype("<u4").tobytes() + number.to_bytes(4, "little"), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


def _threefry(key: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32 of 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), on 32-bit
    words.
    """
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    a, b = (block[0] + keys[0]) & _WORD, (block[1] + keys[1]) & _WORD
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            a = (a + b) & _WORD
            b = ((b << rotation | b >> (32 - rotation)) & _WORD) ^ a
        a = (a + keys[(group + 1) % 3]) & _WORD
        b = (b + keys[(group + 2) % 3] + group + 1) & _WORD
    return a, b
