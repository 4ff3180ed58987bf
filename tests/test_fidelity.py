"""docs/fidelity.md: every test that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_row_names_a_test_that_exists():
    rows = [line for line in (ROOT / "docs" / "fidelity.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("| test |")]
    assert len(rows) > 30
    for row in rows:
        name = re.fullmatch(r".*\| `(test_\w+)(?:::(test_\w+))?` \|", row)
        assert name, f"no test in: {row}"
        module = (ROOT / "tests" / f"{name[1]}.py").read_text()
        assert name[2] is None or f"def {name[2]}(" in module, name[0]
