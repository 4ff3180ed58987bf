"""Safetensors and JSON on disk, for whole policies and for adapters. Paths flow in, checked float32 arrays and dictionaries flow out.

Invariants: nothing is guessed: a tensor too few, too many, of another shape or cut short ends in a UserError that names file and
tensor. A directory is written whole or not at all.
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hintsd_jax.errors import UserError


class Tensors:
    """The tensors of one or several safetensors files by name; opened lazily, read one by one.

    `listing` is the file to name where a tensor is missing, `asker` what says which tensors there should be. `file_of`: name -> file.
    Raises UserError when a file is missing, cut short or something else.
    """

    def __init__(self, files: Iterable[pathlib.Path], listing: pathlib.Path, asker: str, stack: contextlib.ExitStack):
        self.listing, self.asker = listing, asker
        self.file_of: dict[str, pathlib.Path] = {}
        self._open = {}
        for file in files:
            _check_complete(file)
            self._open[file] = stack.enter_context(safe_open(file, framework="np"))
            self.file_of |= dict.fromkeys(self._open[file].keys(), file)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as float32. Raises UserError when it is missing, not floating point or not of `shape`."""
        if name not in self.file_of:
            raise UserError(f"{self.listing}: tensor {name} of shape {list(shape)} is missing")
        file = self.file_of[name]
        about = self._open[file].get_slice(name)
        if tuple(about.get_shape()) != shape:
            raise UserError(f"{file}: tensor {name} has shape {about.get_shape()}; {self.asker} asks for {list(shape)}")
        if about.get_dtype() not in ("F32", "F16", "BF16"):
            raise UserError(f"{file}: tensor {name} has dtype {about.get_dtype()}; only F32, F16 and BF16 are supported")
        return self._open[file].get_tensor(name).astype(np.float32)

    def refuse_others(self, expected: Collection[str]) -> None:
        """Raises UserError when there is a tensor that is not `expected`."""
        extra = sorted(set(self.file_of) - set(expected))
        if extra:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise UserError(f"{self.file_of[extra[0]]}: unexpected tensor {extra[0]}{more}; {self.asker} does not ask for it")


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError when it is missing or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not a JSON object")
    return content


def write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes contiguous arrays as safetensors, readable by whom the umask allows (the library alone writes for the owner only)."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, what: str, marker: str) -> Iterator[pathlib.Path]:
    """A new directory beside `path` to write into, which takes the place of `path` where the block ends without an error.

    What already stands at `path` is replaced if it holds a file `marker`; anything else there, and a place that cannot be
    written, is a UserError. `what` is the thing's name in messages.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and not (path / marker).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists and is no {what} directory; choose another place")
    try:
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


def _check_complete(file: pathlib.Path) -> None:
    """Reads the safetensors header and names the first tensor whose bytes are not there (the library only says 'incomplete').

    Format: 8 bytes little-endian header length, the header as JSON, then the data that its offsets point into.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{file}: cut short within its header ({size} bytes); copy it again")
            header = json.loads(stream.read(length))
        ends = {name: about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise UserError(f"{file}: missing; copy the whole directory again") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a safetensors file: {error!r}") from error
    cut = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if 8 + length + end > size]
    if cut:
        raise UserError(f"{file}: cut short ({size} bytes): tensor {cut[0]} is not complete; copy the file again")
