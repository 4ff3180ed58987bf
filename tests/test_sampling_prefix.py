"""The common beginning of two token sequences."""

import pytest

from hintsd_jax.sampling.prefix import common_prefix_length


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [
        ((), (), 0),
        ((1,), (), 0),
        ((1, 2), (1, 2), 2),
        ((1, 2, 3), (1, 2), 2),
        ((1, 2, 3), (1, 9, 3), 1),
        ((5,), (6,), 0),
    ],
)
def test_common_prefix_length(a, b, length):
    assert common_prefix_length(a, b) == common_prefix_length(list(b), a) == length
