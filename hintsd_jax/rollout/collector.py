# SPDX-License-Identifier: Apache-2.0

"""The host loop between the engine and the environments: tasks in, played episodes out.

A `Rollout` is the engine's job for one episode. With its slot in the engine it gets one in the environment pool, so no
more environments exist than slots. The engine hands it each sampled span; it parses the action, starts the
environment's step in a worker, and answers with the observation's tokens.

An action that was cut at its token limit goes to the environment as it is.

Invariant 4: an episode depends on (seed, step, task, occurrence of the task in the step, rollout index) only: its key
follows from those five. Each further stream of it (see `Episode`) has a key of its own, which follows from that one.

What an environment's failure took is told apart from what was played: see `rollout.played`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hintsd_jax.envs.base import Message, Start, StepResult
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.random_keys import job_key, subkey
from hintsd_jax.rollout.chat import ChatFormat, Delta
from hintsd_jax.rollout.env_call import Call, CallFailure
from hintsd_jax.rollout.env_host import Host
from hintsd_jax.rollout.env_pool import CallJournal, EnvPool, Key
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.played import PROMPT_TOO_LONG, EnvFailure, Rollouts
from hintsd_jax.sampling import Engine, Rewrite, Sampling, SamplingStats

CHARS_PER_TOKEN = 3  # of an observation, as a bound on what may fit; English has about 4
MOST_CHARS_PER_TOKEN = 64  # of a prompt: a longer one cannot fit, and is not tokenised to find out


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
    """One episode as a job of the engine (see `sampling.Job`), in an environment of `pool` that is reset already.

    Args:
      episode: with its prompt, awaiting an action.
      worker: the slot of `pool` in which its environment is.
      key: raw key data (uint32 [2]) of what is sampled.
    """

    def __init__(
        self, episode: Episode, worker: int, pool: EnvPool, chat: ChatFormat, config: RolloutConfig, key: np.ndarray
    ):
        self.episode, self.key, self.sampling, self.context = episode, key, config.sampling, config.context
        self.failures: list[EnvFailure] = []
        self._worker, self._pool, self._chat, self._config = worker, pool, chat, config
        self._call: Call[StepResult] | None = None

    def begin(self, slot: int) -> Sequence[int] | None:
        """The episode's prompt; see `sampling.Job`."""
        return tuple(self.episode.tokens)

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        """Takes a sampled span and starts the environment's step; see `sampling.Job`."""
        text = self._chat.decode(ids)
        step = self.episode.append_action(ids, logprobs, text, cut=not stopped)
        if step.cut and len(self.episode.tokens) >= self._config.context:
            self._end("context")
            return
        callable_tools = self.episode.callable_at(len(self.episode.steps))
        action = parse_action(text, self._chat.style, len(ids) if step.cut else 0, callable_tools)
        step.calls, step.problem = action.size, action.problem_kind
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
            self._failed(f"step {len(episode.steps)}", result)
            self._end(result.reason, result.detail)
            return
        over = result.terminated or result.truncated or len(episode.steps) >= self._config.max_steps
        left = context - len(episode.tokens)
        room = CHARS_PER_TOKEN * left
        while True:
            read = cut_to(result.messages, room, context)
            messages, tools = self._chat.announce_tools(read, result.tools)
            delta = None if over else self._delta(messages, tools)
            used = 0 if delta is None else len(delta.ids) + (0 if delta.new_stream else len(episode.tokens))
            # What is cut leaves half of the room: the flood is not the policy's, whose episode goes on.
            if read == tuple(result.messages) or used <= context - left // 2 or not room:
                break
            room //= 2
        full = used >= context
        announced = () if tools else result.tools
        episode.append_observation(None if full else delta, messages, result.reward, tools, announced)
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
            self._failed("report", report)
            self.episode.detail = f"report: {report.reason}: {report.detail}"
        else:
            self.episode.report = report

    def _failed(self, call: str, failure: CallFailure) -> None:
        """Notes that a call of the episode's environment has failed."""
        self.failures.append(
            EnvFailure(self.episode.task_id, self.episode.rollout, call, **dataclasses.asdict(failure))
        )


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What the episodes that are played together have in common. prompts: by group, what was tokenised already. over,
    failed: see `run_episodes`.
    """

    pool: EnvPool
    chat: ChatFormat
    config: RolloutConfig
    over: Callable[[int, Episode | None], object]
    failed: Callable[[Sequence[EnvFailure]], object]
    prompts: dict[int, tuple[Start, Delta]] = dataclasses.field(default_factory=dict)

    def prompt(self, group: int, start: Start) -> Delta:
        """Tokenises the prompt of a task once for all its rollouts, unless an environment words it differently."""
        known = self.prompts.get(group)
        if known is None or known[0] != start:
            known = self.prompts[group] = (start, self.chat.prompt(start.messages, start.tools))
        return known[1]


class NewRollout(Rollout):
    """An episode that begins with its slot in the engine: there its environment is reset.

    Args:
      place: of the episode among those that are played.
      task: what is played.
      episode: as yet only what it is called.
      journal_key: see `EnvPool.reset`.

    Attributes:
      dropped: why it was never begun, once that is known; "" else.
      prompt_length: tokens of its prompt, once they are known.
    """

    def __init__(
        self, place: int, task: Mapping[str, Any], episode: Episode, journal_key: Key, stage: _Stage, key: np.ndarray
    ):
        super().__init__(episode, -1, stage.pool, stage.chat, stage.config, key)
        self.dropped, self.prompt_length = "", 0
        self._place, self._task, self._journal_key, self._stage = place, task, journal_key, stage
        self._reset: Call[Start] | None = None

    def begin(self, slot: int) -> None:
        """Starts the reset, unless it has been started ahead; see `sampling.Job`."""
        self._worker = slot
        self._reset = self._pool.reset(slot, self._task, self._journal_key)

    def collect(self) -> Sequence[int] | Rewrite | None:
        """See `sampling.Job`."""
        if self._reset is None:
            answer = super().collect()
        else:
            start, self._reset = self._reset.result(), None
            answer = self._begun(start)
        if answer is None:
            self._stage.over(self._place, self.episode if self.was_played else None)
        return answer

    @property
    def was_played(self) -> bool:
        """Of one that is over: whether neither a failure of its environment nor its prompt kept it from being
        played.
        """
        return not self.dropped and not self.episode.ended.startswith("env_")

    def _failed(self, call: str, failure: CallFailure) -> None:
        super()._failed(call, failure)
        self._stage.failed(self.failures[-1:])

    def _begun(self, start: Start | CallFailure) -> Rewrite | None:
        """The prompt; None where the episode cannot begin."""
        if isinstance(start, CallFailure):
            self._failed("reset", start)
            self.dropped = start.reason
            return None
        context, characters = self._config.context, sum(len(message["content"]) for message in start.messages)
        if characters > MOST_CHARS_PER_TOKEN * context:
            self.dropped, self.prompt_length = PROMPT_TOO_LONG, characters // 4  # about
            return None
        prompt = self._stage.prompt(self.episode.group, start)
        self.prompt_length = len(prompt.ids)
        if self.prompt_length >= context:
            self.dropped = PROMPT_TOO_LONG
            return None
        name = self.episode
        self.episode = Episode.begin(
            name.task_id,
            name.rollout,
            self._chat.heard(start.messages),
            prompt,
            start.tools,
            name.group,
            name.occurrence,
        )
        return Rewrite(tuple(self.episode.tokens), self.key)


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
    numbers: range | None = None,
    resets_ahead: int = 0,
    journal: CallJournal | None = None,
    phase: str = "",
    over: Callable[[int, Episode | None], object] = lambda place, episode: None,
    failed: Callable[[Sequence[EnvFailure]], object] = lambda failures: None,
) -> Rollouts:
    """Plays `rollouts` episodes of every task, or those of them with the given `numbers`.

    Args:
      params: the weights that `engine` samples with.
      host: makes the environments; at most as many at once as the engine has slots, and `resets_ahead` more.
      seed, step: of the run and of the training step; with task id, its occurrence and the rollout index they give an
        episode's key.
      call_timeout_s: seconds that a call of an environment may take.
      numbers: of the episodes that are played here, counted by task, then by rollout; None: all.
      resets_ahead: episodes whose environment is reset before a slot is free for them.
      journal: keeps the calls that timed out or died, under `(phase, task id, number of the episode, call)`. One
        journal must not see a phase twice.
      over: called whenever an episode is over, with its place in their order, from 0 on, and the episode; None where
        it could not be played. failed: called with calls of environments that failed, as soon as that is known.
    """
    jobs: list[NewRollout] = []
    names = _occurrences([task["id"] for task in tasks])
    with EnvPool(host, engine.config.slots, call_timeout_s, journal, resets_ahead) as pool:
        stage = _Stage(pool, chat, config, over, failed)
        for number in range(len(tasks) * rollouts) if numbers is None else numbers:
            group, rollout = divmod(number, rollouts)
            name, occurrence = names[group]
            episode = Episode(name, rollout, (), group=group, occurrence=occurrence)
            key = job_key(seed, step, name, rollout, occurrence)
            called = (phase, name, number)
            pool.announce(tasks[group], called)
            jobs.append(NewRollout(len(jobs), tasks[group], episode, called, stage, key))
        stats = engine.run(params, jobs)
        closing = [EnvFailure("", 0, "close", **dataclasses.asdict(failure)) for failure in pool.close()]
    if closing:
        failed(closing)
    return _sorted_out(jobs, stats, closing)


def _sorted_out(jobs: Sequence[NewRollout], stats: SamplingStats, closing: Sequence[EnvFailure]) -> Rollouts:
    """Tells the played episodes from those that a failure or their prompt kept from being played."""
    played, lost, dropped, too_long = [], [], Counter(), {}
    for job in jobs:
        episode = job.episode
        if job.dropped:
            dropped[job.dropped] += 1
            if job.dropped == PROMPT_TOO_LONG:
                too_long[episode.task_id] = job.prompt_length
            continue
        episode.verify()
        if episode.ended.startswith("env_"):
            dropped[episode.ended] += 1
            lost.append(episode)
        else:
            played.append(episode)
    failures = (*(failure for job in jobs for failure in job.failures), *closing)
    return Rollouts(played, dropped, stats, too_long, failures, lost)


def cut_to(messages: Sequence[Message], room: int, context: int) -> tuple[Message, ...]:
    """Messages of at most `room` characters together; what is cut off is said in the text. So that text without any
    bound is neither tokenised nor kept.

    context: in tokens, for the note.
    """
    cut = []
    for message in messages:
        text = message["content"]
        if len(text) > max(room, 0):
            rest = f"\n[{len(text) - max(room, 0):,} more characters do not fit into a context of {context:,} tokens]"
            message = {**message, "content": text[: max(room, 0)] + rest}
        room -= len(text)
        cut.append(message)
    return tuple(cut)


def _occurrences(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name, and how often it stands before."""
    seen: Counter[str] = Counter()
    counts = []
    for name in names:
        counts.append((name, seen[name]))
        seen[name] += 1
    return counts
