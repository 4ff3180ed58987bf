"""Hints about misspelt names, and text that is no Unicode."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintsd_jax.texts import did_you_mean, encodable, is_encodable

KNOWN = ("hint_sd", "grpo", "Desk")


@pytest.mark.parametrize("name, near", [("hintsd", "hint_sd"), ("GRPO", "grpo"), ("desk", "Desk"), ("dekc", "Desk")])
def test_the_nearest_name_whatever_the_case(name, near):
    assert did_you_mean(name, KNOWN) == f"did you mean {near!r}?"


def test_nothing_near():
    assert did_you_mean("xyzzy", KNOWN) == "choose one of hint_sd, grpo, Desk"
    assert did_you_mean("xyzzy", KNOWN, "see the docs") == "see the docs"


@given(st.text(st.characters(codec=None), max_size=20))
def test_halves_of_surrogate_pairs(text):
    clean = encodable(text)
    clean.encode("utf-8")
    assert is_encodable(text) == (clean == text) == all(not 0xD800 <= ord(c) <= 0xDFFF for c in text)
    assert len(clean) == len(text) and is_encodable(clean)
