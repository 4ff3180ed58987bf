"""Hints about misspelt names, text that is no Unicode, and exceptions in one line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hintsd_jax
from hintsd_jax.texts import described, did_you_mean, encodable, is_encodable

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


@pytest.mark.parametrize("fails", ["json.loads('?')", "import no_such_module_at_all", "1 / 0"])
@pytest.mark.parametrize(
    "folder", ["/home/me", f"{Path(hintsd_jax.__file__).parent}_envs", f"{Path(json.__file__).parents[1]}x"]
)
def test_the_place_of_an_exception_is_in_the_users_file(fails, folder):
    """Also in a folder whose path begins like one of those that are not the user's."""
    code = compile(f"def play():\n    {fails}\n", f"{folder}/mine.py", "exec")
    names = {"json": json}
    exec(code, names)
    with pytest.raises(Exception) as caught:
        names["play"]()
    assert described(caught.value).endswith(" (mine.py, line 2, in play)")
