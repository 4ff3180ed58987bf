# SPDX-License-Identifier: Apache-2.0

"""The host loop between the engine and the environments: tasks in, finished episodes out.

A `Rollout` is the engine's job for one episode. The engine hands it each sampled span; it parses the action, starts the
environment's step in a worker, and answers with the observation's tokens. An environment that fails, a full context or
the step limit ends the episode and is counted; it never ends the run.

An action that was cut at its token limit goes to the environment as it is.

Invariant 4: an episode depends on (seed, step, task, occurrence of the task in the step, rollout index) only: its key
follows from those five. Each further stream of it (see `Episode`) has a key of its own, which follows from that one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hintsd_jax.envs.base import Message, Start, StepResult
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.random_keys import job_key, subkey
from hintsd_jax.rollout.chat import ChatFormat, Delta
from hintsd_jax.rollout.env_call import Call, CallFailure
from hintsd_jax.rollout.env_host import Host
from hintsd_jax.rollout.env_pool import CallJournal, EnvPool
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.sampling import Engine, Rewrite, Sampling, SamplingStats

PROMPT_TOO_LONG = "prompt_too_long"


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """max_steps: assistant generations an episode. context: tokens that the student may read and write at once.
    sampling: of every generation.
    """

    max_steps: int
    context: int
    sampling: Sampling


def stream_key(key: np.ndarray, stream: int) -> np.ndarray:
    """Raw key data (uint32 [2]) of an episode's stream: the episode's own key for the first, else a part of it."""
    return key if stream == 0 else subkey(key, stream)


class Rollout:
    """One episode as a job of the engine (see `sampling.Job`).

    Args:
      episode: with its prompt, awaiting an action.
      worker: the slot of `pool` in which its environment is, already reset.
      key: raw key data (uint32 [2]) of what is sampled.
    """

    def __init__(
        self, episode: Episode, worker: int, pool: EnvPool, chat: ChatFormat, config: RolloutConfig, key: np.ndarray
    ):
        self.episode, self.key, self.sampling, self.context = episode, key, config.sampling, config.context
        self.prompt: Sequence[int] = tuple(episode.tokens)
        self._worker, self._pool, self._chat, self._config = worker, pool, chat, config
        self._call: Call[StepResult] | None = None

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        """Takes a sampled span and starts the environment's step; see `sampling.Job`."""
        text = self._chat.decode(ids)
        step = self.episode.append_action(ids, logprobs, text, cut=not stopped)
        if step.cut and len(self.episode.tokens) >= self._config.context:
            self._end("context")
            return
        action = parse_action(text, self._chat.style, cut_at=len(ids) if step.cut else 0)
        step.calls, step.problem = len(action.calls), action.problem_kind
        self._call = self._pool.step(self._worker, action)

    def collect(self) -> Sequence[int] | Rewrite | None:
        """The observation's tokens, once the environment has answered; see `sampling.Job`."""
        if self._call is not None:
            self._observe(self._call.result())
            self._call = None
        if self.episode.ended:
            self._report()
            return None
        last, current = self.episode.steps[-1], len(self.episode.streams) - 1
        if last.stream < current:
            return Rewrite(tuple(self.episode.tokens), stream_key(self.key, current))
        return self.episode.tokens[last.stop :]

    def _observe(self, result: StepResult | CallFailure) -> None:
        """Writes what the environment's step gave into the episode."""
        episode, context = self.episode, self._config.context
        if isinstance(result, CallFailure):
            episode.append_observation(None)
            self._end(result.reason, result.detail)
            return
        messages, tools = self._chat.announce_tools(result.messages, result.tools)
        over = result.terminated or result.truncated or len(episode.steps) >= self._config.max_steps
        delta = None if over else self._delta(messages, tools)
        full = delta is not None and len(delta.ids) + (0 if delta.new_stream else len(episode.tokens)) >= context
        episode.append_observation(None if full else delta, messages, result.reward, tools)
        episode.reward, episode.terminated = result.reward, result.terminated
        if result.terminated:
            self._end("terminated")
        elif over:
            self._end("truncated" if result.truncated else "max_steps")
        elif full:
            self._end("context")

    def _delta(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Delta:
        """What the student reads next."""
        episode, last = self.episode, self.episode.steps[-1]
        number = len(episode.steps)
        ids = episode.tokens[last.start : last.stop]
        dialogue, listed = episode.dialogue(number), episode.tools_at(number)
        return self._chat.observation(dialogue, listed, ids, messages, tools, cut=last.cut)

    def _end(self, reason: str, detail: str = "") -> None:
        self.episode.ended, self.episode.detail = reason, detail

    def _report(self) -> None:
        """Asks the environment for its privileged report; a failure is noted in the episode, and costs nothing else."""
        if self.episode.ended.startswith("env_"):
            return
        report = self._pool.report(self._worker).result()
        if isinstance(report, CallFailure):
            self.episode.detail = f"report: {report.reason}: {report.detail}"
        else:
            self.episode.report = report


def run_episodes(
    engine: Engine,
    params,
    chat: ChatFormat,
    host: Host,
    tasks: Sequence[Mapping[str, Any]],
    rollouts: int,
    config: RolloutConfig,
    *,
    seed: int,
    step: int,
    call_timeout_s: float,
    journal: CallJournal | None = None,
    phase: str = "",
    too_long: dict[str, int] | None = None,
) -> tuple[list[Episode], Counter[str], SamplingStats]:
    """Plays `rollouts` episodes of every task.

    Args:
      params: the weights that `engine` samples with.
      host: makes the environments.
      seed, step: of the run and of the training step; with task id, its occurrence and the rollout index they give an
        episode's key.
      call_timeout_s: seconds that a call of an environment may take.
      journal: keeps the calls that timed out or died, under `(phase, task id, slot, call)`, as a task may come
        twice. One journal must not see a phase twice.
      too_long: gets, by task, the tokens of each prompt that does not fit the context.

    Returns:
      (episodes, dropped, stats): episodes in task order, then rollout order; `dropped` counts by reason the rollouts
      that never began (a reset that failed, a prompt beyond the context), each of which is missing in `episodes`, and
      environments that failed in closing ("close_...").
    """
    slot_keys = [(phase, tasks[worker // rollouts]["id"], worker) for worker in range(len(tasks) * rollouts)]
    with EnvPool(host, len(slot_keys), call_timeout_s, journal) as pool:
        calls = [pool.reset(worker, tasks[worker // rollouts], slot_keys[worker]) for worker in range(len(slot_keys))]
        jobs: list[Rollout] = []
        dropped: Counter[str] = Counter()
        prompts: dict[int, tuple[Start, Delta]] = {}
        occurrences = _occurrences([task["id"] for task in tasks])
        for worker, call in enumerate(calls):
            task_index, rollout = divmod(worker, rollouts)
            task, start = tasks[task_index], call.result()
            if isinstance(start, CallFailure):
                dropped[start.reason] += 1
                continue
            prompt = _prompt(prompts, task_index, start, chat)
            if len(prompt.ids) >= config.context:
                dropped[PROMPT_TOO_LONG] += 1
                if too_long is not None:
                    too_long[task["id"]] = len(prompt.ids)
                continue
            occurrence = occurrences[task_index]
            episode = Episode.begin(
                task["id"], rollout, start.messages, prompt, start.tools, group=task_index, occurrence=occurrence
            )
            key = job_key(seed, step, task["id"], rollout, occurrence)
            jobs.append(Rollout(episode, worker, pool, chat, config, key))
        stats = engine.run(params, jobs)
        for failure in pool.close():
            dropped[f"close_{failure.reason}"] += 1
    for job in jobs:
        job.episode.verify()
    return [job.episode for job in jobs], dropped, stats


def _occurrences(names: Sequence[str]) -> list[int]:
    """For each name, how often it stands before."""
    seen: Counter[str] = Counter()
    counts = []
    for name in names:
        counts.append(seen[name])
        seen[name] += 1
    return counts


def _prompt(prompts: dict[int, tuple[Start, Delta]], task_index: int, start: Start, chat: ChatFormat) -> Delta:
    """Tokenises the prompt of a task once for all its rollouts, unless an environment words it differently."""
    known = prompts.get(task_index)
    if known is None or known[0] != start:
        known = prompts[task_index] = (start, chat.prompt(start.messages, start.tools))
    return known[1]
