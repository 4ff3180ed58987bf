"""Hindsight: episodes in, targets (step, feedback) out, every drop counted by reason.

An analyser reads the whole episode and its bare outcome and names the steps that broke it, or is asked for feedback on
given steps: the controls for *where*. Who answers is an asker (see `questions`): the policy with some weights, or an
endpoint. `environment` is no
asker: it reads the environment's report, which knows the ground truth, and is PRIVILEGED, as is the choice of steps by
`oracle`; both are labelled so wherever they show.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from hintsd_jax.envs.base import Message
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.parse import Parsed, parse_failures
from hintsd_jax.hindsight.questions import Asker, Question
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.episode import Episode

PRIVILEGED_ANALYSERS, PRIVILEGED_SELECTS = ("environment",), ("oracle",)

Keyed = Sequence[tuple[Episode, np.ndarray]]  # episodes, each with the key of its questions


@dataclasses.dataclass(frozen=True)
class HindsightConfig:
    """select: "hindsight" (the analyser names the steps), or which steps it is given: "first", "last", "random"
    (`max_targets` of them), "all", "oracle" (those that the environment knows to be wrong). clip_chars: of the list of
    steps that the analyser reads."""

    select: str
    max_targets: int
    clip_chars: int


@dataclasses.dataclass
class Analysis:
    """What came of one episode. `answer` is the analyser's own text, for the record; `problem`: why (part of) it could
    not be read. `rewards`: of a judge, one a step: 1, -1, or 0 where it said nothing; else ()."""

    episode: Episode
    targets: tuple[Target, ...]
    answer: str = ""
    problem: str | None = None
    rewards: tuple[float, ...] = ()


@dataclasses.dataclass
class Hindsight:
    """All episodes of a step that were looked back on. `dropped` counts answers, entries and rollouts by reason;
    `asked` and `parsed` count questions, and answers that could be read; `tokens` were generated for it."""

    analyses: list[Analysis] = dataclasses.field(default_factory=list)
    dropped: Counter = dataclasses.field(default_factory=Counter)
    asked: int = 0
    parsed: int = 0
    tokens: int = 0


def privileged(select: str, analyser: str) -> bool:
    """Whether the ground truth has a say in the targets."""
    return analyser in PRIVILEGED_ANALYSERS or select in PRIVILEGED_SELECTS


def given_steps(episode: Episode, key: np.ndarray, config: HindsightConfig) -> list[int] | None:
    """The steps (1-based, ascending) that are given; None where the analyser has to find them. Random ones follow from
    the key.
    """
    steps = range(1, len(episode.steps) + 1)
    match config.select:
        case "hindsight":
            return None
        case "first":
            return [1]
        case "last":
            return [len(steps)]
        case "random":
            return sorted(random.Random(key.tobytes()).sample(steps, min(config.max_targets, len(steps))))
        case "all":
            return list(steps)
        case "oracle":
            faults = () if episode.report is None else episode.report.faults or ()
            return sorted({fault.step for fault in faults})[: config.max_targets]
    raise ValueError(f"select {config.select!r}")


def analyse(episodes: Keyed, config: HindsightConfig, ask: Asker) -> Hindsight:
    """Asks about every episode: once, or about each given step."""
    found = Hindsight()
    asked: list[tuple[int, int | None, Question]] = []  # (number in `kept`, given step, question)
    kept: list[Episode] = []
    for episode, key in episodes:
        if not episode.steps:
            found.dropped["no_steps"] += 1
            continue
        steps = given_steps(episode, key, config)
        if steps == []:
            found.dropped[
                "no_report" if episode.report is None or episode.report.faults is None else "nothing_named"
            ] += 1
            continue
        for step in [None] if steps is None else steps:
            if step is None:
                messages = prompts.review_messages(episode, config.max_targets, config.clip_chars)
            else:
                messages = prompts.advise_messages(episode, step, config.clip_chars)
            asked.append((len(kept), step, _question(len(asked), episode, step, messages, key)))
        kept.append(episode)
    replies = _replies(found, asked, ask)
    for n, episode in enumerate(kept):
        parsed = []
        for step, text in replies.get(n, []):
            parsed.append((text, parse_failures(text, len(episode.steps), config.max_targets, only_step=step)))
        if parsed:
            _add(found, episode, parsed)
    return found


def judge(episodes: Keyed, ask: Asker) -> Hindsight:
    """Asks about each step of every episode, from that step and its answer alone. A step that is named has a reward of
    -1 and its hint as feedback, one that is not has 1, and one without a readable answer 0."""
    found = Hindsight()
    asked = []
    for n, (episode, key) in enumerate(episodes):
        found.dropped["no_steps"] += not episode.steps
        for number, step in enumerate(episode.steps, 1):
            asked.append((n, number, _question(len(asked), episode, number, prompts.judge_messages(step), key)))
    replies = _replies(found, asked, ask)
    for n, (episode, _) in enumerate(episodes):
        targets, texts, problems, rewards = [], [], [], [0.0] * len(episode.steps)
        for number, text in replies.get(n, []):
            parsed = parse_failures(text, 1, 1)
            found.dropped.update(parsed.dropped)
            found.parsed += parsed.problem is None
            targets += [Target(number, target.feedback) for target in parsed.targets]
            rewards[number - 1] = 0.0 if parsed.problem else -1.0 if parsed.targets else 1.0
            texts.append(text)
            problems += [parsed.problem] if parsed.problem else []
        if texts:
            found.analyses.append(
                Analysis(episode, tuple(targets), "\n".join(texts), next(iter(problems), None), tuple(rewards))
            )
    found.dropped = +found.dropped
    return found


def ask_environment(episodes: Keyed, config: HindsightConfig) -> Hindsight:
    """PRIVILEGED. The faults that the environment reports; with given steps, their own faults or nothing."""
    found = Hindsight()
    for episode, key in episodes:
        if episode.report is None or episode.report.faults is None:
            found.dropped["no_report"] += 1
            continue
        faults = tuple(Target(fault.step, fault.feedback) for fault in episode.report.faults)
        steps = given_steps(episode, key, config) if episode.steps or config.select == "hindsight" else []
        if steps is not None:
            faults = tuple(fault for fault in faults if fault.step in steps)
        limit = config.max_targets if steps is None else len(faults)
        dropped = {"over_limit": len(faults) - limit} if len(faults) > limit else {}
        found.asked += 1
        _add(found, episode, [(episode.report.summary, Parsed(faults[:limit], None, dropped))])
    return found


def _question(
    number: int, episode: Episode, step: int | None, messages: Sequence[Message], key: np.ndarray
) -> Question:
    """With a key of its own for each step: a hash, since `jax.random.fold_in` would cost a dispatch for each of
    thousands. The name begins with its number: a step may hold a task twice."""
    if step is not None:
        digest = hashlib.blake2b(key.astype("<u4").tobytes() + step.to_bytes(4, "little"), digest_size=8).digest()
        key = np.frombuffer(digest, "<u4").astype(np.uint32)
    return Question(f"{number} {episode.task_id}/{episode.rollout}/{step or 'episode'}", tuple(messages), key)


def _replies(found: Hindsight, asked: Sequence[tuple], ask: Asker) -> dict[int, list[tuple[int | None, str]]]:
    """(given step, text) of the questions that were answered, by the episode's number."""
    answers = ask([question for _, _, question in asked])
    found.asked, found.tokens = len(asked), answers.tokens
    found.dropped.update(answers.dropped)
    replies: dict[int, list[tuple[int | None, str]]] = {}
    for (n, step, _), text in zip(asked, answers.texts, strict=True):
        if text is not None:
            replies.setdefault(n, []).append((step, text))
    return replies


