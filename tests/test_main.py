"""The command line as a user meets it: one clear line, a non-zero status, no traceback."""

import errno
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import hintsd_jax
from hintsd_jax import library
from hintsd_jax import main as entry
from hintsd_jax.config import edge, files, flags
from hintsd_jax.config.build import build
from hintsd_jax.errors import UserError
from hintsd_jax.runs import interruption

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
                raise interruption.Interrupted("SIGINT", interruption.BY_HAND)
            received.append((name, config, workdir))

        return call

    monkeypatch.setattr(library, "training", types.SimpleNamespace(train=mode("train")))
    monkeypatch.setattr(library, "evaluation", types.SimpleNamespace(evaluate=mode("evaluate")))
    monkeypatch.setitem(sys.modules, "hintsd_jax.export", types.SimpleNamespace(export=mode("export")))
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


@pytest.mark.parametrize("named", ["desk_smoke", "bfcl_smoke", "desk_checkpoint", "appworld_qwen3_4b"])
def test_without_a_config_that_of_the_run_is_taken(modes, tmp_path, named):
    flags = [f"--config={named}", "--config.policy.path=p", "--config.env.options.seed=5", "--config.optim.lr=1e-4"]
    assert entry.main(["train", *flags, f"--workdir={tmp_path}"]) == 0
    (tmp_path / "config.json").write_text(json.dumps({"config": modes[0][1].to_dict() | {"older": 1}}))
    assert entry.main(["export", f"--workdir={tmp_path}"]) == 0
    assert entry.main([f"--workdir={tmp_path}", "--config.optim.steps=9", "--config.env.options.other=1"]) == 0
    first, exported, longer = (config for _, config, _ in modes)
    assert exported == first and longer.optim.steps == 9 and longer.env.options == {**first.env.options, "other": 1}


@pytest.mark.parametrize(
    "kept", [{"env": 3}, {"optim": {}}, {"optim": None}, {"env": {"name": None}}, {"env": {"options": 7}}]
)
def test_a_runs_config_that_is_damaged_is_refused_in_one_line(modes, tmp_path, capsys, kept):
    (tmp_path / "config.json").write_text(json.dumps({"config": kept}))
    for words in ([], ["--config.env.name=desk"]):
        said = refusal(capsys, "export", f"--workdir={tmp_path}", *words)
        assert f"{tmp_path / 'config.json'} is of no use (" in said and "give the run's --config" in said


def test_another_environment_has_none_of_the_options_of_the_configs_own(modes):
    for words, options in {
        ("--config.env.name=my_envs:Shredder",): {},
        ("--config.env.options.size=10", "--config.env.name=my_envs:Shredder"): {"size": 10},
        ("--config.env.name=desk",): {"seed": 0, "length": 4, "difficulty": 3},
    }.items():
        apart = [part for word in words for part in word.split("=")]
        for given in (words, apart):
            assert entry.main([CONFIG, "--workdir=w", *given]) == 0
            assert modes[-1][1].env.options == options
        keys = (word.removeprefix("--config.").split("=") for word in reversed(words))
        assert build(library.load_config("desk_smoke", dict(keys))).env.options.keys() == options.keys()


RUN = [CONFIG, "--workdir=w"]


