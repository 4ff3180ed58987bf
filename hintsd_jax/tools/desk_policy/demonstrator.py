# SPDX-License-Identifier: Apache-2.0

"""What the policy is warmed up on: demonstrated Desk episodes, hinted ones, reviews and judgements as token ids with
loss weights (`drills` has the short rows beside them).

Everything goes through the same chat format, environment and prompts as a real rollout and a real analysis, so the
warm-up cannot drift from what the trainer will show the policy.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence

from hintsd_jax.envs.base import Message
from hintsd_jax.envs.desk import demonstrations as demos
from hintsd_jax.envs.desk import feedback, reviews, script
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.kinds import DECISIONS
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.prompts.base import HINT, VERDICT, Benchmark
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode

CONTEXT_WEIGHT = 0.1  # of tokens that the policy only reads: they teach it the language
PROMPTS, BENCHMARK = prompts.shipped("compact"), Benchmark()
MAX_CHARS = 12_000  # of the list of steps in a review, as in the method

# What a hint before a decision is, and how often. The action follows the words of those that speak of the decision at
# hand ("right", "call" which asks for the call, "vague" without a name, "wrong" which asks for the mistake), and the
# habit under all others: none, on another argument, of another kind's step in the same task, of another task, "Go on.".
HINTS = {
    "none": 0.24,
    "right": 0.18,
    "call": 0.04,
    "wrong": 0.2,
    "argument": 0.02,
    "other_step": 0.12,
    "other_task": 0.08,
    "vague": 0.05,
    "vague_wrong": 0.04,
    "neutral": 0.03,
}
HINTED_ELSEWHERE = 0.12  # how often a step without a decision has a hint
# What is said at the start of an episode, and how often: a success on the same task, which is followed; a success on
# another one, which is not; feedback on some decisions, or on one; feedback on another task.
GUIDES = {"solution": 0.35, "other_solution": 0.2, "several": 0.2, "one": 0.15, "other_feedback": 0.1}
# How the faults of reviewed episodes are drawn: every kind alike, never by the demonstrator's habits.
ONE_FAULT, TWO_FAULTS, EACH_FAULTY = 0.45, 0.25, 0.35
REFUSED = 0.3  # of what judges see
OTHER_SHARE = 0.3  # of faults that are no wrong choice, where nobody says another


@dataclasses.dataclass(frozen=True)
class WeightedTokens:
    """`weights[i]` is the loss weight of predicting `ids[i]`."""

    ids: list[int]
    weights: list[float]


@dataclasses.dataclass(frozen=True)
class Decision:
    """One choice of a task, hinted or not: what the policy reads before it, the right action, and its usual mistake."""

    context: Sequence[int]
    right: Sequence[int]
    wrong: Sequence[int]
    kind: str


class Demonstrator:
    """Plays tasks with the habits of `envs.desk.habits`. Everything drawn comes from `rng`."""

    def __init__(self, chat: ChatFormat, seed: int):
        self.chat, self.rng = chat, random.Random(seed)

    def play(self, task: Mapping, error_scale: float = 1.0) -> Episode:
        """An unhinted episode with the demonstrator's mistakes."""
        episode, env = self._begin(task)

        def on_step(step: demos.ReferenceStep, mistake: str | None) -> str:
            return self._act(episode, env, mistake or step.right)

        demos.demonstrate(task, self.rng, on_step, error_scale)
        return episode

    def play_faulty(self, task: Mapping, other_faults: float = OTHER_SHARE) -> Episode:
        """An episode with one fault or some, of every kind alike, and no others. other_faults: how often a fault is one
        of `script.OTHER_FAULTS` instead of a wrong choice.
        """
        return self._play_with(task, self._drawn_faults(task, other_faults))

    def play_with_other_names(self, task: Mapping) -> Episode:
        """An episode where about half of the requests, at least one, have a call with another name than the user's."""
        sites = script.sites(task, "wrong_argument")
        hours = sorted({hour for hour, _ in sites})
        wrong = [hour for hour in hours if self.rng.random() < 0.5] or [self.rng.choice(hours)]
        drawn = [self.rng.choice([site for site in sites if site[0] == hour]) for hour in wrong]
        return self._play_with(task, [("wrong_argument", site) for site in drawn])

    def hinted(
        self,
        task: Mapping,
        other_task: Mapping,
        contradict_rate: float = 0.0,
        error_scale: float = 1.0,
        foreign: float = 1.0,
    ) -> WeightedTokens:
        """An episode with hints right before steps, as the teacher's context has them: see `HINTS`.

        A teacher is asked to score *failed* actions: it must stay sane after a token that contradicts the hint, or the
        rest of the span pulls the student into nonsense. So a share of `contradict_rate` of the hints that speak of
        their step are not followed: the token that contradicts them is not trained on, what follows from it is.

        Args:
          other_task: where hints of another task come from.
          contradict_rate: share of such hints that are not followed.
          error_scale: factor on the habits' rates.
          foreign: factor on how often a hint is of another step or task.
        """
        episode, env = self._begin(task)
        ids, weights, read = [], [], 0
        steps, others = _steps(task), [step for step in _steps(other_task) if step.kind]

        def on_step(step: demos.ReferenceStep, mistake: str | None) -> str:
            nonlocal read
            hint, asked = self._hint(step, steps, others, foreign)
            text = asked or mistake or step.right
            if asked and step.wrong and self.rng.random() < contradict_rate:
                text = step.wrong if asked == step.right else step.right
            context = episode.tokens[read:]
            if hint is not None:
                context = [*episode.tokens[read : episode.prompt_start], *self.chat.user_turn(hint)]
            action = self.chat.encode(text)
            ids.extend([*context, *action])
            weights.extend([CONTEXT_WEIGHT] * len(context) + [1.0] * len(action))
            if asked not in (None, text):
                weights[len(weights) - len(action) + self._first_difference(text, asked)] = 0.0
            self._act(episode, env, text)
            read = episode.steps[-1].stop
            return text

        demos.demonstrate(task, self.rng, on_step, error_scale)
        return WeightedTokens(ids, weights)

    def guided(self, task: Mapping, other_task: Mapping, contrary: float = 0.0) -> WeightedTokens:
        """An episode with something said at its start: see `GUIDES`. The demonstrator follows what is said of its own
        task, and errs as ever where nothing is.

        contrary: share of the decisions of which the mistake is said. Without any, what is said is what is asked for,
        and nobody has to read it.
        """
        (sort,) = self.rng.choices(list(GUIDES), list(GUIDES.values()))
        about = other_task if sort.startswith("other") else task
        steps = list(enumerate(_steps(about), 1))
        decisions = [number for number, step in steps if step.kind]
        said = {number: (step.hint, step.right) for number, step in steps}
        for number, step in steps:
            if contrary and step.kind in DECISIONS and step.wrong and step.wrong_hint and self.rng.random() < contrary:
                said[number] = step.wrong_hint, step.wrong
        covered = (
            []
            if not decisions
            else self.rng.sample(decisions, 1 if sort == "one" else self.rng.randint(1, len(decisions)))
        )
        targets = tuple(Target(number, said[number][0]) for number in sorted(covered))
        solution = [action for _, action in said.values()] if sort.endswith("solution") else ()
        told = decisions if solution else covered
        followed = {step.right: said[number][1] for number, step in steps if number in told} if about is task else {}
        episode, env = self._begin(task)

        def on_step(step: demos.ReferenceStep, mistake: str | None) -> str:
            return self._act(episode, env, followed.get(step.right, mistake or step.right))

        demos.demonstrate(task, self.rng, on_step)
        first = episode.prompt_messages
        if sort == "one" and targets:
            messages = (*first, {"role": "user", "content": PROMPTS.teacher_feedback(targets[0].feedback)})
        else:
            messages = PROMPTS.teacher_reprompt(first, solution=solution, targets=targets)
        context = self.chat.prompt(messages, episode.tools, tags_stand=True).ids
        played = demonstration(episode)
        start = episode.steps[0].start
        weights = [CONTEXT_WEIGHT] * len(context) + played.weights[start:]
        return WeightedTokens([*context, *played.ids[start:]], weights)

    def judgement(self, task: Mapping, other_task: Mapping, question: str) -> WeightedTokens:
        """What a judge can know of one step, shown alone: a step of a faulty episode, or (`REFUSED`) a call of another
        task's, which most often the office refuses. question: VERDICT or HINT.
        """
        if self.rng.random() < REFUSED:
            episode, env = self._begin(task)
            self._act(episode, env, self.rng.choice([step.right for step in _steps(other_task)]))
        else:
            episode = self.play_faulty(task)
        step = self.rng.choice(episode.steps)
        verdict, hint = reviews.step_verdict(step.text, step.observation)
        answer = {VERDICT: verdict} if question == VERDICT else {HINT: hint}
        return self._answer(PROMPTS.judge(step)[question], json.dumps(answer))

    def review(self, task: Mapping, episode: Episode, max_targets: int) -> WeightedTokens:
        """The right review of a failed episode."""
        lines, faults = reviews.review(task, [step.text for step in episode.steps])
        messages = PROMPTS.review(episode, BENCHMARK, max_targets, MAX_CHARS)
        return self._answer(messages, reviews.review_answer(lines, faults[:max_targets]))

    def step_feedback(self, task: Mapping, episode: Episode, of_told: float = 0.0) -> WeightedTokens:
        """The right feedback on one given step, faulty or not.

        of_told: how often it is one of which there is something to say; else any. Of most steps there is not.
        """
        actions = [step.text for step in episode.steps]
        told = [n for n, line in enumerate(reviews.review(task, actions)[0], 1) if reviews.asks_for_words(line)]
        asked = told if told and self.rng.random() < of_told else range(1, len(actions) + 1)
        step = self.rng.choice(asked)
        line, feedback = reviews.step_feedback(task, actions, step)
        messages = PROMPTS.step_feedback(episode, BENCHMARK, step, MAX_CHARS)
        return self._answer(messages, reviews.step_feedback_answer(line, step, feedback))

    def decisions(
        self,
        task: Mapping,
        hint: Callable[[demos.ReferenceStep], str | None] = lambda step: None,
        first: Sequence[Message] | None = None,
    ) -> list[Decision]:
        """Every decision of a task, each after right steps only.

        Args:
          hint: what is said right before a step; None: nothing.
          first: what the episode begins with in place of its own first messages.
        """
        episode, env = self._begin(task)
        began, decisions = len(episode.tokens), []
        prompt = (
            episode.tokens[:began] if first is None else self.chat.prompt(first, episode.tools, tags_stand=True).ids
        )

        def on_step(step: demos.ReferenceStep, mistake: str | None) -> str:
            if step.kind and step.wrong:
                said, context = hint(step), [*prompt, *episode.tokens[began:]]
                if said is not None:  # a look-up stands before every decision, so there is a step after the prompt
                    context = [*prompt, *episode.tokens[began : episode.prompt_start], *self.chat.user_turn(said)]
                right, wrong = self.chat.encode(step.right), self.chat.encode(step.wrong)
                decisions.append(Decision(context, right, wrong, step.kind))
            return self._act(episode, env, step.right)

        demos.demonstrate(task, self.rng, on_step)
        return decisions

    def _hint(
        self,
        step: demos.ReferenceStep,
        steps: Sequence[demos.ReferenceStep],
        others: Sequence[demos.ReferenceStep],
        foreign: float,
    ) -> tuple[str | None, str | None]:
        """(the hint before a step, the action that its words ask for); None where there is none."""
        if not step.kind:
            if self.rng.random() >= HINTED_ELSEWHERE:
                return None, None
            return self.rng.choice(
                [(step.hint, step.right), (feedback.NEUTRAL, None), self._foreign(step, [*steps, *others])]
            )
        often = [share * (foreign if sort.startswith("other") else 1.0) for sort, share in HINTS.items()]
        (sort,) = self.rng.choices(list(HINTS), often)
        wrong = step.wrong_hint or feedback.NEUTRAL
        match sort:
            case "right":
                return step.hint, step.right
            case "call":
                return step.call_hint or step.hint, step.right
            case "argument":
                return step.argument_hint, None
            case "vague":
                return feedback.without_names(step.hint), step.right
            case "wrong":
                return wrong, step.wrong
            case "vague_wrong":
                return feedback.without_names(wrong), step.wrong
            case "other_step":
                return self._foreign(step, steps)
            case "other_task":
                return self._foreign(step, others)
        return (feedback.NEUTRAL if sort == "neutral" else None), None

    def _foreign(self, step: demos.ReferenceStep, pool: Sequence[demos.ReferenceStep]) -> tuple[str | None, None]:
        """A hint that speaks of another step, of another kind: one of the same kind would be obeyed for its label."""
        hints = [each.hint for each in pool if each.kind and each.kind != step.kind]
        return (self.rng.choice(hints) if hints else None), None

    def _drawn_faults(self, task: Mapping, other_faults: float) -> list[tuple[str, script.Site]]:
        """Faults of a task, each in a request of its own."""
        rng = self.rng
        kinds = {request["kind"] for request in task["requests"]} | {"forgotten_call"}
        known = [fault for fault in script.CHOICES if fault.removeprefix("wrong_") in kinds]
        choices = [(fault, site) for fault in known for site in script.sites(task, fault)]
        other = [(fault, places) for fault in script.OTHER_FAULTS if (places := script.sites(task, fault))]
        draw = rng.random()
        chosen = [each for each in choices if rng.random() < EACH_FAULTY]
        if draw < ONE_FAULT + TWO_FAULTS or not chosen:
            chosen = rng.sample(choices, min(2 if ONE_FAULT <= draw < ONE_FAULT + TWO_FAULTS else 1, len(choices)))
        drawn = {}
        for fault, site in chosen:
            if other and rng.random() < other_faults:
                fault, places = rng.choice(other)
                site = rng.choice(places)
            drawn.setdefault(site[0], (fault, site))
        return list(drawn.values())

    def _play_with(self, task: Mapping, faults: Sequence[tuple[str, script.Site]]) -> Episode:
        episode, env = self._begin(task)
        actions, _ = script.with_faults(task, faults, self.rng)
        for text in actions:
            self._act(episode, env, text)
        return episode

    def _first_difference(self, taken: str, other: str) -> int:
        """The token of an action with which it leaves another one."""
        pairs = zip(self.chat.encode(taken), self.chat.encode(other), strict=False)
        return next(n for n, (one, two) in enumerate(pairs) if one != two)

    def _begin(self, task: Mapping) -> tuple[Episode, Desk]:
        env = Desk()
        start = env.reset(task)
        prompt = self.chat.prompt(start.messages, start.tools)
        return Episode.begin(task["id"], 0, start.messages, prompt, start.tools), env

    def _act(self, episode: Episode, env: Desk, text: str) -> str:
        action = self.chat.encode(text)
        episode.append_action(action, [0.0] * len(action), text)
        result = env.step(parse_action(text))
        delta = self.chat.delta(result.messages) if result.messages else None
        episode.append_observation(delta, result.messages, result.reward)
        episode.reward, episode.terminated = result.reward, result.terminated
        if result.terminated:
            episode.ended = "terminated"
        return text

    def _answer(self, messages: Sequence[Message], text: str) -> WeightedTokens:
        context, answer = self.chat.prompt(messages, tags_stand=True).ids, self.chat.encode(text)
        return WeightedTokens([*context, *answer], [CONTEXT_WEIGHT] * len(context) + [1.0] * len(answer))


def demonstration(episode: Episode) -> WeightedTokens:
    """An episode as it was played."""
    return WeightedTokens(episode.tokens, [1.0 if sampled else CONTEXT_WEIGHT for sampled in episode.action_mask()])


def _steps(task: Mapping) -> list[demos.ReferenceStep]:
    return [step for request in task["requests"] for step in demos.reference_steps(request)]
