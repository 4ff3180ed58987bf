"""Keys of draws: the same for ever, and another one for everything else that is drawn."""

import itertools
import zlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.random_keys import job_key, subkey


@pytest.mark.parametrize(
    "parts, expected",
    [
        ((0, 0, "", 0), [683029726, 1624662641]),
        ((42, 3, "dropout desk/7", 1), [375580678, 3919156664]),
        ((1, 2, "hindsight é", 5), [1065263060, 2399137271]),
        ((2**32 - 1, 1, "a", 0), [4055977481, 1125030656]),
    ],
)
def test_a_key_is_what_it_has_always_been(parts, expected):
    """A run that was started before is continued with the same draws."""
    key = job_key(*parts)
    assert key.tolist() == expected and key.dtype == np.uint32


WORDS = st.integers(0, 2**32 - 1)


@given(WORDS, WORDS, st.text(max_size=8), WORDS)
@settings(max_examples=60, deadline=None)
def test_a_key_is_folded_as_jax_does(seed, step, name, index):
    key = jax.random.key(seed)
    for part in (step, zlib.crc32(name.encode()), index):
        key = jax.random.fold_in(key, part)
    assert job_key(seed, step, name, index).tolist() == jax.random.key_data(key).tolist()


def test_a_subkey_is_what_it_has_always_been():
    key = job_key(42, 3, "dropout desk/7", 1)
    expected = {1: [1869612669, 198234649], 7: [3868876436, 2581096824], 2**31: [1573116870, 538160135]}
    assert {number: subkey(key, number).tolist() for number in expected} == expected
    assert subkey(key, 1).dtype == np.uint32


def test_every_draw_has_a_key_of_its_own():
    jobs = [job_key(*parts) for parts in itertools.product(range(2), range(3), ("a", "b", "ab"), range(3))]
    again = [job_key(0, 1, "a", index, occurrence) for index in range(3) for occurrence in range(1, 4)]
    keys = [*jobs, *(subkey(key, number) for key in jobs for number in range(1, 6)), *again]
    keys += [subkey(key, number) for key in again for number in range(1, 6)]
    assert len({tuple(key.tolist()) for key in keys}) == len(keys) == 54 * 6 + 9 * 6


def test_a_name_that_comes_again_has_other_keys_and_the_first_time_todays():
    assert job_key(42, 3, "dropout desk/7", 1, 0).tolist() == [375580678, 3919156664]
    again = job_key(42, 3, "dropout desk/7", 1, 1)
    assert (
        again.dtype == np.uint32 and again.tolist() == subkey(job_key(42, 3, "dropout desk/7", 1), 2**31 + 1).tolist()
    )
