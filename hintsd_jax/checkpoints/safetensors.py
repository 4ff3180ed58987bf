# SPDX-License-Identifier: Apache-2.0

"""Safetensors and JSON on disk or in a store, for policies and for adapters: paths flow in, checked arrays and
dictionaries flow out.

Invariants: nothing is guessed: a tensor too few, too many, of another shape or cut short ends in a UserError that names
file and tensor. No more than a tensor is read at a time. A directory is written whole or not at all.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hintsd_jax.errors import UserError
from hintsd_jax.storage import (
    AnyPath,
    absolute,
    copy_in,
    entries,
    exists,
    is_file,
    is_folder,
    read_bytes,
    read_range,
    remove,
    remove_folder,
    size,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class TensorFiles:
    """The tensors of one or several safetensors files by name. Headers are read at once, data when asked for, one
    tensor at a time.

    Args:
      files: the safetensors files.
      listing: the file to name where a tensor is missing.
      required_by: what says which tensors there should be, such as "config.json"; for messages.

    Attributes:
      file_of: tensor name -> file.

    Raises:
      UserError: a file is missing, cut short or something else.
    """

    def __init__(self, files: Iterable[AnyPath], listing: AnyPath, required_by: str):
        self.listing, self.required_by = listing, required_by
        self.file_of: dict[str, AnyPath] = {}
        self._entries: dict[str, _Entry] = {}
        for file in files:
            entries = _read_header(file)
            self.file_of |= dict.fromkeys(entries, file)
            self._entries |= entries

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError when the tensor is missing, not floating point or not of `shape`. Reads no data."""
        if name not in self.file_of:
            raise UserError(f"{self.listing}: tensor {name} of shape {list(shape)} is missing")
        file, entry = self.file_of[name], self._entries[name]
        if entry.shape != shape:
            required = f"{self.required_by} asks for {list(shape)}"
            raise UserError(f"{file}: tensor {name} has shape {list(entry.shape)}; {required}")
        if entry.dtype not in DTYPES:
            raise UserError(f"{file}: tensor {name} has dtype {entry.dtype}; only {', '.join(DTYPES)} are supported")
        size = entry.stop - entry.start
        if size != math.prod(shape) * DTYPES[entry.dtype].itemsize:
            raise UserError(
                f"{file}: tensor {name} has {size} bytes, too few or too many for its shape; copy the file again"
            )

    def dtype(self, name: str) -> np.dtype:
        """As it is stored, of a tensor that was checked."""
        return DTYPES[self._entries[name].dtype]

    def rows(self, name: str, first: int, stop: int) -> np.ndarray:
        """Rows of a tensor that was checked, as they are stored. Plain reads: the pages of a mapped file would count as
        this process's memory.
        """
        file, entry, dtype = self.file_of[name], self._entries[name], self.dtype(name)
        row = math.prod(entry.shape[1:])
        try:
            start = entry.start + first * row * dtype.itemsize
            if isinstance(file, pathlib.Path):
                data = np.fromfile(file, dtype, (stop - first) * row, offset=start)
            else:
                read = read_range(file, start, start + (stop - first) * row * dtype.itemsize)
                data = np.frombuffer(read, dtype, len(read) // dtype.itemsize)
        except OSError as error:
            raise UserError(f"{file}: tensor {name} cannot be read: {error}") from error
        if data.size != (stop - first) * row:
            raise UserError(f"{file}: tensor {name} ends too early; was the file changed?")
        return data.reshape(stop - first, *entry.shape[1:])

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A whole tensor as it is stored. Raises UserError as `check` does."""
        self.check(name, shape)
        return self.rows(name, 0, shape[0])

    def refuse_others(self, expected: Collection[str]) -> None:
        """Raises UserError when there is a tensor that is not `expected`."""
        extra = sorted(set(self.file_of) - set(expected))
        if extra:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise UserError(
                f"{self.file_of[extra[0]]}: unexpected tensor {ascii(extra[0])[1:-1]:.120}{more};"
                f" {self.required_by} does not ask for it"
            )


def read_json(file: AnyPath) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError when it is missing or holds something else."""
    try:
        content = json.loads(read_bytes(file).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not a JSON object")
    return content


def write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes contiguous arrays as safetensors, readable by whom the umask allows (the library alone: by the owner)."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def write_shards(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], limit: int = 4 * 2**30) -> None:
    """Writes tensors as they come into `model.safetensors`, or, beyond `limit` bytes, into several files with an index.

    At most one file's tensors are in memory.
    """
    shards: list[list[str]] = []  # the tensors' names in each file
    pending: dict[str, np.ndarray] = {}
    total = pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        write_tensors(folder / _shard(len(shards)), pending)
        shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > limit:
            flush()
        pending[name] = np.ascontiguousarray(tensor)
        pending_bytes, total = pending_bytes + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / _shard(0)).rename(folder / WEIGHTS)
        return
    # The final names say how many files there are, which is known only now.
    files = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for n, file in enumerate(files):
        (folder / _shard(n)).rename(folder / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _shard(n: int) -> str:
    return f"model-{n + 1:05d}.safetensors"


@contextlib.contextmanager
def replacing(path: str | os.PathLike, what: str, marker: str) -> Iterator[pathlib.Path]:
    """A new directory beside `path` to write into, which takes the place of `path` where the block ends without an
    error. In a store, which renames nothing in one go: a directory of this machine, whose files are sent then, the
    `marker` last, without which nobody takes the rest for whole.

    What already stands at `path` is replaced if it holds a file `marker`; anything else there, and a place that cannot
    be written, is a UserError. `what` is the thing's name in messages.
    """
    path = absolute(path)
    try:
        if exists(path) and not is_file(path / marker) and not (is_folder(path) and not entries(path)):
            raise UserError(f"{path}: exists and is no {what} directory; choose another place")
        if not isinstance(path, pathlib.Path):
            with tempfile.TemporaryDirectory() as scratch:
                yield pathlib.Path(scratch)
                _send(pathlib.Path(scratch), path, marker)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            new, old = pathlib.Path(scratch, "new"), pathlib.Path(scratch, "old")
            new.mkdir()
            yield new
            if path.exists():
                path.rename(old)  # steps aside first: a rename cannot replace a full directory
            try:
                new.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write the {what} there: {error}") from error


def _send(new: pathlib.Path, path: AnyPath, marker: str) -> None:
    remove(path / marker)
    remove_folder(path)
    files = [file for file in sorted(new.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file == new / marker):
        copy_in(file, path / file.relative_to(new).as_posix())


class _Entry(NamedTuple):
    """What a header says of a tensor. dtype: the format's name, such as BF16. start, stop: its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _read_header(file: AnyPath) -> dict[str, _Entry]:
    """What a file holds. Names the first tensor whose bytes are not there (the library only says 'incomplete').

    Format: 8 bytes little-endian header length, the header as JSON, then the data that its offsets point into.
    """
    try:
        whole = size(file)
        length = int.from_bytes(read_range(file, 0, 8), "little")
        if whole < 8 or length > whole - 8:
            raise UserError(f"{file}: cut short within its header ({whole} bytes); copy it again")
        header = json.loads(read_range(file, 8, 8 + length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
            if not 8 + length <= start <= stop:
                raise ValueError(f"tensor {name} from byte {start} to {stop}")
            tensors[name] = _Entry(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), start, stop)
        in_order = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
        for (before, left), (name, right) in itertools.pairwise(
            [("the header", _Entry("", (), 0, 8 + length)), *in_order]
        ):
            if right.start != left.stop:  # the format has neither holes nor bytes that two tensors share
                raise ValueError(f"tensor {name} begins at byte {right.start}, {before} ends at {left.stop}")
    except FileNotFoundError:
        raise UserError(f"{file}: missing; copy the whole directory again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a safetensors file: {error!r}") from error
    cut = [name for name, entry in in_order if entry.stop > whole]
    if not cut and in_order and in_order[-1][1].stop < whole:
        raise UserError(f"{file}: not a safetensors file: {whole - in_order[-1][1].stop} bytes follow the last tensor")
    if cut:
        raise UserError(
            f"{file}: cut short ({whole} bytes): tensor {ascii(cut[0])[1:-1]:.120} is not complete; copy the file again"
        )
    return tensors
