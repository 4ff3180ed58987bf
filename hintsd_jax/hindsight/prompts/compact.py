# SPDX-License-Identifier: Apache-2.0

"""The prompt set `compact`: for the embedded policy, which was brought up with exactly these words.

The wording is short and constant, each piece a constant of its own and listed in `FIXED_STRINGS`, so that a small
tokenizer can hold each as one token. Numbers and the episode's own text stand between the pieces. Half a million
weights review best when they go step by step before the JSON; they know the tools, so no documentation is shown; and
they follow feedback that stands alone in a user message right before the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hintsd_jax.envs.base import Message
from hintsd_jax.hindsight.prompts.base import (
    HINT,
    VERDICT,
    Benchmark,
    Judgement,
    checked_step,
    clipped_steps,
    read_judgement,
)
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.episode import Episode, Step, observation_text

TASK = "This attempt at a task failed.\nTask:\n"
RESULT = "\nResult: reward "
STEPS = "\nSteps:\n"
STEP = "#"
OBSERVATION = "\n> "
REWARD = "\nreward "
CLIPPED = "[earlier steps cut]\n"
REVIEW = (
    "\nFind the steps that caused the failure, not what followed from them. First write one short line per step:"
    " what was wanted, what was done, ok or bad. Then say for each bad step what should have been done instead,"
    ' as JSON: {"failures": [{"step": 2, "feedback": "..."}]}'
)
AT_MOST = "\nAt most this many steps: "
ONLY_FIRST = "\nOnly the first bad step."
ADVISE = (
    "\nOne step is given. Say what should have been done there instead, as JSON:"
    ' {"failures": [{"step": 2, "feedback": "..."}]}'
)
GIVEN = "\nThe step: "
ASK_VERDICT = '\nWas this step right? 1: yes, -1: no, 0: it does not show. As JSON: {"verdict": ...}'
ASK_HINT = '\nWhat would have helped before this step? As JSON, empty if nothing shows: {"hint": ...}'
WORKED = "This worked:"
FIXED = "Do this:"

FIXED_STRINGS = (
    *(TASK, RESULT, STEPS, STEP, OBSERVATION, REWARD, CLIPPED, REVIEW, AT_MOST, ONLY_FIRST, ADVISE, GIVEN),
    *(ASK_VERDICT, ASK_HINT, WORKED, FIXED),
)


class Compact:
    """See the module's docstring; the methods are those of `base.PromptSet`."""

    def review(self, episode: Episode, benchmark: Benchmark, max_targets: int, max_chars: int) -> list[Message]:
        limit = ONLY_FIRST if max_targets == 1 else f"{AT_MOST}{max_targets}"
        return _user(f"{render_trajectory(episode, max_chars)}{REVIEW}{limit}")

    def step_feedback(self, episode: Episode, benchmark: Benchmark, step: int, max_chars: int) -> list[Message]:
        number = checked_step(episode, step)
        return _user(f"{render_trajectory(episode, max_chars)}{ADVISE}{GIVEN}{STEP}{number}")

    def judge(self, step: Step) -> Mapping[str, list[Message]]:
        """Two questions, as OpenClaw-RL has two judges."""
        steps = STEPS.lstrip() + _render_step(1, step, outcome=False)
        return {VERDICT: _user(steps + ASK_VERDICT), HINT: _user(steps + ASK_HINT)}

    def read_judgement(self, question: str, answer: str) -> Judgement:
        return read_judgement(question, answer)

    def teacher_feedback(self, feedback: str) -> str:
        return feedback

    def teacher_hint(self, message: str, hint: str) -> str:
        return f"{message}\n{hint}"

    def teacher_reprompt(
        self, messages: Sequence[Message], *, solution: Sequence[str] = (), targets: Sequence[Target] = ()
    ) -> tuple[Message, ...]:
        """A message of its own after the first ones."""
        lines = [WORKED, *(f"{STEP}{number} {text}" for number, text in enumerate(solution, 1))]
        if not solution:
            lines = [FIXED, *(f"{STEP}{target.step} {target.feedback}" for target in targets)]
        return (*messages, *_user("\n".join(lines)))


def render_trajectory(episode: Episode, max_chars: int) -> str:
    """Task, bare outcome, then the steps from #1 on: action, observation, and the reward where it is not zero."""
    rendered = [_render_step(number, step) for number, step in enumerate(episode.steps, 1)]
    steps = clipped_steps(rendered, max_chars, CLIPPED)
    outcome = f"{episode.reward:g}, {episode.ended}"
    return f"{TASK}{observation_text(episode.prompt_messages)}{RESULT}{outcome}{STEPS}{steps}"


def _render_step(number: int, step: Step, outcome: bool = True) -> str:
    reward = f"{REWARD}{step.reward:g}" if outcome and step.reward else ""
    return f"{STEP}{number} {step.text}{OBSERVATION}{step.observation}{reward}\n"


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]
