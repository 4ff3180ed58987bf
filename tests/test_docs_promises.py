"""docs/fidelity.md, docs/reliability.md and docs/comparison.md: every test that they name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page, least", [("fidelity", 30), ("reliability", 60)])
def test_every_row_names_a_test_that_exists(page, least):
    rows = [line for line in (ROOT / "docs" / f"{page}.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith(("| test |", "| tests |"))]
    assert len(rows) > least
    for row in rows:
        names = re.findall(r"`(test_\w+)(?:::(test_\w+))?`", row.rpartition(" | ")[2])
        assert names, f"no test in: {row}"
        for module, name in names:
            text = (ROOT / "tests" / f"{module}.py").read_text()
            assert not name or f"def {name}(" in text, f"{module}::{name}"


def test_every_row_of_the_comparison_says_no_or_names_its_test_or_page():
    rows = [line for line in (ROOT / "docs" / "comparison.md").read_text().splitlines() if line.count(" | ") == 5]
    assert len(rows) > 40
    for row in rows:
        ours = row.rpartition(" | ")[2]
        names = re.findall(r"`(test_\w+)::(test_\w+)`", ours)
        assert names or re.search(r"\]\(\S+\.md", ours) or ours.startswith(("**no", "ours |")), row
        for module, name in names:
            assert f"def {name}(" in (ROOT / "tests" / f"{module}.py").read_text(), f"{module}::{name}"
