# SPDX-License-Identifier: Apache-2.0

"""The analyser's questions: a finished episode in, chat messages out.

The analyser reads the task, the bare outcome and the steps; nothing else. Invariant 2 from its other side: no
report, no ground truth and no other rollout is read here, so the answer can only come from the episode itself.
(`solution_hint` is no
question: it is what SDPO's teacher reads of a successful sibling.)

The fixed wording is short and constant, each piece exported and listed in `FIXED_STRINGS`, so that a small tokenizer
can hold each as one token. Numbers and the episode's own text stand between the pieces.
"""

from collections.abc import Sequence

from hintsd_jax.envs.base import Message
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
# Not in FIXED_STRINGS: the embedded policy reads these letter by letter, as it would anything that it was not brought
# up with.
IF_OK = "\nIf it is ok, the list is empty."
WORKED = "This worked:"
FIXED = "Do this:"

FIXED_STRINGS = (TASK, RESULT, STEPS, STEP, OBSERVATION, REWARD, CLIPPED, REVIEW, AT_MOST, ONLY_FIRST, ADVISE, GIVEN)


def render_trajectory(episode: Episode, clip_chars: int = 12000) -> str:
    """Task, bare outcome, then the steps from #1 on: action, observation, and the reward where it is not zero.

    The step list is clipped to its last `clip_chars` characters (12,000 in the method), and says so.
    """
    if clip_chars < 1:
        raise ValueError(f"clip_chars {clip_chars}: must be at least 1")
    steps = "".join(_render_step(number, step) for number, step in enumerate(episode.steps, 1))
    if len(steps) > clip_chars:
        steps = CLIPPED + steps[-clip_chars:]
    outcome = f"{episode.reward:g}, {episode.ended}"
    return f"{TASK}{observation_text(episode.prompt_messages)}{RESULT}{outcome}{STEPS}{steps}"


def review_messages(episode: Episode, max_targets: int, clip_chars: int = 12000) -> list[Message]:
    """Asks which steps broke the episode; at most `max_targets`, or with 1 only the first mistake."""
    limit = ONLY_FIRST if max_targets == 1 else f"{AT_MOST}{max_targets}"
    return [{"role": "user", "content": f"{render_trajectory(episode, clip_chars)}{REVIEW}{limit}"}]


def step_feedback_messages(episode: Episode, step: int, clip_chars: int = 12000) -> list[Message]:
    """Asks for feedback on one given step (1-based); the answer has the same JSON form as a review's."""
    if not 1 <= step <= len(episode.steps):
        raise ValueError(f"step {step} of an episode of {len(episode.steps)} steps")
    return [{"role": "user", "content": f"{render_trajectory(episode, clip_chars)}{ADVISE}{GIVEN}{STEP}{step}"}]


def judge_messages(step: Step) -> list[Message]:
    """Asks about one step from nothing but it and its answer, as a judge of every turn would see it; the answer has a
    review's form.
    """
    return [{"role": "user", "content": f"{STEPS.lstrip()}{_render_step(1, step)}{REVIEW}{ONLY_FIRST}{IF_OK}"}]


def solution_hint(episode: Episode) -> str:
    """What another attempt is told of a success: what was done, step by step."""
    return "\n".join([WORKED, *(f"{STEP}{number} {step.text}" for number, step in enumerate(episode.steps, 1))])


def combined_feedback(targets: Sequence[Target]) -> str:
    """Feedback on several steps as one message."""
    return "\n".join([FIXED, *(f"{STEP}{target.step} {target.feedback}" for target in targets)])


def _render_step(number: int, step: Step) -> str:
    reward = f"{REWARD}{step.reward:g}" if step.reward else ""
    return f"{STEP}{number} {step.text}{OBSERVATION}{step.observation}{reward}\n"
