"""What a config must be: choices, ranges and what goes together. No jax here, so that a wrong config is refused at
once.
"""

import difflib

from ml_collections import ConfigDict

from hintsd_jax.config.schema import FREE, base, flatten, unknown_key
from hintsd_jax.errors import UserError
from hintsd_jax.methods import METHODS, resolved

_RESERVED = (  # not variables of a template: keys of this schema, and what says how to render
    *(
        "history",
        "enable_thinking",
        "stop_ids",
        "tokenizer",
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
    ),
    *(
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
    ),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)

_CHOICES = {
    "method": tuple(METHODS),
    "history": ("keep", "template"),
    "policy.compute_dtype": ("auto", "float32", "bfloat16"),
    "hindsight.select": ("hindsight", "first", "last", "random", "all", "oracle"),
    "hindsight.analyser": ("ema_teacher", "policy", "initial_policy", "endpoint", "environment"),
    "hindsight.feedback_position": ("target", "start"),
    "alarms.action": ("note", "stop", "halve_lr"),
    "batch.layout": ("branches", "rows"),
    "loss.divergence": ("reverse_kl", "forward_kl", "jsd"),
    "loss.support": ("student_topk", "teacher_topk", "full"),
    "optim.schedule": ("constant", "linear"),
    "export.dtype": ("auto", "float32", "bfloat16", "float16"),
}
# Interval notation; "inf" bounds are open.
_RANGES = {
    "seed": "[0, 4294967295]",
    "lora.rank": "[0, inf)",
    "lora.alpha": "[0, inf)",
    "lora.dropout": "[0, 1)",
    "env.call_timeout_s": "(0, inf)",
    "tasks.tasks_per_step": "[1, inf)",
    "tasks.rollouts": "[1, inf)",
    "rollout.slots": "[1, inf)",
    "rollout.context": "[2, inf)",
    "rollout.max_steps": "[1, inf)",
    "rollout.max_action_tokens": "[1, inf)",
    "rollout.temperature": "[0, inf)",
    "rollout.top_p": "(0, 1]",
    "rollout.top_k": "[0, inf)",
    "rollout.prefill_rows": "[1, inf)",
    "rollout.refill_fraction": "(0, 1]",
    "hindsight.max_targets": "[1, inf)",
    "hindsight.temperature": "[0, inf)",
    "hindsight.top_p": "(0, 1]",
    "hindsight.max_tokens": "[1, inf)",
    "hindsight.context": "[2, inf)",
    "hindsight.max_trajectory_chars": "[1, inf)",
    "loss.top_k": "[1, inf)",
    "loss.alpha": "[0, 1]",
    "loss.importance_clip": "[0, inf)",
    "loss.clip_low": "[0, 1]",
    "loss.clip_high": "[0, inf)",
    "loss.policy_gradient_weight": "[0, inf)",
    "loss.chunk_tokens": "[1, inf)",
    "batch.rows_per_device": "[1, inf)",
    "optim.lr": "[0, inf)",
    "optim.b1": "[0, 1)",
    "optim.b2": "[0, 1)",
    "optim.eps": "(0, inf)",
    "optim.weight_decay": "[0, inf)",
    "optim.clip_norm": "[0, inf)",
    "optim.warmup_steps": "[0, inf)",
    "optim.ema_decay": "[0, 1]",
    "optim.steps": "[1, inf)",
    "endpoint.concurrency": "[1, inf)",
    "endpoint.timeout_s": "(0, inf)",
    "endpoint.retries": "[0, inf)",
    "endpoint.backoff_s": "[0, inf)",
    "endpoint.max_calls": "[0, inf)",
    "endpoint.max_tokens": "[0, inf)",
    "endpoint.max_failures": "[1, inf)",
    "alarms.patience": "[1, inf)",
    "alarms.min_entropy": "[0, inf)",
    "alarms.max_divergence": "[0, inf)",
    "alarms.max_action_length": "[0, inf)",
    "alarms.min_success": "[0, 1]",
    "alarms.max_success_drop": "[0, 1]",
    "eval.every": "[0, inf)",
    "eval.tasks": "[1, inf)",
    "eval.rollouts": "[1, inf)",
    "eval.test_tasks": "[0, inf)",
    "checkpoint.every": "[1, inf)",
    "checkpoint.keep": "[1, inf)",
    "plan.memory_gib": "[0, inf)",
}
_BUCKETS = ("rollout.prefill_buckets", "batch.length_buckets", "batch.branch_buckets", "batch.action_buckets")


def validate(config: ConfigDict) -> ConfigDict:
    """Refuses an impossible config; gives a possible one back with what its method decides filled in.

    Raises:
      UserError: one line that lists every problem, not only the first.
    """
    problems = _schema_problems(config)
    if not problems:
        config = resolved(config)
        problems = _value_problems(config) + _relation_problems(config)
    if problems:
        raise UserError(f"impossible config: {'; '.join(problems)}")
    return config


def _schema_problems(config: ConfigDict) -> list[str]:
    keys, known = flatten(config), flatten(base())
    problems = [problem for key in keys if (problem := unknown_key(key, known))]
    missing = [key for key in known if key not in keys and key not in FREE]
    return problems + [f"config key {key} is missing: start from hintsd_jax.config.base()" for key in missing]


