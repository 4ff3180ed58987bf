# SPDX-License-Identifier: Apache-2.0

"""Prompt sets: the wording of hindsight as data, by name, from a file, or of an environment; docs/prompts.md."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path

from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.prompts import wording
from hintsd_jax.hindsight.prompts.base import Benchmark, Judgement, PromptSet
from hintsd_jax.hindsight.prompts.worded import Worded
from hintsd_jax.plugins import load
from hintsd_jax.texts import did_you_mean

__all__ = ["Benchmark", "Judgement", "PromptSet", "Worded", "digest", "find", "of_run", "shipped"]

SHIPPED = ("released", "compact")
_METHODS = [name for name in vars(PromptSet) if not name.startswith("_")]


@functools.cache
def shipped(name: str) -> Worded:
    """A set of the package, one of `SHIPPED`."""
    path = Path(__file__).with_name(f"{name}.toml")
    return Worded(wording.checked(wording.read(path, name), name))


def find(name: str) -> PromptSet:
    """The prompt set of a name; of a file, "....toml"; or the object (or a class of such) at "package.module:name".

    Raises UserError for an unknown name, for a file with anything wrong in it, and for an object that lacks a method of
    `PromptSet`.
    """
    if name in SHIPPED:
        return shipped(name)
    if name.endswith(".toml"):
        return _of_file(Path(name), f"prompt set {name}")
    prompts = load(name, "prompt set", SHIPPED)
    prompts = prompts() if isinstance(prompts, type) else prompts
    if missing := [method for method in _METHODS if not callable(getattr(prompts, method, None))]:
        raise UserError(f"prompt set {name!r} lacks the methods {', '.join(missing)}: see hintsd_jax.hindsight.prompts")
    return prompts


def of_run(name: str, env_class: type, env_name: str) -> PromptSet:
    """The prompt set of a run: as `find`, and over a set of the package what the environment's class says in
    `hindsight_prompts`, a mapping of a file's form or the path of such a file. A set of the user's own is taken as it
    is.

    Raises UserError as `find`, for the environment's words too.
    """
    prompts, given = find(name), getattr(env_class, "hindsight_prompts", None)
    if given is None or name not in SHIPPED:
        return prompts
    where = f"hindsight_prompts of environment {env_name!r}"
    if isinstance(given, str | os.PathLike):
        given = wording.read(Path(given), f"{where}: {given}")
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {type(given).__name__}: give a mapping of tables, or the path of a TOML file")
    if "extends" in given:
        raise UserError(f"{where}: leave `extends` out: the words are laid over hindsight.prompts = {name!r}")
    return Worded(wording.checked(given, where, shipped(name).wording))


def digest(prompts: PromptSet) -> str:
    """16 hexadecimal digits that stand for the words of a set; of an object that is not `Worded`, for its class's
    source, and "" where that is not to be had.
    """
    if isinstance(prompts, Worded) and type(prompts) is Worded:
        return prompts.digest
    try:
        return hashlib.sha256(inspect.getsource(type(prompts)).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def _of_file(path: Path, shown: str) -> Worded:
    tree = dict(wording.read(path, shown))
    extends = tree.pop("extends", None)
    if extends is not None and extends not in SHIPPED:
        hint = did_you_mean(extends, SHIPPED) if isinstance(extends, str) else f"choose one of {', '.join(SHIPPED)}"
        raise UserError(f"{shown}: extends = {extends!r} is no shipped set: {hint}")
    return Worded(wording.checked(tree, shown, None if extends is None else shipped(extends).wording))
