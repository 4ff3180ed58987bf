"""The command: folders in, one file out; one clear line for what a user can mend; nothing heavy is imported."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.tools.report import command as report
from tests.report_helpers import entries_of, overview_of, record, write_run

REPO = Path(__file__).parents[1]


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "hintsd_jax", "report", *map(str, args)], cwd=REPO, capture_output=True, text=True
    )


def test_the_command_writes_one_file_and_imports_no_jax(tmp_path):
    workdir = write_run(tmp_path / "run", {1: [record(targets=(2,))]})
    code = "import sys, hintsd_jax.tools.report.command as r; s = r.main(sys.argv[1:]);"
    code += " print([m for m in ('jax', 'flax') if m in sys.modules], s)"
    out = tmp_path / "new" / "report.html"
    done = subprocess.run([sys.executable, "-c", code, workdir, "--out", out], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["[] 0"], done.stderr
    page = out.read_text(encoding="utf-8")
    assert overview_of(page)["runs"][0]["name"] == "run" and len(entries_of(page)) == 1
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]


def test_what_a_user_can_mend_is_one_line_and_status_2(tmp_path):
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / "empty", "--out", tmp_path / "r.html")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "empty holds no run" in done.stderr and "--workdir" in done.stderr
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["{run}", "--out", "{run}/config.json/r.html"], "--out"),
        (["{run}", "{run}"], "twice"),
        (["{run}/x"], "no folder"),
        (["{run}", "--episodes", "-1"], "--episodes"),
        (["{run}", "--episodes", "1e9"], "invalid int value"),
        (["{run}", "--episode"], "expected one argument"),
        (["--watch", "{run}"], "invalid float value"),
        (["{run}", "--watch=0"], "--watch=0 must be 1 to"),
        (["{run}", "--watch=nan"], "--watch=nan must be"),
        (["-x"], "WORKDIR"),
        (["", "--out=r.html"], "cannot be the name of a folder"),
        (["a\0b"], "cannot be the name of a folder"),
        (["{run}", "--out="], "cannot be the name of a file"),
        (["{run}", "--out={run}/config.json"], "ends with .html"),
        (["~nobody-of-that-name/run"], "home folder of nobody"),
    ],
)
def test_errors_name_what_to_do(tmp_path, args, word):
    workdir = write_run(tmp_path / "run", {1: [record()]})
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=re.escape(word)):
        report.main([arg.format(run=workdir) for arg in args])
    assert (workdir / "config.json").read_bytes() == before


def test_the_same_runs_give_the_same_bytes(tmp_path):
    workdir = write_run(tmp_path / "run", {1: [record(targets=(1, 3))], 2: [record(success=True)]})
    pages = []
    for name in ("a.html", "b.html"):
        report.report([workdir], tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_two_thousand_episodes_are_a_small_file_soon(tmp_path):
    steps = {
        step: [record(f"train-{n // 4}", n % 4, n % 3 == 0, (n % 4 + 1,) if n % 3 else (), 11) for n in range(100)]
        for step in range(1, 21)
    }
    workdir = write_run(tmp_path / "run", steps)
    began = time.process_time()
    size = report.report([workdir], tmp_path / "r.html")
    assert time.process_time() - began < 5
    assert size < 1_000_000
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(entries_of(page)) == 2000
    assert (
        len(page) - sum(map(len, page.split('id="chunk-')[1:])) < 250_000
    )  # what the browser reads before it can draw


def test_watching_writes_again_what_a_run_has_written_and_ends_with_it(tmp_path, monkeypatch, capsys):
    workdir, out = write_run(tmp_path / "run", {1: [record()]}), tmp_path / "r.html"
    written = []

    def wait(event, seconds):
        """The run goes on while the watch waits: nothing, a torn row, a whole row, the last row."""
        page = overview_of(out.read_text(encoding="utf-8"))
        written.append((page["live"], len(page["runs"][0]["metrics"]["step"]), out.stat().st_ino))
        assert seconds == 2.5
        text = ("", '{"step": 2', '}\n{"step": 3}\n', '{"step": 4}\n')[len(written) - 1]
        with open(workdir / "metrics.jsonl", "a") as file:
            file.write(text)

    monkeypatch.setattr(report.interruption, "wait", wait)
    assert report.main([str(workdir), f"--out={out}", "--watch=2.5"]) == 0
    assert [entry[:2] for entry in written] == [(2.5, 1), (2.5, 1), (2.5, 1), (2.5, 3)]
    assert written[0] == written[1]  # nothing new: the file was left alone
    last = overview_of(out.read_text(encoding="utf-8"))
    assert last["live"] is None and last["runs"][0]["steps"] == 4
    assert "at step 4 of 4" in capsys.readouterr().out.splitlines()[-1]


def test_a_watch_that_is_interrupted_leaves_a_page_that_stands_still(tmp_path, monkeypatch):
    workdir, out = write_run(tmp_path / "run", {1: [record()]}), tmp_path / "r.html"

    def wait(event, seconds):
        raise report.interruption.Interrupted("SIGINT")

    monkeypatch.setattr(report.interruption, "wait", wait)
    assert report.main([str(workdir), f"--out={out}", "--watch"]) == 0
    assert overview_of(out.read_text(encoding="utf-8"))["live"] is None


def test_a_broken_record_is_named(tmp_path):
    workdir = write_run(tmp_path / "run", {1: [record(), {"task_id": "x", "steps": 5}]})
    with pytest.raises(UserError, match=r"step_000001\.jsonl holds what no run has written"):
        report.report([workdir], tmp_path / "r.html")


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", '{"config": {"optim": {"lr": [NaN]}}}'),
        ("config.json", '{"config": [], "versions": []}'),
        ("config.json", '{"config": {}, "versions": ["x"]}'),
        ("config.json", "[" * 100_000),
        ("metrics.jsonl", '{"step": 1, "time/step": "x"}\n'),
        ("metrics.jsonl", '{"step": true}\n'),
        ("held_out.json", '{"after": {"success": [[1, 0], [1]]}}'),
        ("held_out.json", '{"after": {"success": [["\\ud800"]]}}'),
        ("held_out.json", '{"after": {"success": [1, 2]}}'),
        ("held_out.json", '{"after": 3}'),
        ("evaluation.json", '{"success": {"a": 1}}'),
        ("evaluation.json", '{"step": NaN}'),
        (
            "episodes/step_000001.jsonl",
            '{"task_id": "x", "steps": [], "hindsight": {"targets": [{"step": 1000000000}]}}\n',
        ),
        ("episodes/step_000001.jsonl", '{"task_id": "x", "prompt_length": Infinity}\n'),
        ("episodes/step_000001.jsonl", '{"rollout": 1e400}\n'),
        ("episodes/step_000001.jsonl", '{"trained": [{"step": {}}]}\n'),
    ],
)
def test_a_file_with_something_else_is_named(tmp_path, name, text):
    workdir = write_run(tmp_path / "run", {1: [record()]})
    (workdir / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        report.report([workdir], tmp_path / "r.html")
    assert "\n" not in str(caught.value) and not (tmp_path / "r.html").exists()
