# SPDX-License-Identifier: Apache-2.0

"""Analysers: episodes in, targets (step, feedback) out, every drop counted by reason.

`ModelAnalyser` asks a language model, the policy with some weights or an endpoint (see `questions.Asker`). It reads the
whole episode and its bare outcome and names the steps that broke it, or is asked about given steps.
`EnvironmentAnalyser` reads the environment's report, which knows the ground truth: PRIVILEGED, as is the selector
`oracle`, and labelled so wherever it shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from hintsd_jax.envs.base import Message
from hintsd_jax.hindsight import prompts, selectors
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.hindsight.parse import Parsed, parse_failures
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

    def review(self, episodes: Sequence[Episode]) -> Hindsight:
        """About whole episodes: which steps broke each, or how the selected steps should have gone."""
        ...

    def judge_steps(self, episodes: Sequence[Episode]) -> Hindsight:
        """About every step of every episode, from that step and its observation alone."""
        ...


class ModelAnalyser:
    """Asks a language model.

    Args:
      ask: who answers.
      key_of: the key that an episode's questions are sampled with.
      select: who names the steps, see `selectors`.
      max_targets: of an episode.
      max_trajectory_chars: of the list of steps that is read; the last ones are kept.
    """

    def __init__(self, ask: Asker, key_of: KeyOf, select: str, max_targets: int, max_trajectory_chars: int):
        self._ask, self._key_of = ask, key_of
        self._selector, self._max_targets, self._max_chars = selectors.find(select), max_targets, max_trajectory_chars

    def review(self, episodes: Sequence[Episode]) -> Hindsight:
        hindsight = Hindsight()
        asked: list[tuple[int, int | None, Question]] = []  # (number in `kept`, selected step, question)
        kept: list[Episode] = []
        for episode in episodes:
            if not episode.steps:
                hindsight.dropped["no_steps"] += 1
                continue
            key = self._key_of(episode)
            steps = [None] if self._selector is None else self._selector(episode, key, self._max_targets)
            if not steps:
                hindsight.dropped["nothing_named" if _has_faults(episode) else "no_report"] += 1
            for step in steps:
                asked.append(
                    (len(kept), step, _question(len(asked), episode, step, self._messages(episode, step), key))
                )
            kept += [episode] if steps else []
        for n, answers in self._answers(hindsight, asked).items():
            steps = len(kept[n].steps)
            parsed = [(text, parse_failures(text, steps, self._max_targets, only_step=step)) for step, text in answers]
            _add(hindsight, kept[n], parsed)
        return hindsight

    def judge_steps(self, episodes: Sequence[Episode]) -> Hindsight:
        """A step that is named has verdict -1 and its hint as feedback, one that is not has 1, and one without a
        readable answer 0.
        """
        hindsight = Hindsight()
        asked: list[tuple[int, int | None, Question]] = []
        for n, episode in enumerate(episodes):
            if not episode.steps:
                hindsight.dropped["no_steps"] += 1
                continue
            key = self._key_of(episode)
            for number, step in enumerate(episode.steps, 1):
                asked.append((n, number, _question(len(asked), episode, number, prompts.judge_messages(step), key)))
        for n, answers in self._answers(hindsight, asked).items():
            _add_verdicts(hindsight, episodes[n], answers)
        hindsight.dropped = +hindsight.dropped
        return hindsight

    def _messages(self, episode: Episode, step: int | None) -> list[Message]:
        if step is None:
            return prompts.review_messages(episode, self._max_targets, self._max_chars)
        return prompts.step_feedback_messages(episode, step, self._max_chars)

    def _answers(
        self, hindsight: Hindsight, asked: Sequence[tuple[int, int | None, Question]]
    ) -> Mapping[int, list[tuple[int | None, str]]]:
        """(selected step, text) of the questions that were answered, by the episode's number, ascending."""
        replies = self._ask([question for _, _, question in asked])
        hindsight.questions, hindsight.generated_tokens = len(asked), replies.tokens
        hindsight.dropped.update(replies.dropped)
        answers: dict[int, list[tuple[int | None, str]]] = {}
        for (n, step, _), text in zip(asked, replies.texts, strict=True):
            if text is not None:
                answers.setdefault(n, []).append((step, text))
        return answers


class EnvironmentAnalyser:
    """PRIVILEGED: the faults that the environment reports; of selected steps their own faults, or nothing.

    Args as in `ModelAnalyser`.
    """

    def __init__(self, key_of: KeyOf, select: str, max_targets: int):
        self._key_of, self._selector, self._max_targets = key_of, selectors.find(select), max_targets

    def review(self, episodes: Sequence[Episode]) -> Hindsight:
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

    def judge_steps(self, episodes: Sequence[Episode]) -> Hindsight:
        raise ValueError("the environment's report judges whole episodes: algorithms refuse it for single steps")


def _has_faults(episode: Episode) -> bool:
    """Whether the environment says which steps were wrong (it may say: none)."""
    return episode.report is not None and episode.report.faults is not None


def _question(
    number: int, episode: Episode, step: int | None, messages: Sequence[Message], key: np.ndarray
) -> Question:
    """With a key of its own for each step. The name begins with its number: a step may hold a task twice."""
    name = f"{number} {episode.task_id}/{episode.rollout}/{step or 'episode'}"
    return Question(name, tuple(messages), key if step is None else subkey(key, step))


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


def _add_verdicts(hindsight: Hindsight, episode: Episode, answers: Sequence[tuple[int | None, str]]) -> None:
    targets, problems, verdicts = [], [], [0.0] * len(episode.steps)
    for number, text in ((step or 0, text) for step, text in answers):
        parsed = parse_failures(text, 1, 1)
        hindsight.dropped.update(parsed.dropped)
        hindsight.readable_answers += parsed.problem is None
        targets += [Target(number, target.feedback) for target in parsed.targets]
        verdicts[number - 1] = 0.0 if parsed.problem else -1.0 if parsed.targets else 1.0
        problems += [parsed.problem] if parsed.problem else []
    text = "\n".join(text for _, text in answers)
    analysis = Analysis(episode, tuple(targets), text, next(iter(problems), None), tuple(verdicts))
    hindsight.analyses.append(analysis)
