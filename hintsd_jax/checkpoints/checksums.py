# SPDX-License-Identifier: Apache-2.0

"""Checksums of arrays: a tree of arrays flows in, a text for each leaf flows out that another value does not share.

A checksum is of the numbers, not of files: it is taken where the arrays are, on the devices, before a save, and again
after a restore, so all that lies between (the way to the host, the disk, the network, the library that writes) is
inside. It is a sum of integers, which has no order: the same on every mesh, with every sharding, over any number of
processes; nothing is gathered, and no file is read twice.

Invariant: one changed element always changes it (each step of `_mixed` can be undone); of other damage, such as a lost
or a swapped block, one in 2^64 stays unseen. It keeps out faults, not forgers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of the two sums that make up a checksum: what is added to an element, and what its place is multiplied with (odd).
_LANES = ((0x9E3779B9, 0x85EBCA6B), (0x7F4A7C15, 0xC2B2AE35))
_HOST_CHUNK = 1 << 16  # elements of a NumPy array at a time: small enough for a processor's cache


def checksums(tree: Any) -> dict[str, str]:
    """One text for each leaf by its dotted name (`params.layers.kernel`): dtype, shape and 16 hexadecimal digits.

    Leaves are jax arrays, all of one set of devices, or NumPy arrays and numbers, which are summed on the host. In
    several processes all call this together.
    """
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named]
    leaves = [_plain(leaf) for _, leaf in named]
    on_device = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    in_rows = all(len(leaf.sharding.device_set) == 1 and _platform(leaf) == "cpu" for leaf in on_device)
    sums_of = _summed(_everywhere(on_device), in_rows)
    summed = iter(jax.device_get([sums_of(leaf) for leaf in on_device]))
    sums = [next(summed) if isinstance(leaf, jax.Array) else host_sums(leaf) for leaf in leaves]
    return {
        name: f"{leaf.dtype}{list(leaf.shape)} {int(first):08x}{int(second):08x}"
        for name, leaf, (first, second) in zip(names, leaves, sums, strict=True)
    }


def changed(stored: Mapping[str, str], tree: Any) -> list[str]:
    """The names of the leaves whose checksum is not the stored one, or that have none."""
    return [name for name, value in checksums(tree).items() if stored.get(name) != value]


def host_sums(array: np.ndarray) -> tuple[int, int]:
    """The two sums of an array in host memory, [0, 2^32) each: those that the devices compute."""
    sums = [0, 0]
    words = np.ascontiguousarray(array).reshape(-1)
    words = words.view(np.dtype(f"u{min(words.itemsize, 4)}"))
    for begin in range(0, words.size, _HOST_CHUNK):
        word = words[begin : begin + _HOST_CHUNK].astype(np.uint32)
        place = np.arange(begin, begin + word.size, dtype=np.uint64).astype(np.uint32)
        for lane, (added, factor) in enumerate(_LANES):
            mixed = _mixed((word + np.uint32(added)) ^ (place * np.uint32(factor)))
            sums[lane] = (sums[lane] + int(mixed.sum(dtype=np.uint64))) % 2**32
    return sums[0], sums[1]


def _plain(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _platform(leaf: jax.Array) -> str:
    return next(iter(leaf.sharding.device_set)).platform


def _everywhere(leaves: list[jax.Array]) -> jax.sharding.Sharding | None:
    """Where the sums go: to every device of the leaves' mesh, so that every process can read them."""
    for leaf in leaves:
        if isinstance(leaf.sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    return None


@functools.cache
def _summed(where: jax.sharding.Sharding | None, in_rows: bool) -> Any:
    """The compiled sums of an array: uint32 [2]. One program a shape: most arrays of a state share theirs with others
    (moments, the EMA), and one program of them all takes several times as long to compile.

    in_rows: row after row of the first dimension. XLA for CPUs keeps what is summed in memory, at twice the size of an
    array; a row of it is small. Where an array is split over devices there may be no such row.
    """

    def checksum(leaf: jax.Array) -> jax.Array:
        return _row_by_row(leaf) if in_rows and leaf.ndim > 1 and leaf.size else _sums(leaf)

    return jax.jit(checksum, out_shardings=where)


def _row_by_row(leaf: jax.Array) -> jax.Array:
    stride = math.prod(leaf.shape[1:]) % 2**32

    def add(row: jax.Array, sums: jax.Array) -> jax.Array:
        return sums + _sums(leaf[row], row.astype(jnp.uint32) * np.uint32(stride))

    return jax.lax.fori_loop(0, leaf.shape[0], add, jnp.zeros(2, jnp.uint32))


def _sums(leaf: jax.Array, begin: Any = 0) -> jax.Array:
    """Of one array, the first element of which has the place `begin`. Places come from one counter a dimension: a
    reshape would gather an array that is split.
    """
    if leaf.dtype == jnp.bool_:
        word = leaf.astype(jnp.uint8)
    else:
        size = min(leaf.dtype.itemsize, 4)
        word = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * size}"))
    word = word.astype(jnp.uint32)
    place = jnp.full(word.shape, begin, jnp.uint32)
    for dimension in range(word.ndim):
        stride = math.prod(word.shape[dimension + 1 :]) % 2**32
        counter = jax.lax.broadcasted_iota(jnp.uint32, word.shape, dimension)
        place = place + counter * np.uint32(stride)
    lanes = [_mixed((word + np.uint32(added)) ^ (place * np.uint32(factor))) for added, factor in _LANES]
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in lanes])


def _mixed(word: Any) -> Any:
    """A one-to-one map of 32-bit numbers in which every bit of the result follows from all bits: two multiplications by
    odd numbers between shifts, as in the last step of MurmurHash3 (A. Appleby, public domain), with its constants.
    """
    word = word ^ (word >> np.uint32(16))
    word = word * np.uint32(0x85EBCA6B)
    word = word ^ (word >> np.uint32(13))
    word = word * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))
