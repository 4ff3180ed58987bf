# SPDX-License-Identifier: Apache-2.0

"""The `env.options` of AppWorld: a mapping in, checked `Options` out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.options import read
from hintsd_jax.errors import UserError

FRACTION, SPARSE = "fraction", "sparse"


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that a config can set.

    Attributes:
      python: of AppWorld's own virtual environment, which `make appworld` makes.
      root: the folder that holds AppWorld's `data`.
      reward: at completion: "fraction", passed tests / all tests, or "sparse", 1 if every test passes, else 0. Success
        is the same under both.
      max_observation_chars: longer outputs are cut, with a note.
      cell_timeout_s: seconds that one action's code may run. The engine ends it then, and the agent is told; code that
        does not let itself be ended costs the episode 10 seconds later. Keep it well below env.call_timeout_s.
      memory_mib: that a model's code may take.
      require_fences: whether to refuse a machine that does not allow every fence around a model's code.
      traces_in_report: the privileged report also tells the evaluator's traces, which hold the ground truth. Train
        split only.
      quote_failures: calls that fail also tell what the worker answered instead, into environment_failures.txt too; it
        may hold texts of the benchmark.
    """

    python: str = ".cache/appworld-venv/bin/python"
    root: str = "data/appworld"
    reward: str = FRACTION
    max_observation_chars: int = 12_000
    cell_timeout_s: float = 30.0
    memory_mib: int = 1024
    require_fences: bool = True
    traces_in_report: bool = False
    quote_failures: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "Options":
        """The options of a config.

        Raises:
          UserError: as `envs.options.read`; or one out of range.
        """
        parsed = read(cls, "appworld", options)
        if parsed.reward not in (FRACTION, SPARSE):
            raise UserError(f"appworld has no reward {parsed.reward!r}; known: {FRACTION}, {SPARSE}")
        if parsed.max_observation_chars < 1 or parsed.memory_mib < 64 or not 0 < parsed.cell_timeout_s < 1e6:
            raise UserError(
                "appworld: max_observation_chars must be 1 or more, memory_mib 64 or more, and cell_timeout_s a number"
                " of seconds above 0"
            )
        return parsed
