# SPDX-License-Identifier: Apache-2.0

"""Prompt sets: the wording of hindsight as data, by name."""

from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.prompts.base import Benchmark, Judgement, PromptSet
from hintsd_jax.hindsight.prompts.compact import Compact
from hintsd_jax.hindsight.prompts.released import Released
from hintsd_jax.plugins import load

__all__ = ["Benchmark", "Judgement", "PromptSet", "find"]

PROMPT_SETS: dict[str, PromptSet] = {"released": Released(), "compact": Compact()}
_METHODS = [name for name in vars(PromptSet) if not name.startswith("_")]


def find(name: str) -> PromptSet:
    """The prompt set of a name, or the object (or a class of such) at a path "package.module:name".

    Raises UserError for an unknown name, and for an object that lacks a method of `PromptSet`.
    """
    if name in PROMPT_SETS:
        return PROMPT_SETS[name]
    prompts = load(name, "prompt set", PROMPT_SETS)
    prompts = prompts() if isinstance(prompts, type) else prompts
    if missing := [method for method in _METHODS if not callable(getattr(prompts, method, None))]:
        raise UserError(f"prompt set {name!r} lacks the methods {', '.join(missing)}: see hintsd_jax.hindsight.prompts")
    return prompts
