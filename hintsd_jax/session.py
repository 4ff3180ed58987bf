"""What a run is made of, from its config: mesh, policy, chat format, engine, environment and tasks. Training and
evaluation share it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hintsd_jax.checkpoints.huggingface import load_policy
from hintsd_jax.checkpoints.peft import load_adapter
from hintsd_jax.checkpoints.tokenizer import generation_stops, load_tokenizer
from hintsd_jax.envs.base import resolve
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.analyser import HindsightConfig
from hintsd_jax.hindsight.endpoint import Endpoint, EndpointConfig
from hintsd_jax.hindsight.questions import Asker, policy_asker
from hintsd_jax.methods import method_of, resolved
from hintsd_jax.models import lora
from hintsd_jax.models.config import LoraConfig, PolicyConfig
from hintsd_jax.models.sharding import make_mesh, shardings
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.runs.journal import Journal
from hintsd_jax.sampling import Engine, EngineConfig, Sampling
from hintsd_jax.training.batching import Shapes
from hintsd_jax.training.losses import LossConfig
from hintsd_jax.training.state import OptimConfig


@dataclasses.dataclass
class Session:
    """The parts of a run. `trained` is what training starts from: all weights, or an adapter on the `frozen` ones;
    training takes a copy and sets it to None. `endpoint` is the analyser behind a server, where there is one. `journal`
    keeps what the outside world answers in the current phase of the current step; None where nothing is resumed."""

    config: ConfigDict
    mesh: Mesh
    policy: PolicyConfig
    frozen: dict | None
    trained: dict | None
    chat: ChatFormat
    engine: Engine
    env_class: type
    endpoint: Endpoint | None = None
    journal: Journal | None = None

    @classmethod
    def open(cls, config: ConfigDict) -> Session:
        """Loads and checks everything but the tasks.

        Raises:
          UserError: whatever the user can mend: a missing or broken checkpoint, a tokenizer that does not fit, an
            unknown environment.
        """
        config = resolved(config)
        env_class = resolve(config.env.name)
        mesh = make_mesh(**config.mesh)
        if config.rollout.slots % mesh.shape["data"]:
            raise UserError(
                f"rollout.slots = {config.rollout.slots} must be a multiple of mesh.data = {mesh.shape['data']}"
            )
        tokenizer = load_tokenizer(config.policy.path)
        chat = ChatFormat(
            tokenizer,
            history=config.chat.history,
            stop_ids=generation_stops(config.policy.path),
            enable_thinking=config.chat.enable_thinking,
            **config.chat.template_kwargs.to_dict(),
        )
        adapter = lora_config(config)
        policy, weights = load_policy(
            config.policy.path, mesh, compute_dtype=compute_dtype(config), remat=config.policy.remat, lora=adapter
        )
        if chat.vocab_size > policy.vocab_size:
            raise UserError(
                f"the tokenizer of {config.policy.path} has ids up to {chat.vocab_size - 1}, but its model only {policy.vocab_size} entries:"
                " use the tokenizer that belongs to the checkpoint"
            )
        serving = engine_config(config)
        if serving.context > policy.max_positions:
            raise UserError(
                f"rollout.context or hindsight.context = {serving.context} exceeds the {policy.max_positions} positions of {config.policy.path}: lower it"
            )
        frozen, trained = (None, weights) if adapter is None else (weights, first_adapter(config, policy, mesh))
        engine = Engine(policy, serving, chat.stop_ids, mesh)
        endpoint = None
        if config.hindsight.analyser == "endpoint":
            endpoint = Endpoint(EndpointConfig(**config.endpoint), answer_sampling(config))
        return cls(config, mesh, policy, frozen, trained, chat, engine, env_class, endpoint)

    def weights(self, trained: dict) -> dict:
        """What the engine and the decoder take, from what is trained."""
        return lora.attach(self.frozen, trained)

    @property
    def benchmark(self) -> str:
        """The version of the benchmark, such as "bfcl-eval 2026.3.23", where the environment's class has `version`, a
        class method or an attribute; "" where it has none."""
        version = getattr(self.env_class, "version", "")
        return str(version() if callable(version) else version)

    @property
    def shapes(self) -> Shapes:
        """The shapes of the update's batches on this mesh."""
        return update_shapes(self.config, self.mesh)

    def tasks(self, split: str) -> Sequence[Mapping]:
        """The tasks of a split. Raises UserError where the environment does not take its options, or has no task."""
        env = self.config.env
        try:
            tasks = self.env_class.tasks(split, env.data_dir, **env.options.to_dict())
        except TypeError as error:
            raise UserError(f"env.options do not fit environment {env.name!r}: {error}") from error
        if not len(tasks):
            raise UserError(f"environment {env.name!r} has no tasks in split {split!r}")
        return tasks

    def rollout_config(self, greedy: bool = False) -> RolloutConfig:
        """How episodes are sampled: as configured, or greedily."""
        rollout = self.config.rollout
        sampling = Sampling(
            temperature=0.0 if greedy else rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_tokens=rollout.max_action_tokens,
        )
        return RolloutConfig(max_steps=rollout.max_steps, context=rollout.context, sampling=sampling)

    def hindsight_config(self) -> HindsightConfig:
        """What analysers are asked."""
        hindsight = self.config.hindsight
        return HindsightConfig(hindsight.select, hindsight.max_targets, hindsight.max_trajectory_chars)

    def policy_asker(self, params) -> Asker:
        """An analyser with these weights, in the engine of the rollouts."""
        return policy_asker(self.engine, params, self.chat, answer_sampling(self.config), self.config.hindsight.context)

    def play(self, params, tasks: Sequence[Mapping], rollouts: int, *, step: int, greedy: bool = False):
        """`rollouts` episodes of every task with these weights; see `episodes.rollout.run_episodes`.

        Raises:
          UserError: not a single prompt fits the context.
        """
        env = self.config.env
        episodes, dropped, stats = run_episodes(
            self.engine,
            params,
            self.chat,
            partial(self.env_class, **env.options.to_dict()),
            tasks,
            rollouts,
            self.rollout_config(greedy),
            seed=self.config.seed,
            step=step,
            call_timeout_s=env.call_timeout_s,
            answers=self.journal,
            phase="greedy" if greedy else "sampled",
        )
        if not episodes and dropped["prompt_too_long"]:
            raise UserError(
                f"all {dropped['prompt_too_long']} prompts are longer than rollout.context = {self.config.rollout.context}: raise it"
                " or choose tasks with shorter prompts"
            )
        return episodes, dropped, stats


