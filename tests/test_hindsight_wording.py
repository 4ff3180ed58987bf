"""Prompt sets as data: what a file, or an environment, may say; what is refused, in which words; what a run keeps."""

import json

import pytest

from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.prompts import Benchmark, Worded, shipped
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.session import Session
from tests.configs import algorithm_config, smoke_config
from tests.test_hindsight_prompts import OwnWords, content, make_episode

OWN = """
extends = "released"

[words]
polite = "Please be kind. {}"

[parts]
outcome = { when = "success", text = "It went well.", without = "It failed with {reward}." }

[review]
system = "{polite}"
user = "{outcome} {{name}} at most {max_targets}\\n{task}\\n{steps}"

[teacher]
feedback = "Mind this: {feedback}"
"""


def _file(tmp_path, text):
    path = tmp_path / "words.toml"
    path.write_text(text)
    return str(path)


def test_a_file_of_ones_own(tmp_path):
    path = _file(tmp_path, OWN)
    words = prompts.find(path)
    system, user = words.review(make_episode(), Benchmark("office"), 3, 12_000)
    assert system["content"] == "Please be kind. {}"
    assert user["content"].startswith("It failed with 0.25. {name} at most 3\nRules.\nuser: Move it.\nStep 1\n")
    assert words.teacher_feedback("take {b}, not {feedback}") == "Mind this: take {b}, not {feedback}"
    # all else is the set's that it extends
    assert words.judge(make_episode().steps[0]) == shipped("released").judge(make_episode().steps[0])
    assert words.digest != shipped("released").digest != shipped("compact").digest
    assert algorithm_config("hint_sd", {"hindsight.prompts": path}).hindsight.prompts == path


def test_what_an_agent_said_is_never_read_for_names():
    episode = make_episode()
    episode.steps[0].text = "{reward} {{ {nothing} }"
    assert "Action:\n{reward} {{ {nothing} }\n" in content(shipped("released").review(episode, Benchmark(), 3, 12_000))


