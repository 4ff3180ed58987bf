"""Rows of the warm-up: scripted Desk episodes, hinted episodes, reviews, advice and drills as token ids with loss
weights.

Every row goes through the same chat format, environment and prompts as a real rollout and a real analysis, so the
warm-up cannot drift from what the trainer will show the policy.
"""

from __future__ import annotations

import dataclasses
import random

from hintsd_jax.envs.desk import advice
from hintsd_jax.envs.desk import demonstrations as demos
from hintsd_jax.envs.desk.env import Desk
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode

DECIDING = "Take "  # how an action begins that chooses something (see `demos.taking`)
CONTEXT_WEIGHT = 0.1  # of tokens that the policy only reads: they teach it the language


@dataclasses.dataclass(frozen=True)
class Row:
    """`weights[i]` is the loss weight of predicting `ids[i]`."""

    ids: list[int]
    weights: list[float]


@dataclasses.dataclass(frozen=True)
class Decision:
    """One hinted or unhinted decision inside a context: what the policy should do, and what its habit would do."""

    context: list[int]
    right: list[int]
    wrong: list[int]
    kind: str


class Demonstrator:
    """Plays tasks into rows. `encode` of an action gives its span, the stop token included."""

    def __init__(self, chat: ChatFormat, tokenizer, rng: random.Random):
        self.chat, self.rng = chat, rng
        self._tokenizer = tokenizer

    def encode_action(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(text, add_special_tokens=False), self.chat.stop_ids[0]]

    def play(self, task: dict, error_scale: float = 1.0) -> Episode:
        """An unhinted episode with the demonstrator's mistakes."""
        episode, env = self._begin(task)

        def on_step(move: demos.Move, erring: str | None) -> str:
            text = erring or move.right
            self._take(episode, env, text)
            return text

        demos.demonstrate(task, self.rng, on_step, error_scale)
        return episode

    @staticmethod
    def row(episode: Episode) -> Row:
        """An episode as it was played."""
        return Row(episode.tokens, [1.0 if sampled else CONTEXT_WEIGHT for sampled in episode.action_mask()])

    def hinted_row(
        self,
        task: dict,
        hint_rate: float = 0.6,
        neutral_rate: float = 0.1,
        error_scale: float = 1.0,
        contradict_rate: float = 0.0,
        vague_rate: float = 0.0,
    ) -> Row:
        """An episode in which most decisions come right after a correct hint, as the teacher's context has it.

        A teacher is asked to score *failed* actions: it must stay sane after a word that contradicts the hint, or the
        rest of the span pulls the student into nonsense. So a share of `contradict_rate` of the hinted decisions goes
        wrong: the word that contradicts the hint is not trained on, what follows from it is. A share of `vague_rate` of
        the hints has no names in it, as those of a judge of single steps.
        """
        episode, env = self._begin(task)
        ids, weights, read = [], [], 0

        def on_step(move: demos.Move, erring: str | None) -> str:
            nonlocal read
            hinted = self.rng.random() < (hint_rate if move.kind else neutral_rate)
            contradicted = (
                hinted and move.wrong is not None and contradict_rate > 0 and self.rng.random() < contradict_rate
            )
            text = move.wrong if contradicted else move.right if hinted or erring is None else erring
            context = episode.tokens[read : episode.prompt_start] if hinted else episode.tokens[read:]
            if hinted:
                vague = vague_rate > 0 and self.rng.random() < vague_rate
                context = [*context, *self.chat.user_turn(advice.without_names(move.hint) if vague else move.hint)]
            action = self.encode_action(text)
            ids.extend([*context, *action])
            weights.extend([CONTEXT_WEIGHT] * len(context) + [1.0] * len(action))
            if contradicted:
                pairs = zip(action, self.encode_action(move.right), strict=False)
                first = next(n for n, (taken, right) in enumerate(pairs) if taken != right)
                weights[len(weights) - len(action) + first] = 0.0
            self._take(episode, env, text)
            read = episode.steps[-1].stop
            return text

        demos.demonstrate(task, self.rng, on_step, error_scale)
        return Row(ids, weights)

    def started_row(self, task: dict) -> Row:
        """An episode under advice that stands at its start: a success on the same task, feedback on some of its
        decisions, or on one. The demonstrator heeds it, and errs as ever where it says nothing."""
        episode, env = self._begin(task)
        numbered = list(enumerate((move for request in task["requests"] for move in demos.moves(request)), start=1))
        decisions = [number for number, move in numbered if move.kind]
        sort = self.rng.choice(("solution", "several", "one"))
        if sort == "solution":
            advised, text = decisions, prompts.solution(self.play(task, error_scale=0.0))
        else:
            advised = self.rng.sample(decisions, 1 if sort == "one" else self.rng.randint(1, len(decisions)))
            targets = [Target(number, move.hint) for number, move in numbered if number in advised]
            text = targets[0].feedback if sort == "one" else prompts.whole_advice(targets)
        hints = {id(move) for number, move in numbered if number in advised}
        known = iter([move for _, move in numbered])

        def on_step(move: demos.Move, erring: str | None) -> str:
            same = next(other for other in known if other == move)  # a forgetful reply skips some
            text = move.right if id(same) in hints or erring is None else erring
            self._take(episode, env, text)
            return text

        demos.demonstrate(task, self.rng, on_step)
        first = episode.steps[0]
        seen, words = self.chat.teacher_context(
            episode.dialogue(1), episode.tools, episode.tokens[: first.prompt_start], text
        )
        context = [*episode.tokens[:seen], *words]
        after = [1.0 if sampled else CONTEXT_WEIGHT for sampled in episode.action_mask()][first.start :]
        return Row([*context, *episode.tokens[first.start :]], [CONTEXT_WEIGHT] * len(context) + after)

    def judge_row(self, task: dict, episode: Episode) -> Row:
        """The right verdict on one step, shown alone."""
        deciding = [number for number, step in enumerate(episode.steps, 1) if step.text.startswith(DECIDING)]
        step = (
            self.rng.choice(deciding)
            if deciding and self.rng.random() < 0.6
            else self.rng.randrange(len(episode.steps)) + 1
        )
        answer = demos.judge(task, [s.text for s in episode.steps], step)
        return self._answer(prompts.judge_messages(episode.steps[step - 1]), answer)

    def review_row(self, task: dict, episode: Episode, max_targets: int) -> Row:
        """The right review of a failed episode, its own or the policy's."""
        lines, faults = demos.review(task, [step.text for step in episode.steps])
        messages = prompts.review_messages(episode, max_targets)
        return self._answer(messages, demos.review_answer(lines, faults[:max_targets]))

    def advice_row(self, task: dict, episode: Episode) -> Row:
        """The right feedback on one given step, faulty or not."""
        step = self.rng.randrange(len(episode.steps)) + 1
        line, feedback = demos.advise(task, [s.text for s in episode.steps], step)
        return self._answer(prompts.advise_messages(episode, step), demos.advice_answer(line, step, feedback))

    def drill_row(self, length: int) -> Row:
        """Random names, then the same names again from a random point on: copying what followed is all there is to
        learn.
        """
        names = [
            self._tokenizer.encode(f'"{n}', add_special_tokens=False)[-1] for n in self.rng.choices(NAMES, k=length)
        ]
        first = self.rng.randrange(length // 4, length // 2)
        ids = (names[:first] * (length // first + 1))[:length]
        return Row(ids, [0.0] * first + [0.5] * (length - first))

    def decisions(self, task: dict, hinted: bool) -> list[Decision]:
        """Every decision of a task, each after right steps only."""
        episode, env = self._begin(task)
        found = []

        def on_step(move: demos.Move, erring: str | None) -> str:
            if move.kind:
                context = episode.tokens
                if hinted:
                    context = [*episode.tokens[: episode.prompt_start], *self.chat.user_turn(move.hint)]
                found.append(
                    Decision(list(context), self.encode_action(move.right), self.encode_action(move.wrong), move.kind)
                )
            self._take(episode, env, move.right)
            return move.right

        demos.demonstrate(task, self.rng, on_step)
        return found

    def _begin(self, task: dict) -> tuple[Episode, Desk]:
        env = Desk()
        start = env.reset(task)
        return Episode.begin(
            task["id"], 0, start.messages, self.chat.prompt(start.messages, start.tools), start.tools
        ), env

    def _take(self, episode: Episode, env: Desk, text: str) -> None:
        action = self.encode_action(text)
        episode.append_action(action, [0.0] * len(action), text)
        turn = env.step(parse_action(text))
        episode.append_observation(
            self.chat.delta(turn.messages) if turn.messages else None, turn.messages, turn.reward
        )
        episode.reward, episode.terminated = turn.reward, turn.terminated
        if turn.terminated:
            episode.ended = "terminated"

    def _answer(self, messages, text: str) -> Row:
        context, answer = list(self.chat.prompt(messages).ids), self.encode_action(text)
        return Row(context + answer, [CONTEXT_WEIGHT] * len(context) + [1.0] * len(answer))
