# SPDX-License-Identifier: Apache-2.0

"""What lies beside the arrays of a checkpoint: counters and a metric flow in, a JSON record with checksums flows out,
and is compared when it is read.

Invariant: a record that is given back is the one that was written, and so is the metric by which the best checkpoint is
found, which orbax keeps in a file of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hintsd_jax.checkpoints.checksums import changed, checksums
from hintsd_jax.errors import UserError, of_the_machine, reason
from hintsd_jax.jsonl import read_object
from hintsd_jax.storage import AnyPath, exists

# Keys of the record on disk, beside the run's own.
_ARRAYS, _METRICS, _DIGEST = OURS = ("arrays", "metrics", "sha256")
# In what orbax and tensorstore say of a machine, a network or a store that fails: no word about the files themselves.
_NOT_OF_FILES = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED")
_NOT_OF_FILES += ("MemoryError", "PermissionError")


class Damaged(UserError):
    """A checkpoint that does not hold what was saved."""


def make(extra: Mapping[str, Any], state: Any, metrics: Mapping[str, float] | None) -> dict[str, Any]:
    """The record of a state (a tree of arrays), with what else the run needs to continue and the metric of the step."""
    record = {**extra, _ARRAYS: checksums(state), _METRICS: metrics}
    return {**record, _DIGEST: _digest(record)}


def read(checkpoint: AnyPath) -> dict[str, Any]:
    """The record in a checkpoint's folder. Raises ValueError or UserError where it is not what was written."""
    record = read_object(checkpoint / "extra" / "metadata")
    if record is None:
        raise ValueError("its record is gone")
    if record.get(_DIGEST) != _digest(record):
        raise ValueError("its record of counters and checksums is not what was written")
    if _ARRAYS not in record:
        raise ValueError("it holds no checksums: an earlier version of this program wrote it")
    return record


def extra_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the run has put into its record."""
    return {key: value for key, value in record.items() if key not in OURS}


def compare(record: Mapping[str, Any], arrays: Any) -> None:
    """Raises ValueError where arrays, or a part of the saved ones, have other checksums than those in the record."""
    if names := changed(record[_ARRAYS], arrays):
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"the numbers of {names[0]}{more} are not those that were saved")


def problem(checkpoint: AnyPath) -> str:
    """What is wrong with the small files of a checkpoint that orbax reads before any array; "" where nothing is.

    A file that is gone is no damage here: a kill leaves checkpoints half deleted, which are removed as a whole.
    """
    try:
        read_object(checkpoint / "_CHECKPOINT_METADATA", "what orbax wrote")
        metrics = read_object(checkpoint / "metrics" / "metrics", "what orbax wrote")
        if exists(checkpoint / "extra" / "metadata"):
            saved = read(checkpoint)[_METRICS]
            if metrics is not None and metrics != saved:
                return "its metric is not the one that was saved"
    except (UserError, ValueError) as error:
        return reason(error).removesuffix(": mend or remove it")
    return ""


def told(error: Exception) -> str:
    """An error in one line, by which `unreadable` knows it in another process too."""
    return f"{type(error).__name__}: {reason(error)}"


def unreadable(checkpoint: AnyPath, error: Exception, remedy: str) -> UserError:
    """What a person reads of a checkpoint that could not be read: `Damaged` unless memory, network or rights failed."""
    about = f"checkpoint {checkpoint} cannot be restored ({told(error)})"
    if any(word in told(error) for word in _NOT_OF_FILES):
        return of_the_machine(error) or UserError(f"{about}: mend it, and the same command continues")
    return Damaged(f"{about}: {remedy}")


def _digest(record: Mapping[str, Any]) -> str:
    """Of a record's JSON but for the digest in it, so that no other one passes for it."""
    rest = {key: value for key, value in record.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
