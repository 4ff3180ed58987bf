"""What a run is made of, from its config: policy, chat format, engine, environment and tasks. Training and evaluation share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from ml_collections import ConfigDict

from hintsd_jax.distill.losses import LossConfig
from hintsd_jax.distill.state import OptimConfig
from hintsd_jax.envs.base import resolve
from hintsd_jax.episodes.chat import ChatFormat
from hintsd_jax.episodes.rollout import RolloutConfig, run_episodes
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.analyser import HindsightConfig
from hintsd_jax.policy.config import PolicyConfig
from hintsd_jax.policy.huggingface import load_policy, load_tokenizer
from hintsd_jax.sampling import Engine, EngineConfig, Sampling


@dataclasses.dataclass
class Session:
    """The parts of a run. `params` are the loaded weights; training takes a copy and sets them to None."""

    config: ConfigDict
    policy: PolicyConfig
    params: dict | None
    chat: ChatFormat
    engine: Engine
    env_class: type

    @classmethod
    def open(cls, config: ConfigDict) -> Session:
        """Loads and checks everything but the tasks.

        Raises:
          UserError: whatever the user can mend: a missing or broken checkpoint, a tokenizer that does not fit, an unknown environment.
        """
        env_class = resolve(config.env.name)
        tokenizer = load_tokenizer(config.policy.path)
        chat = ChatFormat(tokenizer, history=config.history)
        policy, params = load_policy(config.policy.path, compute_dtype=config.policy.compute_dtype, remat=config.policy.remat)
        if chat.vocab_size > policy.vocab_size:
            raise UserError(
                f"the tokenizer of {config.policy.path} has ids up to {chat.vocab_size - 1}, but its model only {policy.vocab_size} entries:"
                " use the tokenizer that belongs to the checkpoint"
            )
        context = max(config.rollout.context, config.hindsight.context)
        if context > policy.max_positions:
            raise UserError(
                f"rollout.context or hindsight.context = {context} exceeds the {policy.max_positions} positions of {config.policy.path}: lower it"
            )
        engine_config = EngineConfig(
            slots=config.rollout.slots,
            context=context,
            max_tokens=max(config.rollout.max_action_tokens, config.hindsight.max_tokens),
            prefill_buckets=tuple(config.rollout.prefill_buckets),
            prefill_rows=config.rollout.prefill_rows,
            refill=config.rollout.refill,
            overlap=config.rollout.overlap,
        )
        return cls(config, policy, params, chat, Engine(policy, engine_config, chat.stop_ids), env_class)

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
        """How failed episodes are analysed."""
        hindsight = self.config.hindsight
        sampling = Sampling(hindsight.temperature, hindsight.top_p, 0, hindsight.max_tokens)
        return HindsightConfig(
            hindsight.select, hindsight.analyser, hindsight.max_targets, hindsight.clip_chars, hindsight.context, sampling
        )

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
        )
        if not episodes and dropped["prompt_too_long"]:
            raise UserError(
                f"all {dropped['prompt_too_long']} prompts are longer than rollout.context = {self.config.rollout.context}: raise it"
                " or choose tasks with shorter prompts"
            )
        return episodes, dropped, stats


def step_tasks(tasks: Sequence[Mapping], seed: int, step: int, count: int) -> list[Mapping]:
    """The tasks of a training step (counted from 0): epochs of a seeded shuffle, read on without a gap. Pure in its arguments."""
    positions = np.arange(step * count, (step + 1) * count)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(len(tasks)) for epoch in set(positions // len(tasks))}
    return [tasks[int(orders[position // len(tasks)][position % len(tasks)])] for position in positions]


def loss_config(config: ConfigDict) -> LossConfig:
    distill = config.distill
    return LossConfig(
        loss="sft" if config.method == "sharpen" else "distill",
        divergence=distill.divergence,
        support=distill.support,
        top_k=distill.top_k,
        alpha=distill.alpha,
        chunk=distill.chunk,
    )


def optim_config(config: ConfigDict) -> OptimConfig:
    options = config.optim.to_dict()
    return OptimConfig(total_steps=options.pop("steps"), **options)


def packing_options(config: ConfigDict) -> dict:
    distill = config.distill
    return {
        "length_buckets": tuple(distill.length_buckets),
        "action_buckets": tuple(distill.action_buckets),
        "rows_per_batch": distill.rows_per_batch,
        "teacher_extra": distill.teacher_extra,
        "mean_of_micro_means": distill.mean_of_micro_means,
    }
