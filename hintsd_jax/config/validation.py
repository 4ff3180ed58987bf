# SPDX-License-Identifier: Apache-2.0

"""What a config must be: types, choices, ranges and what goes together. A config goes in, problems come out, a
line each. No jax here, so that a wrong config is refused at once.

What only one algorithm refuses stands with that algorithm (`Algorithm.problems`).
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import numbers
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from ml_collections import ConfigDict

from hintsd_jax import hub, storage
from hintsd_jax.config.edge import RENAMED_VALUES, Setting, flatten, plain, settings, unknown_key
from hintsd_jax.config.fields import inside, shown
from hintsd_jax.config.schema import FREE, Config
from hintsd_jax.config.secrets import endpoint_problems
from hintsd_jax.errors import UserError
from hintsd_jax.texts import did_you_mean, is_encodable

_RESERVED = (  # not variables of a template: keys of this schema, and what says how to render
    *("history", "enable_thinking", "stop_ids", "tokenizer", "conversation", "messages", "tools", "chat_template"),
    *("add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)
_GROWING = ("rollout.prefill_buckets", "batch.length_buckets", "batch.branch_buckets", "batch.action_buckets")

_INSIDE_FREE = tuple(f"{group}." for group in FREE)
_LONGEST = 4096  # characters of a text
_LEAST = 1e-30  # of a number that is not 0; float32 holds 1e-38
_MOST_EPISODES = 1 << 20  # of a training step
_MOST_TOKENS = 1 << 36  # that caches or a batch hold: more overflows what XLA counts with, and no machine has it
_FEW = 4  # missing keys; a config that lacks more was not made from `base`


def check(edge: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config by dotted key, each possible by itself.

    Raises:
      UserError: one line that lists every problem, not only the first.
    """
    values = flatten(plain(edge))
    refuse(schema_problems(values) or value_problems(values))
    return values


def refuse(problems: Sequence[str]) -> None:
    """Raises UserError with all problems in one line, where there are any."""
    if problems:
        raise UserError(f"impossible config: {'; '.join(problems)}")


def schema_problems(values: Mapping[str, Any]) -> list[str]:
    """Keys that the schema lacks, or that a config lacks; `values` by dotted key."""
    known = settings()
    problems = [problem for name in values if (problem := unknown_key(name, known))]
    missing = [name for name in known if name not in values and name not in FREE]
    if len(missing) > _FEW:
        known_ones = len(known) - len(missing)
        return [
            f"it has {known_ones} of {len(known)} keys: start from hintsd_jax.config.base() and change what differs"
        ]
    return problems + [f"config key {name} is missing: start from hintsd_jax.config.base()" for name in missing]


def value_problems(values: Mapping[str, Any]) -> list[str]:
    """Values of a wrong type, outside of their range or choices. None is open where the algorithm decides."""
    problems = []
    for name, setting in settings().items():
        if name in values and not (values[name] is None and setting.key.by_algorithm):
            problem = _value_problem(setting, values[name])
            problems += [problem] if problem else []
    for name, value in values.items():
        if not name.startswith(_INSIDE_FREE):
            continue
        if not (is_encodable(name) and name.isprintable()):
            problems.append(f"{shown(name)} holds a character that no name can have")
        elif not _is_plain(value):
            problems.append(
                f"{name} = {shown(value)} must be text, a finite number, true, false, none or a list of these"
            )
    return problems


def relation_problems(config: Config) -> list[str]:
    """What does not go together, in a config whose every value is possible by itself."""
    return [
        *_named(config),
        *_splits(config),
        *(_lengths(config) or _sizes(config)),
        *_schedules(config),
        *_template(config),
        *_trackers(config),
        *endpoint_problems(config.endpoint),
    ]


def algorithm_defaults_problems(defaults: Mapping[str, Any]) -> list[str]:
    """What `algorithm_defaults` must not hold: other keys than those that algorithms decide, and impossible values."""
    problems, known = [], settings()
    ours = [name for name, setting in known.items() if setting.key.by_algorithm]
    for algorithm, tree in defaults.items():
        where = f"algorithm_defaults.{algorithm}"
        where = where if where.isprintable() else shown(where)
        for name, value in (flatten(tree) if isinstance(tree, Mapping) else {"": tree}).items():
            if name in ours:
                problem = _value_problem(known[name], value)
                problems += [f"{where}: {problem}"] if problem else []
            elif name in known:
                all_ours = ", ".join(ours)
                problems.append(f"{where}: {name} is not for an algorithm to decide, as {all_ours} are: set it itself")
            elif name and (hint := unknown_key(name)):
                problems.append(f"{where}: {hint}")
            else:
                problems.append(f"{where} = {shown(tree)} must hold config keys, as {{section: {{key: value}}}}")
    return problems


