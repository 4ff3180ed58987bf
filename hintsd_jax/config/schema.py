"""The schema of every config: `base()` gives all keys with their defaults. `hintsd_jax.validation` refuses what cannot
work.

Keys that a method decides (`hintsd_jax.methods`) are None unless a config or an override says something else.

A config file has a `get_config()` that starts from `base()` and overrides. Defaults are the paper's released settings
for BFCL where it states them. Everything but `env.options` and `template_kwargs` is locked: a misspelt key is an error,
not a new key. No jax here, so that a wrong config is refused at once.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base() -> ConfigDict:
    """All keys, with the released settings as defaults; locked but for those of `FREE`."""
    config = ConfigDict(
        {
            "seed": 42,
            "method": "hint_sd",  # or hint_sd_single, hint_sd+grpo, dense, sdpo, grpo, sft, and the control sharpen
            # keep: the sampled tokens stand, also where the chat template would rewrite earlier turns. template: the
            # template is followed; then the teacher's branches bring what it rewrites, and batch.branch_buckets must
            # hold that.
            "history": "keep",
            "enable_thinking": True,  # for templates that know it; True is their own default
            "template_kwargs": {},  # further variables of the chat template, such as date_string
            "policy": {
                "path": "",  # a Hugging Face directory: config.json, safetensors, tokenizer.json, chat template
                # of activations and served weights: bfloat16 on TPU and GPU, float32 on CPU; or either by name
                "compute_dtype": "auto",
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
                # hindsight: the analyser names the steps. first, last, random, all: it is asked for feedback on these.
                # oracle: on those that the environment knows to be wrong (PRIVILEGED)
                "select": placeholder(str),
                # or "policy", "initial_policy", "endpoint", "environment" (PRIVILEGED: knows the ground truth)
                "analyser": "ema_teacher",
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
                # the environment variable that holds the key, such as OPENAI_API_KEY; the key itself is put down
                # nowhere
                "key_env": "",
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
                "importance_clip": placeholder(
                    float
                ),  # a token's divergence is weighed with min(p_student / p_sampler, this); 0: it is not
                "clip_low": 0.2,  # a policy gradient counts while p_student / p_sampler lies between 1 - clip_low
                "clip_high": 0.28,  # and 1 + clip_high
                "policy_weight": 1.0,  # of the policy gradient in hint_sd+grpo
                "chunk": 128,  # span tokens that are projected to the vocabulary at once
                # one pass for all targets of an episode; or "rows": one row per target, the plain reference
                "form": "branches",
                "length_buckets": (4096, 8192, 16_384, 24_576),  # tokens of an episode
                "stream_buckets": (
                    768,
                    3072,
                ),  # tokens that the teacher reads beyond it: feedback and actions of all its targets
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
                # what an alarm does beside the note: "note" nothing, "stop" saves and ends the run, "halve_lr" for the
                # rest of it
                "action": "note",
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
                "weights": (
                    "student",
                ),  # as whole directories; also "ema". Adapters are written of both, where one was trained
                "dtype": "auto",  # of the whole directories: as policy.path stores it; or float32, bfloat16, float16
                "path": "",  # where to; "": export/step_<n> in the workdir
            },
            "plan": {  # of --mode=plan alone, which says whether a run fits
                "devices": "",  # "v5e-8", "v5p-64", "v5e:2x4", "h100", "h200:8", ...; "": the devices of this machine
                "memory_gib": 0.0,  # of one device, for this program; 0: what the device is known to give
                # ask the compiler where there is one for the devices (minutes); False: arithmetic alone
                "compile": True,
                "cache_dir": ".cache/plan",  # what the compiler said is kept here; "": nowhere
            },
        }
    )
    config.lock()
    config.env.options.unlock()
    config.chat.template_kwargs.unlock()
    return config


NOT_OF_A_RUN = (
    "export.",
    "plan.",
)  # what these groups say changes no run: it may differ from what a workdir was made with
FREE = ("env.options", "template_kwargs")  # groups that take any key


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
