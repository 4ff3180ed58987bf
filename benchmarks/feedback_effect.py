"""What an analyser's feedback does to a teacher that reads it: the part "feedback" of `benchmarks.attribution`.

The policy is the teacher. In each failed episode it stands before the faulty step and reads nothing, the feedback at
that step, the same feedback at the start, or another episode's feedback at that step (feedback at that place, but not
the right one). Measured are:

acts:      one action sampled as in a rollout: does it call what the reference still calls in this user turn, and not
           what was called in its place? However it is worded. Where the reference calls nothing more, as in
           environments of plain commands: is it the reference's action to the letter?
as worded: the probability, at temperature 1, of the reference's action to the letter, and of the one that was taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.hindsight_setup import Setup
from benchmarks.injected_faults import Case, calls_in
from benchmarks.pages import markdown_table
from benchmarks.rates import cell, percent, ratio
from hintsd_jax.config import build
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.sampling import Sampling
from hintsd_jax.sampling.prefix import common_prefix_length
from hintsd_jax.sampling.scoring import span_logprobs
from hintsd_jax.statistics import DIFFERENCE

CONTEXTS = ("none", "start", "other", "step")
GROUPS = {
    "named": "its own feedback, where it named the step",
    "asked": "its feedback when asked about the step, where it had not named it",
}


@dataclasses.dataclass
class Generation:
    """A single generation as a job of the engine; `ids` are what was sampled."""

    prompt: Sequence[int]
    key: np.ndarray
    sampling: Sampling
    context: int
    ids: list[int] = dataclasses.field(default_factory=list)

    def begin(self, slot: int) -> Sequence[int]:
        return self.prompt

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        self.ids = ids

    def collect(self) -> None:
        return None


class Reading(NamedTuple):
    """What the teacher makes of one case. right, taken: by context, the log-probs of the tokens of the right action and
    of the one that was taken. acts: by context, 1 where the sampled action is right, else 0. differs: the index of the
    right action's first token that is not the taken one's.
    """

    right: dict[str, np.ndarray]
    taken: dict[str, np.ndarray]
    acts: dict[str, float]
    differs: int


def contexts(chat: ChatFormat, case: Case, feedback: str, other: str) -> dict[str, list[int]]:
    """What the teacher reads before the action, by the names of `CONTEXTS`."""
    episode, step = case.episode, case.episode.steps[case.step - 1]
    tokens, first = episode.tokens, episode.steps[0]

    def with_feedback(number: int, text: str) -> list[int]:
        trunk = tokens[: episode.steps[number - 1].prompt_start]
        prefix_length, added = chat.teacher_context(episode.dialogue(number), episode.tools_at(number), trunk, text)
        return [*trunk[:prefix_length], *added]

    return {
        "none": tokens[: step.start],
        "start": [*with_feedback(1, feedback), *tokens[first.start : step.start]],
        "other": with_feedback(case.step, other),
        "step": with_feedback(case.step, feedback),
    }


def feedback_of_others(cases: Sequence[Case], feedback: Sequence[str]) -> list[str]:
    """For each case the feedback on the next case of another task that differs from its own; its own where there is
    none.
    """
    others = []
    for n, case in enumerate(cases):
        later = [(n + k) % len(cases) for k in range(1, len(cases))]
        fits = (m for m in later if cases[m].episode.task_id != case.episode.task_id and feedback[m] != feedback[n])
        others.append(feedback[next(fits, n)])
    return others


def read(setup: Setup, cases: Sequence[Case], feedback: Sequence[str], seed: int) -> list[Reading | None]:
    """What the teacher makes of the feedback on each case; None where a context is longer than the engine can read."""
    session, chat, sampling = setup.policy, setup.chat, build.rollout_config(setup.config).sampling
    room = session.engine.config.context
    others = feedback_of_others(cases, feedback)
    read_by_case = [contexts(chat, *each) for each in zip(cases, feedback, others, strict=True)]
    fits = [max(map(len, by_context.values())) + sampling.max_tokens <= room for by_context in read_by_case]
    rows, generations = [], []
    for case, by_context, fit in zip(cases, read_by_case, fits, strict=True):
        if fit:
            key = job_key(seed, 0, f"acts {case.fault} {case.episode.task_id}", 0)  # the same in every context
            rows += [(ids, action) for ids in by_context.values() for action in _actions(chat, case)]
            generations += [Generation(ids, key, sampling, room) for ids in by_context.values()]
    weights = session.weights(session.trained)
    session.engine.run(weights, generations)
    scores, sampled = iter(span_logprobs(weights, session.policy, rows, session.mesh)), iter(generations)
    readings: list[Reading | None] = []
    for case, fit in zip(cases, fits, strict=True):
        reading = Reading({}, {}, {}, common_prefix_length(*_actions(chat, case)))
        for context in CONTEXTS if fit else ():
            reading.right[context], reading.taken[context] = next(scores), next(scores)
            reading.acts[context] = float(is_right(chat.decode(next(sampled).ids), case, chat.style))
        readings.append(reading if fit else None)
    return readings


def is_right(text: str, case: Case, style: str) -> bool:
    """Whether an action does what would have been right in a case; see "acts" above."""
    if not case.wanted:
        return text.strip() == case.right.strip()
    calls = calls_in(text, style)
    return bool(calls) and all(call in case.wanted for call in calls)


def _actions(chat: ChatFormat, case: Case) -> tuple[Sequence[int], Sequence[int]]:
    """The ids of the right action and of the taken one."""
    step = case.episode.steps[case.step - 1]
    return chat.encode(case.right), case.episode.tokens[step.start : step.stop]


def summary(readings: Sequence[Reading]) -> dict:
    """Means over episodes, each with its interval; `gain` is the step's minus another context's, paired.

    acts: share of right samples; probability: of the whole action; token_probability: its geometric mean over the
    action's tokens; logprob: nats a token; right_likelier: share of episodes in which the right action is likelier than
    the taken one; decision: the probability of the right action's first token that is not the taken one's.
    """
    logprobs = {
        f"{action} {context}": [getattr(reading, action)[context] for reading in readings]
        for action in ("right", "taken")
        for context in CONTEXTS
    }
    whole = {name: np.array([np.exp(one.sum()) for one in each]) for name, each in logprobs.items()}
    token = {name: np.array([one.mean() for one in each]) for name, each in logprobs.items()}
    acts = {context: np.array([reading.acts[context] for reading in readings]) for context in CONTEXTS}
    decision = {
        context: np.exp([reading.right[context][reading.differs] for reading in readings]) for context in CONTEXTS
    }
    likelier = {context: whole[f"right {context}"] > whole[f"taken {context}"] for context in CONTEXTS}
    return {
        "episodes": len(readings),
        "acts": {context: ratio(values) for context, values in acts.items()},
        "acts_gain": {context: ratio(acts["step"] - acts[context], span=DIFFERENCE) for context in CONTEXTS[:-1]},
        "probability": {name: ratio(values) for name, values in whole.items()},
        "gain": {
            context: ratio(whole["right step"] - whole[f"right {context}"], span=DIFFERENCE)
            for context in CONTEXTS[:-1]
        },
        "token_probability": {name: ratio(np.exp(values)) for name, values in token.items()},
        "logprob": {name: ratio(values, span=None) for name, values in token.items()},
        "right_likelier": {context: ratio(values) for context, values in likelier.items()},
        "decision": {context: ratio(values) for context, values in decision.items()},
    }


def bold(name: str, kinds: Collection[str]) -> str:
    """What is reported of several kinds together stands out."""
    return name if name in kinds else f"**{name}**"


def effect_table(name: str, group: str, rows: Mapping[str, Mapping], kinds: Collection[str]) -> str:
    """By kind of fault."""
    head = ["fault", "episodes", "none", "at the start", "another's", "**at the step**", "step - none", "step - start"]
    head += ["worded: none", "start", "another's", "step", "step - none", "step - start"]
    lines = []
    for kind, row in rows.items():
        acts = [f"{100 * row['acts'][context]['value']:.1f}" for context in CONTEXTS]
        worded = [f"{100 * row['probability'][f'right {context}']['value']:.1f}" for context in CONTEXTS]
        gains = [
            [percent(row[gain][context], sign=True) for context in ("none", "start")] for gain in ("acts_gain", "gain")
        ]
        lines.append([bold(kind, kinds), row["episodes"], *acts, *gains[0], *worded, *gains[1]])
    caption = (
        f"**{name}**, {GROUPS[group]}. Right actions, %: as sampled (however worded), then the probability of the"
        " reference's own words"
    )
    return f"{caption}\n\n{markdown_table(head, lines)}"


def tokens_table(results: Mapping[str, Mapping], kinds: Collection[str]) -> str:
    """Over several kinds together."""
    lines = []
    for name, result in results.items():
        for group, rows in result.get("feedback", {}).items():
            for together, row in rows.items():
                if together in kinds:
                    continue
                measures = {
                    "right, nats": [cell(row["logprob"][f"right {context}"]) for context in CONTEXTS],
                    "taken, nats": [cell(row["logprob"][f"taken {context}"]) for context in CONTEXTS],
                    "right likelier, %": [percent(row["right_likelier"][context]) for context in CONTEXTS],
                    "deciding token, %": [percent(row["decision"][context]) for context in CONTEXTS],
                }
                for measure, cells in measures.items():
                    lines.append([name, group, together, row["episodes"], measure, *cells])
    caption = (
        "As worded: log-probability a token, nats; the share of episodes in which the right action is likelier than the"
        " taken one; the probability of the right action's deciding token, the first that is not the taken one's."
    )
    head = ["analyser", "feedback", "faults", "episodes", "measure", "none", "at the start", "another's, at the step"]
    return f"{caption}\n\n{markdown_table([*head, 'at the step'], lines, left=(0, 1, 2, 4))}"