def step_tasks(tasks: Sequence[Mapping], seed: int, step: int, count: int) -> list[Mapping]:
    """The tasks of a training step (counted from 0): epochs of a seeded shuffle, read on without a gap. Pure in its
    arguments.
    """
    positions = np.arange(step * count, (step + 1) * count)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(len(tasks)) for epoch in set(positions // len(tasks))
    }
    return [tasks[int(orders[position // len(tasks)][position % len(tasks)])] for position in positions]


def engine_config(config: ConfigDict) -> EngineConfig:
    """One engine serves rollouts, analysis and evaluation."""
    rollout, hindsight = config.rollout, config.hindsight
    return EngineConfig(
        slots=rollout.slots,
        context=max(rollout.context, hindsight.context),
        max_tokens=max(rollout.max_action_tokens, hindsight.max_tokens),
        prefill_buckets=tuple(rollout.prefill_buckets),
        prefill_rows=rollout.prefill_rows,
        refill=rollout.refill_fraction,
        overlap=rollout.overlap_env,
    )


def update_shapes(config: ConfigDict, mesh: Mesh) -> Shapes:
    """The shapes of the update's batches: so many rows for each part of the mesh that rows are split over. Where the
    teacher reads its advice at the start, there is no trunk that it could share with the student."""
    method, distill, hindsight = method_of(config), config.distill, config.hindsight
    taught, streams, actions = loss_config(config).taught, tuple(batch.branch_buckets), tuple(batch.action_buckets)
    if method.whole or (taught and (hindsight.feedback_position == "start" or hindsight.select == "all")):
        streams, actions = batch.whole_episode_buckets[:1], batch.whole_episode_buckets[1:]
    return Shapes(
        tuple(batch.length_buckets),
        tuple(streams) if taught else (0,) * len(streams),
        tuple(actions),
        rows=batch.rows_per_device * mesh.shape["data"] * mesh.shape["fsdp"],
        trunk=taught and batch.layout == "branches" and hindsight.feedback_position == "target",
    )


def loss_config(config: ConfigDict) -> LossConfig:
    distill = config.distill
    names = ("divergence", "support", "top_k", "alpha", "importance_clip", "clip_low", "clip_high", "chunk")
    return LossConfig(loss=method_of(config).loss, **{name: distill[name] for name in names})


def answer_sampling(config: ConfigDict) -> Sampling:
    """How an analyser's answers are sampled."""
    hindsight = config.hindsight
    return Sampling(hindsight.temperature, hindsight.top_p, 0, hindsight.max_tokens)


def optim_config(config: ConfigDict) -> OptimConfig:
    options = config.optim.to_dict()
    return OptimConfig(total_steps=options.pop("steps"), **options)


def lora_config(config: ConfigDict) -> LoraConfig | None:
    """The adapter that is trained; None where all weights are."""
    adapter = config.lora
    return LoraConfig(adapter.rank, adapter.alpha, adapter.dropout, tuple(adapter.targets)) if adapter.rank else None


def compute_dtype(config: ConfigDict) -> str:
    """What `policy.compute_dtype` means here. A CPU has no bfloat16 units: its caches in bfloat16 are about 50 times
    slower.
    """
    if config.policy.compute_dtype != "auto":
        return config.policy.compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def first_adapter(config: ConfigDict, policy: PolicyConfig, mesh: Mesh) -> dict:
    """The adapter that training starts from: of `lora.path`, or a fresh one that follows from the seed."""
    init = partial(lora.init_adapter, policy)
    layout = shardings(jax.eval_shape(init, jax.random.key(0)), lora.logical_axes(policy), mesh, "train")
    if config.lora.path:
        return jax.device_put(load_adapter(config.lora.path, policy), layout)
    return jax.jit(init, out_shardings=layout)(jax.random.key(config.seed))
