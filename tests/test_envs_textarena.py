"""TextArena: rewards, texts and ends are those of the package's own loop; seeds; one line for what cannot be played."""

import random
import re
from functools import partial

import pytest

from hintsd_jax.envs.base import Action
from hintsd_jax.envs.protocol import checked
from hintsd_jax.envs.textarena import TextArena, env, games
from hintsd_jax.errors import UserError
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.env_process import host_for
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import EngineConfig, Sampling
from tests.helpers import make_tokenizer

ta = pytest.importorskip("textarena", reason="the package is not installed: run `make textarena`")

HANOI = ["[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]", "[A C]"]
MOVES = {  # what is played at random: moves in the game's form, some of them against its rules
    "Mastermind-v0": [f"[{a} {b} {c} {d}]" for a, b, c, d in ((1, 2, 3, 4), (6, 5, 2, 1), (3, 4, 6, 2), (1, 1, 2, 3))],
    "GuessTheNumber-v0": [f"My guess: [{n}]" for n in range(1, 22)],
    "FrozenLake-v0": ["[right]", "[down]", "[up]", "[s]"],
    "Minesweeper-v0-small": [f"[{row} {column}]" for row in range(5) for column in range(5)],
    "TowerOfHanoi-v0": [*HANOI, "A C", "nothing"],
    "Countdown-v0": ["[0 1 +]", "[0 1 *]", "[1 0 -]", "[2 3 +]"],
    "Blackjack-v0": ["[Hit]", "[Stand]"],
    "LightsOut-v0": [f"[{row} {column}]" for row in range(5) for column in range(6)],
    "PegJump-v0": ["[4->5]", "[12->5]", "[14->5]", "[1->6]"],
    "2048-v0-ultra-easy": ["[Up]", "[Left]", "Down", "[Right]"],
    "Secretary-v0": ["[continue]", "[accept]"],
}


def task_of(game, number=0, split="test"):
    return TextArena.tasks(split, "unused", game=game, size=number + 1)[number]


def played(task, moves):
    """What the game said at the start and after each move, the last result, and the report."""
    game = TextArena(game=task["game"])
    said, result, number = [checked("reset", game.reset(task)).messages[0]["content"]], None, 0
    for move in moves:
        number += 1
        result = checked("step", game.step(Action(move)))
        said += [message["content"] for message in result.messages]
        if result.terminated:
            break
    report = checked("report", game.report(), number)
    game.close()
    return said, result, number, report


def played_by_the_package(task, moves):
    """(all that its own loop has shown the player, reward or None, moves made)."""
    game = ta.make(task["game"])
    game.reset(num_players=1, seed=task["seed"])
    seen, number = game.get_observation()[1], 0
    for number, move in enumerate(moves, 1):
        done, _ = game.step(action=move)
        if done:
            return seen, game.close()[0][0], number
        seen = game.get_observation()[1]
    return seen, None, number


@pytest.mark.parametrize("game", MOVES)
def test_rewards_and_texts_are_those_of_the_packages_own_loop(game, capsys):
    ended = 0
    for number in range(3):
        task, rng = task_of(game, number), random.Random(f"{game} {number}")
        moves = [rng.choice(MOVES[game]) for _ in range(60)]
        seen, reward, count = played_by_the_package(task, moves)
        said, result, number, report = played(task, moves)
        assert number == count and result.terminated == (reward is not None) and not result.truncated
        assert result.reward == (reward or 0.0)
        ended += result.terminated
        lines = [line for text in said[: count + (not result.terminated)] for line in text.splitlines() if line.strip()]
        assert lines and all(line.strip() in seen for line in lines if line != env.NOTHING)
        assert report.faults is None and report.summary
    assert ended  # not all ran out of moves
    assert not capsys.readouterr().out


def test_a_game_that_is_won_is_a_success_and_how_it_ended_is_in_the_report_alone():
    said, result, count, report = played(task_of("TowerOfHanoi-v0"), HANOI)
    assert (result.reward, result.terminated, count) == (1.0, True, 7) and "solved" in report.summary
    task = task_of("GuessTheNumber-v0")
    said, result, count, report = played(task, [f"[{n}]" for n in range(1, 21)])
    target = int(re.search("Target: (\\d+)", report.summary)[1])
    assert count == 11 < target and 0 < result.reward < 1
    assert not any(word in text for text in said[1:] for word in (str(target), "Target"))
    said, result, count, _ = played(task, [f"<think>not [{target - 1}]</think>\n[{target}]"])
    assert (result.reward, result.messages, count) == (1.0, (), 1)
    assert "had not ended" in played(task, ["[1]"])[3].summary


