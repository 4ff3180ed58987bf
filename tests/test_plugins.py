"""What a config names by its path: found, or refused in one line that says what to do."""

import math

import pytest

from hintsd_jax import algorithms
from hintsd_jax.errors import UserError
from hintsd_jax.plugins import load


def problem(path, known=("first", "last")):
    with pytest.raises(UserError) as caught:
        load(path, "selector", known)
    text = str(caught.value)
    assert text.startswith(f"selector {path!r}") and "\n" not in text
    return text


def test_a_path_leads_to_the_object():
    assert load("math:sqrt", "selector") is math.sqrt
    assert load("hintsd_jax.algorithms:ALGORITHMS", "table") is algorithms.ALGORITHMS


def test_an_unknown_name_is_refused_with_the_nearest_or_all():
    assert "did you mean 'first'?" in problem("frist") and "'package.module:name'" in problem("frist")
    assert all(name in problem("zzz") for name in ("first", "last"))
    assert "'package.module:name'" in problem("", known=())


@pytest.mark.parametrize(
    "path", ["math:", ":sqrt", "math:1", "math:a.b", "a b:c", "math.:sqrt", "..math:sqrt", "a:b:c"]
)
def test_a_path_that_is_none_is_refused(path):
    assert "write it as 'package.module:name'" in problem(path)


def test_a_module_that_cannot_be_imported_is_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    (tmp_path / "torn_plugin.py").write_text("def (\n")
    assert "cannot import 'no_such_module' (there is no such module in /" in problem("no_such_module:x")
    assert "cannot import 'broken_plugin' (ZeroDivisionError: division by zero)" in problem("broken_plugin:x")
    assert "cannot import 'torn_plugin' (SyntaxError" in problem("torn_plugin:x")


def test_a_module_without_the_name():
    assert "module 'math' has no 'squareroot'" in problem("math:squareroot")
    assert "has no 'Qqqqqqq'; it defines " in problem("typing:Qqqqqqq") and " more" in problem("typing:Qqqqqqq")
    assert len(problem("typing:Qqqqqqq")) < 300
    assert "module 'fractions' has no 'Fracton'; did you mean 'Fraction'?" in problem("fractions:Fracton")
