# SPDX-License-Identifier: Apache-2.0

"""Every setting of a run: one frozen dataclass a section, one `key` a setting.

This is the only list. From it come the ConfigDict that config files start from (`edge.base`), the checks
(`validation`), the flags' help and docs/config.md (`reference`). Defaults are the paper's released settings for BFCL
where it states them. No jax here, so that a wrong config is refused at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hintsd_jax import hub
from hintsd_jax.config.fields import key

# Groups whose keys change no run: they may differ from what a workdir was made with.
NOT_OF_A_RUN = ("check.", "distributed.", "export.", "plan.")
# Groups that take any key.
FREE = ("env.options", "chat.template_kwargs", "algorithm_defaults", "endpoint.extra_body", "endpoint.headers_env")
_PACKAGE = Path(__file__).parents[1]


class Section:
    """Base of all sections."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, tuples as they are."""
        return dataclasses.asdict(self)  # pyright: ignore[reportArgumentType] - every subclass is a dataclass


@dataclasses.dataclass(frozen=True)
class ChatSection(Section):
    """How messages become tokens."""

    history: str = key(
        "keep",
        "keep: sampled tokens stand, even where the chat template would rewrite earlier messages; template: the"
        " template is followed, and batch.branch_buckets must hold what it rewrites",
        choices=("keep", "template"),
    )
    enable_thinking: bool = key(True, "the model thinks before it acts, where the chat template knows the switch")
    template_kwargs: dict[str, Any] = key({}, "further variables of the chat template, such as date_string")