def _value_problem(setting: Setting, value: Any) -> str | None:
    name, key, kind = setting.name, setting.key, setting.kind
    says = f"{name} = {shown(value)}"
    if get_origin(kind) is dict:
        return None if isinstance(value, Mapping) else f"{says} must be a mapping"
    if get_origin(kind) is tuple:
        return _list_problem(setting, value)
    if not _is(value, kind):
        return f"{says} must be {_NAMES[kind]}"
    if key.interval and not inside(value, key.interval) and not (key.derived and not value):
        return f"{says} must lie in {key.interval}"
    if kind is float and 0 < abs(value) < _LEAST:
        return f"{says} must be 0 or at least {_LEAST}: less is 0 to a device"
    if kind is str and (problem := _text_problem(value)):
        return f"{says} {problem}"
    if key.path and storage.is_remote(value):
        problem = storage.problem(value) if key.remote else "must be on a disk of this machine, not in a store"
        return f"{says} {problem}" if problem else None
    if (name, value) in RENAMED_VALUES:  # algorithm's too, which has no list of choices here
        return f"{says} is now called {RENAMED_VALUES[name, value]!r}"
    own = key.open and (":" in value or bool(key.suffix and value.endswith(key.suffix)))
    if key.choices and value not in key.choices and not own:
        return f"{says} is unknown, {did_you_mean(value, key.choices)}"
    return None


def _list_problem(setting: Setting, value: Any) -> str | None:
    name, key, (kind, _) = setting.name, setting.key, get_args(setting.kind)
    says = f"{name} = {shown(tuple(value) if isinstance(value, list) else value)}"
    if not isinstance(value, tuple | list) or not all(_is(item, kind) for item in value):
        return f"{says} must be a list, each entry {_NAMES[kind]}"
    if key.derived and not value:
        return None
    if key.interval and not (value and all(inside(item, key.interval) for item in value)):
        return f"{says} must hold numbers in {key.interval}"
    if name in _GROWING and any(a >= b for a, b in itertools.pairwise(value)):
        return f"{says} must be growing lengths"
    unknown = [item for item in value if key.choices and item not in key.choices]
    if unknown:
        return f"{says}: {shown(unknown[0])} is unknown, {did_you_mean(unknown[0], key.choices)}"
    if key.choices and len(set(value)) < len(value):
        return f"{says} names one of them twice"
    return None


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value, as config.json must."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return is_encodable(value)
    return value is None or isinstance(value, bool | int) or value == {}


