"""What README, CONTRIBUTING and docs/ name is there. The commands of docs/running.md are run; of all others what goes
wrong in the first moment is checked: modes, config keys and their values, flags, modules, files, targets of make.
"""

import functools
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hintsd_jax.main import MODES, main
from tests.configs import TINY

LONG = True  # see conftest.py
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
COMMANDS = ("make", "python", "pip", "hintsd-jax", "export")
# What stands in the pages for something of the reader's, and something of ours for it.
READERS = {
    "my_config.py": "configs/desk.py",
    "/path/to/model": "assets/desk-policy",
    "/path/to/policy": "assets/desk-policy",
    "my_package.my_module:MyEnvironment": "my_envs:Shredder",
}
# The shapes of tests/test_train.py: their programs are compiled once for both.
SHORTER = [f"--config.{key}={value}" for key, value in (TINY | {"optim.steps": 1, "eval.every": 0}).items()]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language in languages]


def commands(text: str) -> list[list[str]]:
    """The words of each command in a page's blocks, without comments. A block whose first word is no command of ours
    shows what a command prints.
    """
    found = []
    for block in blocks(text, "", "bash", "sh"):
        if block.split()[0] in COMMANDS:
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [words for words in found if words]


def inline(text: str) -> list[str]:
    """What stands between backticks within sentences."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that has of a checkout what commands name, and the files that two pages have one write."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "assets"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_envs.py").write_text(blocks((ROOT / "docs" / "environments.md").read_text(), "python")[0])
    (folder / "my_words.toml").write_text(blocks((ROOT / "docs" / "prompts.md").read_text(), "toml")[0])
    return folder


@pytest.fixture
def in_checkout(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(checkout)
    return checkout


def test_the_shortest_run_as_docs_running_has_it(in_checkout, capsys):
    text = (ROOT / "docs" / "running.md").read_text()
    found = [words for words in commands(text) if words[0] == "hintsd-jax" and "/path/to/" not in " ".join(words)]
    assert [words[1] for words in found] == ["train", "evaluate", "export", "report", "check", "plan"]
    for words in found:
        on_the_run = any(word.startswith("--workdir") for word in words)
        assert main(words[1:] + SHORTER * on_the_run) == 0, (words, capsys.readouterr().err)
    assert (in_checkout / "report.html").exists() and any((in_checkout / "runs/desk_smoke/export").iterdir())


def test_an_environment_of_ones_own_is_checked_as_docs_environments_has_it(in_checkout, capsys):
    text = (ROOT / "docs" / "environments.md").read_text()
    (in_checkout / "script.txt").write_text(blocks(text, "text")[0])
    found = [words[1:] for words in commands(text) if words[1] == "check"]
    for words in found:
        assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert len(found) == 3 and "Error: found nothing." in said and said.count("kept to the protocol") == 3


@pages
def test_commands_are_understood(page, in_checkout, capsys):
    text, trained = page.read_text(), {}
    for words in commands(text):
        for theirs, ours in READERS.items():
            words = [word.replace(theirs, ours) for word in words]
        # Without a config, a command takes that of the run, which an earlier one of the page has begun.
        if workdir := next((word for word in words if word.startswith("--workdir=")), None):
            given = [word for word in words if word.startswith("--config")]
            words += [] if given else trained.get(workdir, [])
            trained.setdefault(workdir, given)
        problem = refused(words, complete=True)
        assert not problem, f"{shlex.join(words)}: {problem} {capsys.readouterr().err}"
    for code in inline(text):
        if code.split()[0] in COMMANDS and " " in code:
            problem = "; ".join(
                filter(None, (refused(shlex.split(part), complete=False) for part in code.split(" && ")))
            )
            assert not problem, f"{code}: {problem}"


def refused(words: list[str], complete: bool) -> str:
    """What is wrong with a command, or nothing. complete: it has all its arguments."""
    match words:
        case ["export", _] | [".", ".venv/bin/activate"] | ["pip", "check"]:
            return ""
        case ["openenv", "init", _] | ["uvicorn", _, *_]:  # of OpenEnv, which is not installed here
            return ""
        case ["pip", "install", "--no-deps", "-r", file]:
            return "" if (ROOT / file).is_file() else "no such file"
        case ["make", target]:
            return "" if target in TARGETS else "no such target"
        case ["pip", "install", what]:
            extra = re.fullmatch(r"(?:\.|hintsd-jax)(?:\[(\w+)\])?", what)
            return "" if extra and (extra[1] is None or extra[1] in EXTRAS) else "no such extra"
        case ["python", "-m", "hintsd_jax" | "hintsd_jax.main", *arguments] | ["hintsd-jax", *arguments]:
            if arguments[:1] == ["report"]:
                return ""  # its arguments are folders of runs
            if complete:
                return "" if main([*arguments, "--print_config"]) == 0 else "refused"
            return "" if not arguments or arguments[0].startswith("--") or arguments[0] in MODES else "no such mode"
        case ["python", "-m", module, *arguments]:
            if importlib.util.find_spec(module) is None:
                return "no such module"
            return missing_flags(module, [word.partition("=")[0] for word in arguments if word.startswith("--")])
        case ["python", file, *_]:
            return "" if (ROOT / file).is_file() else "no such file"
        case _:
            return "unknown command"


def missing_flags(module: str, flags: list[str]) -> str:
    missing = [flag for flag in flags if not re.search(rf"{re.escape(flag)}\b", help_text(module))]
    return f"no such flags: {', '.join(missing)}" if missing else ""


@functools.cache
def help_text(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pages
def test_files_and_modules_are_there(page):
    """Paths from the checkout's or the package's top, dotted names of the package, and links."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"data", "runs"}
    for code in inline(text):
        if re.fullmatch(r"[a-z_]+/[\w./-]*", code) and (code.partition("/")[0] in tops or code.endswith(".py")):
            if not any((base / code).exists() for base in (ROOT, ROOT / "hintsd_jax")):
                missing.append(code)
        elif re.fullmatch(r"hintsd_jax(\.\w+)+", code):
            try:
                pkgutil.resolve_name(code)
            except (ImportError, AttributeError):
                missing.append(code)
    assert not missing
