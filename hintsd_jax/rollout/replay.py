"""Replays: recorded episodes in, the same episodes continued from a step of choice out, with a message put in before it
or not.

Every recorded action before that step goes through a fresh environment again, and what comes back must be what was
recorded; then the policy takes over. It serves to ask what a word at that place would have changed.

Invariants: the recorded ids stand as they are, only the message is tokenised, once, by the chat format; a replay that
departs from its record is dropped and counted, never played on. An episode with a message in it holds hindsight: it is
for measuring, never for training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hintsd_jax.envs.base import Environment, Start, StepResult
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat, Delta
from hintsd_jax.rollout.collector import Rollout, RolloutConfig
from hintsd_jax.rollout.env_pool import EnvPool, Failure
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.sampling import Engine, Stats

PLACES = ("target", "start")
DIFFERS, TOO_LONG = "replay_differs", "prompt_too_long"


@dataclass(frozen=True)
class Continuation:
    """How a recorded episode goes on.

    step: 1-based; the steps before it are replayed, it and all later ones are the policy's. message: what the user says
    in between, "" for nothing; place: where, just before that step ("target") or before the first one ("start"). index:
    the new episode's `rollout`.
    key: raw key data (uint32 [2]) of what is sampled; with the recorded episode's own key and no message, the record
    comes out again.
    """

    task: Mapping[str, Any]
    recorded: Episode
    step: int
    key: np.ndarray
    message: str = ""
    place: str = "target"
    index: int = 0

    def __post_init__(self):
        if not 1 <= self.step <= len(self.recorded.steps):
            raise ValueError(
                f"step {self.step} of an episode with {len(self.recorded.steps)} steps (they count from 1)"
            )
        if self.place not in PLACES:
            raise ValueError(f"place {self.place!r}: use one of {', '.join(PLACES)}")
        if len(self.recorded.streams) != 1:
            raise UserError(
                "an episode whose earlier turns were rewritten cannot be continued: replays need history = keep"
            )


def prefix(plan: Continuation, chat: ChatFormat) -> Episode:
    """The episode up to the step, its message in place, awaiting the policy's action. `dialogue()` of it tells the
    message too.
    """
    recorded, tokens, edge = plan.recorded, plan.recorded.tokens, 0
    inserted = (plan.step if plan.place == "target" else 1) if plan.message else 0
    said, episode = recorded.prompt_messages, None
    for number, step in enumerate(recorded.steps[: plan.step], 1):
        read = Delta(tuple(tokens[edge : step.start]), step.prompt_start - edge)
        if number == inserted:
            dialogue, tools = recorded.dialogue(number), recorded.tools_at(number)
            seen, words = chat.teacher_context(dialogue, tools, tokens[: step.prompt_start], plan.message)
            if seen != step.prompt_start:
                raise UserError("a message makes the chat template rewrite earlier turns: replays need history = keep")
            ids = read.ids[: read.prompt_start] + words
            read, said = (
                Delta(ids, len(ids) - (step.start - step.prompt_start)),
                (*said, {"role": "user", "content": plan.message}),
            )
        if episode is None:
            episode = Episode.begin(recorded.task_id, plan.index, said, read, recorded.tools)
        else:
            earlier = recorded.steps[number - 2]
            episode.append_observation(read, said, earlier.reward, earlier.tools)
        if number < plan.step:
            before = len(episode.logprobs)
            episode.append_action(
                tokens[step.start : step.stop], recorded.logprobs[before : before + step.stop - step.start], step.text
            )
            said, edge = step.messages, step.stop
    return episode


def continue_episodes(
    engine: Engine,
    params,
    chat: ChatFormat,
    make_env: Callable[[], Environment],
    plans: Sequence[Continuation],
    config: RolloutConfig,
    *,
    call_timeout_s: float,
) -> tuple[list[Episode | None], Counter, Stats]:
    """Replays and continues every plan, each with an environment (and its thread) of its own.

    Returns:
      (episodes, dropped, stats): one episode a plan, in order; None where there is none, counted in `dropped` by
      reason: an environment that failed, one that answered otherwise than recorded (`replay_differs`), a prefix beyond
        the context (`prompt_too_long`).
    """
    jobs: dict[int, Rollout] = {}
    if not plans:
        return [], Counter(), Stats()
    with EnvPool(make_env, len(plans), call_timeout_s) as pool:
        ready, dropped = _replay(pool, plans, chat)
        for worker in ready:
            plan = plans[worker]
            episode = prefix(plan, chat)
            if len(episode.tokens) >= config.context:
                dropped[TOO_LONG] += 1
            else:
                jobs[worker] = Rollout(episode, worker, pool, chat, config, plan.key)
        stats = engine.run(params, jobs.values())
        for failure in pool.close():
            dropped[f"close_{failure.reason}"] += 1
    for job in jobs.values():
        job.episode.verify()
    return [jobs[worker].episode if worker in jobs else None for worker in range(len(plans))], dropped, stats


def _replay(pool: EnvPool, plans: Sequence[Continuation], chat: ChatFormat) -> tuple[list[int], Counter]:
    """Plays the recorded actions, all episodes' n-th at once. Returns the workers that stand where their record stood,
    and what was dropped.
    """
    ready, dropped, number = [], Counter(), 0
    calls = {worker: pool.submit(worker, "reset", plan.task) for worker, plan in enumerate(plans)}
    while calls:
        going = []
        for worker, call in calls.items():
            plan, answer = plans[worker], call.result()
            if isinstance(answer, Failure):
                dropped[answer.reason] += 1
            elif not _as_recorded(answer, plan.recorded, number, chat):
                dropped[DIFFERS] += 1
            else:
                (ready if number == plan.step - 1 else going).append(worker)
        texts = {worker: plans[worker].recorded.steps[number].text for worker in going}
        calls = {worker: pool.submit(worker, "step", parse_action(text, chat.style)) for worker, text in texts.items()}
        number += 1
    return sorted(ready), dropped


def _as_recorded(answer: Start | StepResult, recorded: Episode, number: int, chat: ChatFormat) -> bool:
    """Whether this is what came before the first step (`number` 0) or after that many steps."""
    if isinstance(answer, Start):
        return (answer.messages, answer.tools) == (recorded.prompt_messages, recorded.tools)
    step = recorded.steps[number - 1]
    told = chat.announcing(answer.messages, answer.tools)
    return not (answer.terminated or answer.truncated) and (*told, answer.reward) == (
        step.messages,
        step.tools,
        step.reward,
    )
