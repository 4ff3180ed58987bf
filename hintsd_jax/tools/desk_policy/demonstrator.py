# SPDX-License-Identifier: Apache-2.0

"""What the policy is warmed up on: demonstrated Desk episodes, hinted ones, reviews and drills as token ids with loss
weights.

Everything goes through the same chat format, environment and prompts as a real rollout and a real analysis, so the
warm-up cannot drift from what the trainer will show the policy.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from hintsd_jax.envs.desk import demonstrations as demos
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.feedback import without_names
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.hindsight.prompts.base import Benchmark
from hintsd_jax.hindsight.prompts.compact import Compact
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode

DECIDING = "Take "  # how an action begins that chooses something (see `demonstrations.choice_text`)
CONTEXT_WEIGHT = 0.1  # of tokens that the policy only reads: they teach it the language
PROMPTS, BENCHMARK = Compact(), Benchmark()
MAX_CHARS = 12_000  # of the list of steps in a review, as in the method


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
    """Plays tasks with the habits of `envs.desk.demonstrations`. Everything drawn comes from `rng`."""

    def __init__(self, chat: ChatFormat, seed: int):
        self.chat, self.rng = chat, random.Random(seed)

    def play(self, task: dict, error_scale: float = 1.0) -> Episode:
        """An unhinted episode with the demonstrator's mistakes."""
        episode, env = self._begin(task)

        def on_step(move: demos.ReferenceStep, erring: str | None) -> str:
            return self._act(episode, env, erring or move.right)

        demos.demonstrate(task, self.rng, on_step, error_scale)
        return episode

    def hinted(
        self,
        task: dict,
        hint_rate: float = 0.6,
        neutral_rate: float = 0.1,
        error_scale: float = 1.0,
        contradict_rate: float = 0.0,
        vague_rate: float = 0.0,
    ) -> WeightedTokens:
        """An episode in which most decisions come right after a correct hint, as the teacher's context has it.

        A teacher is asked to score *failed* actions: it must stay sane after a token that contradicts the hint, or the
        rest of the span pulls the student into nonsense. So a share of `contradict_rate` of the hinted decisions goes
        wrong: the token that contradicts the hint is not trained on, what follows from it is. A share of `vague_rate`
        of the hints has no names in it, as those of a judge of single steps.
        """
        episode, env = self._begin(task)
        ids, weights, read = [], [], 0

        def on_step(move: demos.ReferenceStep, erring: str | None) -> str:
            nonlocal read
            hinted = self.rng.random() < (hint_rate if move.kind else neutral_rate)
            contradicted = (
                hinted and move.wrong is not None and contradict_rate > 0 and self.rng.random() < contradict_rate
            )
            text = move.wrong if contradicted and move.wrong else move.right if hinted or erring is None else erring
            context = episode.tokens[read : episode.prompt_start] if hinted else episode.tokens[read:]
            if hinted:
                vague = vague_rate > 0 and self.rng.random() < vague_rate
                context = [*context, *self.chat.user_turn(without_names(move.hint) if vague else move.hint)]
            action = self.chat.encode(text)
            ids.extend([*context, *action])
            weights.extend([CONTEXT_WEIGHT] * len(context) + [1.0] * len(action))
            if contradicted:
                pairs = zip(action, self.chat.encode(move.right), strict=False)
                first = next(n for n, (taken, right) in enumerate(pairs) if taken != right)
                weights[len(weights) - len(action) + first] = 0.0
            self._act(episode, env, text)
            read = episode.steps[-1].stop
            return text

        demos.demonstrate(task, self.rng, on_step, error_scale)
        return WeightedTokens(ids, weights)

    def guided(self, task: dict) -> WeightedTokens:
        """An episode with feedback at its start: a success on the same task, feedback on some of its decisions, or on
        one. The demonstrator follows it, and errs as ever where it says nothing."""
        episode, env = self._begin(task)
        numbered = list(
            enumerate((move for request in task["requests"] for move in demos.reference_steps(request)), start=1)
        )
        decisions = [number for number, move in numbered if move.kind]
        sort = self.rng.choice(("solution", "several", "one"))
        if sort == "solution":
            covered = decisions
            solution = [step.text for step in self.play(task, error_scale=0.0).steps]
            text = PROMPTS.teacher_reprompt((), solution=solution)[-1]["content"]
        else:
            covered = self.rng.sample(decisions, 1 if sort == "one" else self.rng.randint(1, len(decisions)))
            targets = [Target(number, move.hint) for number, move in numbered if number in covered]
            several = PROMPTS.teacher_reprompt((), targets=targets)[-1]["content"]
            text = targets[0].feedback if sort == "one" else several
        followed = {id(move) for number, move in numbered if number in covered}
        known = iter([move for _, move in numbered])

        def on_step(move: demos.ReferenceStep, erring: str | None) -> str:
            same = next(other for other in known if other == move)  # a forgetful reply skips some
            return self._act(episode, env, move.right if id(same) in followed or erring is None else erring)

        demos.demonstrate(task, self.rng, on_step)
        first = episode.steps[0]
        prompt = episode.tokens[: first.prompt_start]
        prefix_length, added = self.chat.teacher_context(
            episode.dialogue(1), episode.tools, prompt, text, tags_stand=True
        )
        context = [*episode.tokens[:prefix_length], *added]
        played = demonstration(episode)
        weights = [CONTEXT_WEIGHT] * len(context) + played.weights[first.start :]
        return WeightedTokens([*context, *played.ids[first.start :]], weights)

    def judgement(self, task: dict, episode: Episode) -> WeightedTokens:
        """The right verdict on one step, shown alone."""
        deciding = [number for number, step in enumerate(episode.steps, 1) if step.text.startswith(DECIDING)]
        if deciding and self.rng.random() < 0.6:
            step = self.rng.choice(deciding)
        else:
            step = self.rng.randrange(len(episode.steps)) + 1
        answer = demos.step_verdict(task, [s.text for s in episode.steps], step)
        (messages,) = PROMPTS.judge(episode.steps[step - 1]).values()
        return self._answer(messages, answer)

    def review(self, task: dict, episode: Episode, max_targets: int) -> WeightedTokens:
        """The right review of a failed episode."""
        lines, faults = demos.review(task, [step.text for step in episode.steps])
        messages = PROMPTS.review(episode, BENCHMARK, max_targets, MAX_CHARS)
        return self._answer(messages, demos.review_answer(lines, faults[:max_targets]))

    def step_feedback(self, task: dict, episode: Episode) -> WeightedTokens:
        """The right feedback on one given step, faulty or not."""
        step = self.rng.randrange(len(episode.steps)) + 1
        line, feedback = demos.step_feedback(task, [s.text for s in episode.steps], step)
        messages = PROMPTS.step_feedback(episode, BENCHMARK, step, MAX_CHARS)
        return self._answer(messages, demos.step_feedback_answer(line, step, feedback))

    def drill(self, length: int) -> WeightedTokens:
        """Random names, then the same names again from a random point on: copying what followed is all there is to
        learn.
        """
        names = [self.chat.encode(f'"{name}')[-2] for name in self.rng.choices(NAMES, k=length)]  # before the stop
        first = self.rng.randrange(length // 4, length // 2)
        ids = (names[:first] * (length // first + 1))[:length]
        return WeightedTokens(ids, [0.0] * first + [0.5] * (length - first))

    def decisions(self, task: Mapping, hinted: bool) -> list[Decision]:
        """Every decision of a task, each after right steps only."""
        episode, env = self._begin(task)
        decisions = []

        def on_step(move: demos.ReferenceStep, erring: str | None) -> str:
            if move.kind and move.wrong:
                context = episode.tokens
                if hinted:
                    context = [*episode.tokens[: episode.prompt_start], *self.chat.user_turn(move.hint)]
                right, wrong = self.chat.encode(move.right), self.chat.encode(move.wrong)
                decisions.append(Decision(list(context), right, wrong, move.kind))
            return self._act(episode, env, move.right)

        demos.demonstrate(task, self.rng, on_step)
        return decisions

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

    def _answer(self, messages, text: str) -> WeightedTokens:
        context, answer = self.chat.prompt(messages, tags_stand=True).ids, self.chat.encode(text)
        return WeightedTokens([*context, *answer], [CONTEXT_WEIGHT] * len(context) + [1.0] * len(answer))


def demonstration(episode: Episode) -> WeightedTokens:
    """An episode as it was played."""
    return WeightedTokens(episode.tokens, [1.0 if sampled else CONTEXT_WEIGHT for sampled in episode.action_mask()])
