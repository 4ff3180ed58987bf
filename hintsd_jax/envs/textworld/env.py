# SPDX-License-Identifier: Apache-2.0

"""TextWorld (arXiv:1806.11532) as an environment: a quest in a small world of rooms, doors, chests and things, played
by plain commands, one a step.

The package makes the quest, interprets commands and scores; it also knows the shortest way to win from every state,
and so which steps led nowhere. A step is right if that way is shorter after it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Action, Fault, Message, Report, Start, StepResult
from hintsd_jax.envs.options import read
from hintsd_jax.envs.textworld import quests

SYSTEM = (
    "You play a text adventure. Each of your messages is one command to the game, such as: {examples}. Write the"
    " command alone, on one line, without quotes, explanations or a second command; the game answers what happened."
)
NOT_ONE = "The game takes one command at a time: write a single command on one line and nothing else."
NOT_KNOWN = "The game knows no such command. Its verbs: {verbs}."
# In words that a teacher acts on: after this a model of half a billion weights wrote the command in 18 of 19 states,
# after 'The command here is "...".' in 11, and a sentence in the others (docs/textworld.md).
ADVICE = "The right command is {}. Write only that."
# The interpreter takes "." and "then" for the end of a command and goes on with the next one.
_SEVERAL = re.compile(r"[\r\n.;]|\bthen\b", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z0-9 ,'-]{1,200}")  # others it cannot read; a NUL ends its process
_PROMPT = re.compile(r"\n>[^\n]*\Z")  # the interpreter's prompt and status line
_END = re.compile(r"\s*\*\*\* The End \*\*\*.*\Z", re.DOTALL)  # and what it offers then


class TextWorld:
    """Quests of TextWorld; see `quests.Options`."""

    benchmark_name = "TextWorld, a text adventure"
    kinds_of_mistake = (
        "a command that the game does not know",
        "several commands at once",
        "a command that does not bring the goal nearer",
        "the steps of the goal in the wrong order",
        "a command that was tried before without success",
    )

    def __init__(self, **options: Any):
        read(quests.Options, "textworld", options)
        self._env: Any = None
        self._state: Any = None

    @classmethod
    def version(cls) -> str:
        return f"textworld {quests.PACKAGE.version()}"

    @classmethod
    def tasks(cls, split: str, data_dir: str, /, **options: Any) -> Sequence[Mapping[str, Any]]:
        return quests.tasks(split, data_dir, read(quests.Options, "textworld", options))

    def reset(self, task: Mapping[str, Any]) -> Start:
        wanted = "admissible_commands policy_commands verbs objective description won lost score max_score"
        infos = quests.package().EnvInfos(**dict.fromkeys(wanted.split(), True))
        self._env = quests.package().start(quests.game_file(task), request_infos=infos)
        self._state, self._faults, self._steps = self._env.reset(), [], 0
        self._lists, self._limit = bool(task["list_commands"]), task["limit"] or sys.maxsize
        system = SYSTEM.format(examples="go north, open chest, take key from chest, put key on table")
        user = self._with_commands(f"{self._state.objective}\n\n{self._state.description.strip()}")
        return Start(({"role": "system", "content": system}, {"role": "user", "content": user}))

    def step(self, action: Action) -> StepResult:
        self._steps += 1
        command, before = action.text.strip(), self._state.policy_commands
        if refusal := self._refusal(command):
            self._note(before, before)
            return self._result(refusal)
        self._state, _, _ = self._env.step(command)
        self._note(before, self._state.policy_commands)
        return self._result(_END.sub("", _PROMPT.sub("", self._state.feedback)).strip())

    def report(self) -> Report:
        way = "; ".join(self._state.policy_commands or ()) or "none"
        outcome = "won" if self._state.won else f"not won; from here the shortest way is: {way}"
        return Report(f"The quest was {outcome}.", () if self._state.won else tuple(self._faults))

    def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def _refusal(self, command: str) -> str:
        """Why this is no command for the interpreter: it also knows some that are about the program, to quit, restart,
        save or debug it, with which the package's account of the quest would no longer be true. "": it is one.
        """
        if not command or _SEVERAL.search(command):
            return NOT_ONE
        if not _PLAIN.fullmatch(command) or command.split()[0].lower() not in self._state.verbs:
            return NOT_KNOWN.format(verbs=", ".join(self._state.verbs))
        return ""

    def _note(self, before: Sequence[str], after: Sequence[str]) -> None:
        """A step after which the way is no shorter is a fault."""
        if not self._state.won and (not after or len(after) >= len(before)):
            advice = ADVICE.format(before[0]) if before else "The quest could no longer be won."
            self._faults.append(Fault(self._steps, advice))

    def _result(self, text: str) -> StepResult:
        state = self._state
        ended, cut = bool(state.won or state.lost), self._steps >= self._limit
        message: Message = {"role": "user", "content": text if ended or cut else self._with_commands(text)}
        return StepResult((message,), float(state.score or 0) / max(state.max_score, 1), ended, cut and not ended)

    def _with_commands(self, text: str) -> str:
        if not self._lists:
            return text
        return f"{text}\n\nPossible commands:\n" + "\n".join(self._state.admissible_commands)
