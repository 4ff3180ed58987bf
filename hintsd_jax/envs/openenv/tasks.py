# SPDX-License-Identifier: Apache-2.0

"""Tasks of openenv: options and a split in, tasks out, once the environment has been seen to begin.

A task is a seed for the environment's reset. Seeds of splits are far apart, so that no two splits share one.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from hintsd_jax.envs.openenv.actions import TOOLS, form_of
from hintsd_jax.envs.openenv.options import MOST, SPLITS, Options, package
from hintsd_jax.envs.openenv.served import Place
from hintsd_jax.envs.openenv.session import action_schema, begun
from hintsd_jax.envs.openenv.words import text_of
from hintsd_jax.errors import UserError
from hintsd_jax.texts import described

_SECONDS = 60.0  # of an answer, before the run


def tasks(split: str, options: Options) -> list[dict[str, Any]]:
    """The tasks of a split.

    Raises:
      UserError: an unknown split, an environment that cannot be reached or begun or that does not follow its seed, or
        the package is not installed.
    """
    if split not in SPLITS:
        raise UserError(f"environment openenv has no split {split!r}; it has {', '.join(SPLITS)}")
    package()
    first = (options.seed * len(SPLITS) + SPLITS.index(split)) * MOST
    try:
        told = json.dumps([options.arguments, options.reset])
    except TypeError as error:
        raise UserError(f"openenv: env.options.arguments and reset have to be JSON: {error}") from error
    _check(options.environment, told, options.field, options.text)
    return [{"id": f"{split}-{n}", "seed": first + n} for n in range(options.size)]


@functools.lru_cache(maxsize=4)  # three splits ask for one environment
def _check(environment: str, told: str, field: str, text: str) -> None:
    arguments, reset = json.loads(told)
    place = _placed(Options(environment=environment, arguments=arguments))
    try:
        starts = [_start(place.url, reset, field, text) for _ in range(2)]
    except UserError:
        raise
    except Exception as error:  # whatever server and client raise
        raise UserError(
            f"openenv: the environment {environment} cannot be begun: {described(error, with_place=False)}"
        ) from error
    finally:
        place.close()
    if starts[0] != starts[1]:
        raise UserError(
            f"openenv: the environment {environment} begins otherwise with the same seed: rollouts could not be"
            " repeated"
        )


def _placed(options: Options) -> Place:
    """The environment's server, reached once."""
    place = Place(options)
    try:
        action_schema(place.url)
    except Exception as error:  # of the network, or no server of the package
        place.close()
        raise UserError(
            f"openenv: no environment server answers at {options.environment}: start it, or give another"
            f" env.options.environment ({described(error, with_place=False)})"
        ) from error
    return place


def _start(url: str, reset: dict[str, Any], field: str, text: str) -> Any:
    form = form_of(action_schema(url), field)
    session, tools, result = begun(url, form.kind == TOOLS, {**reset, "seed": 0}, seconds=_SECONDS)
    session.close()
    if form.kind == TOOLS and not tools:
        raise UserError("openenv: the environment has neither tools nor an action with fields: nothing can be done")
    return tools, text_of(result.observation, text)
