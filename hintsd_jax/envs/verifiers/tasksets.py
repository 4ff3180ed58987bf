# SPDX-License-Identifier: Apache-2.0

"""Tasksets of verifiers: options and a split in, tasks and the package's own config out.

A taskset gives one stream of tasks. Splits whose arguments differ read streams of their own ({"split": "test"}); those
that read the same stream divide it, by shares, in a seeded order.

Invariant: splits that read the same stream have no position of it in common.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
import random
from collections.abc import Sequence
from typing import Any

from hintsd_jax.envs.packages import Package
from hintsd_jax.errors import UserError
from hintsd_jax.texts import described

SPLITS = ("train", "eval", "test")
PACKAGE = Package("verifiers")
_MOST = 1_000_000  # tasks of a stream
# What the package takes where nobody names another: `bash`, which is `null` with a shell as a tool.
_HARNESSES = ("bash", "null")
# Of a seat: what the policy takes the place of, and limits in tokens, which the trainer counts and has its own for.
_OURS = ("harness", "runtime", "model", "client", "max_input_tokens", "max_output_tokens", "max_total_tokens")
# What the package imports when it plays.
_PLAYING = (
    "verifiers.v1.harnesses.null",
    "mcp.server.mcpserver",
    "mcp.client.streamable_http",
    "uvicorn",
    "aiohttp.web",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The `env.options` of verifiers.

    taskset: an installed taskset, by its package's id. arguments: its own ("taskset" in the package's config). train,
    eval, test: further ones, of that split. env: the rest of the package's config: the environment's "id", if it is not
    the taskset's own, and its arguments. size: tasks of a stream that are read at most. shares: of the splits (train,
    eval, test) in a stream that they have in common. seed: another one divides it otherwise.
    """

    taskset: str = ""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    eval: dict[str, Any] = dataclasses.field(default_factory=dict)
    test: dict[str, Any] = dataclasses.field(default_factory=dict)
    env: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: int = 1000
    shares: tuple[int, ...] = (8, 1, 1)
    seed: int = 0

    def __post_init__(self):
        if not self.taskset:
            raise UserError("verifiers: env.options.taskset names no taskset: give the id of an installed one")
        if not 1 <= self.size <= _MOST:
            raise UserError(f"verifiers: env.options.size = {self.size}: give 1 to {_MOST}")
        whole = all(type(share) is int and share >= 0 for share in self.shares)
        if len(self.shares) != len(SPLITS) or not whole or not any(self.shares):
            raise UserError(
                f"verifiers: env.options.shares = {self.shares}: give three whole numbers, of train, eval and test"
            )

    def arguments_of(self, split: str) -> dict[str, Any]:
        """The arguments of the taskset in a split."""
        return {**self.arguments, **getattr(self, split)}


_VERIFIERS = PACKAGE.imported("verifiers.v1", *_PLAYING)


def package() -> Any:
    """The package `verifiers.v1`. Raises UserError where it is not installed."""
    if _VERIFIERS is None:
        raise PACKAGE.missing
    return _VERIFIERS


def config_of(options: Options, split: str) -> Any:
    """The package's config (an `EnvConfig`) of a split, in which the one seat is played by the policy: through the
    package's `null` harness, on this machine.

    Raises:
      UserError: the taskset or the environment cannot be found or imported, does not take the arguments, has more than
        one seat, brings a harness, or needs a container.
    """
    vf, where = package(), f"verifiers: taskset {options.taskset!r}"
    if "taskset" in options.env:
        raise UserError("verifiers: env.options.env.taskset: give the taskset's arguments as env.options.arguments")
    raw: dict[str, Any] = {**options.env, "taskset": {**options.arguments_of(split), "id": options.taskset}}
    try:
        config_type = vf.env_config_type(options.taskset, raw.get("id", ""))
        needs_container = vf.task_type(options.taskset).NEEDS_CONTAINER
        default_harness = vf.default_harness_id(options.taskset)
    except Exception as error:  # whatever importing a package raises
        raise UserError(f"{where} cannot be loaded: {described(error, with_place=False)}") from error
    if needs_container:
        raise UserError(f"{where} needs a container, which is not supported")
    fields = config_type.model_fields.items()
    seats = {name: field.default for name, field in fields if isinstance(field.default, vf.AgentConfig)}
    if len(seats) != 1:
        raise UserError(f"{where} has {len(seats)} seats ({', '.join(seats)}): only those with one are supported")
    ((name, default),) = seats.items()
    pinned = default.harness.id if default.harness is not None else default_harness
    if pinned not in _HARNESSES:
        raise UserError(f"{where} brings a harness of its own, {pinned!r}, which is not supported")
    seat = raw.get(name, {})
    if not isinstance(seat, dict):
        raise UserError(f"verifiers: env.options.env.{name} is {seat!r}: give a mapping")
    if taken := sorted(set(_OURS) & set(seat)):
        raise UserError(f"verifiers: env.options.env.{name}.{taken[0]} is the trainer's to set: leave it out")
    raw[name] = {**seat, "harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
    try:
        return config_type.model_validate(raw)
    except ValueError as error:  # pydantic's is one
        errors: Any = getattr(error, "errors", list)()
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in errors) or str(error)
        raise UserError(f"{where} does not take its arguments: {' '.join(said.split())[:400]}") from error


def tasks(split: str, options: Options) -> list[dict[str, Any]]:
    """The tasks of a split: the package's own, each with its position in its stream.

    Raises:
      UserError: an unknown split, a taskset that cannot be read, or no task for this split.
    """
    if split not in SPLITS:
        raise UserError(f"environment verifiers has no split {split!r}; it has {', '.join(SPLITS)}")
    arguments = options.arguments_of(split)
    sharing = [name for name in SPLITS if options.arguments_of(name) == arguments]
    stream = _stream(options, split)
    shares = [options.shares[SPLITS.index(name)] for name in sharing]
    positions = divided(len(stream), shares, options.seed)[sharing.index(split)]
    if not positions:
        raise UserError(
            f"verifiers: taskset {options.taskset!r} has {len(stream)} tasks, and none of them for {split}: give other"
            " env.options.shares, or arguments for each split"
        )
    return [{"id": f"{options.taskset}-{n}", "split": split, "task": stream[n]} for n in positions]


def divided(count: int, shares: Sequence[int], seed: int) -> list[list[int]]:
    """The positions 0 to `count` - 1 in a seeded order, cut in the proportion of the shares."""
    order = random.Random(seed).sample(range(count), count)
    ends = [round(count * part / (sum(shares) or 1)) for part in itertools.accumulate(shares)]
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _stream(options: Options, split: str) -> list[Any]:
    """The first tasks of a stream, at most `size`."""
    config = config_of(options, split).taskset.model_dump_json()
    try:
        stream = _read(options.taskset, config, options.size)
        pickle.dumps(stream[:1])  # so they travel to the environment's process
    except Exception as error:  # whatever the taskset raises
        raise UserError(
            f"verifiers: the tasks of {options.taskset!r} cannot be read: {described(error, with_place=False)}"
        ) from error
    if not stream:
        raise UserError(f"verifiers: taskset {options.taskset!r} has no tasks")
    return stream


@functools.lru_cache(maxsize=4)  # three splits ask for one stream
def _read(taskset: str, config: str, size: int) -> list[Any]:
    vf = package()
    read = vf.load_taskset(vf.taskset_config_type(taskset).model_validate_json(config))
    return list(itertools.islice(read, size))
