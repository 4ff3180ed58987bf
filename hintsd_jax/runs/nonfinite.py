# SPDX-License-Identifier: Apache-2.0

"""What is kept of an update that met a number that is not finite: its batches flow in, one file for study flows out.

The update was skipped, or the run ends with it; without the batches nobody could say why. Read the file with
`numpy.load`: `batch_0/student_BT` and so on (`training.batching.Batch`), `batch_0/tokens/divergence` and so on (what
the loss said of each token), `metrics/loss` and so on.

Invariant: at most `MOST` files a run, those of its first such steps; a resumed run writes the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hintsd_jax.storage import AnyPath, entries, remove, whole_file

MOST = 8
_FILE = re.compile(r"step_(\d+)\.npz")


def keep(
    workdir: AnyPath,
    step: int,
    batches: Sequence[Any],
    tokens: Sequence[Mapping[str, np.ndarray]],
    metrics: Mapping[str, Any],
) -> AnyPath | None:
    """Writes `nonfinite/step_<step>.npz`, whole or not at all; None where `MOST` files are there already.

    batches: named tuples of arrays, of which those with a number that is not finite are kept, in themselves or in what
    is said of their tokens; all, where none has one. tokens: of each batch. metrics: of the update, scalars.

    Raises UserError where the disk refuses it.
    """
    folder = workdir / "nonfinite"
    if len(_files(folder)) >= MOST:
        return None
    numbered = list(enumerate(zip(batches, tokens, strict=True)))
    bad = [each for each in numbered if not _is_finite([*each[1][0], *each[1][1].values()])]
    arrays: dict[str, Any] = {f"metrics/{name}": np.asarray(value) for name, value in metrics.items()}
    for number, (batch, said) in bad or numbered:
        named = batch._asdict() | {f"tokens/{name}": array for name, array in said.items()}
        arrays |= {f"batch_{number}/{name}": np.asarray(array) for name, array in named.items()}
    path = folder / f"step_{step:06d}.npz"
    with whole_file(path) as file:
        np.savez_compressed(file, **arrays)
    return path


def discard_after(workdir: AnyPath, step: int) -> None:
    """Removes the files of steps later than `step`: a resumed run repeats them."""
    for number, path in _files(workdir / "nonfinite").items():
        if number > step:
            remove(path)


def _files(folder: AnyPath) -> dict[int, AnyPath]:
    matches = {path: _FILE.fullmatch(path.name) for path in entries(folder)}
    return {int(match[1]): path for path, match in matches.items() if match}


def _is_finite(arrays: Sequence[np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in arrays)
