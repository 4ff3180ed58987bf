"""Metrics are exact, strict JSON, and cut back to the restored step; the bar and the last table are right."""

import io
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.runs import progress
from hintsd_jax.runs.metrics import NONFINITE, MetricsWriter, Timer, compile_count, peak_bytes, read_metrics


def lines(tmp_path):
    return (tmp_path / "metrics.jsonl").read_text().splitlines()


def test_rows_are_sorted_and_exact(tmp_path):
    writer = MetricsWriter(tmp_path)
    third = np.float32(1) / np.float32(3)
    writer.write(3, {"b/x": 0.1, "a/y": jnp.float32(third), "c": np.int64(2**53 + 1), "ok": True, "eval/avg@4": 0.25})
    writer.close()
    assert lines(tmp_path) == [
        f'{{"step": 3, "a/y": {float(third)!r}, "b/x": 0.1, "c": {2**53 + 1}, "eval/avg@4": 0.25, "ok": 1}}'
    ]
    assert np.float32(read_metrics(tmp_path / "metrics.jsonl")[0]["a/y"]) == third
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_any_float_comes_back_bit_equal(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**64, 200, dtype=np.uint64).view(np.float64)
    special = [0.0, -0.0, 5e-324, 1.7976931348623157e308, 0.1 + 0.2]
    values = np.array([*bits[np.isfinite(bits)], *special])
    writer = MetricsWriter(tmp_path)
    writer.write(1, {f"x{i:03d}": value for i, value in enumerate(values)})
    writer.close()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    back = np.array([row[f"x{i:03d}"] for i in range(len(values))])
    assert back.tobytes() == values.tobytes()


def test_what_is_not_finite_is_null_and_counted(tmp_path):
    writer = MetricsWriter(tmp_path)
    row = writer.write(1, {"loss": math.nan, "norm": jnp.inf, "fine": 1})
    writer.close()
    assert row == {"step": 1, "fine": 1, "loss": None, NONFINITE: 2, "norm": None}
    assert json.loads(lines(tmp_path)[0], parse_constant=lambda name: pytest.fail(name)) == row


@pytest.mark.parametrize("value", ["1", [1], np.zeros(1), None, 1j])
def test_only_single_numbers(tmp_path, value):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(TypeError, match="metric x"):
        writer.write(1, {"x": value})
    writer.close()
    assert lines(tmp_path) == []


def test_resume_cuts_later_and_torn_rows(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(5):
        writer.write(step, {"x": step / 7})
    writer.close()
    whole = lines(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "x"')  # killed while writing
    writer = MetricsWriter(tmp_path, resume_step=2)
    assert lines(tmp_path) == whole[:3]
    for step in (3, 4):
        writer.write(step, {"x": step / 7})
    writer.close()
    assert lines(tmp_path) == whole
    MetricsWriter(tmp_path).close()  # a new start
    assert lines(tmp_path) == []


def test_a_broken_file_is_refused_and_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=1)
    assert len(lines(tmp_path)) == 3


def test_compilations_are_counted_once_each():
    before = compile_count()
    double = jax.jit(lambda x: x * 2 + before)
    x3, x5 = np.zeros(3, np.float32), np.zeros(5, np.float32)
    double(x3)
    first = compile_count() - before
    double(x3)
    assert first == 1 and compile_count() - before == 1
    double(x5)
    assert compile_count() - before == 2


def test_peak_memory_is_in_bytes_and_never_falls():
    block = np.ones(2**25, np.uint8)
    before = peak_bytes()
    assert before > block.nbytes  # in KiB it would be far below
    del block
    assert peak_bytes() >= before


def test_timer_adds_up_and_starts_again():
    timer = Timer()
    with timer("b"), timer("a"):
        pass
    first = timer.take()
    assert list(first) == ["time/a", "time/b"] and 0 <= first["time/a"] <= first["time/b"]
    with pytest.raises(RuntimeError), timer("a"):
        raise RuntimeError
    assert list(timer.take()) == ["time/a"] and timer.take() == {}


class Terminal(io.StringIO):
    def isatty(self):
        return True


ROW = {"rollout/success": 0.5, "train/loss": 0.01234, "rollout/tokens": 3000, "time/step": 2.0}


def test_plain_lines():
    stream = io.StringIO()
    shown = progress.Progress(4, start=1, stream=stream)
    shown.update(2, ROW)
    shown.update(3, {"train/loss": None})
    shown.close()
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"step 2/4  success 50\.0 %  loss 0\.0123  1,500 tok/s  left \d+:\d\d", first)
    assert re.fullmatch(r"step 3/4  left \d+:\d\d", second) and "\r" not in stream.getvalue()


def test_bar_on_a_terminal():
    stream = Terminal()
    bar = progress.Progress(4, stream=stream)
    bar.update(1, ROW)
    bar.note("a line")
    bar.update(4, ROW)
    bar.close()
    text = stream.getvalue()
    assert "success 50.0 %" in text and "1,500 tok/s" in text and "4/4" in text and "a line\n" in text


def test_last_table():
    results = [progress.Result("held-out Avg@4", 0.4, 0.575, None, (0.5, 0.65)), progress.Result("greedy", None, 0.5)]
    facts = {"wall time": progress.format_seconds(3725), "analyser": "environment (PRIVILEGED)"}
    plain, markdown = (make(results, facts).splitlines() for make in (progress.plain_table, progress.markdown_table))
    cells = lambda line, mark: [cell.strip() for cell in re.split(mark, line.strip("| "))]
    expected = [
        ["success, %", "before", "after", "change"],
        ["held-out Avg@4", "40.0", "57.5 (50.0 to 65.0)", "+17.5"],
        ["greedy", "-", "50.0"],
    ]
    assert [cells(plain[n], "  +") for n in (0, 2, 3)] == expected
    assert [cells(markdown[n], r"\|") for n in (0, 2, 3)] == expected
    assert len({line.find(word) + len(word) for line, word in ((plain[0], "after"), (plain[3], " 50.0"))}) == 1
    assert plain[4:] == ["wall time: 1:02:05", "analyser: environment (PRIVILEGED)"]
    assert markdown[4:] == ["", "- wall time: 1:02:05", "- analyser: environment (PRIVILEGED)"]
    assert progress.format_seconds(59.6) == "1:00"
