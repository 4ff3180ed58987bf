"""Builds the documentation's site: README, CONTRIBUTING, CHANGELOG and docs/ flow in, with all that they link to; a
folder `site/` of HTML flows out.

`make site`, or `python docs/write_site.py` where requirements-docs.txt is installed. The pages are laid out under
`.cache/site/pages` in the same folders as in the checkout, so that every link holds as it is written; what the site's
Markdown reads otherwise than GitHub's is put right in the copies. Strict: a warning, or a link of the finished site
that leads to nothing, is exit status 1.
"""

from __future__ import annotations

import html.parser
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "docs" / "site.toml"
WORK = ROOT / ".cache" / "site"
SITE = ROOT / "site"


def relative_links(text: str) -> list[str]:
    """The files that a page of Markdown links to or shows, as it names them: neither addresses nor its own sections."""
    found = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    return [link for link in found if "://" not in link]


def pages_and_files(root: Path) -> list[Path]:
    """The pages of a checkout, and every file that they and the pages they link to name; relative to `root`."""
    waiting = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    waiting += sorted((root / "docs").glob("*.md"))
    found: list[Path] = []
    while waiting:
        path = waiting.pop(0).resolve()
        if path.relative_to(root) in found:
            continue
        found.append(path.relative_to(root))
        if path.suffix == ".md":
            waiting += [path.parent / link for link in relative_links(path.read_text())]
    return found


def for_the_site(text: str) -> str:
    """A page in GitHub's Markdown as the site's reads it: a table begins after an empty line, a formula is MathML."""
    text = re.sub(r"^(<!-- .* -->)\n(?=\|)", r"\1\n\n", text, flags=re.MULTILINE)
    return re.sub(r"^\$\$(.*)\$\$$", lambda match: mathml(match[1]), text, flags=re.MULTILINE)


def mathml(formula: str) -> str:
    converter = importlib.import_module("latex2mathml.converter")  # of the site's own environment, not of the tests'
    formula = formula.replace(r"\|", "\u2016")  # the sign itself: the converter does not know it by this name
    return f'<div style="overflow-x: auto">{converter.convert(formula, display="block")}</div>'


def api_page(title: str, modules: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {module}" for module in modules)]) + "\n"


def lay_out(folder: Path, settings: dict) -> None:
    """Fills the folder with everything that the site is made of."""
    for path in pages_and_files(ROOT):
        copy = folder / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            copy.write_text(for_the_site((ROOT / path).read_text()))
        else:
            shutil.copy(ROOT / path, copy)
    titles = {page: title for title, page in navigation(settings["nav"])}
    (folder / "api").mkdir()
    for name, modules in settings["extra"]["api"].items():
        (folder / "api" / f"{name}.md").write_text(api_page(titles[f"api/{name}.md"], modules))


def navigation(entries: list) -> list[tuple[str, str]]:
    """(title, page) of every page that the navigation names, in its order."""
    found = []
    for title, inside in (pair for entry in entries for pair in entry.items()):
        found += navigation(inside) if isinstance(inside, list) else [(title, inside)]
    return found


class Page(html.parser.HTMLParser):
    """What a finished page links to or loads, and the names of its places."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src", "srcset") and value and tag != "base":
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def broken_links(site: Path) -> list[str]:
    """One line for every link of the finished site that leads to no file of it, or to no place of its page."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            place = unquote(parts.fragment)
            if not target.exists() or (target in pages and place and place not in pages[target].places):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def main() -> int:
    settings = tomllib.loads(CONFIG.read_text())["project"]
    for folder in (WORK, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    lay_out(WORK / settings["docs_dir"], settings)
    shutil.copy(CONFIG, WORK / "zensical.toml")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(WORK / "zensical.toml")]
    built = subprocess.run(command, cwd=WORK, capture_output=True, text=True)
    if built.returncode:
        print(built.stdout + built.stderr, end="", file=sys.stderr)
        return 1
    shutil.move(WORK / settings["site_dir"], SITE)
    broken = broken_links(SITE)
    for line in broken:
        print(f"leads to nothing: {line}", file=sys.stderr)
    print(f"{len(list(SITE.rglob('*.html')))} pages: {SITE.relative_to(ROOT)}/index.html")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