def _text_problem(value: str) -> str | None:
    """Why a text can be no name, path or address."""
    if not is_encodable(value) or any(unicodedata.category(char) == "Cc" for char in value):
        return "holds a character that no name can have"
    return f"has more than {_LONGEST} characters" if len(value) > _LONGEST else None


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a type; a whole number is a number too, true and false are not."""
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    return isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(kind, kind))


def _named(config: Config) -> list[str]:
    """What has to be named, and names that cannot be."""
    needed = {
        "policy.path": "the folder of a Hugging Face policy",
        "env.name": "an environment",
        "env.data_dir": "a folder",
    }
    if config.hindsight.analyser == "endpoint":
        needed |= {
            "endpoint.url": "the server, such as http://127.0.0.1:8000/v1",
            "endpoint.model": "the model it serves",
        }
    problems = []
    for name, what in needed.items():
        group, _, last = name.partition(".")
        if not getattr(getattr(config, group), last):
            problems.append(f"{name} is empty: name {what}")
    if config.lora.rank and not config.lora.targets:
        problems.append("lora.targets is empty: name the projections that have an adapter")
    for name, checkpoint in (("export", config.export.checkpoint), ("fork", config.fork.checkpoint)):
        if checkpoint not in ("latest", "best") and not re.fullmatch(r"[0-9]{1,10}", checkpoint):
            problems.append(f"{name}.checkpoint = {shown(checkpoint)} must be 'latest', 'best' or a step")
    if not config.export.weights and not config.lora.rank:
        problems.append("export.weights is empty and lora.rank = 0 gives no adapter: nothing would be exported")
    if config.export.push_to and not hub.is_model(config.export.push_to):
        problems.append(f"export.push_to = {shown(config.export.push_to)} must be a name of the Hub, owner/name")
    if config.lora.path and not config.lora.rank:
        problems.append("lora.path is given, but lora.rank = 0 trains all weights: give the adapter's rank, or no path")
    return problems


def _trackers(config: Config) -> list[str]:
    missing = [name for name in config.tracking.trackers if not _is_there(name)]
    problems = [
        f'tracking.trackers names {name}, which is not installed: pip install "hintsd-jax[{name}]"' for name in missing
    ]
    if not config.tracking.project:
        problems.append("tracking.project is empty: name a project")
    return problems


def _is_there(tracker: str) -> bool:
    found = None if tracker == "tensorboard" else importlib.util.find_spec(tracker)
    return tracker == "tensorboard" or (found is not None and found.origin is not None)  # a folder of that name is none


def _splits(config: Config) -> list[str]:
    """Splits in the words of TensorFlow Datasets: names with slices in brackets, put together by "+"; "all" is all."""

    def parts(split: str) -> set[str]:
        return {part.partition("[")[0].strip().casefold() for part in split.split("+")}

    splits = config.tasks.to_dict()
    trained = splits["train_split"]
    problems = [
        f"tasks.{name} = {shown(splits[name])} has a part without a name"
        for name in ("train_split", "eval_split", "test_split")
        if "" in parts(splits[name])
    ]
    for name in ("eval_split", "test_split"):
        here = parts(splits[name])
        if here & parts(trained) or "all" in here | parts(trained):
            problems.append(
                f"tasks.{name} = {shown(splits[name])} is of what is trained on, tasks.train_split = {shown(trained)}:"
                " hold a split of its own out"
            )
    return problems


def _sizes(config: Config) -> list[str]:
    """Products that no machine holds, of numbers that are possible one by one."""
    tasks, rollout, batch = config.tasks, config.rollout, config.batch
    episodes = tasks.tasks_per_step * tasks.rollouts
    context = max(rollout.context, config.hindsight.context)
    rows = batch.rows_per_device * max((*batch.length_buckets, *batch.branch_buckets, *batch.whole_episode_buckets))
    prefilled = rollout.prefill_rows * rollout.prefill_buckets[-1]
    problems = []
    if episodes > _MOST_EPISODES:
        problems.append(
            f"tasks.tasks_per_step x tasks.rollouts = {episodes:,} episodes of a step: give at most {_MOST_EPISODES:,}"
        )
    for what, tokens in {
        f"rollout.slots x {context:,} tokens of context": rollout.slots * context,
        "rollout.prefill_rows x the last of rollout.prefill_buckets": prefilled,
        "batch.rows_per_device x the longest of batch's buckets": rows,
    }.items():
        if tokens > _MOST_TOKENS:
            problems.append(f"{what} = {tokens:,} tokens: no machine holds them")
    return problems


def _lengths(config: Config) -> list[str]:
    rollout, hindsight, batch = config.rollout, config.hindsight, config.batch
    episodes = config.tasks.tasks_per_step * config.tasks.rollouts
    problems = []
    if rollout.slots > episodes:
        problems.append(
            f"rollout.slots = {rollout.slots} exceeds the {episodes} episodes of a step"
            " (tasks.tasks_per_step x tasks.rollouts)"
        )
    if rollout.max_action_tokens >= rollout.context:
        problems.append(
            f"rollout.max_action_tokens = {rollout.max_action_tokens} leaves no prompt in"
            f" rollout.context = {rollout.context}"
        )
    if rollout.prefill_buckets[-1] > rollout.context:
        problems.append(
            f"rollout.prefill_buckets ends at {rollout.prefill_buckets[-1]}, beyond rollout.context = {rollout.context}"
        )
    if hindsight.max_tokens >= hindsight.context:
        problems.append(
            f"hindsight.max_tokens = {hindsight.max_tokens} leaves no prompt in hindsight.context = {hindsight.context}"
        )
    actions, branches, lengths = batch.action_buckets, batch.branch_buckets, batch.length_buckets
    if not actions or not branches:  # one of them alone is open
        return [
            *problems,
            f"batch.branch_buckets = {branches} and batch.action_buckets = {actions} go in pairs: give both, or () for"
            " both to have them derived",
        ]
    if actions[-1] >= lengths[-1]:
        problems.append(
            f"batch.action_buckets ends at {actions[-1]}, which leaves no history in batch.length_buckets up to"
            f" {lengths[-1]}"
        )
    if len(branches) != len(actions) or any(a >= m for a, m in zip(actions, branches, strict=False)):
        problems.append(
            f"batch.action_buckets = {actions} must hold one length for each of batch.branch_buckets = {branches},"
            " below it"
        )
    whole = batch.whole_episode_buckets
    if len(whole) != 2 or whole[1] >= whole[0]:
        problems.append(
            f"batch.whole_episode_buckets = {whole} must be two lengths: what the teacher reads of an episode, and its"
            " action tokens, below that"
        )
    return problems


def _schedules(config: Config) -> list[str]:
    problems = []
    if config.rollout.temperature == 0 and config.tasks.rollouts > 1:
        rollouts = config.tasks.rollouts
        problems.append(
            f"rollout.temperature = 0 makes the tasks.rollouts = {rollouts} rollouts of a task all the same"
        )
    if config.hindsight.feedback_position == "start" and config.chat.history != "keep":
        problems.append(
            "hindsight.feedback_position = start needs chat.history = keep: under a rewriting template there is no one"
            " reading of an episode"
        )
    if config.optim.warmup_steps >= config.optim.steps:
        problems.append(
            f"optim.warmup_steps = {config.optim.warmup_steps} must stay below optim.steps = {config.optim.steps}"
        )
    return problems


def _template(config: Config) -> list[str]:
    return [
        f"chat.template_kwargs.{name} is no variable of a chat template: remove it (chat.history and"
        " chat.enable_thinking are keys of their own)"
        for name in sorted(set(_RESERVED) & set(config.chat.template_kwargs))
    ]
