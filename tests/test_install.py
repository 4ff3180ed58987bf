"""The wheel in an environment of its own: its command, its configs and its assets, from a folder far from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

OPTIMIZED = True  # real rollouts: see conftest.py
ROOT = Path(__file__).parents[1]


def run(*command, cwd, **environment):
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=variables | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of a virtual environment with the wheel. What the package depends on is looked up in the environment
    of the tests: nothing is downloaded.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", folder / "env" / "bin" / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # after the wheel: it comes later
    return folder / "env"


def test_the_command_runs_a_shipped_config_from_anywhere(installed, tmp_path):
    command = installed / "bin" / "hintsd-jax"
    assert "optim.lr" in run(command, "--help", cwd=tmp_path)
    settings = {
        "tasks.tasks_per_step": 1, "tasks.rollouts": 4, "rollout.slots": 4, "optim.steps": 1, "eval.tasks": 1,
        "eval.rollouts": 1, "eval.test_tasks": 1,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    table = run(command, "train", "--config=desk_smoke", "--workdir=run", *flags, cwd=tmp_path)
    assert "test Avg@1" in table
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    policy = Path(stored["config"]["policy"]["path"])
    assert policy.is_relative_to(installed) and not policy.is_symlink() and policy.name == "desk-policy"
    run(command, "report", "run", cwd=tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "report.html", "run"]


def test_it_is_the_wheel_that_is_imported(installed, tmp_path):
    code = (
        "import hintsd_jax, importlib.metadata as m; print(hintsd_jax.__file__);"
        "print(*sorted(m.metadata('hintsd-jax').get_all('Provides-Extra')))"
    )
    file, extras = run(installed / "bin" / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(installed) and not Path(file).is_relative_to(ROOT)
    assert extras == "bfcl cuda dev tpu"
    assert (Path(file).parent / "py.typed").exists()
