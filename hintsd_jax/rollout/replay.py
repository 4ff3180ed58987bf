# SPDX-License-Identifier: Apache-2.0

"""Replays: recorded episodes in, the same episodes continued from a chosen step out, with a message before it or not.

Every recorded action before that step goes through a new environment again, and what comes back must be what was
recorded; then the policy takes over. This measures what a message at that place would have changed.

Invariants: the recorded ids stand as they are, only the message is tokenised, once, by the chat format; a replay that
departs from its record is dropped and counted, never played on. An episode with a message in it holds hindsight: it is
for measuring, never for training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hintsd_jax.envs.base import Action, Message, Start, StepResult
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat, Delta
from hintsd_jax.rollout.collector import Rollout, RolloutConfig
from hintsd_jax.rollout.env_call import Call, CallFailure
from hintsd_jax.rollout.env_host import Host
from hintsd_jax.rollout.env_pool import EnvPool
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.played import PROMPT_TOO_LONG
from hintsd_jax.sampling import Engine, SamplingStats

POSITIONS = ("target", "start")
REPLAY_DIFFERS = "replay_differs"


@dataclass(frozen=True)
class Continuation:
    """How a recorded episode goes on.

    step: from 1 on; the steps before it are replayed, it and all later ones are the policy's. key: raw key data (uint32
    [2]) of what is sampled; with the recorded episode's own key and no message, the record comes out again. message: a
    user message in between, "" for none. position: where it stands, right before that step ("target") or before the
    first one ("start"). index: the new episode's `rollout`.

    Raises ValueError for a step or a position that does not exist, and UserError for an episode of several streams.
    """

    task: Mapping[str, Any]
    recorded: Episode
    step: int
    key: np.ndarray
    message: str = ""
    position: str = "target"
    index: int = 0

    def __post_init__(self):
        if not 1 <= self.step <= len(self.recorded.steps):
            raise ValueError(
                f"step {self.step} of an episode with {len(self.recorded.steps)} steps (they count from 1)"
            )
        if self.position not in POSITIONS:
            raise ValueError(f"position {self.position!r}: use one of {', '.join(POSITIONS)}")
        if len(self.recorded.streams) != 1:
            raise UserError(
                "an episode whose earlier turns were rewritten cannot be continued: replays need chat.history = keep"
            )


def replayed_prefix(plan: Continuation, chat: ChatFormat) -> Episode:
    """The episode up to the step, its message in place, awaiting the policy's action. Its `dialogue()` has the message
    too.

    Raises:
      UserError: the message makes the chat template rewrite earlier turns.
    """
    recorded = plan.recorded
    messages, delta = _read_before(plan, 1, chat)
    group, occurrence = recorded.group, recorded.occurrence
    episode = Episode.begin(recorded.task_id, plan.index, messages, delta, recorded.tools, group, occurrence)
    for number, step in enumerate(recorded.steps[: plan.step - 1], 1):
        first = len(episode.logprobs)
        logprobs = recorded.logprobs[first : first + step.stop - step.start]
        again = episode.append_action(recorded.tokens[step.start : step.stop], logprobs, step.text, step.cut)
        again.calls, again.problem = step.calls, step.problem
        messages, delta = _read_before(plan, number + 1, chat)
        episode.append_observation(delta, messages, step.reward, step.tools, step.announced)
    return episode


def continue_episodes(
    engine: Engine,
    params,
    chat: ChatFormat,
    host: Host,
    plans: Sequence[Continuation],
    config: RolloutConfig,
    *,
    call_timeout_s: float,
) -> tuple[list[Episode | None], Counter[str], SamplingStats]:
    """Replays and continues every plan, each with an environment of its own, as many at once as the engine has slots.

    Args:
      params: the weights that `engine` samples with.
      host: makes the environments.
      call_timeout_s: seconds that a call of an environment may take.

    Returns:
      (episodes, dropped, stats): one episode a plan, in order; None where there is none, counted in `dropped` by
      reason: an environment that failed, one that answered otherwise than recorded (REPLAY_DIFFERS), a prefix beyond
      the context (PROMPT_TOO_LONG).
    """
    episodes: list[Episode | None] = []
    dropped: Counter[str] = Counter()
    stats = SamplingStats()
    for first in range(0, len(plans), engine.config.slots):
        some = plans[first : first + engine.config.slots]
        with EnvPool(host, len(some), call_timeout_s) as pool:
            episodes += _continue(engine, params, chat, pool, some, config, dropped, stats)
            dropped.update(f"close_{failure.reason}" for failure in pool.close())
    return episodes, dropped, stats


def _continue(
    engine: Engine,
    params,
    chat: ChatFormat,
    pool: EnvPool,
    plans: Sequence[Continuation],
    config: RolloutConfig,
    dropped: Counter[str],
    stats: SamplingStats,
) -> list[Episode | None]:
    """As `continue_episodes`, a slot of the pool for each plan; counts in `dropped` and `stats`."""
    jobs: dict[int, Rollout] = {}
    for worker in _replay(pool, plans, chat, dropped):
        plan = plans[worker]
        episode = replayed_prefix(plan, chat)
        if len(episode.tokens) >= config.context:
            dropped[PROMPT_TOO_LONG] += 1
        else:
            jobs[worker] = Rollout(episode, worker, pool, chat, config, plan.key)
    stats.add(engine.run(params, jobs.values()))
    for job in jobs.values():
        job.episode.verify()
    return [jobs[worker].episode if worker in jobs else None for worker in range(len(plans))]


def _read_before(plan: Continuation, number: int, chat: ChatFormat) -> tuple[tuple[Message, ...], Delta]:
    """What the new episode reads right before a step: what was recorded, and the plan's message if it stands here."""
    recorded, step = plan.recorded, plan.recorded.steps[number - 1]
    messages, start = recorded.prompt_messages, 0
    if number > 1:
        messages, start = recorded.steps[number - 2].messages, recorded.steps[number - 2].stop
    ids, prompt_start = tuple(recorded.tokens[start : step.start]), step.prompt_start - start
    if not plan.message or number != (plan.step if plan.position == "target" else 1):
        return messages, Delta(ids, prompt_start)
    trunk = recorded.tokens[: step.prompt_start]
    prefix_length, context = chat.teacher_context(
        recorded.dialogue(number), recorded.tools_at(number), trunk, plan.message
    )
    if prefix_length != len(trunk):
        raise UserError("a message makes the chat template rewrite earlier turns: replays need chat.history = keep")
    ids = ids[:prompt_start] + context
    return (*messages, {"role": "user", "content": plan.message}), Delta(
        ids, len(ids) - (step.start - step.prompt_start)
    )


