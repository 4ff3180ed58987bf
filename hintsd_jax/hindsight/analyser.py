"""Hindsight: failed episodes in, targets (step, feedback) out, every drop counted by reason.

The policy analysers (`policy_ema`, `policy`, `policy_initial`) read the whole episode and its bare outcome, through the same
engine as the rollouts, with the weights their name says. `environment` reads the environment's report, which knows the
ground truth: it is PRIVILEGED and labelled so wherever it shows. With `select = "random"` the step is drawn first and the
same analyser is asked for feedback on it: the control for *where*.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from hintsd_jax.episodes.chat import ChatFormat
from hintsd_jax.episodes.episode import Episode
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.parse import parse_failures
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.sampling import Engine, Sampling

PRIVILEGED = ("environment",)


@dataclasses.dataclass(frozen=True)
class HindsightConfig:
    """select: "hindsight" (the analyser names the steps) or "random" (it is given one). context: tokens of question and answer."""

    select: str
    analyser: str
    max_targets: int
    clip_chars: int
    context: int
    sampling: Sampling


@dataclasses.dataclass
class Analysis:
    """What came of one failed episode. `answer` is the analyser's own text, for the record."""

    episode: Episode
    targets: tuple[Target, ...]
    answer: str = ""
    problem: str | None = None


@dataclasses.dataclass
class Hindsight:
    """All failed episodes of a step. `dropped` counts answers, entries and rollouts by reason; `tokens` were sampled for it."""

    analyses: list[Analysis]
    dropped: Counter
    tokens: int = 0

    @property
    def parsed(self) -> int:
        """Episodes whose answer could be read."""
        return sum(analysis.problem is None for analysis in self.analyses)


class _Question:
    """One request to the analyser as a job of the engine: a single generation."""

    def __init__(self, prompt: Sequence[int], key: np.ndarray, config: HindsightConfig):
        self.prompt, self.key, self.sampling, self.context = prompt, key, config.sampling, config.context
        self.ids: list[int] = []

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        self.ids = ids

    def collect(self) -> None:
        return None


def given_step(episode: Episode, key: np.ndarray) -> int:
    """The random control's step (1-based), uniform over the episode's, from the question's key."""
    return random.Random(key.tobytes()).randrange(len(episode.steps)) + 1


def ask_policy(
    engine: Engine, params, chat: ChatFormat, failed: Sequence[tuple[Episode, np.ndarray]], config: HindsightConfig
) -> Hindsight:
    """Asks the analyser `params` about every failed episode. `failed` pairs each with the key of its question."""
    found, asked = Hindsight([], Counter()), []
    for episode, key in failed:
        if not episode.steps:
            found.dropped["no_steps"] += 1
            continue
        step = given_step(episode, key) if config.select == "random" else None
        if step is None:
            messages = prompts.review_messages(episode, config.max_targets, config.clip_chars)
        else:
            messages = prompts.advise_messages(episode, step, config.clip_chars)
        prompt = chat.prompt(messages).ids
        if len(prompt) + config.sampling.max_tokens > config.context:
            found.dropped["prompt_too_long"] += 1
            continue
        asked.append((episode, step, _Question(prompt, key, config)))
    found.tokens = engine.run(params, [question for _, _, question in asked]).sampled
    for episode, step, question in asked:
        answer = chat.decode(question.ids)
        parsed = parse_failures(answer, len(episode.steps), config.max_targets, only_step=step)
        _add(found, Analysis(episode, parsed.targets, answer, parsed.problem), parsed.dropped)
    return found


def ask_environment(failed: Sequence[tuple[Episode, np.ndarray]], config: HindsightConfig) -> Hindsight:
    """PRIVILEGED. The faults that the environment reports; with a given step, its own fault or nothing."""
    found = Hindsight([], Counter())
    for episode, key in failed:
        if episode.report is None or episode.report.faults is None:
            found.dropped["no_report"] += 1
            continue
        faults = [Target(fault.step, fault.feedback) for fault in episode.report.faults]
        if config.select == "random":
            step = given_step(episode, key)
            faults = [fault for fault in faults if fault.step == step]
        dropped = {"over_limit": len(faults) - config.max_targets} if len(faults) > config.max_targets else {}
        _add(found, Analysis(episode, tuple(faults[: config.max_targets]), episode.report.summary), dropped)
    return found


def _add(found: Hindsight, analysis: Analysis, dropped: Mapping[str, int]) -> None:
    """Keeps what came of one episode; an episode that is left without any target is counted, whatever the reason."""
    found.dropped.update(dropped)
    if not analysis.targets and not dropped:
        found.dropped["nothing_named"] += 1
    found.analyses.append(analysis)


def attribution(analyses: Sequence[Analysis]) -> dict[str, float]:
    """How right the targets are, where environments know their faults.

    Returns:
      `hindsight/precision`: targets that are true faults / targets; `hindsight/recall`: true faults that are targets / faults;
      `hindsight/first_fault`: share of episodes whose first fault is a target. Absent where nothing is known.
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
