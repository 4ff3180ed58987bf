# SPDX-License-Identifier: Apache-2.0

"""What lies between those who ask a language model and those who answer: questions in, texts out.

An asker is a function of questions: `policy_asker` makes one of the engine and any weights, `endpoint.Endpoint.ask` is
another.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from hintsd_jax.envs.base import Message
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.sampling import Engine, Generation, Sampling


@dataclasses.dataclass(frozen=True)
class Question:
    """One request to an analyser.

    name: unique within a training step, such as "<task id>/<rollout>/<step or 'episode'>". key: uint32 [2], raw data of
    the key that the answer is sampled with. is_complete: whether a text holds a whole answer, so that no more of it
    need be generated; None: it ends by itself.
    """

    name: str
    messages: tuple[Message, ...]
    key: np.ndarray
    is_complete: Callable[[str], bool] | None = None


@dataclasses.dataclass
class Answers:
    """texts: one a question, in order; None where there is none, counted in `dropped` by reason. cut: for each, whether
    it was cut at its limit of tokens. tokens: generated for them.
    """

    texts: list[str | None]
    dropped: Counter
    tokens: int = 0
    cut: list[bool] = dataclasses.field(default_factory=list)

    @classmethod
    def together(cls, parts: Sequence[Answers]) -> Answers:
        """The answers to questions that were shared out, in the order of the parts."""
        whole = cls([], Counter())
        for part in parts:
            whole.texts += part.texts
            whole.dropped.update(part.dropped)
            whole.tokens += part.tokens
            whole.cut += part.cut
        return whole


Asker = Callable[[Iterable[Question]], Answers]  # some of the questions may still be to come


def policy_asker(
    engine: Engine,
    params,
    chat: ChatFormat,
    sampling: Sampling,
    context: int,
    tick: Callable[[], object] = lambda: None,
) -> Asker:
    """An asker of the policy with these weights. What is longer than `context` with its answer is not asked
    ("prompt_too_long"). An answer ends as soon as it is complete: models that repeat themselves would fill the limit.
    tick: called after each answer.
    """

    def sampling_of(question: Question) -> Sampling:
        is_complete = question.is_complete
        if is_complete is None:
            return sampling
        return dataclasses.replace(sampling, is_complete=lambda ids: is_complete(chat.decode(ids)))

    def ask(questions: Iterable[Question]) -> Answers:
        questions, jobs = list(questions), dict[int, Generation]()
        for n, question in enumerate(questions):
            prompt = chat.prompt(question.messages, tags_stand=True).ids
            if len(prompt) + sampling.max_tokens <= context:
                jobs[n] = Generation(prompt, question.key, sampling_of(question), context, tick)
        tokens = engine.run(params, list(jobs.values())).sampled_tokens
        texts = [chat.decode(jobs[n].ids) if n in jobs else None for n in range(len(questions))]
        missing = len(questions) - len(jobs)
        cut = [n in jobs and jobs[n].cut for n in range(len(questions))]
        return Answers(texts, Counter({"prompt_too_long": missing} if missing else {}), tokens, cut)

    return ask