@pytest.mark.parametrize(
    "words, says",
    [
        # keys
        ([*RUN, "--config.optim.lrr=1"], "unknown config key optim.lrr: did you mean optim.lr?"),
        ([*RUN, "--config.optimm.lr=1"], "unknown config key optimm.lr: did you mean optim.lr?"),
        ([*RUN, "--config.OPTIM.LR=1"], "unknown config key OPTIM.LR: did you mean optim.lr?"),
        ([*RUN, "--config.sed=1"], "unknown config key sed: did you mean seed?"),
        ([*RUN, "--config.optim..lr=1"], "did you mean optim.lr?"),
        ([*RUN, "--config.seed.x=1"], "unknown config key seed.x"),
        ([*RUN, "--config.rollout.prefill_buckets[0]=8"], "did you mean rollout.prefill_buckets?"),
        ([*RUN, "--config.=1"], "unknown config key"),
        ([*RUN, "--config.distill.form=rows"], "distill.form is now called batch.layout"),
        ([*RUN, "--config.distill=1"], "under loss and batch"),
        ([*RUN, "--config.template_kwargs.date=1"], "is now called chat.template_kwargs.date"),
        ([*RUN, "--noconfig.method"], "method is now called algorithm"),
        ([*RUN, "--optim.lr=1"], "unknown flag --optim.lr: write --config.optim.lr"),
        # values
        ([*RUN, "--config.algorithm=dense"], "algorithm = 'dense' is now called 'openclaw_rl'"),
        ([*RUN, "--config.algorithm=grop"], "did you mean 'grpo'?"),
        ([*RUN, "--config.algorithm="], "choose one of"),
        ([*RUN, "--config.algorithm=os:path"], "no subclass of hintsd_jax.algorithms.base.Algorithm"),
        ([*RUN, "--config.algorithm=no.such:Thing"], "cannot import 'no.such'"),
        ([*RUN, "--config.hindsight.select=:"], "write it as 'package.module:name'"),
        ([*RUN, "--config.hindsight.select=no.such:f"], "cannot import 'no.such'"),
        ([*RUN, "--config.optim.lr=fast"], "optim.lr = 'fast' cannot be read; allowed: number [0, 1000000]"),
        ([*RUN, "--config.optim.lr=" + "9" * 400], "optim.lr = inf must lie in [0, 1000000]"),
        ([*RUN, "--config.optim.steps=" + "9" * 400], "must lie in [1, 1073741824]"),
        ([*RUN, "--config.optim.steps=" + "9" * 5000], "optim.steps = "),
        ([*RUN, "--config.optim.lr=nan"], "optim.lr = nan must lie in"),
        ([*RUN, "--config.optim.lr"], "config.optim.lr"),
        ([*RUN, "--config.seed=1.0"], "seed = '1.0' cannot be read; allowed: whole number [0, 4294967295]"),
        ([*RUN, "--config.seed=True"], "seed = 'True' cannot be read"),
        ([*RUN, "--config.seed="], "seed = '' cannot be read"),
        ([*RUN, "--config.policy.remat=yes"], "policy.remat = 'yes' cannot be read; allowed: true or false"),
        ([*RUN, "--noconfig.policy.remat=true"], "does not take an argument"),
        ([*RUN, "--noconfig.seed"], "which seed is not"),
        ([*RUN, "--config.hindsight.max_targets=2.5"], "allowed: whole number [1, 65536]"),
        ([*RUN, "--config.hindsight.select=None"], "choose one of hindsight, first"),
        ([*RUN, "--config.optim=1"], "optim"),
        ([*RUN, "--config.optim={}"], "start from hintsd_jax.config.base()"),
        ([*RUN, "--config.rollout.slots=99", "--config.batch.layout=x"], "choose one of branches"),
        ([*RUN, "--config.rollout.slots=99"], "rollout.slots = 99 exceeds the 16 episodes"),
        ([*RUN, "--config.rollout.prefill_buckets=(8,"], "prefill_buckets"),
        ([*RUN, "--config.rollout.prefill_buckets="], "prefill_buckets"),
        ([*RUN, "--config.rollout.prefill_buckets=(8,'a')"], "each entry a whole number"),
        ([*RUN, "--config.rollout.prefill_buckets=exit(3)"], "each entry a whole number"),
        ([*RUN, "--config.rollout.prefill_buckets={8,16}"], "prefill_buckets = '{8,16}' cannot be read; allowed: list"),
        ([*RUN, "--config.rollout.prefill_buckets=b'ab'"], "cannot be read; allowed: list of whole number"),
        ([*RUN, "--config.export.weights={'student':1}"], "cannot be read; allowed: list of student, ema"),
        ([*RUN, "--config.rollout.prefill_buckets=(1.5,288)"], "each entry a whole number"),
        ([*RUN, "--config.rollout.top_k=1" + "0" * 30], "must lie in [0, 16777216]"),
        ([*RUN, "--config.env.call_timeout_s=1e10"], "must lie in (0, 1000000]"),
        ([*RUN, "--config.rollout.prefill_rows=1000000000"], "must lie in [1, 65536]"),
        ([*RUN, "--config.lora.targets=('q_pro',)"], "did you mean 'q_proj'?"),
        ([*RUN, "--config.policy.path=a\0b"], "a character that no name can have"),
        ([*RUN, "--config.policy.path=\udcff"], "a character that no name can have"),
        ([*RUN, "--config.env.options=3"], "env.options = '3' cannot be read"),
        ([*RUN, "--config.env.options.length=abc"], "env.options.length"),
        ([*RUN, "--config.env.options.a.b=1"], "is not set in the config file"),
        ([*RUN, "--config.chat.template_kwargs.dat=1"], "config key dat is not set in the config file"),
        # modes, folders and other words
        ([*RUN, "--mode=trian"], "--mode=trian is unknown: did you mean 'train'?"),
        ([*RUN, "--mode="], "--mode= is unknown"),
        ([*RUN, "--mode"], "--mode has no value"),
        (["train", "--mode=evaluate", *RUN], "train and --mode=evaluate are two modes"),
        (["evaluate", *RUN, "train"], "the mode train comes first, and only one"),
        (["tarin", *RUN], "unexpected argument 'tarin': did you mean 'train'?"),
        ([CONFIG, "--workdr=w"], "unknown flag --workdr: did you mean 'workdir'?"),
        ([CONFIG], "--workdir is missing"),
        ([CONFIG, "--workdir="], "--workdir is empty"),
        ([CONFIG, "--workdir= "], "--workdir is empty"),
        ([CONFIG, "--workdir=a\0b"], "cannot be the name of a folder"),
        ([CONFIG, "--workdir"], "workdir"),
        ([*RUN, "--print_config=maybe"], "--print_config = 'maybe' must be true or false"),
        ([*RUN, "optim.lr=1"], "unexpected argument 'optim.lr=1': write settings as --config.key=value"),
        ([*RUN, ""], "unexpected argument ''"),
        (["--", *RUN], "unexpected argument"),
        ([*RUN, "-?"], "unknown flag --?"),
        ([*RUN, "--flagfile=/etc/hosts"], "unknown flag --flagfile: settings are written --config.key=value"),
        ([*RUN, "--undefok=x", "--x=1"], "unknown flag --undefok"),
        ([CONFIG, "--workdir", "--config.seed=1"], "--workdir has no value"),
        (["--config", "--workdir=w"], "--config has no value"),
        ([CONFIG, "--workdir=."], "--workdir=. is the current folder and holds no run: give a folder of its own"),
        ([CONFIG, "--workdir=./"], "is the current folder"),
        ([CONFIG, "--workdir=/"], "is the root folder"),
        ([CONFIG, "--workdir=~"], "is the home folder"),
        ([CONFIG, "--workdir=~nobody-of-that-name/w"], "--workdir = '~nobody-of-that-name/w' names the home folder of"),
        ([CONFIG, "--workdir=" + "w" * 300], "File name too long"),
        # config files
        (["--workdir=w"], "--config is missing, and --workdir=w holds no run: "),
        (["--config"], "--config has no value"),
        (["--config=", "--workdir=w"], "--config is empty"),
        (["--config=configs/nowhere.py", "--workdir=w"], "the config file configs/nowhere.py does not exist"),
        (["--config=configs", "--workdir=w"], "the config file configs is no file"),
        (["--config=elsewhere/desk.py", "--workdir=w"], "--config=desk is the one that ships"),
        (["--config=README.md", "--workdir=w"], "its name must end with .py"),
        (["--config=" + "a" * 5000, "--workdir=w"], "File name too long"),
        (["--config=~nobody-of-that-name/c.py", "--workdir=w"], "names the home folder of nobody"),
        (["--config=dekc", "--workdir=w"], "did you mean 'desk'?"),
        (["--config=desk:x", "--workdir=w"], "did you mean 'desk'?"),
        (["--config=a\0b", "--workdir=w"], "is neither shipped nor a file"),
        (["--config=configs/desk_warmup.py", "--workdir=w"], "start from hintsd_jax.config.base()"),
        ([CONFIG, "--workdir=refused"], "error: no such thing"),
        (["report", "/no/such/run"], "/no/such/run"),
        (["--mode=report", "/no/such/run", "--out=x.html"], "/no/such/run"),
        (["report"], "report needs folders of runs"),
        (["plan"], "--config is missing"),
    ],
)
def test_a_mistake_is_one_line(modes, capsys, words, says):
    assert says in refusal(capsys, *words)


