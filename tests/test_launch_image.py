"""The image of launch/Dockerfile, as far as a machine without a daemon can check it: it is clean for hadolint, all that
it copies is there and let in, and a package can be built from just that.
"""

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)).splitlines()


def let_in(name: str) -> bool:
    """Whether the build sees a file of the checkout's top: of the patterns that match, the last one says."""
    lines = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    seen = True
    for pattern in filter(None, (line.partition("#")[0].strip() for line in lines)):
        if fnmatch.fnmatchcase(name, pattern.removeprefix("!")):
            seen = pattern.startswith("!")
    return seen


def copied() -> set[str]:
    sources = [shlex.split(line)[1:-1] for line in INSTRUCTIONS if line.startswith("COPY ")]
    return {path.name for words in sources for word in words for path in ROOT.glob(word) if let_in(path.name)}


def test_it_is_clean_for_hadolint():
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("no hadolint: requirements-dev.txt has it")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_what_it_copies_is_there_and_nothing_else_is_let_in():
    for line in INSTRUCTIONS:
        if line.startswith("COPY "):
            for word in shlex.split(line)[1:-1]:
                assert any(let_in(path.name) for path in ROOT.glob(word)), word
    assert {path.name for path in ROOT.iterdir() if let_in(path.name)} == copied()
    assert not {".git", ".venv", "runs", "tests", "requirements-bfcl.txt"} & copied()


def test_a_package_can_be_built_from_what_it_copies():
    """README, licence, version and every file of requirements that pyproject.toml reads."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], "hintsd_jax"}
    needed |= {file for part in [dynamic, *dynamic["optional-dependencies"].values()] for file in files_of(part)}
    assert needed <= copied()
    links = [path for path in (ROOT / "hintsd_jax").iterdir() if path.is_symlink()]
    assert links and {path.readlink().name for path in links} <= copied()


def files_of(part: dict) -> list[str]:
    """Of one extra, or of the package's own dependencies."""
    return part["file"] if "file" in part else part["dependencies"]["file"]


@pytest.mark.parametrize("page", ["launch/Dockerfile", "docs/launching.md"])
def test_the_extras_that_are_shown_have_a_file(page):
    shown = re.findall(r"EXTRAS=([\w,-]+)", (ROOT / page).read_text())
    assert {"cuda", "tpu,gs"} <= set(shown)
    for extra in {name for words in shown for name in words.split(",")}:
        assert let_in(f"requirements-{extra}.txt") and (ROOT / f"requirements-{extra}.txt").is_file(), extra
