# SPDX-License-Identifier: Apache-2.0

"""The prompt set `released`: for models that read. What is asked, shown and told is as in HINT-SD's released code, and
for the baselines as in OpenClaw-RL and SDPO (arXiv 2601.20802); the words are ours.

The analyser gets a role and, as far as the environment names them, the usual kinds of mistake; then everything that the
agent began with, the tool documentation included, and the steps with their bare outcomes. It answers with JSON alone: a
line a step before it would fill the whole answer in a long episode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Message
from hintsd_jax.hindsight.prompts.base import (
    HINT,
    VERDICT,
    Benchmark,
    Judgement,
    checked_step,
    clipped_steps,
    read_judgement,
    without_reasoning,
)
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.episode import Episode, Step, observation_text

# In words: small models repeat an example as their answer.
_FEEDBACK_KEY = '"feedback" (one or two sentences: how that step should have gone)'
MANY_FORM = (
    'Answer with one JSON object with the key "failures": a list with an entry for each such step, earliest first. An'
    f' entry has the keys "step" (a whole number) and {_FEEDBACK_KEY}.'
)
ONE_FORM = f'Answer with one JSON object with the keys "failure_step" (a whole number) and {_FEEDBACK_KEY}.'
VERDICT_FORM = 'Answer with one JSON object with the key "verdict" (1, -1 or 0).'
HINT_FORM = 'Answer with one JSON object with the key "hint" (a text, empty if there is no hint).'
OMISSION = "[earlier steps left out]\n"

_FEEDBACK_RULE = (
    "The feedback on a step says how that step should have gone: concrete advice to the agent before it acts, in fewer"
    " than three sentences, about that step alone."
)
_JSON_ONLY = "Your answer is one JSON object and nothing else: no introduction, no explanation, no code fence."
_CAUSE = "Name the steps where the agent itself went wrong, not what followed from them."


class Released:
    """See the module's docstring; the methods are those of `base.PromptSet`."""

    def review(self, episode: Episode, benchmark: Benchmark, max_targets: int, max_chars: int) -> list[Message]:
        if max_targets == 1:
            what, form = "the first step that contains a mistake, with feedback on it", ONE_FORM
        else:
            what, form = (
                f"the steps that caused the failure: at least 1 and at most {max_targets}, earliest first, each with"
                " feedback of its own",
                MANY_FORM,
            )
        role = f"{_role(benchmark)} Find {what}. {_CAUSE} {_FEEDBACK_RULE} {_JSON_ONLY}"
        request = "Which of the agent's steps made this attempt fail, and how should they have gone?"
        return _asked(role, f"{request}\n\n{_attempt(episode, benchmark, max_chars)}\n{form}")

    def step_feedback(self, episode: Episode, benchmark: Benchmark, step: int, max_chars: int) -> list[Message]:
        number = checked_step(episode, step)
        role = f"{_role(benchmark)} One step is given: write feedback on it. {_FEEDBACK_RULE} {_JSON_ONLY}"
        request = "How should one step of this attempt have gone? Its number stands below the attempt."
        form = ONE_FORM.replace("a whole number", str(number))
        # The number last: questions about an episode's other steps have all before it in common, which is read once.
        return _asked(role, f"{request}\n\n{_attempt(episode, benchmark, max_chars)}\nThe step: {number}. {form}")

    def judge(self, step: Step) -> Mapping[str, list[Message]]:
        """Two questions, as OpenClaw-RL has two judges: whether the step was good, and what would have helped."""
        shown = f"The agent's action:\n{step.text}\n\nWhat came next:\n{step.observation or '(nothing)'}\n"
        verdict = (
            "You judge one step of an agent by what came right after it. The verdict is 1 if that shows that the step"
            f" was right, -1 if it shows that the step was wrong, 0 if it shows neither. {_JSON_ONLY}"
        )
        hint = (
            "You look at one step of an agent and at what came right after it, and decide whether that tells how the"
            " step should have gone. If it does, write a hint that would have helped the agent before it acted, in one"
            f" to three sentences; if it does not, the hint is empty. {_JSON_ONLY}"
        )
        return {
            VERDICT: _asked(verdict, f"{shown}\n{VERDICT_FORM}"),
            HINT: _asked(hint, f"{shown}\n{HINT_FORM}"),
        }

    def read_judgement(self, question: str, answer: str) -> Judgement:
        return read_judgement(question, answer)

    def teacher_feedback(self, feedback: str) -> str:
        return f"Take the following feedback into account for this step.\n\n{feedback}"

    def teacher_hint(self, message: str, hint: str) -> str:
        return f"{message}\n\n## Hint\n{hint}"

    def teacher_reprompt(
        self, messages: Sequence[Message], *, solution: Sequence[str] = (), targets: Sequence[Target] = ()
    ) -> tuple[Message, ...]:
        """The last user message, with what the teacher knows and the request to solve the task inside it."""
        if solution:
            actions = "\n".join(without_reasoning(text) for text in solution)
            known = f"A correct solution of an earlier attempt:\n\n{actions}"
        else:
            steps = "\n".join(f"Step {target.step}: {target.feedback}" for target in targets)
            known = f"Feedback on an earlier attempt that failed:\n\n{steps}"
        place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
        question = "" if place is None else messages[place]["content"]
        prompt = {
            "role": "user",
            "content": f"{question}\n\n{known}\n\nNow solve the original task correctly.".lstrip(),
        }
        if place is None:
            return (*messages, prompt)
        return (*messages[:place], prompt, *messages[place + 1 :])