CHANGE = "from hintsd_jax.config import base\ndef get_config():\n    c = base()\n    {}\n    return c\n"


@pytest.mark.parametrize(
    "text, says",
    [
        ("from hintsd_jax.config import base\ndef get_config():\n    c = base()\n    c.optim.lrr = 1\n", "lrr"),
        (
            "from hintsd_jax.config import base\ndef get_config():\n    c = base()\n    c.optim.lr = 'fast'\n",
            "TypeError: Could not override field 'lr' (reference). fast is of original type",
        ),
        (CHANGE.format("c.optim.lr = 'fast'"), "(c.py, line 4)"),
        (CHANGE.format("c.method = 'grpo'"), "config key method is now called algorithm (c.py, line 4)"),
        (CHANGE.format("c.distill.form = 'rows'"), "config key distill.form is now called batch.layout (c.py, line 4)"),
        (CHANGE.format("c.hindsight.place = 'start'"), "hindsight.place is now called hindsight.feedback_position"),
        (CHANGE.format("c.hindsight.plcae = 'start'"), "unknown config key hindsight.plcae"),
        (CHANGE.format("c.update({'method': 'grpo'})"), "config key method is now called algorithm"),
        (CHANGE.format("c.alarms.action = 'note'"), "alarms.action = 'note' is now called 'warn'"),
        (CHANGE.format("c.env.options.f = print"), "env.options.f = <built-in function print> must be text"),
        (CHANGE.format("c.env.options.f = float('nan')"), "env.options.f = nan must be text"),
        (CHANGE.format("c.env.options.me = c.env.options"), "the config holds itself"),
        (CHANGE.format("c.algorithm = 'x' * 100_000"), "has more than 4096 characters"),
        (CHANGE.format("c.optim = {'lr': 1.0}"), "start from hintsd_jax.config.base()"),
        (CHANGE.format("c.seed = None"), "seed = None must be a whole number"),
        (CHANGE.format("return os.nothing"), "NameError: name 'os' is not defined (c.py, line 4)"),
        ("def get_config():\n    return get_config()\n", "RecursionError"),
        ("\0", "SyntaxError"),
        ("from hintsd_jax.config import bas\n", "ImportError: cannot import name 'bas'"),
        ("import no_such_module\n", "No module named 'no_such_module' (c.py, line 1)"),
        ("def get_config(:\n", "SyntaxError: invalid syntax (c.py, line 1)"),
        ("x = 1\n", "has no function get_config()"),
        ("def get_config():\n    return {}\n", "returns dict, not hintsd_jax.config.base()"),
        ("def get_config():\n    raise SystemExit(0)\n", "SystemExit: 0 (c.py, line 2)"),
        ("def get_config(name):\n    return name\n", "missing 1 required positional argument"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines (c.py, line 1)"),
        ("", "has no function get_config()"),
        ("class Odd(BaseException): pass\nraise Odd('x')\n", "Odd: x (c.py, line 2)"),
        ("class Mute(Exception):\n    def __str__(self): return 1 / 0\nraise Mute\n", "Mute: without a text"),
        ("raise ValueError('\\udcff' * 5000)\n", "ValueError"),
        ("from . import base\n", "attempted relative import with no known parent package (c.py, line 1)"),
        ("async def get_config():\n    return 1\n", "returns coroutine, not"),
        ("def get_config():\n    yield 1\n", "returns generator, not"),
        ("get_config = 3\n", "has no function get_config()"),
        ("get_config = object\n", "returns object, not"),
        (CHANGE.format("c.optim.lr = c.rollout"), "c.py, line 4"),
        (CHANGE.format("c.rollout.prefill_buckets = {8, 16}"), "prefill_buckets"),
        (CHANGE.format("c.unlock(); c.optim.more = 1"), "unknown config key optim.more"),
        (CHANGE.format("c.unlock(); del c.optim.lr"), "optim.lr is missing"),
        (CHANGE.format("c.unlock(); c.optim = 3"), "optim"),
        (CHANGE.format("c.env.options['a\\udcff'] = 1"), "env.options"),
        (CHANGE.format("c.env.options.x = b'a'"), "env.options.x = b'a' must be text"),
    ],
)
def test_a_mistake_in_the_config_file_is_one_line(tmp_path, capsys, text, says):
    (tmp_path / "c.py").write_text(text)
    assert says in refusal(capsys, f"--config={tmp_path}/c.py", "--workdir=w")


def test_what_a_machine_refuses_is_one_line(modes, capsys, monkeypatch):
    def refused(error):
        monkeypatch.setattr(library, "training", types.SimpleNamespace(train=lambda *_: raises(error)))
        return refusal(capsys, *RUN)

    def raises(error):
        raise error

    assert "w/config.json: Read-only file system" in refused(
        OSError(errno.EROFS, "Read-only file system", "w/config.json")
    )
    assert "No space left" in refused(OSError(errno.ENOSPC, "No space left on device"))
    assert "memory is out (MemoryError): lower rollout.slots" in refused(MemoryError())
    assert "memory is out (RESOURCE_EXHAUSTED: Out" in refused(RuntimeError("RESOURCE_EXHAUSTED: Out\nof memory"))
    for bug in (ConnectionError("reset"), RuntimeError("dictionary changed size"), RecursionError("deep")):
        with pytest.raises(type(bug)):
            refused(bug)


def test_a_bug_keeps_its_traceback_and_an_interrupt_is_no_bug(modes, capsys):
    with pytest.raises(ValueError, match="a bug"):
        entry.main([CONFIG, "--workdir=bug"])
    assert entry.main([CONFIG, "--workdir=interrupted"]) == 130
    assert "continues from the last checkpoint" in capsys.readouterr().err
    for words in (["evaluate"], ["--mode=export"]):
        assert entry.main([*words, CONFIG, "--workdir=interrupted"]) == 130
        assert "(SIGINT): the same command begins anew" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "-h"], ["help"]])
