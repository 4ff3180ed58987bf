"""The entry as a user meets it: its own process, one clear line, a non-zero status, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The two modes are stood in for: what they receive is printed, and whether jax was imported before.
STAND_IN = """
import runpy, sys, types
import hintsd_jax
from hintsd_jax.errors import UserError
def mode(name):
    def call(config, workdir):
        if workdir == "refused":
            raise UserError("no such\\nthing")
        if workdir == "bug":
            raise ValueError("a bug")
        if workdir == "interrupted":
            raise KeyboardInterrupt
        print(name, config.optim.lr, config.rollout.prefill_buckets, workdir, "jax" in sys.modules)
    return call
for name in ("train", "evaluate"):
    module = types.ModuleType(f"hintsd_jax.{name}")
    setattr(module, name, mode(name))
    sys.modules[module.__name__] = module
    setattr(hintsd_jax, name, module)
runpy.run_module("hintsd_jax.main", run_name="__main__", alter_sys=True)
"""


def start(*flags):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STAND_IN, *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def refusal(*flags) -> str:
    done = start(*flags)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


CONFIG = "--config=configs/desk_smoke.py"


def test_runs_the_mode_with_overrides_and_without_jax():
    done = start(CONFIG, "--workdir=runs/a", "--config.optim.lr=1e-4", "--config.rollout.prefill_buckets=(8, 16)")
    assert done.stdout.split("\n")[0] == "train 0.0001 (8, 16) runs/a False", done
    done = start(CONFIG, "--workdir=runs/a", "--mode=evaluate")
    assert done.returncode == 0 and done.stdout.startswith("evaluate "), done


@pytest.mark.parametrize(
    "flags, says",
    [
        ([CONFIG, "--workdir=w", "--config.optim.lrr=1"], "unknown config key optim.lrr: did you mean optim.lr?"),
        ([CONFIG, "--workdir=w", "--config.optimm.lr=1"], "unknown config key optimm.lr: did you mean optim.lr?"),
        ([CONFIG, "--workdir=w", "--config.sed=1"], "unknown config key sed: did you mean seed?"),
        ([CONFIG, "--workdir=w", "--config.env.options.lenth=1"], "lenth"),
        ([CONFIG, "--workdir=w", "--config.optim.lr=fast"], "could not convert string to float: 'fast'"),
        (
            [CONFIG, "--workdir=w", "--config.rollout.slots=99", "--config.chat.history=templates"],
            "did you mean 'template'?; rollout.slots = 99",
        ),
        ([CONFIG, "--workdir=w", "--config.chat.template_kwargs.dat=1"], "dat"),
        ([CONFIG, "--workdir=w", "--mode=trian"], "--mode=trian"),
        ([CONFIG, "--workdr=w"], "workdir"),
        ([CONFIG], "--workdir is missing"),
        (["--workdir=w"], "--config is missing"),
        ([CONFIG, "--workdir=w", "optim.lr=1"], "unexpected argument 'optim.lr=1'"),
        (["--config=configs/nowhere.py", "--workdir=w"], "No such file or directory: 'configs/nowhere.py'"),
        (
            ["--config=configs/nowhere.py", "--workdir=w", "--config.seed=1"],
            "No such file or directory: 'configs/nowhere.py'",
        ),
        ([CONFIG, "--workdir=refused"], "error: no such thing"),
    ],
)
def test_a_mistake_is_one_line(flags, says):
    assert says in refusal(*flags)


@pytest.mark.parametrize("line, says", [("config.optim.lrr = 1", "lrr"), ("config.optim.lr = 'fast'", "TypeError")])
def test_a_mistake_in_the_config_file_is_one_line(tmp_path, line, says):
    (tmp_path / "c.py").write_text(
        f"from hintsd_jax.config import base\ndef get_config():\n    config = base()\n    {line}\n    return config\n"
    )
    assert says in refusal(f"--config={tmp_path}/c.py", "--workdir=w")


def test_a_bug_keeps_its_traceback_and_an_interrupt_is_no_bug():
    assert "Traceback" in start(CONFIG, "--workdir=bug").stderr
    done = start(CONFIG, "--workdir=interrupted")
    assert done.returncode == 130 and "Traceback" not in done.stderr
