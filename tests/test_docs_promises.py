"""docs/fidelity.md and docs/reliability.md: every test that they name is there."""

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
