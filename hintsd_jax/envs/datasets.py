# SPDX-License-Identifier: Apache-2.0

"""Task sets as TensorFlow Datasets builders, built once on a machine and read without TensorFlow.

In: a builder class that lists its tasks per split, the folder to keep them in, and a split. Out: `Sequence[Mapping]`
with cheap indexing, every text a `str` and every number a Python number.

Invariants: the path of the files holds the builder's name, config and version, so a task set is never mixed up with
another version of itself; the order within a split is the order in which the builder lists it; one process builds while
the others wait, and a build that was killed leaves nothing that counts as built (TFDS renames a finished folder into
place).
"""

import contextlib
import fcntl
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from hintsd_jax.errors import UserError

tfds.disable_progress_bar()  # builds take seconds, and the bars garble the log of a run


class TaskBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of every task set. A subclass gives `VERSION`, `FEATURES` and `splits()`; parameters go into a
    `BuilderConfig`.

    Whatever the tasks depend on (a generator's hash, a wheel's version) must stand in `VERSION` or in the config's
    name.
    """

    FEATURES: ClassVar[Mapping[str, tfds.features.FeatureConnector]] = {}

    # No place for files of checksums, as nothing is downloaded. TFDS's own property needs a package that it does not
    # require.
    code_path = None

    def splits(self) -> Mapping[str, Iterable[Mapping[str, Any]]]:
        """Split name -> its tasks in order. Every task is a mapping with the keys of `FEATURES`, a unique str "id"
        among them.
        """
        raise NotImplementedError(f"{type(self).__name__} must give its splits")

    def _info(self) -> tfds.core.DatasetInfo:
        # Not `dataset_info_from_configs`: that looks for README and CITATION files beside the builder's module.
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(dict(self.FEATURES)),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[str, Mapping[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(tasks) for split, tasks in self.splits().items()}

    def _generate_examples(self, tasks: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        seen: set[str] = set()
        for task in tasks:
            if task["id"] in seen:
                raise UserError(f"{self.name}: two tasks have the id {task['id']!r}: give every task an id of its own")
            seen.add(task["id"])
            yield task["id"], task


class StoredTasks(Sequence):
    """A TFDS data source with its bytes decoded. Slices give lists."""

    unique_ids = True  # `TaskBuilder` builds no other

    def __init__(self, source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        return _to_python(self._source[int(position)])


def data_source(
    builder_cls: type[tfds.core.DatasetBuilder], data_dir: str, split: str, **builder_options
) -> Sequence[Mapping]:
    """The tasks of one split, built on the first call.

    Args:
      builder_cls: a `TaskBuilder`.
      data_dir: where built task sets are kept; created if missing.
      split: a split name, or a slice of one as TFDS writes it ("train[:32]").
      **builder_options: for the builder, e.g. `config=...`.

    Raises:
      UserError: `data_dir` cannot be written, the stored files cannot be read, or there is no such split.
    """
    data_dir = os.path.abspath(os.path.expanduser(data_dir))
    any_builder: Any = builder_cls  # TFDS's decorators hide the signatures of its methods
    make_builder = lambda: any_builder(data_dir=data_dir, file_format="array_record", **builder_options)
    try:
        os.makedirs(data_dir, exist_ok=True)
        builder = make_builder()
        if not os.path.exists(os.path.join(builder.data_dir, "dataset_info.json")):  # the last file of a build
            with _locked(os.path.join(data_dir, f".{builder.name}.lock")):
                # A new one, which looks into its folder again: another process may have filled it.
                builder = make_builder()
                _prepare(builder)
    except OSError as error:
        raise UserError(f"task sets cannot be kept in {data_dir} ({error}); choose another data_dir") from error
    known = sorted(builder.info.splits)
    if split.partition("[")[0] not in known:
        raise UserError(f"{builder.name} has no split {split!r}; it has {', '.join(known)}")
    try:
        return StoredTasks(builder.as_data_source(split=split))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{builder.name}: split {split!r} cannot be read from {builder.data_dir}: {reason}") from error


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    # TFDS announces every build on stdout, which belongs to the run's own output.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released by the kernel when the process dies
        yield


def _to_python(value):
    match value:
        case bytes():
            return value.decode("utf-8")
        case Mapping():
            return {key: _to_python(item) for key, item in value.items()}
        case np.generic():
            return _to_python(value.item())
        case np.ndarray():
            return [_to_python(item) for item in value.tolist()]
        case list() | tuple():
            return [_to_python(item) for item in value]
    return value
