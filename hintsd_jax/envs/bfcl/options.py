# SPDX-License-Identifier: Apache-2.0

"""The `env.options` of BFCL: a mapping in, checked `Options` out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.bfcl.actions import FORMATS
from hintsd_jax.envs.options import read
from hintsd_jax.errors import UserError

TELL, END_TURN = "tell", "end_turn"


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that a config can set.

    Attributes:
      split: how the tasks are divided into train, eval and test; see `bfcl_tasks`, which checks this and the next.
      categories: of the benchmark; () takes all that the split has.
      format: "official", the benchmark's own function-calling dialogue for Qwen, or "paper", that of HINT-SD's released
        code.
      max_prompt_chars: keep only tasks whose tool documentation and first message fit into this many characters; 0
        keeps all.
      max_observation_chars: longer results are cut, with a note.
      unreadable_calls: what an action does whose call cannot be read. "tell": an error is its result, and the user turn
        goes on; calls that only the trainer's own parser reads are run. "end_turn": it ends the user turn, as in both
        handlers, which is needed to compare with published numbers.
      ground_truth_in_report: the privileged report also tells the ground truth's calls and values. Train split only.
    """

    split: str = "clean"
    categories: Sequence[str] = ()
    format: str = "official"
    max_prompt_chars: int = 0
    max_observation_chars: int = 4000
    unreadable_calls: str = TELL
    ground_truth_in_report: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "Options":
        """The options of a config.

        Raises:
          UserError: as `envs.options.read`; an unknown format, or a size out of range.
        """
        parsed = read(cls, "bfcl", options)
        if parsed.format not in FORMATS:
            raise UserError(f"bfcl has no format {parsed.format!r}; known: {', '.join(FORMATS)}")
        if parsed.unreadable_calls not in (TELL, END_TURN):
            raise UserError(f"bfcl has no unreadable_calls {parsed.unreadable_calls!r}; known: {TELL}, {END_TURN}")
        if parsed.max_prompt_chars < 0 or parsed.max_observation_chars < 1:
            raise UserError("bfcl: max_prompt_chars must be 0 or more, and max_observation_chars 1 or more")
        return parsed
