"""The schema of every config: `base()` gives all keys with their defaults, `validate` refuses what cannot work.

Keys that a method decides (`hintsd_jax.methods`) are None unless a config or an override says something else.

A config file has a `get_config()` that starts from `base()` and overrides. Defaults are the paper's released settings for
BFCL where it states them. Everything but `env.options` and `template_kwargs` is locked: a misspelt key is an error, not a new key.
No jax here, so that a wrong config is refused at once.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from hintsd_jax.errors import UserError
from hintsd_jax.methods import METHODS, resolved


def base() -> ConfigDict:
    """All keys, with the released settings as defaults; locked but for those of `FREE`."""
    config = ConfigDict(
        {
            "seed": 42,
            "method": "hint_sd",  # or hint_sd_single, hint_sd+grpo, dense, sdpo, grpo, sft, and the control sharpen
            # keep: the sampled tokens stand, also where the chat template would rewrite earlier turns. template: the template is followed;
            # then the teacher's branches bring what it rewrites, and distill.stream_buckets must hold that.
            "history": "keep",
            "enable_thinking": True,  # for templates that know it; True is their own default
            "template_kwargs": {},  # further variables of the chat template, such as date_string
            "policy": {
                "path": "",  # a Hugging Face directory: config.json, safetensors, tokenizer.json, chat template
                "compute_dtype": "auto",  # of activations and served weights: bfloat16 on TPU and GPU, float32 on CPU; or either by name
                "remat": True,  # layers are computed again in the backward pass instead of kept
            },
            "lora": {
                "rank": 32,  # 0: train all weights
                "alpha": 64.0,
                "dropout": 0.05,  # of the student's adapter inputs in the update
                "targets": ("q_proj", "v_proj"),
                "path": "",  # a folder in PEFT's format to start from; "": a fresh adapter
            },
            "mesh": {  # devices = data x fsdp x tensor; one of them may be -1: all that are left
                "data": 1,  # replicas
                "fsdp": -1,  # parts that weights, optimizer and batches are scattered over
                "tensor": 1,  # parts that heads, ffn and vocabulary are split into
            },
            "env": {
                "name": "bfcl",  # a registered name, or package.module:Class
                "options": {},  # what the environment's constructor and `tasks` take
                "data_dir": "data",  # where task data sets are built
                "call_timeout_s": 60.0,  # wall clock, one environment call
            },
            "tasks": {
                "train_split": "train",
                "eval_split": "eval",
                "test_split": "test",
                "tasks_per_step": 2,  # the released 1 task a micro-step x 2 micro-steps
                "rollouts": 4,  # of each task
            },
            "rollout": {
                "slots": 8,  # episodes that are decoded at the same time
                "context": 24_576,  # tokens of a whole episode
                "max_steps": 20,
                "max_action_tokens": 1024,
                "temperature": 0.6,
                "top_p": 1.0,
                "top_k": 0,  # 0: off
                "prefill_buckets": (64, 256, 1024),  # longer prompts go in several chunks
                "prefill_rows": 1,  # rows that are prefilled at the same time
                "refill": 0.25,  # share of the active slots that must have stopped before the decode loop returns
                "overlap": True,  # environment steps run beside decoding
            },
            "hindsight": {
                # hindsight: the analyser names the steps. first, last, random, all: it is asked for feedback on these. oracle: on those that
                # the environment knows to be wrong (PRIVILEGED)
                "select": placeholder(str),
                "analyser": "policy_ema",  # or "policy", "policy_initial", "endpoint", "environment" (PRIVILEGED: knows the ground truth)
                "max_targets": placeholder(int),  # of an episode; of select = random the number of steps
                "place": placeholder(str),  # where the teacher reads feedback: target (right before the step) or start
                "temperature": 0.6,
                "top_p": 0.95,
                "max_tokens": 512,
                "context": 24_576,  # tokens of the analyser's prompt and answer
                "clip_chars": 12_000,  # the list of steps is clipped to its last characters
            },
            "endpoint": {  # of hindsight.analyser = endpoint: a server with OpenAI's /v1/chat/completions
                "url": "",  # such as http://127.0.0.1:8000/v1
                "model": "",
                "key_env": "",  # the environment variable that holds the key, such as OPENAI_API_KEY; the key itself is put down nowhere
                "concurrency": 8,  # requests at the same time
                "timeout_s": 60.0,  # of a whole request
                "retries": 4,
                "backoff_s": 1.0,  # before the first retry; doubled each time
                "max_calls": 0,  # requests in the whole run; 0: no limit
                "max_tokens": 0,  # prompts and answers in the whole run; 0: no limit
                "max_failures": 64,  # so many questions in a row without an answer end the run
            },
            "distill": {
                "divergence": placeholder(str),  # reverse_kl, forward_kl or jsd
                "support": "student_topk",  # or "teacher_topk", "full"
                "top_k": 100,
                "alpha": 0.5,  # jsd only: 0 is forward KL, 1 reverse KL
                "importance_clip": placeholder(float),  # a token's divergence is weighed with min(p_student / p_sampler, this); 0: it is not
                "clip_low": 0.2,  # a policy gradient counts while p_student / p_sampler lies between 1 - clip_low
                "clip_high": 0.28,  # and 1 + clip_high
                "policy_weight": 1.0,  # of the policy gradient in hint_sd+grpo
                "chunk": 128,  # span tokens that are projected to the vocabulary at once
                "form": "branches",  # one pass for all targets of an episode; or "rows": one row per target, the plain reference
                "length_buckets": (4096, 8192, 16_384, 24_576),  # tokens of an episode
                "stream_buckets": (768, 3072),  # tokens that the teacher reads beyond it: feedback and actions of all its targets
                "action_buckets": (256, 1536),  # action tokens; the n-th goes with the n-th of stream_buckets
                # the same two where all steps of an episode are trained on, or the teacher reads whole episodes
                "episode_pair": (26_624, 8192),
                "rows_per_device": 1,  # episodes in a batch on each of the mesh's data x fsdp parts
                "mean_of_micro_means": False,  # True: the released code's average, which weighs tokens unevenly
            },
            "optim": {
                "lr": 5e-6,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,  # 0: off
                "schedule": "linear",  # decay to 0; or "constant"
                "warmup_steps": 0,
                "ema_decay": placeholder(float),  # of the teacher, a step
                "steps": 1500,  # 15 epochs over 200 tasks
            },
            "eval": {
                "every": 100,  # optimizer steps; 0: only before and after
                "tasks": 40,
                "rollouts": 4,
                "test_tasks": 160,  # before and after; 0: none
                "greedy": True,  # also one greedy rollout a task, before and after
            },
            "alarms": {  # a collapse, as these thresholds have it; 0 turns one off
                "action": "note",  # what an alarm does beside the note: "note" nothing, "stop" saves and ends the run, "halve_lr" for the rest of it
                "patience": 3,  # steps in a row
                "min_entropy": 0.0,  # nats a token
                "max_divergence": 0.0,  # nats a token
                "max_action_length": 0.0,  # tokens, mean
                "min_success": 0.0,  # share of a step's rollouts
                "max_success_drop": 0.0,  # of the mean success over `patience` steps, below the best so far
            },
            "checkpoint": {
                "every": 50,  # optimizer steps; the last step is always saved
                "keep": 2,  # the latest ones; the best by evaluation stays as well
            },
            "export": {  # --mode=export
                "checkpoint": "latest",  # or "best" by evaluation, or a step
                "weights": ("student",),  # as whole directories; also "ema". Adapters are written of both, where one was trained
                "dtype": "auto",  # of the whole directories: as policy.path stores it; or float32, bfloat16, float16
                "path": "",  # where to; "": export/step_<n> in the workdir
            },
            "plan": {  # of --mode=plan alone, which says whether a run fits
                "devices": "",  # "v5e-8", "v5p-64", "v5e:2x4", "h100", "h200:8", ...; "": the devices of this machine
                "memory_gib": 0.0,  # of one device, for this program; 0: what the device is known to give
                "compile": True,  # ask the compiler where there is one for the devices (minutes); False: arithmetic alone
                "cache_dir": ".cache/plan",  # what the compiler said is kept here; "": nowhere
            },
        }
    )
    config.lock()
    config.env.options.unlock()
    config.template_kwargs.unlock()
    return config


NOT_OF_A_RUN = ("export.", "plan.")  # what these groups say changes no run: it may differ from what a workdir was made with
FREE = ("env.options", "template_kwargs")  # groups that take any key
_RESERVED = (  # not variables of a template: keys of this schema, and what says how to render
    *("history", "enable_thinking", "stop_ids", "tokenizer", "conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)

_CHOICES = {
    "method": tuple(METHODS),
    "history": ("keep", "template"),
    "policy.compute_dtype": ("auto", "float32", "bfloat16"),
    "hindsight.select": ("hindsight", "first", "last", "random", "all", "oracle"),
    "hindsight.analyser": ("policy_ema", "policy", "policy_initial", "endpoint", "environment"),
    "hindsight.place": ("target", "start"),
    "alarms.action": ("note", "stop", "halve_lr"),
    "distill.form": ("branches", "rows"),
    "distill.divergence": ("reverse_kl", "forward_kl", "jsd"),
    "distill.support": ("student_topk", "teacher_topk", "full"),
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
    "rollout.refill": "(0, 1]",
    "hindsight.max_targets": "[1, inf)",
    "hindsight.temperature": "[0, inf)",
    "hindsight.top_p": "(0, 1]",
    "hindsight.max_tokens": "[1, inf)",
    "hindsight.context": "[2, inf)",
    "hindsight.clip_chars": "[1, inf)",
    "distill.top_k": "[1, inf)",
    "distill.alpha": "[0, 1]",
    "distill.importance_clip": "[0, inf)",
    "distill.clip_low": "[0, 1]",
    "distill.clip_high": "[0, inf)",
    "distill.policy_weight": "[0, inf)",
    "distill.chunk": "[1, inf)",
    "distill.rows_per_device": "[1, inf)",
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
_BUCKETS = ("rollout.prefill_buckets", "distill.length_buckets", "distill.stream_buckets", "distill.action_buckets")


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


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {"dotted.key": value}; an empty mapping is a value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping | ConfigDict) and len(value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unknown_key(key: str, known: Iterable[str] | None = None) -> str | None:
    """One line about a dotted key that the schema lacks, with the nearest that it has; None for a key that it has.

    `known` are the dotted keys to compare with, those of `base()` by default; any key under those of `FREE` passes.
    """
    known = list(flatten(base()) if known is None else known)
    groups = {name.rsplit(".", 1)[0] for name in known}
    if key in known or key in groups or key.startswith(tuple(f"{group}." for group in FREE)):
        return None

    def closeness(name: str) -> tuple[bool, float]:
        """A key cut short comes first, then likeness as a whole and of the last part."""
        pairs = ((key, name), (key.rpartition(".")[2], name.rpartition(".")[2]))
        return name.startswith(key), sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return f"unknown config key {key}: did you mean {max(known, key=closeness)}?"


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
    named = {"policy.path": "the folder of a Hugging Face policy", "env.name": "an environment", "env.data_dir": "a folder"}
    if values["hindsight.analyser"] == "endpoint":
        named |= {"endpoint.url": "the server, such as http://127.0.0.1:8000/v1", "endpoint.model": "the model that it serves"}
    for key, what in named.items():
        if not values[key]:
            problems.append(f"{key} is empty: name {what}")
    weights = tuple(values["export.weights"])
    if set(weights) - {"student", "ema"}:
        problems.append(f"export.weights = {weights!r}: name some of 'student' and 'ema', or none")
    checkpoint = str(values["export.checkpoint"])
    if checkpoint not in ("latest", "best") and not checkpoint.isdecimal():
        problems.append(f"export.checkpoint = {checkpoint!r} must be 'latest', 'best' or a step")
    for key in sorted(set(_RESERVED) & set(config.template_kwargs)):
        problems.append(f"template_kwargs.{key} is no variable of a chat template: remove it (history, enable_thinking are keys of their own)")
    return problems


def _relation_problems(config: ConfigDict) -> list[str]:
    tasks, rollout, hindsight, distill, optim = config.tasks, config.rollout, config.hindsight, config.distill, config.optim
    episodes = tasks.tasks_per_step * tasks.rollouts
    prefill, actions, lengths = (
        max(buckets, default=0) for buckets in (rollout.prefill_buckets, distill.action_buckets, distill.length_buckets)
    )
    streams = tuple(distill.stream_buckets)
    problems = []
    if rollout.slots > episodes:
        problems.append(
            f"rollout.slots = {rollout.slots} exceeds the {episodes} episodes of a step (tasks.tasks_per_step x tasks.rollouts)"
        )
    if rollout.temperature == 0 and tasks.rollouts > 1:
        problems.append(f"rollout.temperature = 0 makes the tasks.rollouts = {tasks.rollouts} rollouts of a task all the same")
    if rollout.max_action_tokens >= rollout.context:
        problems.append(
            f"rollout.max_action_tokens = {rollout.max_action_tokens} leaves no prompt in rollout.context = {rollout.context}"
        )
    if prefill > rollout.context:
        problems.append(f"rollout.prefill_buckets ends at {prefill}, beyond rollout.context = {rollout.context}")
    if hindsight.max_tokens >= hindsight.context:
        problems.append(f"hindsight.max_tokens = {hindsight.max_tokens} leaves no prompt in hindsight.context = {hindsight.context}")
    if actions >= lengths:
        problems.append(f"distill.action_buckets ends at {actions}, which leaves no history in distill.length_buckets up to {lengths}")
    if len(streams) != len(distill.action_buckets) or any(a >= m for a, m in zip(distill.action_buckets, streams)):
        problems.append(
            f"distill.action_buckets = {tuple(distill.action_buckets)} must hold one length for each of distill.stream_buckets = {streams}, below it"
        )
    pair = tuple(distill.episode_pair)
    if len(pair) != 2 or not 0 < pair[1] < pair[0]:
        problems.append(f"distill.episode_pair = {pair} must be two lengths: what the teacher reads of an episode, and its action tokens, below that")
    if hindsight.place == "start" and config.history != "keep":
        problems.append("hindsight.place = start needs history = keep: under a rewriting template there is no one reading of an episode")
    asks = METHODS[config.method].asks if config.method in METHODS else ""
    if asks == "steps" and (hindsight.select != "all" or hindsight.place != "target" or hindsight.analyser == "environment"):
        problems.append(f"method = {config.method} judges all steps, each where it stands: leave hindsight.select and place, and choose another analyser than environment")
    if asks == "orphans" and (hindsight.select != "hindsight" or hindsight.place != "start"):
        problems.append(f"method = {config.method} reads about whole episodes at their start: leave hindsight.select and hindsight.place")
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
