# SPDX-License-Identifier: Apache-2.0

"""Checkpoints: a train state and a small JSON record flow in under a step, and come out bit-equal.

Invariant: a checkpoint is there whole or not at all. Orbax writes into a temporary folder and renames it when all is on
disk; what a kill left behind, half written or half deleted, is ignored and removed at the next start.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError, reason

PyTree = Any
_DIGEST = "sha256"  # key of `extra` on disk


class Checkpoints:
    """The checkpoints of one run, saved in the background. Keeps the last `keep` and the best by `best`.

    Args:
      directory: created where there is none.
      keep: how many of the latest checkpoints stay.
      best: name of the metric of which the highest value so far stays as well.

    Raises:
      UserError: the folder cannot be written, or holds something else.
    """

    def __init__(self, directory: str | os.PathLike, keep: int, best: str = "eval/avg@4"):
        _silence_closed_loops()
        self._directory = Path(directory).absolute()
        self._best = best
        score = lambda metrics: metrics[best]
        kept = [
            preservation_policy.LatestN(keep),
            preservation_policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            best_fn=score,
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        if os.path.lexists(self._directory) and not self._directory.is_dir():
            raise UserError(f"{self._directory} is no folder: move it away, or give another --workdir")
        for path in self._directory.rglob("*"):
            if not (path.is_file() or path.is_dir()):  # orbax would wait at a pipe for ever
                raise UserError(f"{path} is no file and no folder: remove it, or the checkpoint that it is of")
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options)
            # Orbax deletes file by file: a kill leaves half a checkpoint, which it would offer as a whole one.
            steps = self._manager.all_steps()
            for step in set(sorted(steps)[:-keep]) - {self._manager.best_step()}:
                self._manager.delete(step)
        except Exception as error:  # see `restore`
            raise UserError(
                f"{self._directory} cannot be used ({type(error).__name__}: {reason(error)}): mend it, remove the"
                " checkpoint that is named, or give another --workdir"
            ) from error

    @classmethod
    def open(cls, workdir: str | os.PathLike, config: Config) -> Checkpoints:
        """Those of the run in `workdir`; the best is the one with the highest Avg@k in evaluations while training."""
        return cls(Path(workdir) / "checkpoints", config.checkpoint.keep, best=f"eval/avg@{config.eval.rollouts}")

    def save(
        self, step: int, state: PyTree, extra: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
    ) -> bool:
        """Starts saving and returns when `state` has been copied to the host: it may be donated at once.

        Args:
          step: must grow from call to call.
          state: a pytree of arrays.
          extra: what else the run needs to continue, JSON values only.
          metrics: this step's metrics; without the `best` key the checkpoint does not take part in the choice of the
            best.

        Returns:
          False when this step is saved already.

        Raises:
          UserError: the disk refuses it, or has refused the one before.
        """
        if step in self._manager.all_steps():
            return False
        tracked = None
        if metrics is not None and metrics.get(self._best) is not None:
            tracked = {self._best: float(metrics[self._best])}
        record = {**extra, _DIGEST: _digest(extra)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(record))
        with self._saving():
            return self._manager.save(step, args=items, metrics=tracked, force=True)

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step with the highest `best` metric among the checkpoints kept; None while none has one."""
        return self._manager.best_step()

    def restore(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
          step: one that is there, `latest_step` or `best_step`.
          abstract_state: arrays or ShapeDtypeStructs in the tree, shapes, dtypes and shardings to restore into. A leaf
            without a sharding goes to the first local device.

        Returns:
          The state and the `extra` record.

        Raises:
          UserError: the checkpoint is damaged or of another model.
        """
        target = jax.tree.map(_abstract, abstract_state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), extra=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
            extra = dict(restored["extra"])
            if extra.pop(_DIGEST, None) != _digest(extra):
                raise ValueError("its record of counters was changed by somebody else")
        except Exception as error:  # orbax, tensorstore and json each raise their own kinds for a damaged folder
            raise self._unreadable(step, error, "remove that folder to continue from an earlier one") from error
        return restored["state"], extra

    def restore_part(self, step: int, part: PyTree) -> PyTree:
        """Reads a part of a checkpoint's state.

        Args:
          step: one of `steps`.
          part: nested dicts like the state, down to the wanted leaves: arrays, or shapes with a sharding, are restored
            as `restore` does; anything else comes as NumPy, on whatever devices it was saved.

        Returns:
          The same nesting of arrays.

        Raises:
          UserError: the checkpoint is damaged, or has no such part.
        """

        def how(leaf: Any) -> ocp.RestoreArgs:
            if getattr(leaf, "sharding", None) is None:
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)

        args = ocp.args.PyTreeRestore(item=part, restore_args=jax.tree.map(how, part), partial_restore=True)
        try:
            # Not by the manager: one that has saved reads whole states only.
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                restored = reader.restore(self._directory / str(step) / "state", args=args)
            wanted_leaves = jax.tree_util.tree_flatten_with_path(part)[0]
            for (path, wanted), leaf in zip(wanted_leaves, jax.tree.leaves(restored), strict=True):
                # Orbax hands back what it was asked with where there is no such leaf.
                if leaf is wanted or getattr(wanted, "shape", leaf.shape) != leaf.shape:
                    raise KeyError(f"it has no {jax.tree_util.keystr(path)} of this shape")
            return restored
        except Exception as error:  # see `restore`
            remedy = "choose another checkpoint, or give the config that the run was trained with"
            raise self._unreadable(step, error, remedy) from error

    def _unreadable(self, step: int, error: Exception, remedy: str) -> UserError:
        what = f"{type(error).__name__}: {reason(error)}"
        return UserError(f"checkpoint {self._directory / str(step)} cannot be restored ({what}): {remedy}")

    def wait(self) -> None:
        """Returns when every started save is on disk; raises as `save` does what the background has met."""
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """What the disk refuses as a UserError: an OSError, or tensorstore's words for one."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) or "os_error_code" in str(error):
                why = (
                    os.strerror(error.errno)
                    if isinstance(error, OSError) and error.errno
                    else str(error).rpartition('": ')[2]
                )
                raise UserError(
                    f"{self._directory} cannot be written ({' '.join(why.split())}): make room, then the same command"
                    " continues from the last checkpoint"
                ) from error
            raise


@functools.cache
def _silence_closed_loops() -> None:
    """Keeps one remark off stderr: once a read or write has failed, which `wait` or `restore` raise, tensorstore's
    others still report to orbax's event loop, which is closed by then; Python prints a traceback for each.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook


def _digest(extra: Mapping[str, Any]) -> str:
    """Of a record's JSON, so that no other one passes for it."""
    return hashlib.sha256(json.dumps(extra, sort_keys=True).encode()).hexdigest()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
