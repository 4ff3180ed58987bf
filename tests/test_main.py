"""The command line as a user meets it: one clear line, a non-zero status, no traceback."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hintsd_jax import main as entry
from hintsd_jax.config import edge, files
from hintsd_jax.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = "--config=desk_smoke"


@pytest.fixture
def modes(monkeypatch):
    """The modes are stood in for: what they receive is kept."""
    received = []

    def mode(name):
        def call(config, workdir):
            if workdir == "refused":
                raise UserError("no such\nthing")
            if workdir == "bug":
                raise ValueError("a bug")
            if workdir == "interrupted":
                raise KeyboardInterrupt
            received.append((name, config, workdir))

        return call

    for name in ("train", "evaluate", "export"):
        monkeypatch.setitem(sys.modules, f"hintsd_jax.{name}", types.SimpleNamespace(**{name: mode(name)}))
    plan = types.SimpleNamespace(plan=lambda config: received.append(("plan", config, None)))
    monkeypatch.setitem(sys.modules, "hintsd_jax.tools.planner.plan", plan)
    return received


def refusal(capsys, *words) -> str:
    assert entry.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed
    return printed.err


def test_runs_the_mode_with_overrides(modes):
    overrides = ["--config.optim.lr=1e-4", "--config.rollout.prefill_buckets=(8, 16)", "--config.policy.remat=true"]
    assert entry.main([CONFIG, "--workdir=runs/a", *overrides]) == 0
    assert entry.main(["evaluate", "--config", "configs/desk_smoke.py", "--workdir", "runs/a"]) == 0
    assert entry.main([CONFIG, "--workdir=runs/a", "--mode=export", "--config.env.options.length=2"]) == 0
    assert entry.main(["plan", CONFIG]) == 1
    (train, config, workdir), *others = modes
    assert (train, workdir) == ("train", "runs/a") and [name for name, *_ in others] == ["evaluate", "export", "plan"]
    assert (config.optim.lr, config.rollout.prefill_buckets, config.policy.remat) == (1e-4, (8, 16), True)
    assert others[1][1].env.options["length"] == 2


@pytest.mark.parametrize(
    "words, says",
    [
        ([CONFIG, "--workdir=w", "--config.optim.lrr=1"], "unknown config key optim.lrr: did you mean optim.lr?"),
        ([CONFIG, "--workdir=w", "--config.optimm.lr=1"], "unknown config key optimm.lr: did you mean optim.lr?"),
        ([CONFIG, "--workdir=w", "--config.sed=1"], "unknown config key sed: did you mean seed?"),
        ([CONFIG, "--workdir=w", "--config.distill.form=rows"], "distill.form is now called batch.layout"),
        ([CONFIG, "--workdir=w", "--noconfig.method"], "method is now called algorithm"),
        ([CONFIG, "--workdir=w", "--config.algorithm=dense"], "algorithm = 'dense' is now called 'openclaw_rl'"),
        ([CONFIG, "--workdir=w", "--config.algorithm=grop"], "did you mean 'grpo'?"),
        ([CONFIG, "--workdir=w", "--config.algorithm=os:path"], "no subclass of hintsd_jax.algorithms.base.Algorithm"),
        ([CONFIG, "--workdir=w", "--config.algorithm=no.such:Thing"], "cannot import 'no.such'"),
        ([CONFIG, "--workdir=w", "--config.env.options.lenth=1"], "lenth"),
        ([CONFIG, "--workdir=w", "--config.optim.lr=fast"], "could not convert string to float: 'fast'"),
        ([CONFIG, "--workdir=w", "--config.optim.lr"], "config.optim.lr"),
        ([CONFIG, "--workdir=w", "--config.=1"], "unknown config key"),
        ([CONFIG, "--workdir=w", "--config.optim=1"], "optim"),
        ([CONFIG, "--workdir=w", "--config.rollout.slots=99", "--config.batch.layout=x"], "choose one of branches"),
        ([CONFIG, "--workdir=w", "--config.rollout.slots=99"], "rollout.slots = 99 exceeds the 16 episodes"),
        ([CONFIG, "--workdir=w", "--config.rollout.prefill_buckets=(8,"], "prefill_buckets"),
        ([CONFIG, "--workdir=w", "--config.chat.template_kwargs.dat=1"], "dat"),
        ([CONFIG, "--workdir=w", "--mode=trian"], "--mode=trian"),
        ([CONFIG, "--workdr=w"], "workdir"),
        ([CONFIG], "--workdir is missing"),
        ([CONFIG, "--workdir="], "--workdir is empty"),
        ([CONFIG, "--workdir"], "workdir"),
        (["--workdir=w"], "--config is missing"),
        (["--config"], "--config has no value"),
        (["--config=", "--workdir=w"], "--config is empty"),
        ([CONFIG, "--workdir=w", "optim.lr=1"], "unexpected argument 'optim.lr=1'"),
        (["tarin", CONFIG, "--workdir=w"], "unexpected argument 'tarin'"),
        (["--config=configs/nowhere.py", "--workdir=w"], "configs/nowhere.py cannot be read (no such file)"),
        (["--config=configs", "--workdir=w"], "config 'configs' is neither shipped nor a file"),
        (["--config=./configs", "--workdir=w"], "./configs cannot be read (a folder)"),
        (["--config=README.md", "--workdir=w"], "its name must end with .py"),
        (["--config=dekc", "--workdir=w"], "did you mean 'desk'?"),
        ([CONFIG, "--workdir=refused"], "error: no such thing"),
        (["report", "/no/such/run"], "/no/such/run"),
    ],
)
def test_a_mistake_is_one_line(modes, capsys, words, says):
    assert says in refusal(capsys, *words)


@pytest.mark.parametrize(
    "text, says",
    [
        ("from hintsd_jax.config import base\ndef get_config():\n    c = base()\n    c.optim.lrr = 1\n", "lrr"),
        (
            "from hintsd_jax.config import base\ndef get_config():\n    c = base()\n    c.optim.lr = 'fast'\n",
            "(line 4)",
        ),
        ("from hintsd_jax.config import bas\n", "ImportError: cannot import name 'bas'"),
        ("import no_such_module\n", "No module named 'no_such_module' (line 1)"),
        ("def get_config(:\n", "SyntaxError: invalid syntax (line 1)"),
        ("x = 1\n", "has no function get_config()"),
        ("def get_config():\n    return {}\n", "returns dict, not hintsd_jax.config.base()"),
        ("def get_config():\n    raise SystemExit(0)\n", "SystemExit: 0 (line 2)"),
        ("def get_config(name):\n    return name\n", "missing 1 required positional argument"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines (line 1)"),
        ("", "has no function get_config()"),
    ],
)
def test_a_mistake_in_the_config_file_is_one_line(tmp_path, capsys, text, says):
    (tmp_path / "c.py").write_text(text)
    assert says in refusal(capsys, f"--config={tmp_path}/c.py", "--workdir=w")


def test_a_bug_keeps_its_traceback_and_an_interrupt_is_no_bug(modes, capsys):
    with pytest.raises(ValueError, match="a bug"):
        entry.main([CONFIG, "--workdir=bug"])
    assert entry.main([CONFIG, "--workdir=interrupted"]) == 130
    assert "continues from the last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "-h"], ["help"]])
def test_help_lists_every_mode_flag_and_key(capsys, words):
    assert entry.main(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text or f"  {name}\n" in text for name in (*entry.MODES, *edge.settings()))
    assert all(f"--{name}" in text for name in entry.FLAGS) and all(name in text for name in files.shipped())
    assert entry.main([]) == 2


def test_print_config_prints_what_is_resolved(capsys):
    assert entry.main([CONFIG, "--print_config", "--config.algorithm=sdpo"]) == 0
    text = capsys.readouterr().out
    assert "feedback_position: start" in text and "divergence: jsd" in text and "None" not in text


def test_its_own_process_from_another_folder_and_without_jax_where_it_can(tmp_path):
    code = (
        "import sys; from hintsd_jax.main import main; status = main(sys.argv[1:]);"
        "print([name for name in ('jax', 'flax', 'transformers') if name in sys.modules]); sys.exit(status)"
    )

    def start(*words):
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    wrong = start("-c", code, "train", CONFIG, "--workdir=w", "--config.rollout.top_p=2")
    assert (wrong.returncode, wrong.stdout) == (2, "[]\n") and "rollout.top_p = 2.0 must lie in (0, 1]" in wrong.stderr
    right = start("-m", "hintsd_jax", "train", CONFIG, "--print_config")
    assert right.returncode == 0 and str(ROOT / "hintsd_jax" / "assets" / "desk-policy") in right.stdout
    assert list(tmp_path.iterdir()) == []