def _role(benchmark: Benchmark) -> str:
    tasks = f"tasks of {benchmark.name}" if benchmark.name else "tasks with tools"
    mistakes = ""
    if benchmark.kinds_of_mistake:
        mistakes = f" Usual mistakes there: {', '.join(benchmark.kinds_of_mistake)}."
    return f"You analyse failed attempts of an agent at {tasks}.{mistakes}"


def _attempt(episode: Episode, benchmark: Benchmark, max_chars: int) -> str:
    """Everything that the analyser may know of an attempt. Only its step list is ever clipped."""
    last = len(episode.steps)
    steps = [_step(number, step, episode.terminated and number == last) for number, step in enumerate(episode.steps, 1)]
    facts = [
        f"Task: {episode.task_id}",
        *([f"Benchmark: {benchmark.name}"] if benchmark.name else []),
        f"Final reward: {episode.reward:g}",
        f"Success: {_yes(episode.success)}",
        f"Terminated by the environment: {_yes(episode.terminated)}",
        f"Stopped by a limit: {_yes(not episode.terminated)}",
    ]
    text = "\n".join(facts)
    text += f"\n\nWhat the agent began with:\n{_first_prompt(episode)}"
    text += f"\n\nSteps:\n{clipped_steps(steps, max_chars, OMISSION)}"
    feedback = _last_feedback(episode)
    return text + (f"\nThe environment's last feedback:\n{feedback}\n" if feedback else "")


def _first_prompt(episode: Episode) -> str:
    parts = [f"[{message['role']}]\n{message['content']}" for message in episode.prompt_messages]
    return "\n".join([*parts, *(["[tools]", _documentation(episode.tools)] if episode.tools else [])])


def _documentation(tools: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)


def _step(number: int, step: Step, terminated: bool) -> str:
    tools = f"\nNew tools:\n{_documentation(step.tools)}" if step.tools else ""
    return (
        f"Step {number}\nAction:\n{step.text}\nEnvironment:\n{step.observation or '(nothing)'}{tools}\n"
        f"Reward: {step.reward:g}\nTerminated: {_yes(terminated)}\n\n"
    )


def _last_feedback(episode: Episode) -> str:
    """What the environment said last; nothing after a success, a full context, or an end with part of the reward."""
    partial = episode.terminated and episode.reward > 0
    if episode.success or partial or episode.ended == "context" or not episode.steps:
        return ""
    return observation_text(episode.steps[-1].messages)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _asked(role: str, text: str) -> list[Message]:
    return [{"role": "system", "content": role}, {"role": "user", "content": text}]
