# SPDX-License-Identifier: Apache-2.0

"""Checkpoints: a train state and a small JSON record flow in under a step, and come out bit-equal.

Invariants: a checkpoint is there whole or not at all. Orbax writes into a temporary folder and renames it when all is
on disk; what a kill left behind, half written or half deleted, is ignored and removed at the next start. And what comes
out is what went in: the `record` beside the arrays holds their checksums, which are compared when they are read.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hintsd_jax.checkpoints import record
from hintsd_jax.checkpoints.quiet_orbax import ocp, preservation_policy
from hintsd_jax.checkpoints.record import Damaged
from hintsd_jax.config.schema import Config
from hintsd_jax.errors import UserError, reason
from hintsd_jax.storage import AnyPath, absolute, entries, exists, move_folder

PyTree = Any
_STEP = re.compile("[0-9]+")  # name of a checkpoint's folder


class Checkpoints:
    """The checkpoints of one run, saved in the background. Keeps the last `keep` and the best by `best`.

    Args:
      directory: created where there is none.
      keep: how many of the latest checkpoints stay.
      best: name of the metric of which the highest value so far stays as well.
      on_damage: "stop", or "previous": a damaged checkpoint is moved to `damaged/` beside the folder, and the one
        before it takes its place.
      read_only: nothing is saved, mended, moved or removed: another run may be writing.

    Attributes:
      notes: a line for each checkpoint that was moved, for whoever watches.

    Raises:
      Damaged: a checkpoint is not what was saved, and `on_damage` does not say that it may be moved.
      UserError: the folder cannot be written, or holds something else.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int,
        best: str = "eval/avg@4",
        on_damage: str = "stop",
        read_only: bool = False,
    ):
        _silence_closed_loops()
        self._directory = absolute(directory)
        self._best, self._on_damage = best, on_damage
        self._manager: Any = None  # until the small files are known to be sound
        self.notes: list[str] = []
        score = lambda metrics: next(iter(metrics.values()))  # the only one that is saved, whatever k of Avg@k was then
        kept = [
            preservation_policy.LatestN(keep),
            preservation_policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            best_fn=score,
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=True,
            create=not read_only,
            read_only=read_only,
        )
        if isinstance(self._directory, Path):
            _check_kinds(self._directory)
        if not read_only:
            self._check_small_files()
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options)
            # Orbax deletes file by file: a kill leaves half a checkpoint, which it would offer as a whole one.
            for step in set() if read_only else set(self.steps[:-keep]) - {self._manager.best_step()}:
                self._manager.delete(step)
        except Exception as error:  # see `restore`
            raise UserError(
                f"{self._directory} cannot be used ({type(error).__name__}: {reason(error)}): mend it, remove the"
                " checkpoint that is named, or give another --workdir"
            ) from error

    @classmethod
    def open(cls, workdir: str | os.PathLike, config: Config, read_only: bool = False) -> Checkpoints:
        """Those of the run in `workdir`; the best is the one with the highest Avg@k in evaluations while training."""
        best, settings = f"eval/avg@{config.eval.rollouts}", config.checkpoint
        return cls(absolute(workdir) / "checkpoints", settings.keep, best, settings.on_damage, read_only)

    def _check_small_files(self) -> None:
        for step in self.steps:
            if why := record.problem(self._folder(step)):
                self._damaged(
                    step, Damaged(f"checkpoint {self._folder(step)} is damaged ({why}): {self._remedy(step)}")
                )

    def save(
        self, step: int, state: PyTree, extra: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
    ) -> bool:
        """Starts saving and returns when `state` has been copied to the host: it may be donated at once.

        Args:
          step: must grow from call to call.
          state: a pytree of arrays.
          extra: what else the run needs to continue, JSON values only; "arrays", "metrics" and "sha256" are ours.
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
        beside = record.make(extra, state, tracked)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(beside))
        with self._saving():
            return self._manager.save(step, args=items, metrics=tracked, force=True)

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, ascending."""
        if self._manager is None:  # it is still to be opened
            return sorted(int(path.name) for path in entries(self._directory) if _STEP.fullmatch(path.name))
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step with the highest `best` metric among the checkpoints kept; None while none has one."""
        return self._manager.best_step()

    def chosen(self, wanted: str, key: str) -> int:
        """The step of "latest", "best" or a number. Raises UserError, which names the setting `key`, where none is."""
        step = {"latest": self.latest_step, "best": self.best_step}.get(wanted, wanted)
        if step is None or int(step) not in self.steps:
            raise UserError(
                f"{key} = {wanted}: {self._directory.parent} has no such checkpoint; there are {self.steps or 'none'}"
            )
        return int(step)

    def restore(
        self, step: int, abstract_state: PyTree, agree: Callable[[str], Iterable[str]] = lambda problem: [problem]
    ) -> tuple[PyTree, dict[str, Any]]:
        """Reads one checkpoint.

        Args:
          step: one that is there, `latest_step` or `best_step`.
          abstract_state: arrays or ShapeDtypeStructs in the tree, shapes, dtypes and shardings to restore into. A leaf
            without a sharding goes to the first local device.
          agree: takes what has gone wrong in this process ("": nothing), gives that of all processes: each reads its
            own part of the arrays, and where one cannot, none may go on.

        Returns:
          The state and the `extra` record.

        Raises:
          Damaged: the checkpoint is not what was saved, or of another model.
          UserError: it cannot be read now: memory, network or rights.
        """
        target = jax.tree.map(_abstract, abstract_state)
        try:
            beside = record.read(self._folder(step))
            items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            state, error = _outcome(lambda: self._manager.restore(step, args=items)["state"])
            problems = [problem for problem in agree(record.told(error) if error else "") if problem]
            if error or problems:
                raise error or ValueError(f"another process says {problems[0]}")
            record.compare(beside, state)
        except Exception as error:  # orbax, tensorstore and json each raise their own kinds for a damaged folder
            raise record.unreadable(self._folder(step), error, self._remedy(step)) from error
        return state, record.extra_of(beside)

    def restore_latest(
        self, abstract_state: PyTree, agree: Callable[[str], Iterable[str]] = lambda problem: [problem]
    ) -> tuple[int, PyTree, dict[str, Any]]:
        """The step, state and `extra` record of the newest checkpoint, or by `on_damage` of the newest that is sound.
        There must be one.

        Raises: as `restore`.
        """
        while True:
            step = self.steps[-1]
            try:
                return step, *self.restore(step, abstract_state, agree)
            except Damaged as damaged:
                self._damaged(step, damaged)

    def restore_part(self, step: int, part: PyTree) -> PyTree:
        """Reads a part of a checkpoint's state.

        Args:
          step: one of `steps`.
          part: nested dicts like the state, down to the wanted leaves: arrays, or shapes with a sharding, are restored
            as `restore` does; anything else comes as NumPy, on whatever devices it was saved.

        Returns:
          The same nesting of arrays.

        Raises:
          Damaged: the part is not what was saved, or the checkpoint has no such part.
          UserError: it cannot be read now: memory, network or rights.
        """

        def how(leaf: Any) -> ocp.RestoreArgs:
            if getattr(leaf, "sharding", None) is None:
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)

        args = ocp.args.PyTreeRestore(item=part, restore_args=jax.tree.map(how, part), partial_restore=True)
        try:
            # Not by the manager: one that has saved reads whole states only.
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                restored = reader.restore(self._folder(step) / "state", args=args)
            wanted_leaves = jax.tree_util.tree_flatten_with_path(part)[0]
            for (path, wanted), leaf in zip(wanted_leaves, jax.tree.leaves(restored), strict=True):
                # Orbax hands back what it was asked with where there is no such leaf.
                if leaf is wanted or getattr(wanted, "shape", leaf.shape) != leaf.shape:
                    raise KeyError(f"it has no {jax.tree_util.keystr(path)} of this shape")
            record.compare(record.read(self._folder(step)), restored)
            return restored
        except Exception as error:  # see `restore`
            remedy = "choose another checkpoint, or give the config that the run was trained with"
            raise record.unreadable(self._folder(step), error, remedy) from error

    def _folder(self, step: int) -> AnyPath:
        return self._directory / str(step)

    def _earlier(self, step: int) -> int | None:
        return max((each for each in self.steps if each < step), default=None)

    def _remedy(self, step: int) -> str:
        if (earlier := self._earlier(step)) is None:
            return "there is no earlier one; give another --workdir to begin again"
        return f"set checkpoint.on_damage = previous to move it away and continue from step {earlier}"

    def _damaged(self, step: int, damaged: Damaged) -> None:
        """Moves a checkpoint to `damaged/`, where the config allows it: the run will save this step again."""
        if self._on_damage != "previous" or self._earlier(step) is None:
            raise damaged
        parent = self._directory.parent / "damaged"
        names = (f"{step}{'.again' * times}" for times in itertools.count())
        aside = next(parent / name for name in names if not exists(parent / name))
        _meet("checkpoint is damaged")  # each has chosen the same name before it exists
        if jax.process_index() == 0:
            move_folder(self._folder(step), aside, marker="commit_success.txt")  # orbax's own, where it renames nothing
        _meet("checkpoint is moved")
        if self._manager is not None:
            self._manager.reload()
        why = str(damaged).partition(": set checkpoint.on_damage")[0]
        self.notes.append(f"{why}: it lies in {aside} now, and step {self._earlier(step)} takes its place")

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
    # So does asyncio, of each further read that failed beside the one that is raised.
    unasked = "Future exception was never retrieved"
    logging.getLogger("asyncio").addFilter(lambda record: unasked not in record.getMessage())


def _outcome(call: Callable[[], PyTree]) -> tuple[PyTree, Exception | None]:
    try:
        return call(), None
    except Exception as error:  # see `restore`, which raises it again
        return None, error


def _meet(where: str) -> None:
    """Waits for the other processes, where there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _check_kinds(folder: Path) -> None:
    """Raises UserError where something lies in a folder of this machine at which orbax would stop or wait for ever."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is no folder: move it away, or give another --workdir")
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is no file and no folder: remove it, or the checkpoint that it is of")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
