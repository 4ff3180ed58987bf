# SPDX-License-Identifier: Apache-2.0

"""Files wherever they lie: a path or an address (`gs://bucket/name`, `s3://bucket/name`) flows in; whole files,
appended lines and lists of names flow out.

An object store is no disk. It renames nothing in one go, appends nothing, locks nothing, and its libraries raise their
own kinds of errors. Here it looks like a disk as far as a run needs one, and every error of its libraries is an
OSError. A path of this machine stays what it is: a `pathlib.Path`, with rename and fsync.

Invariant: a file appears whole or not at all, here as there. On a disk it is written beside its place, synced and
renamed; in a store it is put together on this machine and sent in one request, after which the store shows it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from hintsd_jax.errors import UserError, reason, writing

if TYPE_CHECKING:
    from etils import epath

# Schemes of addresses -> the package that fsspec reads and writes them with.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(/?)")
_BUFFER = 64 * 2**20  # bytes of a file on its way to a store that stay in memory; the rest waits on this machine's disk

_BLOCK = 16 * 2**20  # bytes that are copied at a time

AnyPath: TypeAlias = "Path | epath.Path"


def scheme(path: str | os.PathLike) -> str:
    """ "gs" of `gs://bucket/name`, and of `gs:/bucket/name`, which was meant so; "" of a path of this machine."""
    match = _ADDRESS.match(os.fspath(path))
    kind = match[1].lower() if match else ""
    return kind if match and (match[2] or kind in PACKAGES) else ""


def is_remote(path: str | os.PathLike) -> bool:
    return bool(scheme(path))


def problem(path: str) -> str:
    """Why an address leads nowhere, to be put behind its name; "" where it may be used, or is a path of here."""
    kind = scheme(path)
    if not kind:
        return ""
    if kind not in PACKAGES:
        return (
            f"is an address of a kind that is not known: give a folder, {' or '.join(f'{k}://...' for k in PACKAGES)}"
        )
    if not path.startswith(f"{kind}://"):
        return f"must begin with {kind}://, in small letters"
    bucket, _, name = path[len(kind) + 3 :].partition("/")
    parts = name.rstrip("/").split("/")
    if not bucket or not name.strip("/"):
        return f"names no folder within a bucket: give {kind}://bucket/folder"
    if any(part in ("", ".", "..") for part in parts) or set(path) & set("*?[]{}#\\"):
        return (
            "has an empty part, a . or .. as a part, or one of * ? [ ] { } # \\, which each store reads in its own way"
        )
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        return f'needs the package {PACKAGES[kind]}, which is not installed: pip install "hintsd-jax[{kind}]"'
    return ""


def problem_of_checkpoints(path: str) -> str:
    """As `problem`, of an address where checkpoints shall lie. Orbax, which writes them, knows one kind of store."""
    if scheme(path) in ("", "gs"):
        return ""
    return "cannot hold checkpoints: orbax writes them to disks and to gs:// only; policies and exports may lie there"


def located(path: str | os.PathLike) -> AnyPath:
    """A path of this machine as a `pathlib.Path`, an address as the path of `etils.epath`. Both join by `/`, and have
    `name`, `parent` and `with_name`; read and write them with the functions here.

    Raises:
      UserError: an address that leads nowhere, or whose package is missing.
    """
    if not is_remote(path):
        return Path(path)
    text = os.fspath(path)
    if why := problem(text):
        raise UserError(f"{text} {why}")
    return _paths()(text.rstrip("/"))


def absolute(path: str | os.PathLike) -> AnyPath:
    """As `located`, a path of this machine from its root on."""
    place = located(path)
    return place.absolute() if isinstance(place, Path) else place


@functools.cache
def _paths() -> type[epath.Path]:
    """The class of addresses, after etils and fsspec have been told what they must know before the first one."""
    from etils import epath  # here, because most runs never need them
    from fsspec import config

    # Where TensorFlow happens to be installed, etils would take its file system, which knows other credentials.
    os.environ["EPATH_USE_TF"] = "false"
    for package in PACKAGES.values():  # each try that fails is logged with its traceback; the last one is raised
        logging.getLogger(package).setLevel(logging.CRITICAL)
    for kind in PACKAGES:  # orbax and other processes write behind fsspec's back: what it remembers of folders is old
        config.conf.setdefault(kind, {})["use_listings_cache"] = False
    return epath.Path


@contextlib.contextmanager
def _calling(path: AnyPath) -> Iterator[None]:
    """Errors of a store's libraries as OSErrors that name its path. Those of this machine pass."""
    try:
        yield
    except Exception as error:  # google's, amazon's and aiohttp's packages each have their own families of errors
        told = isinstance(error, OSError) and error.filename is not None
        if isinstance(path, Path) or told or isinstance(error, FileNotFoundError | NotADirectoryError | UserError):
            raise
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(code, f"{type(error).__name__}: {reason(error)}", str(path)) from error


