# SPDX-License-Identifier: Apache-2.0

"""Benchmarks whose licence does not let their texts be passed on: what a class says of itself in, records that may be
shown out.

An environment's class says `private_texts = True`: then records hold hashes in place of texts and tokens, unless
`env.record_texts` is set. Its `aggregate_splits` name splits of which only results as a whole may be kept, and on which
nothing is trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from hintsd_jax.envs.protocol import shown
from hintsd_jax.envs.tool_calls import PROBLEM_KINDS
from hintsd_jax.errors import UserError

NOTE = (
    "Hashes stand for texts and tokens here: the licence of this benchmark does not let its data, or what is derived"
    " from it, be passed on as plain text. For your own eyes: --config.env.record_texts=True"
)
HIDDEN = "·"  # a piece of an action: a hash of so short a text would tell it
# The texts that are ours: names, and why something ended.
_OURS = ("task_id", "ended", "role", "analyser", "select", "feedback_position")


@dataclasses.dataclass(frozen=True)
class Privacy:
    """texts: whether they are hashed in records. aggregate_splits: see the module's docstring."""

    texts: bool = False
    aggregate_splits: tuple[str, ...] = ()

    @classmethod
    def of(cls, env_class: type, name: str, record_texts: bool) -> Privacy:
        """Of an environment's class. name, record_texts: of the config.

        Raises:
          UserError: the class says something else than a bool and names of splits.
        """
        private, splits = getattr(env_class, "private_texts", False), getattr(env_class, "aggregate_splits", ())
        if type(private) is not bool or type(splits) is not tuple or not all(isinstance(each, str) for each in splits):
            raise UserError(
                f"environment {shown(name)}: private_texts must be a bool and aggregate_splits a tuple of names, not"
                f" {shown(private)} and {shown(splits)}"
            )
        return cls(private and not record_texts, splits)

    def check_training(self, split: str) -> None:
        """Raises UserError where nothing may be trained on a split."""
        if split in self.aggregate_splits:
            raise UserError(
                f"tasks.train_split = {split}: of this split the benchmark allows results as a whole and no training:"
                " train on another"
            )

    def record(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """A record of an episode as it may be kept."""
        if not self.texts:
            return record
        kept = {name: _hidden(name, value) for name, value in record.items()}
        return kept | {"prompt_messages": [{"role": "note", "content": NOTE}, *kept["prompt_messages"]]}


def _hidden(name: str, value: Any) -> Any:
    if name == "streams":
        return [f"{_hash(','.join(map(str, tokens)))}, {len(tokens):,} tokens" for tokens in value]
    if name in ("pieces", "teacher_best"):
        return [HIDDEN] * len(value)
    if isinstance(value, str):
        ours = name in _OURS or not value or (name == "problem" and value in PROBLEM_KINDS)
        return value if ours else f"{_hash(value)}, {len(value):,} characters"
    if isinstance(value, Mapping):
        return {key: _hidden(key, item) for key, item in value.items()}
    return [_hidden(name, item) for item in value] if isinstance(value, list | tuple) else value


def _hash(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
