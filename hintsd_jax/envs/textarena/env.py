# SPDX-License-Identifier: Apache-2.0

"""TextArena as an environment: a game for one player, a move a step, in the words in which the game asks for it.

The package makes the game, says what happened and rewards; nothing is added to its words. How a game ended is in the
report alone (PRIVILEGED): there the package also tells what the player did not find out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hintsd_jax.envs.base import Action, Message, Report, Start, StepResult
from hintsd_jax.envs.call_reading import THINK_CLOSE
from hintsd_jax.envs.options import read
from hintsd_jax.envs.textarena import games

NOTHING = "Your turn."  # where the game says nothing


class TextArena:
    """Games of TextArena for one player; see `games.Options`."""

    benchmark_name = "TextArena, a collection of text games"
    kinds_of_mistake = (
        "a move in another form than the game asks for",
        "a move that the rules forbid",
        "a move that was made before",
        "a move that what the game has said rules out",
    )

    def __init__(self, **options: Any):
        read(games.Options, "textarena", options)
        self._game: Any = None

    @classmethod
    def version(cls) -> str:
        return f"textarena {games.PACKAGE.version()}"

    @classmethod
    def tasks(cls, split: str, data_dir: str, /, **options: Any) -> Sequence[Mapping[str, Any]]:
        return games.tasks(split, read(games.Options, "textarena", options))

    def reset(self, task: Mapping[str, Any]) -> Start:
        self._game, self._dice = games.opened(task["game"], task["seed"])
        self._reason = ""
        return Start(_message(games.news(self._game) or NOTHING))

    def step(self, action: Action) -> StepResult:
        move = action.text.rpartition(THINK_CLOSE)[2].strip()
        with self._dice.at_work():
            done, _ = self._game.step(move)
            said = games.news(self._game)
            if not done:
                return StepResult(_message(said or NOTHING))
            rewards, players = self._game.close()
        self._reason = str(players[0].get("reason") or "")
        return StepResult(_message(said) if said else (), float(rewards[0]), terminated=True)

    def report(self) -> Report:
        return Report(self._reason or "The game had not ended.")

    def close(self) -> None:
        self._game = None


def _message(text: str) -> tuple[Message]:
    return ({"role": "user", "content": text},)
