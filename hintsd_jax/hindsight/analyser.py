# SPDX-License-Identifier: Apache-2.0

"""Analysers: episodes in, targets (step, feedback) out, every drop counted by reason.

`ModelAnalyser` asks a language model, the policy with some weights or an endpoint (see `questions.Asker`). It reads the
whole episode and its bare outcome and names the steps that broke it, or is asked about given steps.
`EnvironmentAnalyser` reads the environment's report, which knows the ground truth: PRIVILEGED, as is the selector
`oracle`, and labelled so wherever it shows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from hintsd_jax.envs.base import Message
from hintsd_jax.hindsight import selectors
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.hindsight.parse import Parsed, parse_failures
from hintsd_jax.hindsight.prompts import Benchmark, PromptSet
from hintsd_jax.hindsight.questions import Asker, Question
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.random_keys import subkey
from hintsd_jax.rollout.episode import Episode

PRIVILEGED_ANALYSERS = ("environment",)

KeyOf = Callable[[Episode], np.ndarray]  # an episode -> the raw key (uint32 [2]) of its questions


def privileged(select: str, analyser: str) -> bool:
    """Whether the ground truth has a say in the targets."""
    return analyser in PRIVILEGED_ANALYSERS or select in selectors.PRIVILEGED_SELECTORS


class Analyser(Protocol):
    """Who looks back. Algorithms choose the episodes and which of the two is asked."""

    def review(self, episodes: Iterable[Episode]) -> Hindsight:
        """About whole episodes: which steps broke each, or how the selected steps should have gone."""
        ...

    def judge_steps(self, episodes: Iterable[Episode]) -> Hindsight:
        """About every step of every episode, from that step and its observation alone."""
        ...


class ModelAnalyser:
    """Asks a language model. Episodes may still be to come: a question is made as soon as its episode is there.

    Args:
      ask: who answers.
      prompts: the wording of questions.
      benchmark: what the questions say of the environment.
      key_of: the key that an episode's questions are sampled with.
      select: who names the steps, see `selectors`.
      max_targets: of an episode.
      max_trajectory_chars: of the list of steps that is read; the last ones are kept.
    """

    def __init__(
        self,
        ask: Asker,
        prompts: PromptSet,
        benchmark: Benchmark,
        key_of: KeyOf,
        select: str,
        max_targets: int,
        max_trajectory_chars: int,
    ):
        self._ask, self._prompts, self._benchmark, self._key_of = ask, prompts, benchmark, key_of
        self._selector, self._max_targets, self._max_chars = selectors.find(select), max_targets, max_trajectory_chars

    def review(self, episodes: Iterable[Episode]) -> Hindsight:
        hindsight = Hindsight()
        kept: list[Episode] = []

        def asked() -> Iterator[_Asked]:
            for episode in episodes:
                if not episode.steps:
                    hindsight.dropped["no_steps"] += 1
                    continue
                key = self._key_of(episode)
                steps = [None] if self._selector is None else self._selector(episode, key, self._max_targets)
                if not steps:
                    hindsight.dropped["nothing_named" if _has_faults(episode) else "no_report"] += 1
                    continue
                kept.append(episode)
                for step in steps:
                    complete = partial(_is_review, steps=len(episode.steps), only_step=step)
                    yield _Asked(len(kept) - 1, step, "", self._messages(episode, step), _key(key, step), complete)

        for n, answers in self._answers(hindsight, kept, asked()).items():
            steps = len(kept[n].steps)
            parsed = [
                (answer.text, parse_failures(answer.text, steps, self._max_targets, answer.step, answer.cut))
                for answer in answers
            ]
            _add(hindsight, kept[n], parsed)
        return hindsight

    def judge_steps(self, episodes: Iterable[Episode]) -> Hindsight:
        """A step's verdict is 1, -1, or 0 where no answer could be read; its hint, if there is one, is a target."""
        hindsight = Hindsight()
        kept: list[Episode] = []

        def asked() -> Iterator[_Asked]:
            for episode in episodes:
                if not episode.steps:
                    hindsight.dropped["no_steps"] += 1
                    continue
                kept.append(episode)
                for number, step in enumerate(episode.steps, 1):
                    key = _key(self._key_of(episode), number)
                    for place, (name, messages) in enumerate(self._prompts.judge(step).items()):
                        key_of_question = subkey(key, place) if place else key
                        complete = partial(self._is_judgement, name)
                        yield _Asked(len(kept) - 1, number, name, messages, key_of_question, complete)

        for n, answers in self._answers(hindsight, kept, asked()).items():
            self._add_judgements(hindsight, kept[n], answers)
        hindsight.dropped = +hindsight.dropped
        return hindsight

    def _messages(self, episode: Episode, step: int | None) -> list[Message]:
        if step is None:
            return self._prompts.review(episode, self._benchmark, self._max_targets, self._max_chars)
        return self._prompts.step_feedback(episode, self._benchmark, step, self._max_chars)

    def _is_judgement(self, question: str, text: str) -> bool:
        return self._prompts.read_judgement(question, text).problem is None

    def _answers(
        self, hindsight: Hindsight, episodes: Sequence[Episode], to_ask: Iterable[_Asked]
    ) -> Mapping[int, list[_Answer]]:
        """What was answered, by the episode's number, ascending. episodes: they grow with what is asked."""
        asked: list[_Asked] = []

        def questions() -> Iterator[Question]:
            for number, each in enumerate(to_ask):
                asked.append(each)
                yield each.question(number, episodes[each.episode])

        replies = self._ask(questions())
        hindsight.questions, hindsight.generated_tokens = len(asked), replies.tokens
        hindsight.dropped.update(replies.dropped)
        answers: dict[int, list[_Answer]] = {}
        for each, text, cut in zip(asked, replies.texts, replies.cut, strict=True):
            if text is not None:
                answers.setdefault(each.episode, []).append(_Answer(each.step, each.name, text, cut))
        return answers

    def _add_judgements(self, hindsight: Hindsight, episode: Episode, answers: Sequence[_Answer]) -> None:
        hints: dict[int, str] = {}
        verdicts, problems = [0.0] * len(episode.steps), []
        for answer in answers:
            number, judgement = answer.step or 0, self._prompts.read_judgement(answer.name, answer.text)
            hindsight.readable_answers += judgement.problem is None
            if judgement.problem:
                hindsight.dropped["truncated" if answer.cut else "unparsable"] += 1
                problems.append(judgement.problem)
            if judgement.verdict is not None:
                verdicts[number - 1] = judgement.verdict
            if judgement.hint:
                hints[number] = judgement.hint
        targets = tuple(Target(number, hint) for number, hint in sorted(hints.items()))
        text = "\n".join(answer.text for answer in answers)
        hindsight.analyses.append(Analysis(episode, targets, text, problems[0] if problems else None, tuple(verdicts)))


