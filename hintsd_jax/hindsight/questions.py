# SPDX-License-Identifier: Apache-2.0

"""What lies between those who ask a language model and those who answer: questions in, texts out.

An asker is a function of questions: `policy_asker` makes one of the engine and any weights, `endpoint.Endpoint.ask` is
another.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from hintsd_jax.envs.base import Message
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.sampling import Engine, Sampling


@dataclasses.dataclass(frozen=True)
class Question:
    """One request to an analyser. name: unique within a training step, such as "<task id>/<rollout>/<step or
    'episode'>".
    key: uint32 [2], raw data of the key that the answer is sampled with."""

    name: str
    messages: tuple[Message, ...]
    key: np.ndarray


@dataclasses.dataclass
class Answers:
    """texts: one a question, in order; None where there is none, counted in `dropped` by reason. tokens: generated for
    them.
    """

    texts: list[str | None]
    dropped: Counter
    tokens: int = 0


Asker = Callable[[Sequence[Question]], Answers]


class _Generation:
    """One question as a job of the engine: a single generation."""

    def __init__(self, prompt: Sequence[int], key: np.ndarray, sampling: Sampling, context: int):
        self.prompt, self.key, self.sampling, self.context = prompt, key, sampling, context
        self.ids: list[int] = []

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        self.ids = ids

    def collect(self) -> None:
        return None


def policy_asker(engine: Engine, params, chat: ChatFormat, sampling: Sampling, context: int) -> Asker:
    """An asker of the policy with these weights. What is longer than `context` with its answer is not asked
    ("prompt_too_long").
    """

    def ask(questions: Sequence[Question]) -> Answers:
        jobs: dict[int, _Generation] = {}
        for n, question in enumerate(questions):
            prompt = chat.prompt(question.messages).ids
            if len(prompt) + sampling.max_tokens <= context:
                jobs[n] = _Generation(prompt, question.key, sampling, context)
        tokens = engine.run(params, list(jobs.values())).sampled_tokens
        texts = [chat.decode(jobs[n].ids) if n in jobs else None for n in range(len(questions))]
        missing = len(questions) - len(jobs)
        return Answers(texts, Counter({"prompt_too_long": missing} if missing else {}), tokens)

    return ask