def test_games_side_by_side_do_not_draw_from_each_other_nor_from_anybody():
    tasks = [task_of("Minesweeper-v0-small", number) for number in range(2)]
    alone = [played(task, ["[2 2]"])[0] for task in tasks]
    assert alone[0] != alone[1] and alone == [played(task, ["[2 2]"])[0] for task in tasks]
    random.seed(5)
    before = random.getstate()
    both = [TextArena() for _ in tasks]
    said = [[game.reset(task).messages[0]["content"]] for game, task in zip(both, tasks)]
    for game, texts in zip(both, said):  # the mines are laid with the first move
        texts.append(game.step(Action("[2 2]")).messages[0]["content"])
    assert said == alone and random.getstate() == before


def test_whole_episodes_through_the_loop_in_processes():
    """Scripts of one move after the other on two tasks; the reward of each is the package's."""
    options = {"game": "GuessTheNumber-v0", "size": 2}
    tasks = TextArena.tasks("train", "unused", **options)
    scripts = [[f"[{n}]" for n in range(1, 12)], [f"[{n}]" for n in range(20, 9, -1)]]
    chat = ChatFormat(make_tokenizer(), history="keep")
    most = 1 << 20
    engine = ScriptedEngine(chat, lambda job: scripts[job.episode.rollout], EngineConfig(4, most, most))
    config = RolloutConfig(most, most, Sampling(1.0, 1.0, 0, most))
    host = host_for(TextArena, "textarena", options, "auto", memory_gib=1.0)
    try:
        result = run_episodes(engine, None, chat, host, tasks, 2, config, seed=0, step=0, call_timeout_s=60.0)
    finally:
        host.close()
    assert len(result.episodes) == 4 and not result.failures
    expected = [played_by_the_package(task, script)[1] for task in tasks for script in scripts]
    assert [episode.reward for episode in result.episodes] == expected
    assert [episode.success for episode in result.episodes] == [reward == 1 for reward in expected]
    assert any(episode.success for episode in result.episodes)


def test_the_same_task_is_the_same_game_and_splits_share_no_seed():
    assert played(task_of("FrozenLake-v0"), []) == played(task_of("FrozenLake-v0"), [])
    seeds = [{task["seed"] for task in TextArena.tasks(split, "unused", size=50)} for split in games.SPLITS]
    assert all(len(own) == 50 for own in seeds) and len(set.union(*seeds)) == 150
    assert not {task["seed"] for task in TextArena.tasks("train", "unused", size=50, seed=1)} & set.union(*seeds)
    starts = {played(task_of("FrozenLake-v0", n, split), [])[0][0] for n in range(5) for split in games.SPLITS}
    assert len(starts) > 10
    assert TextArena.version() == f"textarena {ta.__version__}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"game": "Mastermnd-v0"}, "did you mean 'Mastermind-v0'"),
        ({"game": "TicTacToe-v0"}, "number of players has to be 2"),
        ({"game": "GuessWho-v0"}, "cannot be opened for one player here"),
        ({"gmae": "Mastermind-v0"}, "did you mean 'game'"),
        ({"size": 0}, "give 1 to"),
        ({"seed": -1}, "give 0 to"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(options, said, monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(UserError, match=said) as error:
        TextArena.tasks("train", "unused", **options)
    assert "\n" not in str(error.value)


def test_a_split_or_a_package_that_is_not_there(monkeypatch):
    with pytest.raises(UserError, match="train, eval, test"):
        TextArena.tasks("valid", "unused")
    monkeypatch.setattr(games, "_TEXTARENA", None)
    for ask in (partial(TextArena.tasks, "train", "unused"), partial(TextArena().reset, {"game": "x", "seed": 0})):
        with pytest.raises(UserError, match="make textarena"):
            ask()


def test_a_game_that_does_not_follow_its_seed_is_refused(monkeypatch):
    texts = iter(["one", "another"])
    monkeypatch.setattr(games, "news", lambda game: next(texts))
    with pytest.raises(UserError, match="with the same seed"):
        TextArena.tasks("train", "unused")
