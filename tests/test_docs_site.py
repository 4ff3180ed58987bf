"""The documentation's site, without building it: its navigation has every page once, every link of every page leads to
something, and the script that builds it sees what does not.
"""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("write_site", ROOT / "docs" / "write_site.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

SETTINGS = tomllib.loads((ROOT / "docs" / "site.toml").read_text())["project"]


def sections(page: Path) -> set[str]:
    """The names that GitHub and the site give to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_navigation_has_every_page_once():
    named = [page for _, page in script.navigation(SETTINGS["nav"])]
    pages = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]
    assert sorted(named) == sorted([*pages, *(f"api/{name}.md" for name in SETTINGS["extra"]["api"])])


def test_what_the_api_pages_show_is_there_and_documented():
    for name, modules in SETTINGS["extra"]["api"].items():
        assert len(set(modules)) == len(modules), name
        for module in modules:
            file = ROOT / f"{module.replace('.', '/')}.py"
            assert ast.get_docstring(ast.parse(file.read_text())), module


def test_every_link_of_every_page_leads_to_something():
    """Pages that others link to are looked at too, such as results of benchmarks."""
    pages = [ROOT / path for path in script.pages_and_files(ROOT) if path.suffix == ".md"]
    assert len(pages) > len(list(ROOT.glob("docs/*.md"))) + 10
    broken = []
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            name, _, section = link.partition("#")
            target = page.parent / name if name else page
            if "://" not in link and not (target.is_file() and (not section or section in sections(target))):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_a_page_brings_the_files_that_its_links_name_along(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text('[a](docs/a.md#b) [web](https://a.b/c.md) <img src="x.svg">')
    (tmp_path / "docs" / "a.md").write_text("[code](../code.py) [back](../README.md) [here](#b)")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "x.svg", "code.py", "other.md"):
        (tmp_path / name).write_text("")
    found = [str(path) for path in script.pages_and_files(tmp_path.resolve())]
    assert sorted(found) == ["CHANGELOG.md", "CONTRIBUTING.md", "README.md", "code.py", "docs/a.md", "x.svg"]


def test_what_the_sites_markdown_reads_otherwise_is_put_right(monkeypatch):
    monkeypatch.setattr(script, "mathml", lambda formula: f"<math>{formula}</math>")
    text = "<!-- made by x -->\n| a |\n|---|\n\n<!-- end -->\ntext\n\n$$x^2$$\n\ncosts $$ and $$\n"
    expected = text.replace("-->\n| a |", "-->\n\n| a |").replace("$$x^2$$", "<math>x^2</math>")
    assert script.for_the_site(text) == expected


@pytest.mark.parametrize("link", ["nothing.html", "b.html#nothing", "#nothing", "c/", "../outside.html"])
def test_a_link_of_the_site_that_leads_to_nothing_is_seen(tmp_path, link):
    (tmp_path / "c").mkdir()
    good = ["b.html", "b.html#here", "#top", "https://a.b/c", "d%20e.svg", "mailto:a@b.c", "//a.b/c"]
    (tmp_path / "d e.svg").write_text("")
    (tmp_path / "b.html").write_text('<p id="here">')
    page = '<p id="top">' + "".join(f'<a href="{target}">' for target in good)
    (tmp_path / "a.html").write_text(page)
    assert script.broken_links(tmp_path) == []
    (tmp_path / "a.html").write_text(page + f'<img src="{link}">')
    assert script.broken_links(tmp_path) == [f"a.html: {link}"]