def _add(found: Hindsight, episode: Episode, answers: Sequence[tuple[str, Parsed]]) -> None:
    """Keeps what came of one episode; an episode that is left without any target is counted, whatever the reason."""
    dropped: Counter = Counter()
    for _, parsed in answers:
        dropped.update(parsed.dropped)
        found.parsed += parsed.problem is None
    targets = tuple(sorted(target for _, parsed in answers for target in parsed.targets))
    found.dropped.update(dropped)
    if not targets and not dropped:
        found.dropped["nothing_named"] += 1
    problem = next((parsed.problem for _, parsed in answers if parsed.problem), None)
    found.analyses.append(Analysis(episode, targets, "\n".join(text for text, _ in answers), problem))


def attribution(analyses: Sequence[Analysis]) -> dict[str, float]:
    """How right the targets are, where environments know their faults.

    Returns:
      `hindsight/precision`: targets that are true faults / targets; `hindsight/recall`: true faults that are targets /
      faults; `hindsight/first_fault`: share of episodes whose first fault is a target. Absent where nothing is known.
    """
    named = right = faults = first = episodes = 0
    for analysis in analyses:
        report = analysis.episode.report
        if report is None or not report.faults:
            continue
        true, steps = {fault.step for fault in report.faults}, {target.step for target in analysis.targets}
        episodes, named, faults = episodes + 1, named + len(steps), faults + len(true)
        right, first = right + len(true & steps), first + (min(true) in steps)
    rates = {"precision": (right, named), "recall": (right, faults), "first_fault": (first, episodes)}
    return {f"hindsight/{name}": part / whole for name, (part, whole) in rates.items() if whole}
