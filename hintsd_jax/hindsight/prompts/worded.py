# SPDX-License-Identifier: Apache-2.0

"""A prompt set of words alone: a wording goes in, the messages that it makes of episodes, steps and feedback come
out.
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
from hintsd_jax.hindsight.prompts.wording import Wording
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.episode import Episode, Step, observation_text


class Worded:
    """The methods are those of `base.PromptSet`; what the names in braces stand for is said here and in
    docs/prompts.md.
    """

    def __init__(self, wording: Wording):
        self.wording = wording

    @property
    def digest(self) -> str:
        """See `Wording.digest`."""
        return self.wording.digest

    def review(self, episode: Episode, benchmark: Benchmark, max_targets: int, max_chars: int) -> list[Message]:
        values = self._attempt(episode, benchmark, max_chars) | {"max_targets": str(max_targets)}
        return self._question("review_first" if max_targets == 1 else "review", values)

    def step_feedback(self, episode: Episode, benchmark: Benchmark, step: int, max_chars: int) -> list[Message]:
        number = str(checked_step(episode, step))
        return self._question("step_feedback", self._attempt(episode, benchmark, max_chars) | {"step": number})

    def judge(self, step: Step) -> Mapping[str, list[Message]]:
        """Two questions, as OpenClaw-RL has two judges: whether the step was good, and what would have helped."""
        values = {**_action(step.text), "observation": step.observation}
        return {VERDICT: self._question("verdict", values), HINT: self._question("hint", values)}

    def read_judgement(self, question: str, answer: str) -> Judgement:
        return read_judgement(question, answer)

    def teacher_feedback(self, feedback: str) -> str:
        return self.wording.fill("teacher.feedback", {"feedback": feedback})

    def teacher_hint(self, message: str, hint: str) -> str:
        return self.wording.fill("teacher.hint", {"message": message, "hint": hint})

    def teacher_reprompt(
        self, messages: Sequence[Message], *, solution: Sequence[str] = (), targets: Sequence[Target] = ()
    ) -> tuple[Message, ...]:
        """Where the template holds {message}, it takes the place of the last user message; else it is a message of its
        own after the others.
        """
        fill = self.wording.fill
        if solution:
            template, name = "teacher.solution", "actions"
            values = ({"number": str(n), **_action(text)} for n, text in enumerate(solution, 1))
            lines = [fill("teacher.solution_step", each) for each in values]
        else:
            template, name = "teacher.targets", "feedbacks"
            lines = [fill("teacher.target", {"step": str(t.step), "feedback": t.feedback}) for t in targets]
        known = {name: "\n".join(lines)}
        if not self.wording.uses(template, "message"):
            return (*messages, _user(fill(template, {"message": "", **known})))
        place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=len(messages))
        said = messages[place]["content"] if place < len(messages) else ""
        prompt = _user(fill(template, {"message": said, **known}).lstrip())
        return (*messages[:place], prompt, *messages[place + 1 :])

    def _question(self, name: str, values: Mapping[str, Any]) -> list[Message]:
        system = self.wording.fill(f"{name}.system", values)
        user = _user(self.wording.fill(f"{name}.user", values))
        return [{"role": "system", "content": system}, user] if system else [user]

    def _attempt(self, episode: Episode, benchmark: Benchmark, max_chars: int) -> dict[str, Any]:
        """Everything that an analyser may know of an episode. Only its step list is ever clipped."""
        fill, last = self.wording.fill, len(episode.steps)
        steps = [self._step(n, step, episode.terminated and n == last) for n, step in enumerate(episode.steps, 1)]
        said = ({"role": m["role"], "content": m["content"]} for m in episode.prompt_messages)
        return {
            "benchmark": benchmark.name,
            "kinds_of_mistake": ", ".join(benchmark.kinds_of_mistake),
            "task_id": episode.task_id,
            "task": observation_text(episode.prompt_messages),
            "messages": "\n".join(fill("attempt.message", each) for each in said),
            "tools": _documentation(episode.tools),
            "reward": f"{episode.reward:g}",
            "ended": episode.ended,
            "steps": clipped_steps(steps, max_chars, fill("attempt.omission", {})),
            "last_feedback": _last_feedback(episode),
            "success": episode.success,
            "terminated": episode.terminated,
            "stopped": not episode.terminated,
        }

    def _step(self, number: int, step: Step, terminated: bool) -> str:
        values = {
            "number": str(number),
            **_action(step.text),
            "observation": step.observation,
            "tools": _documentation(step.tools),
            "reward": f"{step.reward:g}",
            "rewarded": bool(step.reward),
            "terminated": terminated,
        }
        return self.wording.fill("attempt.step", values)


def _action(text: str) -> dict[str, str]:
    return {"action": text, "bare_action": without_reasoning(text)}


def _documentation(tools: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)


def _last_feedback(episode: Episode) -> str:
    """What the environment said last; nothing after a success, a full context, or an end with part of the reward."""
    partial = episode.terminated and episode.reward > 0
    if episode.success or partial or episode.ended == "context" or not episode.steps:
        return ""
    return observation_text(episode.steps[-1].messages)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