def exists(path: AnyPath) -> bool:
    """Whether there is a file, or a folder with something in it. Raises OSError where the store does not say, as the
    next two do.
    """
    return path.exists() if isinstance(path, Path) else _is_folder(path) is not None


def is_folder(path: AnyPath) -> bool:
    """Whether it is a folder; in a store: whether something lies under this name."""
    return path.is_dir() if isinstance(path, Path) else bool(_is_folder(path))


def is_file(path: AnyPath) -> bool:
    return path.is_file() if isinstance(path, Path) else _is_folder(path) is False


def _is_folder(path: epath.Path) -> bool | None:
    """None where nothing is there. Not by `exists` and `is_dir`: to fsspec a store that does not answer is empty."""
    try:
        with _calling(path):
            return bool(path.stat().is_directory)
    except FileNotFoundError:
        return None


def entries(folder: AnyPath) -> list[AnyPath]:
    """What lies in a folder, sorted by name; nothing where there is no folder."""
    with _calling(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if isinstance(folder, Path):
            return sorted(folder.iterdir())
        # A store lists a folder that somebody has made as an empty name within itself.
        return sorted((path for path in folder.iterdir() if path.name and path != folder), key=lambda path: path.name)
    return []


def size(path: AnyPath) -> int:
    """Bytes of a file."""
    with _calling(path):
        return path.stat().st_size if isinstance(path, Path) else int(path.stat().length)


def remove(path: AnyPath) -> None:
    """Removes a file, if it is there. Raises UserError where the disk or the store refuses it."""
    with writing(path), _calling(path):
        path.unlink(missing_ok=True)


def remove_folder(path: AnyPath) -> None:
    """Removes a folder in a store with all that is in it, if it is there; the files before those that name them."""
    for entry in entries(path):
        remove_folder(entry) if is_folder(entry) else remove(entry)
    if isinstance(path, Path):
        path.rmdir()


def move_folder(source: AnyPath, target: AnyPath, marker: str) -> None:
    """Gives a folder a new name. In a store, file by file; `marker`, without which nobody takes it for whole, goes
    first.

    Raises UserError where the disk or the store refuses it.
    """
    with writing(target):
        if isinstance(source, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            return
        with _calling(source):
            _copy_below(source, target)
            remove(source / marker)
            remove_folder(source)


def _copy_below(source: AnyPath, target: AnyPath) -> None:
    for entry in entries(source):
        if is_folder(entry):
            _copy_below(entry, target / entry.name)
        else:
            with whole_file(target / entry.name) as out, entry.open("rb") as file:
                shutil.copyfileobj(file, out, _BLOCK)


def make_folder(path: AnyPath) -> None:
    """A folder and its parents, where they are not there. A store has none: names are all that it has.

    Raises UserError where the disk refuses it.
    """
    if isinstance(path, Path):
        with writing(path, "give another place"):
            path.mkdir(parents=True, exist_ok=True)


def open_file(path: AnyPath) -> IO[bytes] | None:
    """A file, to be read; None where there is none. One in a store is read as a whole, into memory.

    Raises:
      UserError: it cannot be read, or is a folder, a pipe (which would wait for ever) or a link to nothing.
    """
    if not isinstance(path, Path):
        return _fetched(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing: mend or remove it") from error
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no file: move it away")
    return os.fdopen(descriptor, "rb")


def _fetched(path: epath.Path) -> IO[bytes] | None:
    try:
        with _calling(path):
            return io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)})") from error


