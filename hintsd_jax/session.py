# SPDX-License-Identifier: Apache-2.0

"""The parts of a run, opened from its config: mesh, policy, chat format, engine, environment, algorithm.

Training and evaluation share it. Everything is loaded and checked here, before the first episode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from hintsd_jax import policies, processes
from hintsd_jax.algorithms.base import Algorithm
from hintsd_jax.checkpoints.huggingface import load_policy, read_config
from hintsd_jax.checkpoints.peft import load_adapter
from hintsd_jax.checkpoints.tokenizer import generation_stops, load_tokenizer
from hintsd_jax.config import build, lengths
from hintsd_jax.config.schema import Config
from hintsd_jax.envs.protocol import MAX_TASKS_READ, call_style, checked_tasks, checked_version, shown
from hintsd_jax.envs.registry import resolve
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.analyser import PRIVILEGED_ANALYSERS, Analyser, EnvironmentAnalyser, ModelAnalyser
from hintsd_jax.hindsight.endpoint import Endpoint
from hintsd_jax.hindsight.looking_back import LookingBack
from hintsd_jax.hindsight.prompts import Benchmark
from hintsd_jax.hindsight.questions import Answers, Asker, Question, policy_asker
from hintsd_jax.models import lora
from hintsd_jax.models.config import PolicyConfig
from hintsd_jax.models.decoder import Params
from hintsd_jax.models.sharding import make_mesh, serving_mesh, shardings
from hintsd_jax.privacy import Privacy
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import run_episodes
from hintsd_jax.rollout.dialogues import Dialogues
from hintsd_jax.rollout.env_host import Host
from hintsd_jax.rollout.env_process import host_for
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.played import EnvFailure, Rollouts
from hintsd_jax.runs import interruption
from hintsd_jax.runs.journal import Journal
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.sampling import Engine


class Watch(Protocol):
    """Who looks on. What they do changes nothing in the run."""

    def began(self, what: str, total: int) -> None:
        """So many things of a kind are to be done ("programs", "episodes", "answers", "batches"), `tick` after each."""

    def tick(self, n: int = 1) -> None:
        """So many more are done."""

    def failed(self, failures: Sequence[EnvFailure]) -> None:
        """These calls of environments have failed."""


class Nobody:
    """A watch that does nothing."""

    def began(self, what: str, total: int) -> None: ...
    def tick(self, n: int = 1) -> None: ...
    def failed(self, failures: Sequence[EnvFailure]) -> None: ...


@dataclasses.dataclass
class Session:
    """The parts of a run. `trained` is what training starts from: all weights, or an adapter on the `frozen` ones;
    training takes a copy and sets it to None. `endpoint` is the analyser behind a server, where there is one.
    `has_played`: whether any episode could be played so far.
    """

    config: Config
    algorithm: Algorithm
    mesh: Mesh
    policy: PolicyConfig
    frozen: Params | None
    trained: Params | None
    chat: ChatFormat
    engine: Engine
    env_class: type
    endpoint: Endpoint | None = None
    watch: Watch = dataclasses.field(default_factory=Nobody)
    has_played: bool = False
    _splits: dict[str, Sequence[Mapping]] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """An environment may have words of its own, which the algorithm then speaks with."""
        self.algorithm.prompts = prompts.of_run(self.config.hindsight.prompts, self.env_class, self.config.env.name)

    @classmethod
    def open(cls, config: Config, workdir: str = "") -> Session:
        """Loads and checks everything but the tasks; a policy by name is fetched, see `policies.pinned`.

        Raises:
          UserError: whatever the user can mend: a missing or broken checkpoint, a tokenizer that does not fit, an
            unknown environment.
        """
        env_class = resolve(config.env.name)
        Benchmark.of(env_class, config.env.name)  # what it says of itself is read before weights are
        prompts.of_run(config.hindsight.prompts, env_class, config.env.name)
        Privacy.of(env_class, config.env.name, config.env.record_texts).check_training(config.tasks.train_split)
        config = policies.pinned(config, workdir)
        kv_heads = read_config(config.policy.location).num_kv_heads
        sizes = build.mesh_sizes(config, kv_heads, jax.device_count(), processes.count())
        mesh = make_mesh(sizes["data"], sizes["fsdp"], sizes["tensor"])
        own_mesh = serving_mesh(mesh, kv_heads)
        if config.rollout.slots % own_mesh.shape["data"]:
            raise UserError(
                f"rollout.slots = {config.rollout.slots} must be a multiple of the {own_mesh.shape['data']} copies of"
                " the model that mesh.data puts on the devices of a process"
            )
        tokenizer = load_tokenizer(config.policy.location)
        chat = ChatFormat(
            tokenizer,
            history=config.chat.history,
            stop_ids=generation_stops(config.policy.location),
            call_style=call_style(env_class, config.env.name, config.env.call_style),
            enable_thinking=config.chat.enable_thinking,
            **config.chat.template_kwargs,
        )
        adapter = build.lora_config(config)
        policy, weights = load_policy(
            config.policy.location,
            mesh,
            compute_dtype=build.compute_dtype(config),
            remat=config.policy.remat,
            lora=adapter,
        )
        engine_config = build.engine_config(config)
        _check_fit(config, policy, chat, engine_config.context)
        policy = dataclasses.replace(policy, unknown_ids=chat.unknown_ids(policy.vocab_size))
        frozen, trained = (None, weights) if adapter is None else (weights, _first_adapter(config, policy, mesh))
        engine = Engine(policy, engine_config, chat.stop_ids, own_mesh, between=interruption.check)
        endpoint = None
        if config.hindsight.analyser == "endpoint":
            endpoint = Endpoint(config.endpoint, build.answer_sampling(config))
        return cls(config, build.algorithm(config), mesh, policy, frozen, trained, chat, engine, env_class, endpoint)

    def weights(self, trained: Params | None) -> Params:
        """What the engine and the decoder take, from what is trained.

        Raises ValueError for the session's own weights after training has taken them.
        """
        if trained is None:
            raise ValueError("the session's weights are in the train state now")
        return lora.attach(self.frozen, trained)

    @cached_property
    def host(self) -> Host:
        """Where environments live."""
        env = self.config.env
        return host_for(self.env_class, env.name, env.options, env.isolation, env.memory_gib)

    @cached_property
    def dialogues(self) -> Dialogues | None:
        """What an offline algorithm learns from; None for all others. Raises UserError as `Dialogues.read`."""
        return Dialogues.read(self.config.sft.path, self.chat) if self.algorithm.offline else None

    @property
    def chat_notes(self) -> list[str]:
        """A line for each way in which the student reads something else than the chat template alone would write."""
        notes = {
            "chat.history = keep departs from the chat template": self.chat.deviation,
            "the chat template": self.chat.adaptation,
        }
        return [f"{what}: {text}" for what, text in notes.items() if text]

    @property
    def privacy(self) -> Privacy:
        """What may be kept of episodes and results."""
        return Privacy.of(self.env_class, self.config.env.name, self.config.env.record_texts)

    @property
    def benchmark(self) -> str:
        """The version of the benchmark, such as "bfcl-eval 2026.3.23"; "" where the environment names none."""
        return checked_version(self.env_class, self.config.env.name)

    def tasks(self, split: str, limit: int | None = None) -> Sequence[Mapping]:
        """The tasks of a split, or its first `limit`. Raises UserError as `checked_tasks`."""
        env = self.config.env
        if split not in self._splits:
            self._splits[split] = checked_tasks(self.env_class, split, env.data_dir, env.options, env.name)
        tasks = self._splits[split]
        return tasks if limit is None else tasks[:limit]

    @cached_property
    def tasks_digest(self) -> str:
        """Of the held-out tasks and of the first of those that are trained on: a run that goes on must find them again,
        or it compares what cannot be compared.
        """
        tasks, count = self.config.tasks, self.config.eval
        parts = ((tasks.train_split, 100), (tasks.eval_split, count.tasks), (tasks.test_split, count.test_tasks))
        held = [f"{split} {_written(task)}" for split, number in parts if number for task in self.tasks(split, number)]
        return hashlib.sha256("\n".join(held).encode()).hexdigest()[:16]

    def overlaps(self, tasks: Sequence[Mapping]) -> list[str]:
        """A line for each held-out split that has tasks of the training split, alike in all that they hold."""
        config, lines = self.config, []
        known = {task["id"]: shown(task, 10_000) for task in tasks} if len(tasks) <= MAX_TASKS_READ else {}
        splits = {config.tasks.eval_split: config.eval.tasks, config.tasks.test_split: config.eval.test_tasks}
        for split, count in splits.items():
            held_out = self.tasks(split, count) if count and known else []
            same = sum(known.get(task["id"]) == shown(task, 10_000) for task in held_out)
            if same:
                lines.append(
                    f"{same:,} of {len(held_out):,} tasks of {split} are trained on too: that is no held-out result"
                )
        return lines

    def play(
        self,
        params: Params,
        tasks: Sequence[Mapping],
        rollouts: int,
        *,
        step: int,
        greedy: bool = False,
        journal: Journal | None = None,
        over: Callable[[int, Episode | None], object] = lambda place, episode: None,
        refuse: bool = True,
    ) -> Rollouts:
        """`rollouts` episodes of every task with these weights, those that other processes have played too; see
        `rollout.collector.run_episodes`.

        journal: keeps what the outside world answers; None where nothing is resumed. over: as in `run_episodes`, of
        those that this process plays. refuse: whether `refuse_unplayed` follows.

        Raises:
          UserError: as `refuse_unplayed`.
        """
        env = self.config.env
        numbers = processes.share(len(tasks) * rollouts)
        self.watch.began("episodes", len(numbers))

        def one_is_over(place: int, episode: Episode | None) -> None:
            self.watch.tick()
            over(place, episode)

        own = run_episodes(
            self.engine,
            params,
            self.chat,
            self.host,
            tasks,
            rollouts,
            build.rollout_config(self.config, greedy=greedy),
            seed=self.config.seed,
            step=step,
            call_timeout_s=env.call_timeout_s,
            numbers=numbers,
            resets_ahead=env.resets_ahead,
            journal=journal,
            phase="greedy" if greedy else "sampled",
            over=one_is_over,
            failed=self.watch.failed,
        )
        played = Rollouts.together(processes.gather(own, "rollouts"))
        self.has_played |= bool(played.episodes)
        if refuse:
            self.refuse_unplayed(played)
        return played

    def refuse_unplayed(self, played: Rollouts) -> None:
        """Raises UserError where not a single prompt fits the context, or, as long as no episode was ever played,
        environments failed so that none could be.
        """
        if not played.episodes and not played.failed:
            raise UserError(
                f"all {played.begun} prompts are longer than rollout.context ="
                f" {self.config.rollout.context}: {played.describe_too_long()}. Set rollout.context to about"
                f" {lengths.rounded(2 * max(played.too_long.values()))}, with batch.length_buckets = () and"
                " hindsight.context = 0 to have the lengths that follow derived; or choose tasks or tools with shorter"
                " prompts"
            )
        if not self.has_played:
            first = next(failure for failure in played.failures if failure.call != "close")
            where = f"{first.call} of task {first.task_id}: {first.reason}: {first.detail}"
            raise UserError(
                f"none of {played.begun} episodes could be played: environment {self.config.env.name!r} failed in"
                f" {played.failed} of them, first in {where}. Nothing is scored or trained on; mend the environment,"
                " and the same command goes on"
            )

    def analyser(self, trained: Params | None, step: int, journal: Journal | None = None) -> Analyser:
        """Who looks back on the episodes of a training step.

        trained: the weights that the policy analyses with, where it does. journal: as in `play`.
        """
        hindsight, seed = self.config.hindsight, self.config.seed
        key_of = lambda e: job_key(seed, step, f"hindsight {e.task_id}", e.rollout, e.occurrence)
        if hindsight.analyser in PRIVILEGED_ANALYSERS:
            return EnvironmentAnalyser(key_of, hindsight.select, hindsight.max_targets)
        if self.endpoint:
            ask = partial(self.endpoint.ask, journal=journal)
        else:
            sampling = build.answer_sampling(self.config)
            ask = policy_asker(
                self.engine, self.weights(trained), self.chat, sampling, hindsight.context, self.watch.tick
            )
        return ModelAnalyser(
            partial(self._ask, ask),
            self.algorithm.prompts,
            Benchmark.of(self.env_class, self.config.env.name),
            key_of,
            hindsight.select,
            hindsight.max_targets,
            hindsight.max_trajectory_chars,
        )

    def looking_back(self, analyser: Analyser) -> LookingBack:
        """Around the rollouts that the algorithm looks back on with `analyser`: beside them where an endpoint answers,
        after them where the policy does, which the engine serves with one set of weights at a time.
        """
        analyse = lambda episodes: self.algorithm.analyse(episodes, analyser)
        return LookingBack(analyse, self._asks_beside, partial(self.watch.began, "answers", 0))

    @property
    def _asks_beside(self) -> bool:
        """Processes know of each other's episodes only when all of them are over."""
        return self.endpoint is not None and processes.count() == 1

    def _ask(self, ask: Asker, questions: Iterable[Question]) -> Answers:
        """The answers, each asked for by one process; all questions to an endpoint by the first, which keeps its
        limits.
        """
        if self._asks_beside:
            return ask(questions)
        questions = list(questions)
        own = processes.share(len(questions))
        if self.endpoint:
            own = range(len(questions) if processes.leads() else 0)
        self.watch.began("answers", len(own))
        answers = ask([questions[number] for number in own])
        return Answers.together(processes.gather(answers, "analysis"))


