"""What an analyser's words do to a teacher that reads them: the part "words" of `benchmarks.attribution`.

The policy is the teacher. In each failed episode it stands before the faulty step and reads nothing, the feedback at
that step, the same feedback at the start, or another episode's feedback at that step (a word at that place, but not the
right one). Asked are:

acts:      one action sampled as in a rollout: does it call what the reference still calls in this user turn, and not
           what was called in its place? However it is worded.
as worded: the probability, at temperature 1, of the reference's action to the letter, and of the one that was taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from benchmarks.looking_back import Request, cell, percent, ratio
from hintsd_jax.envs.base import ToolCall
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.sampling.prefix import common_prefix_length
from hintsd_jax.sampling.scoring import span_logprobs
from hintsd_jax.session import Session

THIRDS = ("early", "middle", "late")
CONTEXTS = ("none", "start", "other", "step")
GROUPS = {
    "named": "its own words, where it named the step",
    "told": "its words when told the step, where it had not named it",
}


@dataclasses.dataclass
class Case:
    """A failed episode with its one fault: the kind and the 1-based step. `right`: the action that would have been
    right there; `wanted`: the calls that would have been right in its place, the reference's for the rest of that user
    turn but the taken ones."""

    episode: Episode
    fault: str
    step: int
    right: str
    wanted: tuple[ToolCall, ...]

    @classmethod
    def of(cls, episode: Episode, fault: str, step: int, reference: Sequence[str], style: str) -> Case:
        """`reference`: the texts of all right actions, the same as the episode's up to the step."""
        wanted: list[ToolCall] = []
        for text in reference[step - 1 :]:
            calls = parse_action(text, style).calls
            if not calls:
                break
            wanted += calls
        taken = parse_action(episode.steps[step - 1].text, style).calls
        return cls(episode, fault, step, reference[step - 1], tuple(call for call in wanted if call not in taken))

    @property
    def third(self) -> str:
        """Where in the episode the fault is."""
        return THIRDS[3 * (self.step - 1) // len(self.episode.steps)]


def contexts(chat: ChatFormat, case: Case, words: str, other: str) -> dict[str, list[int]]:
    """What the teacher reads before the action, by the names of `CONTEXTS`."""
    episode, step = case.episode, case.episode.steps[case.step - 1]
    tokens, first = episode.tokens, case.episode.steps[0]

    def teacher_context(number: int, text: str) -> list[int]:
        trunk = tokens[: episode.steps[number - 1].prompt_start]
        seen, added = chat.teacher_context(episode.dialogue(number), episode.tools_at(number), trunk, text)
        return [*trunk[:seen], *added]

    at_start = [*advised(1, words), *tokens[first.start : step.start]]
    return dict(
        zip(
            CONTEXTS,
            (tokens[: step.start], at_start, advised(case.step, other), advised(case.step, words)),
            strict=True,
        )
    )


def others(cases: Sequence[Case], words: Sequence[str]) -> list[str]:
    """For each case the words about the next case of another task whose words differ; its own where there is none."""
    found = []
    for n, case in enumerate(cases):
        later = ((n + k) % len(cases) for k in range(1, len(cases)))
        found.append(
            next(
                (words[m] for m in later if cases[m].episode.task_id != case.episode.task_id and words[m] != words[n]),
                words[n],
            )
        )
    return found


Reading = Mapping[str, np.ndarray | float | int]
"""Of one case: "right none", "taken none", "right start", ...: log-probs of the action's tokens; "acts none", ...: 1
where the sampled action is right, else 0; "differs": the index of the right action's first token that is not the taken
one's."""


def read(session: Session, cases: Sequence[Case], words: Sequence[str], seed: int) -> list[Reading | None]:
    """What the teacher makes of the words about each case; None where a context is longer than the engine can read."""
    sampling, room = session.rollout_config().sampling, session.engine.config.context
    wider = [contexts(session.chat, *each) for each in zip(cases, words, others(cases, words), strict=True)]
    fits = [max(map(len, found.values())) + sampling.max_tokens <= room for found in wider]
    rows, requests = [], []
    for case, found, fit in zip(cases, wider, fits, strict=True):
        if fit:
            key = job_key(seed, 0, f"acts {case.fault} {case.episode.task_id}", 0)  # the same in every context
            rows += [(ids, action) for ids in found.values() for action in _actions(session.chat, case)]
            requests += [Request(ids, key, sampling, room) for ids in found.values()]
    weights = session.weights(session.trained)
    session.engine.run(weights, requests)
    scores, taken = iter(span_logprobs(weights, session.policy, rows, session.mesh)), iter(requests)
    readings: list[Reading | None] = []
    for case, fit in zip(cases, fits, strict=True):
        reading: dict[str, np.ndarray | float | int] = {"differs": common_prefix_length(*_actions(session.chat, case))}
        for context in CONTEXTS if fit else ():
            reading[f"right {context}"], reading[f"taken {context}"] = next(scores), next(scores)
            calls = parse_action(session.chat.decode(next(taken).ids), session.chat.style).calls
            reading[f"acts {context}"] = float(bool(calls) and all(call in case.wanted for call in calls))
        readings.append(reading if fit else None)
    return readings


def _actions(chat: ChatFormat, case: Case) -> tuple[Sequence[int], Sequence[int]]:
    """The ids of the right action and of the taken one."""
    step = case.episode.steps[case.step - 1]
    return chat.encode(case.right), case.episode.tokens[step.start : step.stop]


def summary(readings: Sequence[Reading]) -> dict:
    """Means over episodes, each with its interval; `gain` is the step's minus another context's, paired.

    acts: share of right samples; probability: of the whole action; token_probability: its geometric mean over the
    action's tokens;
    logprob: nats a token; right_likelier: share of episodes in which the right action is likelier than the taken one;
    decision: the probability of the right action's first token that is not the taken one's.
    """
    names = [f"{action} {context}" for action in ("right", "taken") for context in CONTEXTS]
    whole = {name: np.array([np.exp(reading[name].sum()) for reading in readings]) for name in names}
    token = {name: np.array([reading[name].mean() for reading in readings]) for name in names}
    acts = {context: np.array([reading[f"acts {context}"] for reading in readings]) for context in CONTEXTS}
    decision = {
        context: np.exp([reading[f"right {context}"][reading["differs"]] for reading in readings])
        for context in CONTEXTS
    }
    return {
        "episodes": len(readings),
        "acts": {context: ratio(values) for context, values in acts.items()},
        "acts_gain": {context: ratio(acts["step"] - acts[context]) for context in CONTEXTS[:-1]},
        "probability": {name: ratio(values) for name, values in whole.items()},
        "gain": {context: ratio(whole["right step"] - whole[f"right {context}"]) for context in CONTEXTS[:-1]},
        "token_probability": {name: ratio(np.exp(values)) for name, values in token.items()},
        "logprob": {name: ratio(values) for name, values in token.items()},
        "right_likelier": {
            context: ratio(whole[f"right {context}"] > whole[f"taken {context}"]) for context in CONTEXTS
        },
        "decision": {context: ratio(values) for context, values in decision.items()},
    }


def bold(name: str, kinds: Collection[str]) -> str:
    """What is told of several kinds together stands out."""
    return name if name in kinds else f"**{name}**"


def words_table(name: str, group: str, rows: Mapping[str, Mapping], kinds: Collection[str]) -> str:
    """By kind of fault."""
    lines = [
        f"**{name}**, {GROUPS[group]}. Right actions, %: as sampled (however worded), then the probability of the reference's own words",
        "",
    ]
    head = ["none", "at the start", "another's", "**at the step**", "step - none", "step - start"]
    head += ["worded: none", "start", "another's", "step", "step - none", "step - start"]
    lines += [f"| fault | episodes | {' | '.join(head)} |", f"|---|--:|{'--:|' * len(head)}"]
    for kind, row in rows.items():
        acts = [f"{100 * row['acts'][context]['value']:.1f}" for context in CONTEXTS]
        worded = [f"{100 * row['probability'][f'right {context}']['value']:.1f}" for context in CONTEXTS]
        gains = [
            [percent(row[gain][context], sign=True) for context in ("none", "start")] for gain in ("acts_gain", "gain")
        ]
        lines.append(
            f"| {' | '.join([bold(kind, kinds), str(row['episodes']), *acts, *gains[0], *worded, *gains[1]])} |"
        )
    return "\n".join(lines)


def tokens_table(found: Mapping[str, Mapping], kinds: Collection[str]) -> str:
    """Over several kinds together."""
    lines = [
        "As worded: log-probability a token, nats; the share of episodes in which the right action is likelier than the taken one; the"
    ]
    lines[0] += " probability of the right action's deciding token, the first that is not the taken one's."
    lines += [
        "",
        "| analyser | words | faults | episodes | what | none | at the start | another's, at the step | at the step |",
    ]
    lines += ["|---|---|---|--:|---|--:|--:|--:|--:|"]
    for name, group, together, row in (
        (name, group, together, row)
        for name, result in found.items()
        for group, rows in result.get("words", {}).items()
        for together, row in rows.items()
        if together not in kinds
    ):
        whats = {
            "right, nats": [cell(row["logprob"][f"right {context}"]) for context in CONTEXTS],
            "taken, nats": [cell(row["logprob"][f"taken {context}"]) for context in CONTEXTS],
            "right likelier, %": [percent(row["right_likelier"][context]) for context in CONTEXTS],
            "deciding token, %": [percent(row["decision"][context]) for context in CONTEXTS],
        }
        lines += [
            f"| {name} | {group} | {together} | {row['episodes']} | {what} | {' | '.join(cells)} |"
            for what, cells in whats.items()
        ]
    return "\n".join(lines)
