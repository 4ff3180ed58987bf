# SPDX-License-Identifier: Apache-2.0

"""Games of TextArena: options and a split in, tasks out; a task in, its opened game out.

A task is a game's name and a seed. Seeds of splits are far apart, so that no two splits share one.

Invariant: a game's course follows from its task and the player's moves, wherever it is played. Games draw from Python's
one generator, `random`; while one is at work that has the game's own state, and afterwards the one from before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from hintsd_jax.envs.packages import Package
from hintsd_jax.errors import UserError
from hintsd_jax.texts import described, did_you_mean

SPLITS = ("train", "eval", "test")
_MOST = 1_000_000  # seeds of a split
_SEEDS = 100  # of the options
PACKAGE = Package("textarena")
_AT_WORK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Options:
    """The `env.options` of textarena.

    game: a name of the package's list, for one player. size: tasks of each split. seed: another one gives others.
    """

    game: str = "Mastermind-v0"
    size: int = 200
    seed: int = 0

    def __post_init__(self):
        for name, least, most in (("size", 1, _MOST), ("seed", 0, _SEEDS)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"textarena: env.options.{name} = {getattr(self, name)}: give {least} to {most}")


_TEXTARENA = PACKAGE.imported("textarena")


def package() -> Any:
    """The package `textarena`. Raises UserError where it is not installed."""
    if _TEXTARENA is None:
        raise PACKAGE.missing
    return _TEXTARENA


class Dice:
    """The random numbers of one game."""

    def __init__(self, seed: int):
        self._state = random.Random(seed).getstate()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While a game runs: its numbers come from here, and what it prints goes nowhere."""
        with _AT_WORK, contextlib.redirect_stdout(io.StringIO()):
            before = random.getstate()
            random.setstate(self._state)
            try:
                yield
            finally:
                self._state = random.getstate()
                random.setstate(before)


def opened(name: str, seed: int) -> tuple[Any, Dice]:
    """A game at its start, with its random numbers. Raises whatever the package does."""
    dice = Dice(seed)
    with dice.at_work():
        game = package().make(name)
        game.reset(num_players=1, seed=seed)
    return game, dice


def news(game: Any) -> str:
    """What the game has said to its player since it was last asked; the player's own moves are no news. It is read
    below the package's wrappers, which would repeat all that was said before.
    """
    while isinstance(game, package().Wrapper):
        game = game.env
    _, observations = game.get_observation()
    own = package().ObservationType.PLAYER_ACTION
    # Three games of 0.7.4 mix up what they say of a move with who made it: what is no text is such an echo.
    texts = [text.strip() for _, text, kind in observations if kind is not own and isinstance(text, str)]
    return "\n\n".join(filter(None, texts))


def tasks(split: str, options: Options) -> list[dict[str, Any]]:
    """The tasks of a split.

    Raises:
      UserError: an unknown split or game, one that cannot be opened here for one player or does not follow its seed, or
        the package is not installed.
    """
    if split not in SPLITS:
        raise UserError(f"environment textarena has no split {split!r}; it has {', '.join(SPLITS)}")
    _check(options.game)
    first = (options.seed * len(SPLITS) + SPLITS.index(split)) * _MOST
    return [{"id": f"{split}-{n}", "game": options.game, "seed": first + n} for n in range(options.size)]


def _check(name: str) -> None:
    known: Mapping[str, Any] = package().envs.registration.ENV_REGISTRY
    if name not in known:
        hint = did_you_mean(name, known, "textarena.pprint_registry_detailed() lists them")
        raise UserError(f"textarena: env.options.game = {name!r} is no game of the package; {hint}")
    try:
        starts = {news(opened(name, seed=0)[0]) for _ in range(2)}
    except Exception as error:  # whatever the package raises
        raise UserError(
            f"textarena: the game {name!r} cannot be opened for one player here: {described(error, with_place=False)}"
            " (docs/textarena.md says which games can)"
        ) from error
    if len(starts) > 1:
        raise UserError(
            f"textarena: the game {name!r} begins otherwise with the same seed: rollouts could not be repeated"
        )