def _written(task: Mapping) -> str:
    """A task as text that is the same in every process, unlike a `repr`, which may hold addresses, and sets in any
    order: what JSON cannot hold counts by its type, and a task that it cannot hold at all by its id.
    """
    as_json = lambda value: dict(value) if isinstance(value, Mapping) else type(value).__name__
    try:
        return json.dumps(task, default=as_json, skipkeys=True)
    except (ValueError, RecursionError):  # it holds itself
        return json.dumps(task["id"])


def open_workdir(session: Session, path: str, may_differ: Callable[[str], bool]) -> Workdir:
    """`Workdir.open`, in the first process before all others."""
    opened = partial(
        Workdir.open,
        path,
        session.config,
        may_differ=may_differ,
        benchmark=session.benchmark,
        prompts={"set": session.config.hindsight.prompts, "digest": prompts.digest(session.algorithm.prompts)},
        process=processes.index(),
    )
    folder = opened() if processes.leads() else None
    processes.gather(None, "the workdir")
    return folder or opened()


def step_tasks(tasks: Sequence[Mapping], seed: int, step: int, count: int) -> list[Mapping]:
    """The tasks of a training step (counted from 0): epochs of a seeded shuffle, read on without a gap. Pure in its
    arguments.
    """
    places = [divmod(position, len(tasks)) for position in range(step * count, (step + 1) * count)]
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(len(tasks)) for epoch, _ in places}
    return [tasks[int(orders[epoch][place])] for epoch, place in places]


def _check_fit(config: Config, policy: PolicyConfig, chat: ChatFormat, context: int) -> None:
    """Raises UserError where tokenizer, model and context do not belong together."""
    if chat.vocab_size > policy.vocab_size:
        raise UserError(
            f"the tokenizer of {config.policy.location} has ids up to {chat.vocab_size - 1}, but its model only"
            f" {policy.vocab_size} entries: use the tokenizer that belongs to the checkpoint"
        )
    if context > policy.max_positions:
        raise UserError(
            f"rollout.context or hindsight.context = {context} exceeds the {policy.max_positions} positions of"
            f" {config.policy.location}: lower it"
        )


def _first_adapter(config: Config, policy: PolicyConfig, mesh: Mesh) -> dict:
    """The adapter that training starts from: of `lora.path`, or a new one that follows from the seed."""
    init = partial(lora.init_adapter, policy)
    layout = shardings(jax.eval_shape(init, jax.random.key(0)), lora.logical_axes(policy), mesh, "train")
    if config.lora.path:
        return jax.device_put(load_adapter(config.lora.path, policy), layout)
    return jax.jit(init, out_shardings=layout)(jax.random.key(config.seed))