def test_help_lists_every_mode_flag_and_key(capsys, words):
    assert entry.main(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text or f"  {name}\n" in text for name in (*entry.MODES, *edge.settings()))
    assert all(f"--{name}" in text for name in flags.FLAGS) and all(name in text for name in files.shipped())
    assert max(map(len, text.split("\n"))) <= 110
    assert entry.main([]) == 2


def test_print_config_prints_what_is_resolved(capsys):
    assert entry.main([CONFIG, "--print_config", "--config.algorithm=sdpo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "hindsight.feedback_position = 'start'" in lines and "loss.divergence = 'jsd'" in lines
    assert not [line for line in lines if line.endswith(" = None")]
    assert [line.split(" = ")[0] for line in lines if not line.startswith("env.options.")] == [
        name for name in edge.settings() if name != "env.options"
    ]


def test_an_option_that_the_config_file_does_not_set_is_taken_from_a_flag(modes):
    new = ["--config.env.options.format=official", "--config.env.options.categories=('a', 'b')"]
    assert entry.main([*RUN, *new, "--config.env.options.length=2"]) == 0
    options = modes[0][1].env.options
    assert (options["format"], options["categories"], options["length"]) == ("official", ("a", "b"), 2)


def test_closed_outputs_and_those_of_another_encoding(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert entry.main(["--version"]) == 0 and entry.main(["--config=no_such"]) == 2
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert entry.main(["--config=d\xe9\udcffsk"]) == 2
    sys.stderr.flush()
    assert b"config 'd\\xe9" in sys.stderr.buffer.getvalue()


def test_version_and_the_help_of_report(capsys):
    assert entry.main(["--version"]) == 0 and hintsd_jax.__version__ in capsys.readouterr().out
    assert entry.main(["report", "--help"]) == 0 and "--episodes" in capsys.readouterr().out


def test_its_own_process_from_another_folder_and_without_jax_where_it_can(tmp_path):
    code = (
        "import sys; from hintsd_jax.main import main; status = main(sys.argv[1:]);"
        "print([name for name in ('jax', 'flax', 'transformers') if name in sys.modules]); sys.exit(status)"
    )

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(*words):
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    wrong = start("-c", code, "train", CONFIG, "--workdir=w", "--config.rollout.top_p=2")
    assert (wrong.returncode, wrong.stdout) == (2, "[]\n") and "rollout.top_p = 2.0 must lie in (0, 1]" in wrong.stderr
    right = start("-m", "hintsd_jax", "train", CONFIG, "--print_config")
    assert right.returncode == 0 and "policy.path = 'assets/desk-policy'" in right.stdout

    def shell(words, ends):
        line = f"{sys.executable} -m hintsd_jax {words}; echo $? >&2"
        return subprocess.run(
            f"({line}) {ends}", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    left = shell("--help", "| head -1")
    assert left.stdout.startswith("usage: ") and left.stderr == "0\n"
    full = shell("--help", ">/dev/full")
    assert full.stderr == "error: the output cannot be written (No space left on device): make room for it\n2\n"
    assert list(tmp_path.iterdir()) == []