@dataclasses.dataclass(frozen=True)
class PolicySection(Section):
    """The model."""

    path: str = key(
        "",
        "a Hugging Face directory: config.json, safetensors, tokenizer.json, chat template; a path assets/... that the"
        " current folder lacks is looked for in the installed package; owner/name or owner/name@revision, where no such"
        " folder is, names a model of the Hugging Face Hub",
        path=True,
        remote=True,
    )
    compute_dtype: str = key(
        "auto",
        "dtype of activations and of the weights that serve; auto: bfloat16 on TPU and GPU, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    remat: bool = key(True, "layers are computed again in the backward pass instead of kept")

    @property
    def location(self) -> str:
        """Where `path` is: as it stands; in the installed package where the current folder has no such assets/...; or
        in the Hugging Face cache, of the name that `policies.pinned` has made of a name.
        """
        packaged = _PACKAGE / self.path
        in_package = self.path.startswith("assets/") and not Path(self.path).exists() and packaged.exists()
        name = hub.name_of(self.path)
        if name is not None and name.is_pinned:
            return str(name.folder)
        return str(packaged) if in_package else self.path


@dataclasses.dataclass(frozen=True)
class LoraSection(Section):
    """The adapter that is trained."""

    rank: int = key(32, "rank of the adapter; 0: no adapter, all weights are trained", "[0, 65536]")
    alpha: float = key(64.0, "the adapter's output is scaled by alpha / rank", "[0, 1000000]")
    rslora: bool = key(False, "rank-stabilised: the adapter's output is scaled by alpha / sqrt(rank) instead")
    dropout: float = key(
        0.05, "share of the adapter's inputs that is set to 0, in the student's pass of the update", "[0, 1)"
    )
    targets: tuple[str, ...] = key(
        ("q_proj", "v_proj"),
        "the projections that have an adapter",
        choices=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )
    path: str = key(
        "", "folder of an adapter in PEFT's format to start from; empty: a new adapter", path=True, remote=True
    )


@dataclasses.dataclass(frozen=True)
class MeshSection(Section):
    """How the devices are used: devices = data x fsdp x tensor; one of them may be -1: all that are left."""

    data: int = key(
        0,
        "copies of the model; 0: one, or with an adapter and several processes one a process; -1: all devices that are"
        " left",
        "[-1, 1048576]",
    )
    fsdp: int = key(
        -1,
        "parts that weights, optimizer state and batches are split into (fully sharded); -1 as above",
        "[-1, 1048576]",
    )
    tensor: int = key(
        0,
        "parts that heads, feed-forward layers and vocabulary are split into; 0: 1, or more where devices outnumber"
        " the episodes of a training step; -1 as above",
        "[-1, 1048576]",
    )


@dataclasses.dataclass(frozen=True)
class DistributedSection(Section):
    """The processes of a run on several hosts, or with one process a GPU; changes no run."""

    coordinator: str = key(
        "auto",
        "host:port of process 0; auto: what TPU pods, Slurm, Open MPI and Kubernetes say, else one process; none: one",
    )
    processes: int = key(0, "how many there are; 0: what the machine says", "[0, 1048576]")
    process: int = key(-1, "which one this is, from 0 on; -1: what the machine says", "[-1, 1048575]")
    silence_s: float = key(
        30.0, "seconds without a sign of life after which the others name a process and end", "[5, 1000000]"
    )


@dataclasses.dataclass(frozen=True)
class EnvSection(Section):
    """The environment."""

    name: str = key(
        "bfcl",
        "a registered name, or package.module:Class; verifiers:ID and openenv:URL (or app) name their option taskset or"
        " environment with it",
    )
    options: dict[str, Any] = key({}, "keyword arguments of the environment's constructor and of its `tasks`")
    call_style: str = key(
        "auto",
        "form in which a policy's tool calls are read: hermes, JSON in <tool_call> tags; bare, nothing but JSON"
        " objects; json, JSON objects anywhere in the text, also in a code fence; fenced, in code fences only; xml,"
        " <function=...> in <tool_call> tags; pythonic, a list of Python calls; lfm2, such a list in tags; olmo3,"
        " Python calls in <function_calls> tags; auto: what the chat template writes. Environments whose actions are"
        " code take auto only",
        choices=("auto", "hermes", "bare", "json", "fenced", "xml", "pythonic", "lfm2", "olmo3"),
    )
    data_dir: str = key("data", "folder where task data sets are built, relative to the current folder", path=True)
    call_timeout_s: float = key(60.0, "seconds (wall clock) that one call of the environment may take", "(0, 1000000]")
    isolation: str = key(
        "auto",
        "where an environment runs: process, in one of its own, which is killed where a call takes too long or too much"
        " memory; thread, in the trainer's process; auto: what its class names in `isolation`, else process",
        choices=("auto", "thread", "process"),
    )
    memory_gib: float = key(4.0, "GiB of memory that the process of one environment may take", "[0.03125, 1048576]")
    resets_ahead: int = key(
        2,
        "episodes whose environment is reset before a slot of the engine is free for them; so many more than"
        " rollout.slots exist at most",
        "[0, 4096]",
    )
    record_texts: bool = key(
        False,
        "episodes/ holds the texts of benchmarks whose licence does not let them be passed on (AppWorld), too; else"
        " their hashes",
    )


@dataclasses.dataclass(frozen=True)
class TasksSection(Section):
    """What is played in training and evaluation."""

    train_split: str = key("train", "the split that is trained on")
    eval_split: str = key("eval", "the split that is evaluated while training")
    test_split: str = key("test", "the split that is evaluated before and after")
    tasks_per_step: int = key(2, "tasks of a training step; released: 2 micro-steps of 1 task", "[1, 65536]")
    rollouts: int = key(4, "episodes of each task", "[1, 4096]")


@dataclasses.dataclass(frozen=True)
class RolloutSection(Section):
    """How episodes are sampled."""

    slots: int = key(8, "episodes that are decoded at the same time", "[1, 1048576]")
    context: int = key(24_576, "most tokens of an episode; one that needs more ends as failed", "[2, 16777216]")
    max_steps: int = key(20, "most steps of an episode", "[1, 1048576]")
    max_action_tokens: int = key(1024, "most tokens of an action", "[1, 16777216]")
    temperature: float = key(0.6, "temperature of sampling; 0: greedy", "[0, 1000]")
    top_p: float = key(
        1.0, "sampling from the smallest set of likeliest tokens with this probability; 1: all tokens", "(0, 1]"
    )
    top_k: int = key(0, "sampling from so many likeliest tokens; 0: all", "[0, 16777216]")
    prefill_buckets: tuple[int, ...] = key(
        (64, 256, 1024),
        "lengths of prefill's chunks in tokens, growing; a prompt goes in as many as fill it best",
        "[1, 16777216]",
    )
    prefill_rows: int = key(
        1, "chunks of the shortest length that are prefilled at once; of longer ones as many tokens", "[1, 65536]"
    )
    refill_fraction: float = key(
        0.25,
        "share of the active slots that must have stopped before decoding hands back to the environments",
        "(0, 1]",
    )
    overlap_env: bool = key(True, "environments work while other episodes are decoded")
    free_cache: bool = key(
        False,
        "the slots' key-value cache is freed while weights are updated, and allocated again for the next episodes",
    )
    mask_cut_episodes: bool = key(
        False,
        "episodes that a limit ended (of steps, of tokens, or of the environment) are neither looked back on nor"
        " trained on; false: they are failures, as in the paper. They count in scores and in their task's mean reward",
    )


@dataclasses.dataclass(frozen=True)
class HindsightSection(Section):
    """Who analyses episodes, and what is asked."""

    select: str = key(
        None,
        "which steps get feedback: those that the analyser names (hindsight), or given ones; oracle: those that the"
        " environment knows to be wrong, PRIVILEGED; or a function of your own",
        choices=("hindsight", "first", "last", "random", "all", "oracle"),
        by_algorithm=True,
        open=True,
    )
    analyser: str = key(
        "ema_teacher",
        "who writes feedback: the policy with its EMA, its current or its initial weights; a server; or the"
        " environment's report, which knows the ground truth: PRIVILEGED",
        choices=("ema_teacher", "student", "initial_policy", "endpoint", "environment"),
    )
    max_targets: int = key(
        None,
        "most targets of an episode; with hindsight.select = random, how many steps are drawn",
        "[1, 65536]",
        by_algorithm=True,
    )
    prompts: str = key(
        "released",
        "wording of all questions and of what teachers read: that of the released code's structure, for models that"
        " read; compact, for the embedded policy; a TOML file of your own (docs/prompts.md); or an object of your own",
        choices=("released", "compact"),
        open=True,
        suffix=".toml",
    )
    feedback_position: str = key(
        None,
        "where the teacher reads feedback: in a user message right before the target step, in the last user message"
        " before it, or at the start of the episode",
        choices=("target", "last_user", "start"),
        by_algorithm=True,
    )
    temperature: float = key(0.6, "temperature of the analyser's answers; 0: greedy", "[0, 1000]")
    top_p: float = key(0.95, "top-p of the analyser's answers; 1: all tokens", "(0, 1]")
    max_tokens: int = key(512, "most tokens of an answer", "[1, 16777216]")
    context: int = key(
        24_576,
        "most tokens of the analyser's prompt and answer together; 0: rollout.context and the answer, and 512",
        "[2, 16777216]",
        derived=True,
    )
    max_trajectory_chars: int = key(
        12_000, "of the trajectory that the analyser reads, so many last characters", "[1, 1073741824]"
    )


@dataclasses.dataclass(frozen=True)
class EndpointSection(Section):
    """Of hindsight.analyser = endpoint: a server with OpenAI's /v1/chat/completions."""

    url: str = key("", "address of the server, such as http://127.0.0.1:8000/v1")
    model: str = key("", "name of the model, as the server has it")
    key_env: str = key(
        "", "name of the environment variable that holds the key, such as OPENAI_API_KEY; never the key itself"
    )
    headers_env: dict[str, Any] = key(
        {}, "further headers: name of a header -> name of the environment variable that holds its value"
    )
    use_proxy: bool = key(False, "go through the proxy that http_proxy, https_proxy and no_proxy name")
    max_tokens_field: str = key(
        "max_tokens",
        "the request's field for hindsight.max_tokens; none: it is not sent",
        choices=("max_tokens", "max_completion_tokens", "none"),
    )
    send_sampling: bool = key(True, "send hindsight.temperature and hindsight.top_p, which reasoning models refuse")
    extra_body: dict[str, Any] = key(
        {}, "further fields of each request, such as reasoning_effort or chat_template_kwargs; they win over ours"
    )
    concurrency: int = key(8, "requests at the same time", "[1, 4096]")
    timeout_s: float = key(60.0, "seconds that a whole request may take", "(0, 1000000]")
    retries: int = key(4, "further requests of a question after a failed one", "[0, 1000]")
    backoff_s: float = key(1.0, "seconds before the first retry; doubled for each further one", "[0, 1000000]")
    max_calls: int = key(0, "most requests of the whole run; 0: no limit", "[0, 1000000000000]")
    max_tokens: int = key(0, "most tokens of prompts and answers of the whole run; 0: no limit", "[0, 1000000000000]")
    max_failures: int = key(64, "the run ends after so many questions in a row without an answer", "[1, 1073741824]")


@dataclasses.dataclass(frozen=True)
class LossSection(Section):
    """What is minimised on the action tokens; the algorithm says which parts the loss has."""

    divergence: str = key(
        None,
        "divergence of teacher and student, token by token",
        choices=("reverse_kl", "forward_kl", "jsd"),
        by_algorithm=True,
    )
    support: str = key(
        "student_topk",
        "entries that the divergence compares: the likeliest of one side and one tail bucket, or the full vocabulary",
        choices=("student_topk", "teacher_topk", "full"),
    )
    top_k: int = key(100, "likeliest entries of loss.support = student_topk and teacher_topk", "[1, 16777216]")
    alpha: float = key(0.5, "mixture of loss.divergence = jsd: 0 is forward KL, 1 reverse KL", "[0, 1]")
    importance_clip: float = key(
        None,
        "a token's divergence is multiplied by min(p_student / p_sampler, this); 0: it is not",
        "[0, 1000000]",
        by_algorithm=True,
    )
    clip_low: float = key(0.2, "of the policy gradient: p_student / p_sampler counts down to 1 - this", "[0, 1]")
    clip_high: float = key(0.28, "of the policy gradient: p_student / p_sampler counts up to 1 + this", "[0, 1000000]")
    policy_gradient_weight: float = key(1.0, "weight of the policy gradient in hint_sd+grpo", "[0, 1000000]")
    chunk_tokens: int = key(128, "action tokens that are projected to the vocabulary at once", "[1, 16777216]")
    mean_of_micro_means: bool = key(
        False,
        "averages micro-steps (tasks of a training step) first, those without a token as 0, as the released code does;"
        " tokens of short ones then weigh more",
    )


@dataclasses.dataclass(frozen=True)
class GrpoSection(Section):
    """Of grpo and hint_sd+grpo: advantages, means and what keeps the policy near its start."""

    mean: str = key(
        "token",
        "mean of the policy gradient over all action tokens, or over the episodes' own means",
        choices=("token", "sequence"),
    )
    normalize_std: bool = key(
        True, "advantages are divided by the standard deviation of a task's rewards; false: Dr. GRPO, arXiv 2503.20783"
    )
    reference_kl: float = key(
        0.0,
        "coefficient of KL(student || the policy that training began with) on the tokens of the policy gradient; 0: no"
        " such KL, nor its pass",
        "[0, 1000000]",
    )
    drop_equal_groups: bool = key(
        True, "tasks whose rollouts all ended alike are left out; false: they count in the mean, with an advantage of 0"
    )


@dataclasses.dataclass(frozen=True)
class SftSection(Section):
    """Of sft: what it learns from."""

    path: str = key(
        "",
        'file of dialogues of another policy, JSON lines {"messages": [{"role": ..., "content": ...}, ...]}; every'
        " message of the assistant is trained on",
        path=True,
        remote=True,
    )


@dataclasses.dataclass(frozen=True)
class BatchSection(Section):
    """The shapes of the update's batches."""

    layout: str = key(
        "branches",
        "branches: one pass for all targets of an episode; separate: an example for each target (slow, the reference)",
        choices=("branches", "separate"),
    )
    length_buckets: tuple[int, ...] = key(
        (4096, 8192, 16_384, 24_576),
        "padded lengths of an episode in tokens, growing; empty: rollout.context, its half and its quarter",
        "[1, 16777216]",
        derived=True,
    )
    branch_buckets: tuple[int, ...] = key(
        (768, 3072),
        "padded lengths in tokens of what the teacher reads beyond the episode (feedback and actions of all its"
        " targets), growing; empty, as batch.action_buckets then: what the longest answer and actions need, and a"
        " quarter",
        "[1, 16777216]",
        derived=True,
    )
    action_buckets: tuple[int, ...] = key(
        (256, 1536),
        "padded lengths of the action tokens, growing; the n-th goes with the n-th of batch.branch_buckets",
        "[1, 16777216]",
        derived=True,
    )
    whole_episode_buckets: tuple[int, ...] = key(
        (26_624, 8192),
        "the one branch length and the one action length where all actions of an episode are trained on, or the"
        " teacher reads whole episodes; a quarter of the first too where it reads of single steps; empty: twice and"
        " half rollout.context",
        "[1, 16777216]",
        derived=True,
    )
    rows_per_device: int = key(1, "examples of a batch on each of the mesh's data x fsdp parts", "[1, 65536]")


@dataclasses.dataclass(frozen=True)
class OptimSection(Section):
    """AdamW, its schedule, and the teacher's EMA."""

    lr: float = key(5e-6, "peak learning rate", "[0, 1000000]")
    b1: float = key(0.9, "decay of the first moment", "[0, 1)")
    b2: float = key(0.999, "decay of the second moment", "[0, 1)")
    eps: float = key(1e-8, "added to the square root of the second moment", "(0, 1]")
    weight_decay: float = key(0.0, "decoupled weight decay", "[0, 1000000]")
    clip_norm: float = key(1.0, "limit of the gradient's global norm; 0: off", "[0, 1000000]")
    schedule: str = key("linear", "linear: the rate falls to 0 at optim.steps", choices=("constant", "linear"))
    warmup_steps: int = key(0, "training steps over which the rate rises linearly from 0", "[0, 1073741824]")
    empty_updates: str = key(
        "skip",
        "what a training step without any action token does: skip, nothing; step, as the released code, an Adam step"
        " with a gradient of 0, and the EMA follows",
        choices=("skip", "step"),
    )
    ema_decay: float = key(
        None, "share of the teacher that stays in an optimizer step; 1: it never changes", "[0, 1]", by_algorithm=True
    )
    max_nonfinite: int = key(
        3,
        "the run ends after so many updates in a row that were skipped because a number was not finite",
        "[1, 1073741824]",
    )
    steps: int = key(1500, "training steps of the run; released: 15 epochs over 200 tasks", "[1, 1073741824]")


@dataclasses.dataclass(frozen=True)
class EvalSection(Section):
    """Success on tasks that are not trained on."""

    every: int = key(100, "optimizer steps between evaluations; 0: only before and after", "[0, 1073741824]")
    tasks: int = key(40, "tasks of the eval split", "[1, 1073741824]")
    rollouts: int = key(4, "episodes of each task", "[1, 4096]")
    test_tasks: int = key(160, "tasks of the test split, before and after; 0: none", "[0, 1073741824]")
    greedy: bool = key(True, "also one greedy episode a task, before and after")
    record_tasks: int = key(
        16, "of so many test tasks the sampled episodes are kept, before and after; 0: none", "[0, 1073741824]"
    )


@dataclasses.dataclass(frozen=True)
class AlarmsSection(Section):
    """Thresholds that say that a run collapses; 0 turns one off."""

    action: str = key(
        "warn",
        "what an alarm does: warn, nothing but a line; stop, save and end the run; halve_lr, go on with half the rate",
        choices=("warn", "stop", "halve_lr"),
    )
    patience: int = key(3, "training steps in a row beyond a threshold that make an alarm", "[1, 1048576]")
    min_entropy: float = key(0.0, "alarm below this mean entropy, nats a token", "[0, 1000000]")
    max_divergence: float = key(0.0, "alarm above this divergence from the teacher, nats a token", "[0, 1000000]")
    max_action_length: float = key(0.0, "alarm above this mean length of actions, tokens", "[0, 1000000]")
    min_success: float = key(0.0, "alarm below this share of successful episodes of a step", "[0, 1]")
    max_unreadable: float = key(0.5, "alarm above this share of questions without a readable answer", "[0, 1]")
    min_tokens: float = key(
        1.0, "alarm below this number of action tokens in an update, where some episode failed", "[0, 1000000]"
    )
    min_targets: float = key(
        1.0,
        "alarm below this number of targets of a step, where the analyser was asked about failed episodes",
        "[0, 1000000]",
    )
    max_dropped: float = key(
        0.5, "alarm above this share of the episodes of a step that were lost to the environment's failures", "[0, 1]"
    )
    max_success_drop: float = key(
        0.0, "alarm when the mean success of alarms.patience steps falls so far below its best", "[0, 1]"
    )


@dataclasses.dataclass(frozen=True)
class TrackingSection(Section):
    """Where metrics go beside the run's own files."""

    trackers: tuple[str, ...] = key(
        ("tensorboard",),
        "who gets the metrics as well: TensorBoard, Weights & Biases, trackio, MLflow; the last three get tables of"
        " episodes too, with targets and feedback",
        choices=("tensorboard", "wandb", "trackio", "mlflow"),
    )
    project: str = key("hintsd_jax", "the project, or experiment, that the run stands in there")
    name: str = key("", "the run's name there; empty: that of the workdir")
    online: bool = key(
        False,
        "they send to their servers, which their own logins and environment variables name; false: all of it stays in"
        " the workdir",
    )


@dataclasses.dataclass(frozen=True)
class CheckpointSection(Section):
    """When the state of a run is saved."""

    every: int = key(50, "optimizer steps between checkpoints; the last step is always saved", "[1, 1073741824]")
    keep: int = key(2, "latest checkpoints that stay; the best by evaluation stays as well", "[1, 1048576]")
    on_damage: str = key(
        "stop",
        "what a run does that finds its newest checkpoint damaged: stop, and say so; previous, move it to damaged/ in"
        " the workdir, say so, and continue from the one before it",
        choices=("stop", "previous"),
    )


@dataclasses.dataclass(frozen=True)
class ForkSection(Section):
    """A new run that begins with what another has learnt; steps, schedule and tasks are its own."""

    path: str = key(
        "", "workdir of the run to begin from, which stays as it is; empty: begin with the policy", path=True
    )
    checkpoint: str = key("latest", "latest; best, by evaluation; or the number of a step")
    carry: str = key(
        "state",
        "what is taken over: state, the trained weights, the teacher's EMA and the optimizer's moments; weights, the"
        " trained weights alone, of which the teacher starts as a copy",
        choices=("state", "weights"),
    )


@dataclasses.dataclass(frozen=True)
class ExportSection(Section):
    """What `hintsd-jax export` writes; changes no run."""

    checkpoint: str = key("latest", "latest; best, by evaluation; or the number of a step")
    weights: tuple[str, ...] = key(
        ("student",),
        "weights that are written as whole directories; adapters are written of both, where one was trained",
        choices=("student", "ema"),
    )
    dtype: str = key(
        "auto",
        "dtype of the whole directories; auto: as policy.path stores it",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    path: str = key("", "folder to write to; empty: export/step_<n> in the workdir", path=True, remote=True)
    push_to: str = key(
        "",
        "owner/name of a model of the Hugging Face Hub that the directories are pushed to as well; empty: nothing"
        " leaves this machine",
    )
    push_private: bool = key(True, "a model that the push makes is private; one that is there stays as it is")


@dataclasses.dataclass(frozen=True)
class CheckSection(Section):
    """What `hintsd-jax check` plays; changes no run."""

    tasks: int = key(1, "tasks of the training split, the first ones", "[1, 1024]")
    rollouts: int = key(2, "episodes of each; two show whether a task begins alike each time", "[1, 1024]")
    script: str = key(
        "", "text file with the actions to play, a line of --- between two; empty: the policy plays", path=True
    )


@dataclasses.dataclass(frozen=True)
class PlanSection(Section):
    """What `hintsd-jax plan` assumes; changes no run."""

    devices: str = key("", "such as v5e-8, v5p-64, v5e:2x4, h100, h200:8; empty: the devices of this machine")
    memory_gib: float = key(
        0.0, "memory of one device for this program, in GiB; 0: what the device is known to give", "[0, 1000000]"
    )
    compile: bool = key(True, "ask the compiler where there is one for the devices (minutes); false: arithmetic alone")
    cache_dir: str = key(
        ".cache/plan",
        "folder where the compiler's answers are kept, relative to the current folder; empty: nowhere",
        path=True,
    )


def _section(cls: type[Section]) -> Any:
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True)
class Config(Section):
    """The settings of one run, checked and with everything decided (`build.build` makes it)."""

    seed: int = key(42, "everything random follows from it", "[0, 4294967295]")
    algorithm: str = key("hint_sd", "a name of docs/algorithms.md, or package.module:Class")
    algorithm_defaults: dict[str, Any] = key(
        {},
        "for a config file: what an algorithm decides in this environment instead of its own default, as"
        " {algorithm: {section: {key: value}}}; a key that is set itself comes first",
    )
    chat: ChatSection = _section(ChatSection)
    policy: PolicySection = _section(PolicySection)
    lora: LoraSection = _section(LoraSection)
    mesh: MeshSection = _section(MeshSection)
    distributed: DistributedSection = _section(DistributedSection)
    env: EnvSection = _section(EnvSection)
    tasks: TasksSection = _section(TasksSection)
    rollout: RolloutSection = _section(RolloutSection)
    hindsight: HindsightSection = _section(HindsightSection)
    endpoint: EndpointSection = _section(EndpointSection)
    loss: LossSection = _section(LossSection)
    grpo: GrpoSection = _section(GrpoSection)
    sft: SftSection = _section(SftSection)
    batch: BatchSection = _section(BatchSection)
    optim: OptimSection = _section(OptimSection)
    eval: EvalSection = _section(EvalSection)
    alarms: AlarmsSection = _section(AlarmsSection)
    tracking: TrackingSection = _section(TrackingSection)
    checkpoint: CheckpointSection = _section(CheckpointSection)
    fork: ForkSection = _section(ForkSection)
    export: ExportSection = _section(ExportSection)
    check: CheckSection = _section(CheckSection)
    plan: PlanSection = _section(PlanSection)

    def replaced(self, changes: Mapping[str, Any]) -> Config:
        """A copy with other values of some dotted keys; nothing is checked."""
        config = self
        for name, value in changes.items():
            group, _, last = name.rpartition(".")
            change = {last: value}
            config = dataclasses.replace(
                config, **({group: dataclasses.replace(getattr(config, group), **change)} if group else change)
            )
        return config
