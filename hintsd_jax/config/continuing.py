# SPDX-License-Identifier: Apache-2.0

"""Which settings a run may continue with that it was not begun with: one table of all keys, with a reason a group.

Invariant: every key of the schema is in exactly one group (a test holds it), so who adds a key decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from hintsd_jax.config.schema import NOT_OF_A_RUN, EndpointSection


class Group(NamedTuple):
    """may_differ: on resume. reason: in words. keys: dotted names; one that ends with a dot is all of a section."""

    may_differ: bool
    reason: str
    keys: tuple[str, ...]


def _of(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


_SERVER = tuple(field.name for field in dataclasses.fields(EndpointSection) if field.name != "model")
GROUPS = {
    "place": Group(
        True,
        "where the run computes and reads, not what; sums over other devices are rounded otherwise",
        ("mesh.", "env.data_dir"),
    ),
    "memory": Group(
        True,
        "how much is done at once; the same numbers are summed in another order",
        (
            "policy.remat",
            *_of("rollout", "slots", "prefill_buckets", "prefill_rows", "refill_fraction", "overlap_env", "free_cache"),
            "loss.chunk_tokens",
            "batch.rows_per_device",
        ),
    ),
    "world": Group(
        True,
        "walls around environments, and the address and manners of a server with the same model; what they answered is"
        " in the journal",
        (
            *_of("env", "isolation", "memory_gib", "call_timeout_s", "resets_ahead"),
            *_of("endpoint", *_SERVER),
        ),
    ),
    "watching": Group(
        True,
        "what is measured, kept and said, and when a run stops; halve_lr of alarms.action acts from then on",
        (
            "alarms.",
            "tracking.",
            "checkpoint.",
            "eval.every",
            "eval.record_tasks",
            "env.record_texts",
            "optim.max_nonfinite",
        ),
    ),
    "length": Group(
        True,
        "how long the run goes on; with optim.schedule = linear the rate of all steps to come changes, which is said",
        ("optim.steps",),
    ),
    "other commands": Group(True, "of export, check and plan, and of how processes meet", NOT_OF_A_RUN),
    "policy": Group(
        False,
        "which model learns, what of it is trained, and in which numbers: the state in the checkpoint is its",
        ("policy.path", "policy.compute_dtype", "lora.", "chat.", "fork."),
    ),
    "tasks": Group(
        False,
        "what is played: rows, scores and the best checkpoint of a run are compared with one another",
        (
            *("seed", "tasks."),
            *_of("env", "name", "options", "call_style"),
            *_of("eval", "tasks", "rollouts", "test_tasks", "greedy"),
            *_of("rollout", "context", "max_steps", "max_action_tokens", "temperature", "top_p", "top_k"),
            "rollout.mask_cut_episodes",
        ),
    ),
    "method": Group(
        False,
        "what is learnt from what is played; to go on from here by another one, fork",
        (
            *("algorithm", "algorithm_defaults", "hindsight.", "endpoint.model", "grpo.", "sft."),
            *_of("loss", "divergence", "support", "top_k", "alpha", "importance_clip", "clip_low", "clip_high"),
            *_of("loss", "policy_gradient_weight", "mean_of_micro_means"),
            *_of("batch", "layout", "length_buckets", "branch_buckets", "action_buckets", "whole_episode_buckets"),
            *_of("optim", "lr", "b1", "b2", "eps", "weight_decay", "clip_norm", "schedule", "warmup_steps"),
            *_of("optim", "empty_updates", "ema_decay"),
        ),
    ),
}


def groups_of(key: str) -> list[str]:
    """The names of the groups that a dotted key is in: one. What stands below a key (`env.options.x`) goes with it."""
    parts = key.split(".")
    heads = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    heads |= {f"{head}." for head in heads if head != key}
    return [name for name, group in GROUPS.items() if heads & set(group.keys)]


def may_differ(key: str) -> bool:
    """Whether a run continues with another value of a dotted key, or of a key below one that takes any."""
    return any(GROUPS[name].may_differ for name in groups_of(key))


def or_of(*prefixes: str) -> Callable[[str], bool]:
    """As `may_differ`, and all keys that begin so: an evaluation may have an `eval.` of its own."""
    return lambda key: key.startswith(prefixes) or may_differ(key)
