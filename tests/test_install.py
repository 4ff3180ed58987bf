"""The package in an environment of its own, as a user makes it: source distribution, wheel, virtual environment. Its
command, configs and assets are used from a folder far from the checkout.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import hintsd_jax
from tests.configs import TINY

LONG = True  # see conftest.py
ROOT = Path(__file__).parents[1]
# Every process of the environment notes what it opens in the checkout, but for what the tests' own environment and
# cache hold.
WATCH = """
import os, sys
root, log = {root!r}, {log!r}
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and args[0] != log:
        path = os.path.realpath(args[0])
        if path.startswith(root + "/") and not path.startswith((root + "/.cache/", {allowed!r})):
            with open(log, "a") as file:
                print(path, file=file)
sys.addaudithook(watch)
"""


def run(*command, cwd):
    """The command's standard output. Paths that the tests themselves may be given do not reach it."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of a virtual environment with the wheel, built from the source distribution of a copy. What the
    package depends on comes from the environment of the tests: nothing is downloaded.
    """
    folder = tmp_path_factory.mktemp("install")
    for name in ("hintsd_jax", "configs", "assets"):
        shutil.copytree(
            ROOT / name, folder / "copy" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in (
        *ROOT.glob("requirements*.txt"),
        *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")),
    ):
        shutil.copy(file, folder / "copy")
    sdist = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    archive = run(sys.executable, "-c", sdist, cwd=folder / "copy").splitlines()[-1]
    shutil.rmtree(folder / "copy")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", folder / archive, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", folder / "env" / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    ours = sysconfig.get_paths()["purelib"]
    (site / "dependencies.pth").write_text(ours + "\n")  # behind the wheel in sys.path
    watch = WATCH.format(root=str(ROOT), log=str(folder / "opened"), allowed=os.path.realpath(sys.prefix) + "/")
    (site / "sitecustomize.py").write_text(watch)
    return folder / "env"


def test_the_version_is_the_same_wherever_it_stands():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    released = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited[1] == released[1] == hintsd_jax.__version__


def test_the_command_runs_a_shipped_config_from_anywhere(installed, tmp_path):
    command = installed / "bin" / "hintsd-jax"
    assert "optim.lr" in run(command, "--help", cwd=tmp_path)
    # The shapes of tests/test_train.py: their programs are compiled once for both.
    settings = TINY | {"optim.steps": 1, "eval.every": 0, "eval.tasks": 1, "eval.test_tasks": 1}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    table = run(command, "train", "--config=desk_smoke", "--workdir=run", *flags, cwd=tmp_path)
    assert "test Avg@2" in table
    updates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [update["step"] for update in updates] == [0, 1] and "train/loss" in updates[1]
    assert (tmp_path / "run" / "result.md").exists() and (tmp_path / "run" / "episodes" / "step_000001.jsonl").exists()
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["config"]["policy"]["path"].endswith("assets/desk-policy")
    assert str(ROOT) not in json.dumps(stored)
    run(command, "report", "run", cwd=tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "report.html", "run"]
    assert not (installed.parent / "opened").exists(), (installed.parent / "opened").read_text()


def test_it_is_the_wheel_that_is_imported(installed, tmp_path):
    code = (
        "import hintsd_jax, importlib.metadata as m; print(hintsd_jax.__file__);"
        "print(*sorted(m.metadata('hintsd-jax').get_all('Provides-Extra')))"
    )
    file, extras = run(installed / "bin" / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(installed) and not Path(file).is_relative_to(ROOT)
    assert extras == "bfcl cuda dev gs mlflow openenv s3 tpu trackio wandb"
    assert (Path(file).parent / "py.typed").exists()
    assert "optim.lr" in run(installed / "bin" / "python", "-m", "hintsd_jax", "--help", cwd=tmp_path)


def test_the_wheel_has_every_file_of_the_package(installed):
    """Those of configs/ and assets/, which are links in a checkout, too."""
    package = next((installed / "lib").glob("python*/site-packages/hintsd_jax"))
    ours, theirs = (
        {
            str(path.relative_to(base))
            for folder in (base, base / "configs", base / "assets")  # rglob does not follow the links
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        for base in (ROOT / "hintsd_jax", package)
    )
    assert ours == theirs and "assets/desk-policy/model.safetensors" in theirs and "configs/desk.py" in theirs
    assert not any(path.is_symlink() for path in package.rglob("*"))