def _value_problems(config: ConfigDict) -> list[str]:
    values, problems = flatten(config), []
    for key, choices in _CHOICES.items():
        if values[key] is not None and values[key] not in choices:
            near = difflib.get_close_matches(str(values[key]), choices, 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"
            problems.append(f"{key} = {values[key]!r} is unknown, {hint}")
    for key, interval in _RANGES.items():
        if values[key] is not None and not _inside(values[key], interval):  # None: of an unknown method
            problems.append(f"{key} = {values[key]!r} must lie in {interval}")
    for key in _BUCKETS:
        buckets = tuple(values[key])
        if not buckets or buckets[0] < 1 or any(a >= b for a, b in zip(buckets, buckets[1:])):
            problems.append(f"{key} = {buckets!r} must be growing positive lengths")
    named = {
        "policy.path": "the folder of a Hugging Face policy",
        "env.name": "an environment",
        "env.data_dir": "a folder",
    }
    if values["hindsight.analyser"] == "endpoint":
        named |= {
            "endpoint.url": "the server, such as http://127.0.0.1:8000/v1",
            "endpoint.model": "the model that it serves",
        }
    for key, what in named.items():
        if not values[key]:
            problems.append(f"{key} is empty: name {what}")
    weights = tuple(values["export.weights"])
    if set(weights) - {"student", "ema"}:
        problems.append(f"export.weights = {weights!r}: name some of 'student' and 'ema', or none")
    checkpoint = str(values["export.checkpoint"])
    if checkpoint not in ("latest", "best") and not checkpoint.isdecimal():
        problems.append(f"export.checkpoint = {checkpoint!r} must be 'latest', 'best' or a step")
    for key in sorted(set(_RESERVED) & set(config.chat.template_kwargs)):
        problems.append(
            f"template_kwargs.{key} is no variable of a chat template: remove it (history, enable_thinking are keys of their own)"
        )
    return problems


def _relation_problems(config: ConfigDict) -> list[str]:
    tasks, rollout, hindsight, distill, optim = (
        config.tasks,
        config.rollout,
        config.hindsight,
        config.distill,
        config.optim,
    )
    episodes = tasks.tasks_per_step * tasks.rollouts
    prefill, actions, lengths = (
        max(buckets, default=0) for buckets in (rollout.prefill_buckets, batch.action_buckets, batch.length_buckets)
    )
    streams = tuple(batch.branch_buckets)
    problems = []
    if rollout.slots > episodes:
        problems.append(
            f"rollout.slots = {rollout.slots} exceeds the {episodes} episodes of a step (tasks.tasks_per_step x tasks.rollouts)"
        )
    if rollout.temperature == 0 and tasks.rollouts > 1:
        problems.append(
            f"rollout.temperature = 0 makes the tasks.rollouts = {tasks.rollouts} rollouts of a task all the same"
        )
    if rollout.max_action_tokens >= rollout.context:
        problems.append(
            f"rollout.max_action_tokens = {rollout.max_action_tokens} leaves no prompt in rollout.context = {rollout.context}"
        )
    if prefill > rollout.context:
        problems.append(f"rollout.prefill_buckets ends at {prefill}, beyond rollout.context = {rollout.context}")
    if hindsight.max_tokens >= hindsight.context:
        problems.append(
            f"hindsight.max_tokens = {hindsight.max_tokens} leaves no prompt in hindsight.context = {hindsight.context}"
        )
    if actions >= lengths:
        problems.append(
            f"batch.action_buckets ends at {actions}, which leaves no history in batch.length_buckets up to {lengths}"
        )
    if len(streams) != len(batch.action_buckets) or any(a >= m for a, m in zip(batch.action_buckets, streams)):
        problems.append(
            f"batch.action_buckets = {tuple(batch.action_buckets)} must hold one length for each of batch.branch_buckets = {streams}, below it"
        )
    pair = tuple(batch.whole_episode_buckets)
    if len(pair) != 2 or not 0 < pair[1] < pair[0]:
        problems.append(
            f"batch.whole_episode_buckets = {pair} must be two lengths: what the teacher reads of an episode, and its action tokens, below that"
        )
    if hindsight.feedback_position == "start" and config.chat.history != "keep":
        problems.append(
            "hindsight.feedback_position = start needs history = keep: under a rewriting template there is no one reading of an episode"
        )
    asks = METHODS[config.algorithm].asks if config.algorithm in METHODS else ""
    if asks == "steps" and (
        hindsight.select != "all" or hindsight.feedback_position != "target" or hindsight.analyser == "environment"
    ):
        problems.append(
            f"method = {config.algorithm} judges all steps, each where it stands: leave hindsight.select and place, and choose another analyser than environment"
        )
    if asks == "orphans" and (hindsight.select != "hindsight" or hindsight.feedback_position != "start"):
        problems.append(
            f"method = {config.algorithm} reads about whole episodes at their start: leave hindsight.select and hindsight.feedback_position"
        )
    if optim.warmup_steps >= optim.steps:
        problems.append(f"optim.warmup_steps = {optim.warmup_steps} must stay below optim.steps = {optim.steps}")
    for key in ("eval_split", "test_split"):
        if tasks[key] == tasks.train_split:
            problems.append(f"tasks.{key} = {tasks.train_split!r} is the split that is trained on")
    return problems


def _inside(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "(0, 1]"; NaN lies in none."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below
