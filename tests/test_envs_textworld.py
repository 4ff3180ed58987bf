"""TextWorld: the package's walkthrough wins through the loop, a fault does not, and reports say what happened."""

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import textworld_lessons, textworld_runs, textworld_scripted
from hintsd_jax.config import build, files
from hintsd_jax.envs.base import Action
from hintsd_jax.envs.protocol import checked
from hintsd_jax.envs.textworld import TextWorld, env, quests, script
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.parse import parse_failures
from hintsd_jax.rollout.chat import ChatFormat
from tests.helpers import make_tokenizer

pytest.importorskip("textworld", reason="the package is not installed: run `make textworld`")

OPTIONS = {"quest_length": 2, "limit": 6, "size": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("quests"))


@pytest.fixture
def task(folder):
    return TextWorld.tasks("train", folder, **OPTIONS)[0]


def play(task, commands):
    """What each of the commands led to, and the report."""
    game = TextWorld(**OPTIONS)
    start, results = checked("reset", game.reset(task)), []
    for number, command in enumerate(commands, 1):
        results.append(checked("step", game.step(Action(command)), number))
        if results[-1].terminated or results[-1].truncated:
            break
    report = checked("report", game.report(), len(results))
    game.close()
    return start, results, report


def test_walkthroughs_win_faults_lose_and_the_first_fault_reported_is_the_one_put_in(folder, tmp_path):
    chat = ChatFormat(make_tokenizer(), history="keep")
    row = textworld_scripted.measure(chat, folder, 2, 2)
    assert (row["won"], row["scores equal"]) == (2, 2)
    for kind in script.FAULTS:
        assert row["faults"][kind] == {"injected": 2, "failed": 2, "first reported": 2}, kind
    assert "| 2" in textworld_scripted.tables([row])


def test_what_the_player_reads(task):
    right = quests.walkthrough(task)
    start, results, report = play(task, right)
    system, user = start.messages
    assert "one line" in system["content"] and not start.tools
    assert right[0] in user["content"].split("Possible commands:\n")[1].splitlines()
    texts = [user["content"], *(result.messages[0]["content"] for result in results)]
    assert not any(word in text for text in texts for word in ("$$", "RESTART", "\n>", "-= The End"))
    assert [result.reward for result in results] == [0.0, 1.0] and results[-1].terminated
    assert report.faults == () and "won" in report.summary
    without = TextWorld(list_commands=False)
    assert "Possible commands" not in without.reset(task | {"list_commands": False}).messages[1]["content"]
    without.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "look\ninventory",
        "look\r\nlook",
        "look\rlook",
        "look. {0}. {1}",
        "{0} then {1}",
        "{0}; {1}",
        "{0} THEN {1}",
    ],
)
def test_more_or_less_than_one_command_is_not_played(task, text):
    _, (result,), report = play(task, [text.format(*quests.walkthrough(task))])
    assert result.messages[0]["content"].startswith(env.NOT_ONE) and result.reward == 0.0
    right = quests.walkthrough(task)[0]
    assert [(fault.step, right in fault.feedback) for fault in report.faults] == [(1, True)]


PROGRAM = [
    "quit",
    "restart",
    "RESTORE",
    "save",
    "script",
    "undo",
    "verify",
    "tw-print state",
    "purloin key",
    "yes",
    "tree",
]


@pytest.mark.parametrize(
    "text", [*PROGRAM, "look\0", "look \u00f6", "look \U0001f600", "look\x0blook", "look " + "x" * 300]
)
def test_what_is_about_the_program_or_cannot_be_read_does_not_reach_it(task, text):
    """The episode goes on as if nothing had been said: a NUL would have ended the process, a restart the account."""
    _, results, report = play(task, [text, *quests.walkthrough(task)])
    assert results[0].messages[0]["content"].startswith(env.NOT_KNOWN.partition("{")[0])
    assert results[-1].reward == 1.0 and results[-1].terminated and report.faults == ()


def test_a_detour_is_a_fault_and_the_way_back_is_none(task):
    """The way is longer after the detour, and as long as before after the way back."""
    right = quests.walkthrough(task)
    _, results, report = play(task, ["go nowhere", right[0], "look", "look", "look", "look"])
    assert [fault.step for fault in report.faults] == [1, 3, 4, 5, 6]
    assert results[-1].truncated and not results[-1].terminated and len(results) == OPTIONS["limit"]
    assert right[1] in report.summary


def test_the_same_task_is_the_same_quest_and_splits_share_none(folder, task):
    start, results, _ = play(task, ["look"])
    again, repeated, _ = play(task, ["look"])
    assert start == again and results == repeated
    seeds = [{each["seed"] for each in TextWorld.tasks(split, folder, **OPTIONS)} for split in quests.SPLITS]
    assert all(len(own) == 3 for own in seeds) and len(set.union(*seeds)) == 9
    other = {each["seed"] for each in TextWorld.tasks("train", folder, **OPTIONS | {"seed": 1})}
    assert not other & set.union(*seeds)


