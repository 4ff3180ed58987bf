"""Writes docs/architecture.md: the rooms with what each is for, and the graph of imports between them.

`python docs/write_architecture.py`; everything on the page is read off the code. A test compares.
"""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = "hintsd_jax"
ASIDE = ("configs", "assets", "__main__")


def rooms() -> list[str]:
    """The packages and modules at the top of the package, from the highest layer to the lowest, as pyproject.toml
    orders them. `config` counts where its lowest module stands.
    """
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = [name.strip().split(".")[1] for layer in layers for name in layer.split("|")]
    last = {name: n for n, name in enumerate(names)}
    return [name for n, name in enumerate(names) if last[name] == n and name not in ASIDE]


def arrows() -> Counter[tuple[str, str]]:
    """(importer, imported) -> how many imports of modules there are between two rooms."""
    graph, counts = grimp.build_graph(PACKAGE, cache_dir=None), Counter()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            pair = tuple((name.split(".") + [""])[1] for name in (importer, imported))
            if all(pair) and pair[0] != pair[1] and not set(pair) & set(ASIDE):
                counts[pair] += 1
    return counts


def summary(room: str) -> str:
    """The first paragraph of a room's docstring."""
    file = ROOT / PACKAGE / f"{room}.py"
    file = file if file.exists() else ROOT / PACKAGE / room / "__init__.py"
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split())


def page() -> str:
    names, counts = rooms(), arrows()
    text = [
        "# Architecture",
        "",
        "Written by `python docs/write_architecture.py` from the code. Imports point down this table only;",
        "`lint-imports` (part of `make test`) holds that, with the layers in `pyproject.toml`. `config` stands where",
        "its schema does; its `build`, which makes the typed config and the rooms' own configs, stands right above",
        "`algorithms`.",
        "",
        "| room | what it is |",
        "|---|---|",
        *(f"| `{name}` | {summary(name)} |" for name in names),
        "",
        "## Imports between rooms",
        "",
        "Foundations that nearly every room uses (`errors`, `config` and the small modules below it) are left out.",
        "",
        "```mermaid",
        "flowchart TD",
    ]
    foundations = set(names[names.index("config") :])
    for importer, imported in sorted(counts, key=lambda pair: (names.index(pair[0]), names.index(pair[1]))):
        if imported not in foundations and importer not in foundations:
            text.append(f"    {importer} --> {imported}")
    return "\n".join([*text, "```", ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