REFUSED = {
    "[review": " is no TOML in UTF-8: ",
    "": "attempt.message is missing: give that text, or `extends`",
    'extends = "relaesed"': "extends = 'relaesed' is no shipped set: did you mean 'released'",
    "extends = 3": "extends = 3 is no shipped set: choose one of released, compact",
    "[reveiw]": "the table [reveiw] is unknown: did you mean 'review'",
    "review = 1": "review must be a table of texts",
    '[review]\nusr = "a"': "review.usr is unknown: did you mean 'user'",
    "[review]\nuser = 3": "review.user must be a text",
    '[review]\nuser = "{steps} {task} {max_tagrets}"': "review.user has {max_tagrets}, which is not known there: "
    "did you mean 'max_targets'",
    '[review]\nuser = "{steps} {task}"\nsystem = ""': "review.user or review.system must hold {max_targets}",
    '[review_first]\nuser = "{steps}"\nsystem = ""': "review_first.user or review_first.system must hold {task} or",
    '[verdict]\nuser = "{action} {observation} {reward}"': "verdict.user has {reward}, which is not known there",
    '[teacher]\nhint = "{hint}"': "teacher.hint must hold {message}, and does not",
    '[teacher]\nfeedback = "a { {feedback}"': "teacher.feedback has a single { (at 'a { {feedback}'): a brace",
    '[teacher]\nfeedback = "a } {feedback}"': "teacher.feedback has a single }",
    '[teacher]\nfeedback = "{feedback!r}"': "teacher.feedback has a single {",
    '[words]\nb = "say {action}"': "words.b holds {action}, and words are plain",
    '[words]\naction = "b"': "words.action has the name of what is filled in",
    '[words]\n"a b" = "b"': "words.a b: names are small letters",
    '[words]\nattempt = "b"': "attempt is a word and a part",
    '[parts]\nb = "c"': "parts.b must be a table: text",
    "[parts]\nb.when = 'success'": "parts.b has no text",
    "[parts]\nb.txt = 'c'": "parts.b has 'txt': a part has text, when, without",
    "[parts]\nb = {text = 'c', when = 'sucess'}": "parts.b has when = 'sucess', unknown: did you mean 'success'",
    "[parts]\nb.text = '{c}'\nc.text = '{b}'": "parts.b stands within itself",
    "[parts]\nb.text = '{success}'": "parts.b has {success}, which is no text: let a part have when = 'success'",
    "[parts]\nb = {when = 'success', text = 'c'}\n[hint]\nuser = '{action}{observation}{b}'": (
        "hint.user has {b}, which asks for 'success'; that is not known there"
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_wrong_with_a_file_is_said_at_the_start(tmp_path, text):
    extends = "" if text == "" or "extends" in text else 'extends = "released"\n'
    with pytest.raises(UserError) as told:
        prompts.find(_file(tmp_path, extends + text))
    assert str(told.value).startswith("prompt set ") and REFUSED[text] in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _file(tmp_path, OWN)
    assert algorithm_config("hint_sd", {"hindsight.prompts": "~/words.toml"}).hindsight.prompts[0] != "~"
    with pytest.raises(UserError, match=r"none.toml cannot be read \(No such file"):
        algorithm_config("hint_sd", {"hindsight.prompts": str(tmp_path / "none.toml")})
    with pytest.raises(UserError, match="hindsight.prompts = 'words' is unknown"):
        algorithm_config("hint_sd", {"hindsight.prompts": "words"})


class Quiz:
    hindsight_prompts = {"teacher": {"feedback": "Here: {feedback}"}}


def test_an_environments_words_lie_over_a_shipped_set_alone(tmp_path):
    for name in prompts.SHIPPED:
        words = prompts.of_run(name, Quiz, "quiz")
        assert words.teacher_feedback("so") == "Here: so"
        assert words.teacher_hint("a", "b") == shipped(name).teacher_hint("a", "b")
        assert prompts.of_run(name, object, "none") is shipped(name)
    own = prompts.of_run(_file(tmp_path, OWN), Quiz, "quiz")
    assert own.teacher_feedback("so") == "Mind this: so"
    for given, says in {
        "none.toml": "none.toml cannot be read",
        3: "is int: give a mapping",
    }.items():
        with pytest.raises(UserError, match=f"hindsight_prompts of environment 'quiz'.*{says}"):
            prompts.of_run("released", type("Bad", (), {"hindsight_prompts": given}), "quiz")
    with pytest.raises(UserError, match="environment 'quiz': leave `extends` out"):
        prompts.of_run("released", type("Bad", (), {"hindsight_prompts": {"extends": "compact"}}), "quiz")
    with pytest.raises(UserError, match="environment 'quiz': teacher.feedback must hold"):
        prompts.of_run("compact", type("Bad", (), {"hindsight_prompts": {"teacher": {"feedback": "a"}}}), "quiz")


def test_a_session_speaks_with_the_environments_words(tmp_path):
    config = smoke_config(tmp_path)
    algorithm = type("Any", (), {"prompts": None})()
    Session(config, algorithm, None, None, None, None, None, None, Quiz)
    assert algorithm.prompts.teacher_feedback("so") == "Here: so"


def test_a_run_keeps_the_digest_of_its_words_and_goes_on_with_the_same_alone(tmp_path):
    config, run = smoke_config(tmp_path), tmp_path / "run"
    kept = lambda: json.loads((run / "config.json").read_text()).get("prompts")
    Workdir.open(run, config).close()
    assert kept() is None  # one that an earlier version began, or that reads no words
    now = {"set": "compact", "digest": prompts.digest(shipped("compact"))}
    for _ in range(2):
        Workdir.open(run, config, prompts=now).close()
        assert kept() == now
    Workdir.open(run, config).close()  # an export
    with pytest.raises(UserError, match=f"other words in hindsight.prompts = 'compact'.*{now['digest']}, now 00ff"):
        Workdir.open(run, config, prompts={"set": "compact", "digest": "00ff"})
    assert kept() == now


def test_digests():
    """Of an object its class stands for it; every letter of a wording counts."""
    assert prompts.digest(shipped("compact")) == shipped("compact").digest
    assert prompts.digest(OwnWords()) == prompts.digest(OwnWords()) != shipped("released").digest
    wording = shipped("compact").wording
    other = Worded(type(wording)({**wording.words, "fixed": "Do this :"}, wording.parts, wording.templates))
    assert prompts.digest(other) != shipped("compact").digest