class EnvironmentAnalyser:
    """PRIVILEGED: the faults that the environment reports; of selected steps their own faults, or nothing.

    Args as in `ModelAnalyser`.
    """

    def __init__(self, key_of: KeyOf, select: str, max_targets: int):
        self._key_of, self._selector, self._max_targets = key_of, selectors.find(select), max_targets

    def review(self, episodes: Iterable[Episode]) -> Hindsight:
        hindsight = Hindsight()
        for episode in episodes:
            if episode.report is None or not _has_faults(episode):
                hindsight.dropped["no_report"] += 1
                continue
            targets = tuple(Target(fault.step, fault.feedback) for fault in episode.report.faults or ())
            limit = self._max_targets
            if self._selector is not None:
                key = self._key_of(episode)
                steps = self._selector(episode, key, self._max_targets) if episode.steps else []
                targets = tuple(target for target in targets if target.step in steps)
                limit = len(targets)
            dropped = {"over_limit": len(targets) - limit} if len(targets) > limit else {}
            hindsight.questions += 1
            _add(hindsight, episode, [(episode.report.summary, Parsed(targets[:limit], None, dropped))])
        return hindsight

    def judge_steps(self, episodes: Iterable[Episode]) -> Hindsight:
        raise ValueError("the environment's report judges whole episodes: algorithms refuse it for single steps")


def _has_faults(episode: Episode) -> bool:
    """Whether the environment says which steps were wrong (it may say: none)."""
    return episode.report is not None and episode.report.faults is not None


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A question about an episode (its number). step: 1-based, None for the whole; name: of a judge's question."""

    episode: int
    step: int | None
    name: str
    messages: Sequence[Message]
    key: np.ndarray
    is_complete: Callable[[str], bool]

    def question(self, number: int, episode: Episode) -> Question:
        """Its name begins with its number: a step may hold a task twice."""
        name = f"{number} {episode.task_id}/{episode.rollout}/{self.step or 'episode'}"
        return Question(f"{name}/{self.name}" if self.name else name, tuple(self.messages), self.key, self.is_complete)


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What came back: see `_Asked`. cut: at its limit of tokens."""

    step: int | None
    name: str
    text: str
    cut: bool


def _key(key: np.ndarray, step: int | None) -> np.ndarray:
    """A key of its own for each step."""
    return key if step is None else subkey(key, step)


def _is_review(text: str, steps: int, only_step: int | None) -> bool:
    return parse_failures(text, steps, 1, only_step).problem is None


def _add(hindsight: Hindsight, episode: Episode, answers: Sequence[tuple[str, Parsed]]) -> None:
    """Keeps what came of one episode; one that is left without any target is counted, whatever the reason."""
    dropped: Counter[str] = Counter()
    for _, parsed in answers:
        dropped.update(parsed.dropped)
        hindsight.readable_answers += parsed.problem is None
    targets = tuple(sorted(target for _, parsed in answers for target in parsed.targets))
    hindsight.dropped.update(dropped)
    if not targets and not dropped:
        hindsight.dropped["nothing_named"] += 1
    problem = next((parsed.problem for _, parsed in answers if parsed.problem), None)
    hindsight.analyses.append(Analysis(episode, targets, "\n".join(text for text, _ in answers), problem))