def read_bytes(path: AnyPath) -> bytes:
    """A whole file. Raises OSError, FileNotFoundError among them."""
    with _calling(path):
        return path.read_bytes()


def read_range(path: AnyPath, start: int, stop: int) -> bytes:
    """Bytes of a file from `start` up to `stop`, fewer where it ends before. Raises OSError."""
    with _calling(path), path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


@contextlib.contextmanager
def whole_file(path: AnyPath) -> Iterator[IO[bytes]]:
    """A file that appears at `path` whole when the block ends, and not at all when it raises. Its folder is made.

    Raises UserError where the disk or the store refuses it.
    """
    with writing(path):
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            partial.unlink(missing_ok=True)  # of a killed process, or a pipe, which would wait for ever
            try:
                with open(partial, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        else:
            # Not straight into the store's file, which is sent when it is closed: after an error as well.
            with tempfile.SpooledTemporaryFile(_BUFFER) as spool:
                yield spool
                spool.seek(0)
                with _calling(path):
                    out: Any = path.open("wb")
                    with out:
                        shutil.copyfileobj(spool, out, _BLOCK)


def copy_in(source: Path, path: AnyPath) -> None:
    """Puts a file of this machine to where it belongs, as `whole_file` does."""
    with open(source, "rb") as file, whole_file(path) as out:
        shutil.copyfileobj(file, out, _BLOCK)


def copy_out(path: AnyPath, target: Path) -> None:
    """Writes a file's content to a path of this machine. Raises OSError."""
    with _calling(path), path.open("rb") as file, open(target, "wb") as out:
        shutil.copyfileobj(file, out, _BLOCK)


@contextlib.contextmanager
def whole_text(path: AnyPath) -> Iterator[IO[str]]:
    """As `whole_file`, for UTF-8 text."""
    with whole_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        yield text
        text.detach()  # flushes, and leaves the file open


class Appended:
    """A file that grows at its end; what `write` was given is stored when `write` returns.

    A disk appends. A store does not: there, the whole file is sent again each time, out of a copy in memory, so keep
    such files small; Google's store takes about one write of the same file in a second, and its package waits for it.

    Args:
      path: made with the first write, with its folder.
      keep: bytes at the beginning of what is there that stay; what follows, torn by a kill, is cut off by the first
        write. None: all.

    Attributes:
      size: bytes that are stored.

    Raises:
      UserError: the disk or the store refuses it, here and in `write`; or, in `write`, the file was removed or cut
        meanwhile.
    """

    def __init__(self, path: AnyPath, keep: int | None = None):
        self._path = path
        self._copy = bytearray()
        if isinstance(path, Path):
            self.size = keep if keep is not None else path.stat().st_size if path.is_file() else 0
            return
        if keep != 0:
            file = open_file(path)
            self._copy += file.read() if file is not None else b""
            del self._copy[len(self._copy) if keep is None else keep :]
        self.size = len(self._copy)

    def write(self, data: bytes) -> None:
        if isinstance(self._path, Path):
            self._append(self._path, data)
        else:
            with whole_file(self._path) as file:
                file.write(self._copy)
                file.write(data)
            self._copy += data
        self.size += len(data)

    def _append(self, path: Path, data: bytes) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                if file.tell() < self.size:  # of which the rest would be zeros
                    raise UserError(f"{path} was removed or cut while it was written: restore it, or start anew")
                file.truncate(self.size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if not self.size:
                _sync_names(path.parent)


def _sync_names(folder: Path) -> None:
    """Puts the names of a new file and of its folder on disk."""
    for path in (folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
