"""The batteries in short: the frame tells good endings from bad ones; a few command lines and spoiled workdirs."""

import json
import random
import shutil
import sys
import time

import jax.numpy as jnp
import pytest

from benchmarks.batteries import battery, command_lines, workdirs
from benchmarks.batteries.battery import Case, Ending, Outcome
from hintsd_jax.checkpoints.train_state import Checkpoints
from hintsd_jax.errors import UserError
from hintsd_jax.runs.metrics import MetricsWriter
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.tools.report.command import report
from tests.configs import algorithm_config
from tests.report_helpers import record

SHAPE = {"x": jnp.ones(3)}


def refuse():
    raise UserError("mend it")


@pytest.mark.parametrize(
    "run, ending",
    [
        (lambda: Outcome(Ending.COUNTED), Ending.COUNTED),
        (refuse, Ending.REFUSED),
        (lambda: 1 / 0, Ending.TRACEBACK),
        (lambda: sys.exit(0), Ending.TRACEBACK),
        (lambda: time.sleep(9), Ending.HUNG),
        (lambda: battery.command("--config=no_such").outcome, Ending.REFUSED),
        (lambda: battery.Printed(2, "", "a line\n").outcome, Ending.TRACEBACK),
        (lambda: battery.Printed(0, "", "Traceback (most recent call last)").outcome, Ending.TRACEBACK),
        (lambda: command_lines.run_line(command_lines.texts.RUN, lambda values: "another").outcome, Ending.TRACEBACK),
        (lambda: command_lines.run_line(command_lines.texts.RUN, lambda values: "another"), Ending.SILENT),
    ],
)
def test_a_bad_ending_is_told_from_a_good_one(run, ending):
    assert battery.play(Case("a: b", run), limit_seconds=2.0).ending == ending


def test_a_page_counts_what_was_bad():
    cases = [Case("a: 1", refuse), Case("a: 2", lambda: 1 / 0), Case("b: 1", lambda: Outcome(Ending.FINE, "x|y"))]
    page = battery.page("Some", 7, battery.run(cases))
    assert "3 cases, seed 7" in page and "; 1 bad." in page and "traceback: `a: 2`" in page


def test_command_lines_in_short(tmp_path):
    drawn = command_lines.make_cases(random.Random(1), 500, tmp_path)
    quick = [case for case in drawn if case.kind not in ("session", "plan", "process", "words")]
    for case in random.Random(2).sample(quick, 24):
        outcome = battery.play(case)
        assert not battery.is_bad(outcome), (case.name, outcome)


def made_by_hand(folder):
    """A workdir like a run's, with a train state of three numbers; what reads and writes it is real."""
    with Workdir.open(folder, algorithm_config("grpo")) as workdir:
        writer = MetricsWriter(folder)
        checkpoints = Checkpoints(folder / "checkpoints", 2, "eval/avg@4")
        for step in range(3):
            writer.write(step, {"rollout/success": 0.5, "time/step": 1.0})
            if step:
                workdir.write_episodes(step, [record(targets=(2,)), record(success=True)])
                checkpoints.save(step, SHAPE, {"step": step, "before": None}, {"eval/avg@4": 0.5})
        held_out = {"metrics": {}, "success": [[1, 0]], "greedy": []}
        workdir.write_text("held_out.json", json.dumps({"before": held_out, "after": held_out}))
        workdir.write_text("evaluation.json", json.dumps({"step": 2, **held_out}))
        workdir.write_text("result.md", "done")
        workdir.journal("after", 2).put("env_timeout", "none", 1, value="x")
        checkpoints.close()
        writer.close()


def continued(folder):
    """What a resumed run reads and writes first."""
    with Workdir.open(folder, algorithm_config("grpo")) as workdir:
        checkpoints = Checkpoints(folder / "checkpoints", 2, "eval/avg@4")
        step = checkpoints.latest_step
        workdir.discard_after(step)
        MetricsWriter(folder, step).close()
        workdir.journal("after", 2)
        if step is not None:
            state, counters = checkpoints.restore(step, SHAPE)
            assert counters == {"step": step, "before": None} and (state["x"] == 1).all()
        checkpoints.close()


def test_spoiled_workdirs_in_short(tmp_path):
    source, copy = tmp_path / "run", tmp_path / "copy"
    made_by_hand(source)
    endings = {}
    for n in range(-1, 22):
        rng = random.Random(n)
        shutil.copytree(source, copy)
        what, target = "as it is", ""
        if n >= 0:
            kind = list(workdirs.SPOILERS)[n % 4]
            places = [*workdirs.FILES, *workdirs.FOLDERS[:-1]] if kind == "wrong kind" else [*workdirs.FILES][:8]
            target = rng.choice(places)
            what = f"{kind}: {target} {workdirs.SPOILERS[kind](copy / target, rng)}"
        for read in (lambda: report([copy], tmp_path / "r.html"), lambda: continued(copy)):
            outcome = battery.play(Case(what, lambda read=read: Outcome(Ending.FINE, str(read()))))
            assert not battery.is_bad(outcome) and "\n" not in outcome.says, (what, outcome)
            endings.setdefault(outcome.ending, []).append(n)
        assert not [file for file in copy.rglob(".*.partial") if not file.is_symlink()]
        shutil.rmtree(copy)
    assert endings[Ending.FINE][:2] == [-1, -1] and endings[Ending.REFUSED]
