"""Metrics are exact, strict JSON, and cut back to the restored step."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintsd_jax.errors import UserError
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


def test_rows_that_somebody_has_removed_changed_or_put_twice_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path)
    digests = []
    for step in range(4):
        writer.write(step, {"x": step / 3})
        digests.append(writer.digest)
    writer.close()
    sound = path.read_text()
    lines = sound.splitlines(keepends=True)
    continued = MetricsWriter(tmp_path, 2, digests[2])
    continued.write(3, {"x": 3 / 3})
    assert path.read_text() == sound and continued.digest == digests[3]
    for text, said in {
        lines[0] + lines[2]: "lacks the rows of 1 steps, the first 1 than when step 2 was saved",
        "": "lacks the rows of 3 steps, the first 0",
        sound.replace("0.333", "0.334"): "has other rows than when step 2 was saved",
        "".join(lines[:2]) + lines[2][:-1]: "lacks the rows of 1 steps, the first 2",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=said) as caught:
            MetricsWriter(tmp_path, 2, digests[2])
        assert path.read_text() == text and f"--config.fork.path={tmp_path}" in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="lacks the rows of 3 steps"):
        MetricsWriter(tmp_path, 2, digests[2])
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"holds the steps \[0, 1, 1\], which do not grow"):
        MetricsWriter(tmp_path, resume_step=1)


@pytest.mark.parametrize(
    "row", ['"step": true', '"step": 1, "x": "1"', '"step": 1, "x": NaN', '"step": 1, "x": {}', ""]
)
def test_a_row_that_no_run_has_written_is_refused(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(f"{{{row}}}\n")
    with pytest.raises(UserError, match="line 1 is not a metrics row"):
        MetricsWriter(tmp_path, resume_step=1)
