"""What the benchmarks write: Markdown tables, and pages of docs/ with a table between two markers."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from tabulate import tabulate

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]], left: Collection[int] = (0,)) -> str:
    """Columns in `left` (by number) begin on the left, all others end on the right; a "|" in a cell becomes "/"."""
    align = ["left" if n in left else "right" for n in range(len(header))]
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return tabulate(cells, header, tablefmt="pipe", colalign=align, disable_numparse=True)


def fill(page: Path, mark: str, text: str) -> None:
    """Puts a text between the page's markers of that name; says so where the page has none."""
    markers = re.compile(rf"(<!-- {mark}: made by [^>]*-->\n).*?(\n<!-- {mark}: end -->)", re.DOTALL)
    whole, count = markers.subn(lambda match: match[1] + text + match[2], page.read_text())
    if count:
        page.write_text(whole)
    else:
        print(f"{page} has no place for {mark}: it stays as it is", file=sys.stderr)