def test_a_game_that_was_not_finished_does_not_count(task, monkeypatch):
    """A process that is killed leaves nothing that another one takes for a game."""
    path = Path(quests.game_file(task))
    other = task | {"seed": task["seed"] + 500_000}

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quests.os, "replace", killed)
        quests.game_file(other)
    assert sorted(file.suffix for file in path.parent.iterdir() if file.stem == path.stem) == [".json", ".z8"]
    assert len({file.stem for file in path.parent.iterdir()}) == len(list(path.parent.iterdir())) // 2
    assert json.loads(Path(quests.game_file(other)).with_suffix(".json").read_text("utf-8"))


def test_a_quest_that_its_own_walkthrough_does_not_win_is_made_anew(folder):
    """The package's quest of this seed has a chest and an American style chest, which its interpreter mixes up."""
    task = TextWorld.tasks("test", folder, quest_length=4, limit=8, size=2)[1]
    _, results, report = play(task, quests.walkthrough(task))
    assert results[-1].reward == 1.0 and report.faults == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quest_lenght": 1}, "quest_length"),
        ({"quest_length": 0}, "give 1 to 20"),
        ({"rooms": "3"}, "int"),
        ({"limit": -1}, "give 0 to"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said, folder):
    for refuse in (partial(TextWorld, **options), partial(TextWorld.tasks, "train", folder, **options)):
        with pytest.raises(UserError, match=said):
            refuse()


def test_a_split_that_is_not_there(folder):
    with pytest.raises(UserError, match="train, eval, test"):
        TextWorld.tasks("valid", folder)


def test_scripts_need_an_end(task):
    with pytest.raises(ValueError, match="limit"):
        script.with_fault(task | {"limit": 0}, "dropped_command", 0)
    with pytest.raises(ValueError, match="dropped_command"):
        script.sites(task, "dropped_call")


@pytest.mark.parametrize("max_targets", [1, 3])
def test_lessons_are_reviews_and_hints_that_the_words_decide(folder, max_targets):
    changed = {"env.data_dir": folder, "hindsight.max_targets": max_targets}
    config = build.build(files.load("textworld")).replaced(changed)
    rows = textworld_lessons.lessons(config, ChatFormat(make_tokenizer(), history="keep"), quests=4, seed=1)
    assert rows and rows == textworld_lessons.lessons(config, ChatFormat(make_tokenizer(), history="keep"), 4, 1)
    reviews = [row for row in rows if row[-1]["content"].startswith("{")]
    hinted = [row for row in rows if row not in reviews]
    assert len(reviews) == len(hinted) >= 2
    for row in reviews:
        found = parse_failures(row[-1]["content"], 5, max_targets)
        assert found.targets and not found.dropped and not found.problem
        assert all(f'"{key}"' in row[-2]["content"] for key in json.loads(row[-1]["content"]))  # in the form asked for
    for row in hinted:
        assert f"The right command is {row[-1]['content']}. Write only that." in row[-2]["content"]
        assert all(message["weight"] == 0 for message in row[:-1] if message["role"] == "assistant")
        assert row[-1]["content"] in row[-3]["content"]  # a command that the game has listed


def test_the_tables_of_runs_pair_what_was_played_before_and_after(tmp_path):
    """A run of two steps beside its starting policy, of 10 tasks x 2 rollouts each."""
    config = {
        "algorithm": "hint_sd", "seed": 3, "optim": {"lr": 5e-4}, "tasks": {"tasks_per_step": 4, "rollouts": 4},
        "hindsight": {"analyser": "environment", "select": "random"}, "policy": {"path": "/models/small"},
        "env": {"options": {"quest_length": 2}},
    }  # fmt: skip
    evaluation = {"start": (0, [[0, 0]] * 10), "run": (2, [[0, 1]] * 5 + [[1, 1]] * 5)}
    for name, (step, success) in evaluation.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"config": config}))
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"step": step, "success": success}))
    rows = [{"step": 0}, {"step": 1, "rollout/success": 0.25, "time/step": 9.0}, {"step": 2, "rollout/success": None}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {name: textworld_runs.read(tmp_path / name) for name in evaluation}
    assert runs["start"]["before"] == [[0, 0]] * 10 and "after" not in runs["start"]
    assert "/models" not in json.dumps(runs)  # it is committed: no folder of the machine that it was made on
    what = "hint_sd, PRIVILEGED: the environment's words, random steps, small, quests of 2"
    cells = lambda table: [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert cells(textworld_runs.curves(runs)) == [["run", what, "25", "-"]]
    [line] = cells(textworld_runs.held_out(runs))
    assert line[:5] == ["run", what, "3", "10 x 2", "2"]
    assert [cell.partition(" ")[0] for cell in line[5:]] == ["0.0", "75.0", "+75.0"]
    [line] = cells(textworld_runs.costs(runs))
    assert line == ["run", "9", "-", "-", "-", "-", "-", "-"]
