"""The host loop between the engine and the environments: tasks in, finished episodes out.

A `Rollout` is the engine's job for one episode. The engine hands it each sampled span; it parses the action, starts the
environment's step in a worker, and answers with the observation's tokens. A failing environment, a full context or the
step limit ends the episode and is counted; it never ends the run.

Invariant: an episode depends on (seed, step, task, rollout index) only: its key is folded from those four. Each further
stream of it (see `Episode`) has a key of its own, which follows from that one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from hintsd_jax.envs.base import Environment, Start, StepResult
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.rollout.chat import ChatFormat, Delta
from hintsd_jax.rollout.env_pool import Answers, EnvPool, Failure
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.sampling import Engine, Rewrite, Sampling, Stats


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """max_steps: assistant generations an episode. context: tokens that the student may read and write at once.
    reports: ask environments for theirs (privileged)."""

    max_steps: int
    context: int
    sampling: Sampling
    reports: bool = True


def job_key(seed: int, step: int, name: str, index: int) -> np.ndarray:
    """Raw key data (uint32 [2]) of one job: folded from the run's seed, the step, a name (task id and purpose) and an
    index.
    """
    key = jax.random.key(seed)
    for part in (step, zlib.crc32(name.encode()), index):
        key = jax.random.fold_in(key, part)
    return np.asarray(jax.random.key_data(key))


def stream_key(key: np.ndarray, stream: int) -> np.ndarray:
    """Raw key data of an episode's stream: the episode's own key for the first, a hash of it for the others.

    Not `jax.random.fold_in`: this is called while the engine runs, under whose mesh that would compile once more.
    """
    if stream == 0:
        return key
    digest = hashlib.blake2b(key.astype("<u4").tobytes() + stream.to_bytes(4, "little"), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


class Rollout:
    """One episode as a job of the engine (see `sampling.Job`)."""

    def __init__(
        self, episode: Episode, worker: int, pool: EnvPool, chat: ChatFormat, config: RolloutConfig, key: np.ndarray
    ):
        self.episode, self.key, self.sampling, self.context = episode, key, config.sampling, config.context
        self.prompt = tuple(episode.tokens)
        self._worker, self._pool, self._chat, self._config = worker, pool, chat, config
        self._call = None

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        text = self._chat.decode(ids)
        self.episode.append_action(ids, logprobs, text)
        if not stopped:
            full = len(self.episode.tokens) >= self._config.context
            self._end("context" if full else "action_length")
            return
        self._call = self._pool.submit(self._worker, "step", parse_action(text, self._chat.style))

    def collect(self) -> Sequence[int] | Rewrite | None:
        if self._call is not None:
            self._answer(self._call.result())
            self._call = None
        if self.episode.ended:
            self._report()
            return None
        last, current = self.episode.steps[-1], len(self.episode.streams) - 1
        if last.stream < current:
            return Rewrite(tuple(self.episode.tokens), stream_key(self.key, current))
        return self.episode.tokens[last.stop :]

    def _answer(self, turn: StepResult | Failure) -> None:
        episode = self.episode
        if isinstance(turn, Failure):
            episode.append_observation(None)
            self._end(turn.reason, turn.detail)
            return
        messages, tools = self._chat.announcing(turn.messages, turn.tools)
        turn = dataclasses.replace(turn, messages=messages, tools=tools)
        over = turn.terminated or turn.truncated or len(episode.steps) >= self._config.max_steps
        delta = None if over else self._answered(turn)
        full = (
            delta is not None
            and len(delta.ids) + (0 if delta.new_stream else len(episode.tokens)) >= self._config.context
        )
        episode.append_observation(None if full else delta, turn.messages, turn.reward, turn.tools)
        episode.reward, episode.terminated = turn.reward, turn.terminated
        if turn.terminated:
            self._end("terminated")
        elif over:
            self._end("truncated" if turn.truncated else "max_steps")
        elif full:
            self._end("context")

    def _answered(self, turn: StepResult) -> Delta:
        episode, last = self.episode, self.episode.steps[-1]
        number = len(episode.steps)
        ids = episode.tokens[last.start : last.stop]
        return self._chat.observation(
            episode.dialogue(number), episode.tools_at(number), ids, turn.messages, turn.tools
        )

    def _end(self, reason: str, detail: str = "") -> None:
        self.episode.ended, self.episode.detail = reason, detail

    def _report(self) -> None:
        """The environment's privileged look back; a failure of it is told, and costs only the report."""
        if not self._config.reports or self.episode.ended.startswith("env_"):
            return
        report = self._pool.submit(self._worker, "report").result()
        if isinstance(report, Failure):
            self.episode.detail = f"report: {report.reason}: {report.detail}"
        else:
            self.episode.report = report


def run_episodes(
    engine: Engine,
    params,
    chat: ChatFormat,
    make_env: Callable[[], Environment],
    tasks: Sequence[Mapping],
    rollouts: int,
    config: RolloutConfig,
    *,
    seed: int,
    step: int,
    call_timeout_s: float,
    answers: Answers | None = None,
    phase: str = "",
) -> tuple[list[Episode], Counter, Stats]:
    """Plays `rollouts` episodes of every task.

    `answers` keeps the calls that timed out, under `(phase, task id, slot, call)`: a task may come twice. One journal
    must not see a phase twice.

    Returns:
      (episodes, dropped, stats): episodes in task order, then rollout order; `dropped` counts by reason the rollouts
      that never began (a reset that failed, a prompt beyond the context), each of which is missing in `episodes`.
    """
    names = [(phase, tasks[worker // rollouts]["id"], worker) for worker in range(len(tasks) * rollouts)]
    with EnvPool(make_env, len(names), call_timeout_s, answers, names) as pool:
        calls = [pool.submit(worker, "reset", tasks[worker // rollouts]) for worker in range(len(names))]
        jobs: list[Rollout] = []
        dropped: Counter = Counter()
        prompts: dict[int, tuple] = {}
        for worker, call in enumerate(calls):
            nth, index = divmod(worker, rollouts)
            task, start = tasks[nth], call.result()
            if isinstance(start, Failure):
                dropped[start.reason] += 1
                continue
            prompt = _prompt(prompts, nth, start, chat)
            if len(prompt.ids) >= config.context:
                dropped["prompt_too_long"] += 1
                continue
            episode = Episode.begin(task["id"], index, start.messages, prompt, start.tools)
            jobs.append(Rollout(episode, worker, pool, chat, config, job_key(seed, step, task["id"], index)))
        stats = engine.run(params, jobs)
        for failure in pool.close():
            dropped[f"close_{failure.reason}"] += 1
    for job in jobs:
        job.episode.verify()
    return [job.episode for job in jobs], dropped, stats


def _prompt(prompts: dict[int, tuple], task: int, start: Start, chat: ChatFormat):
    """Tokenises the prompt of a task once for all its rollouts (unless an environment words it differently)."""
    known = prompts.get(task)
    if known is None or known[0] != start:
        known = prompts[task] = (start, chat.prompt(start.messages, start.tools))
    return known[1]
