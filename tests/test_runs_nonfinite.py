"""What is kept for study of updates that met a number that is not finite: the guilty batches, and never many files."""

from typing import NamedTuple

import numpy as np

from hintsd_jax.runs import nonfinite


class Batch(NamedTuple):
    tokens_BT: np.ndarray
    logprob_BA: np.ndarray


def batch(value):
    return Batch(np.arange(3), np.array([value, 1.0], np.float32))


def test_the_guilty_batches_are_kept_with_all_that_is_said_of_them(tmp_path):
    batches = [batch(0.5), batch(np.nan), batch(0.5)]
    said = [{"divergence": np.ones(2)}, {"divergence": np.ones(2)}, {"divergence": np.array([1, np.inf])}]
    path = nonfinite.keep(tmp_path, 7, batches, said, {"loss": np.float32(np.nan), "lr": 0.5})
    assert [file.name for file in (tmp_path / "nonfinite").iterdir()] == ["step_000007.npz"] == [path.name]
    with np.load(path) as file:
        assert {name.split("/")[0] for name in file} == {"metrics", "batch_1", "batch_2"}
        assert np.isnan(file["metrics/loss"]) and file["metrics/lr"] == 0.5
        np.testing.assert_array_equal(file["batch_1/logprob_BA"], [np.nan, 1.0])
        np.testing.assert_array_equal(file["batch_2/tokens/divergence"], [1.0, np.inf])
    with np.load(nonfinite.keep(tmp_path, 8, batches[:1], said[:1], {})) as file:  # the weights were it
        assert {name.split("/")[0] for name in file} == {"batch_0"}
    assert nonfinite.keep(tmp_path, 9, [], [], {"loss": 1.0}).exists()


def test_the_first_files_of_a_run_stay_and_no_more_are_written(tmp_path):
    written = [nonfinite.keep(tmp_path, step, [], [], {}) for step in range(1, 11)]
    assert [path is not None for path in written] == [True] * nonfinite.MOST + [False] * 2
    nonfinite.discard_after(tmp_path, 6)  # a resumed run writes what the killed one wrote
    assert [nonfinite.keep(tmp_path, step, [], [], {}) for step in range(7, 11)] == written[6:]
    nonfinite.discard_after(tmp_path / "fresh", 0)