def _replay(pool: EnvPool, plans: Sequence[Continuation], chat: ChatFormat, dropped: Counter[str]) -> list[int]:
    """Plays the recorded actions, the n-th ones of all episodes at once. The workers whose environment answered as
    recorded up to the plan's step; the others are counted in `dropped`, by reason.
    """
    ready: list[int] = []
    calls: dict[int, Call] = {worker: pool.reset(worker, plan.task) for worker, plan in enumerate(plans)}
    steps = 0  # that have been replayed
    while calls:
        unfinished = []
        for worker, call in calls.items():
            plan, result = plans[worker], call.result()
            if isinstance(result, CallFailure):
                dropped[result.reason] += 1
            elif not _as_recorded(result, plan.recorded, steps, chat):
                dropped[REPLAY_DIFFERS] += 1
            else:
                (ready if steps == plan.step - 1 else unfinished).append(worker)
        calls = {worker: pool.step(worker, _action(plans[worker].recorded, steps + 1, chat)) for worker in unfinished}
        steps += 1
    return sorted(ready)


def _action(recorded: Episode, number: int, chat: ChatFormat) -> Action:
    step = recorded.steps[number - 1]
    return parse_action(step.text, chat.style, step.stop - step.start if step.cut else 0, recorded.callable_at(number))


def _as_recorded(result: Start | StepResult, recorded: Episode, steps: int, chat: ChatFormat) -> bool:
    """Whether this is what the environment gave at the start (`steps` 0) or after that many steps."""
    if isinstance(result, Start):
        return (chat.heard(result.messages), result.tools) == (recorded.prompt_messages, recorded.tools)
    if result.terminated or result.truncated:
        return False
    step = recorded.steps[steps - 1]
    messages, tools = chat.announce_tools(result.messages, result.tools)
    return (messages, tools, result.reward) == (step.messages, step.tools, step.reward)
