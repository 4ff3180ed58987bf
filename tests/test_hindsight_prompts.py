"""The wording of hindsight: complete, as the fixtures have it word by word, and without anything that knows the ground
truth.
"""

import dataclasses

import pytest

from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.parse import parse_failures, parse_hint, parse_verdict
from hintsd_jax.hindsight.prompts import Benchmark, Judgement, Worded
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import Delta
from hintsd_jax.rollout.episode import Episode

PLAIN = Benchmark("office", ("a wrong tool", "a missing call"))
SETS = {name: prompts.find(name) for name in ("released", "compact")}
WORDS = SETS["compact"].wording.words
LONG = 12_000
KEYS = [f'"{key}"' for key in ("failures", "failure_step", "step", "feedback", "verdict", "hint")]
FEEDBACK_KEY = '"feedback" (one or two sentences: how that step should have gone)'
TOOL = {"name": "move", "description": "Moves it."}


def make_episode() -> Episode:
    messages = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Move it."}]
    episode = Episode.begin("task-7", 0, messages, Delta((1, 2), 1), [TOOL])
    tool, user = lambda text: {"role": "tool", "content": text}, {"role": "user", "content": "And now?"}
    for action, observation, reward in (
        ("look", [tool("a b")], 0.0),
        ("take a", [tool("ok"), user], 0.25),
        ("bye", [], 0.0),
    ):
        episode.append_action([3], [0.0], action)
        episode.append_observation(Delta((4, 5), 1), observation, reward)
    episode.reward, episode.ended = 0.25, "max_steps"
    return episode


def _form(name):
    """How an answer is to look, of a part of the released set."""
    return SETS["released"].wording.parts[name].text.replace("{feedback_key}", FEEDBACK_KEY)


def content(messages):
    return "\n".join(message["content"] for message in messages)


def test_the_whole_compact_rendering():
    trajectory = (
        "This attempt at a task failed.\nTask:\nRules.\nuser: Move it.\nResult: reward 0.25, max_steps\nSteps:\n"
        "#1 look\n> a b\n"
        "#2 take a\n> ok\nuser: And now?\nreward 0.25\n"
        "#3 bye\n> \n"
    )
    episode, words = make_episode(), SETS["compact"]
    (review,) = words.review(episode, PLAIN, 3, LONG)
    assert review == {"role": "user", "content": trajectory + WORDS["ask_review"] + "\nAt most this many steps: 3"}
    (first,) = words.review(episode, PLAIN, 1, LONG)
    assert first["content"] == trajectory + WORDS["ask_review"] + "\nOnly the first bad step."
    (request,) = words.step_feedback(episode, PLAIN, 2, LONG)
    assert request["content"] == trajectory + WORDS["ask_advice"] + "\nThe step: #2"


@pytest.mark.parametrize("name", SETS)
def test_questions_about_steps_of_an_episode_differ_at_their_end_only(name):
    """So that all before it is read once."""
    one, other = (SETS[name].step_feedback(make_episode(), PLAIN, step, LONG) for step in (1, 3))
    assert one[:-1] == other[:-1]
    texts = [messages[-1]["content"] for messages in (one, other)]
    common = next(n for n, (a, b) in enumerate(zip(*texts)) if a != b)
    assert texts[0][common] == "1" and texts[1][common] == "3"
    assert all(text.index("bye") < common for text in texts)


def test_a_released_review_shows_everything_that_the_method_shows():
    system, user = SETS["released"].review(make_episode(), PLAIN, 3, LONG)
    assert (system["role"], user["role"]) == ("system", "user")
    for piece in ("tasks of office", "a wrong tool, a missing call", "at least 1 and at most 3, earliest first"):
        assert piece in system["content"]
    facts = ["Task: task-7", "Benchmark: office", "Final reward: 0.25", "Success: no"]
    facts += ["Terminated by the environment: no", "Stopped by a limit: yes"]
    began = "[system]\nRules.\n[user]\nMove it.\n[tools]\n" + '{"name": "move", "description": "Moves it."}'
    second = "Step 2\nAction:\ntake a\nEnvironment:\nok\nuser: And now?\nReward: 0.25\nTerminated: no\n"
    places = [user["content"].index(piece) for piece in (*facts, began, "Step 1\n", second, "Step 3\n")]
    assert places == sorted(places) and user["content"].endswith(_form("many_form"))
    single = SETS["released"].review(make_episode(), PLAIN, 1, LONG)
    assert "the first step that contains a mistake" in single[0]["content"]
    assert single[1]["content"].endswith(_form("one_form"))


@pytest.mark.parametrize(
    "changes, shown",
    [
        ({}, True),
        ({"ended": "context"}, False),
        ({"terminated": True}, False),  # with part of the reward
        ({"terminated": True, "reward": 0.0}, True),
        ({"terminated": True, "reward": 1.0}, False),
    ],
)
def test_the_last_feedback_is_shown_where_the_method_shows_it(changes, shown):
    episode = make_episode()
    episode.steps[-1].messages = ({"role": "tool", "content": "no such place"},)
    episode = dataclasses.replace(episode, **changes)
    (_, user) = SETS["released"].review(episode, PLAIN, 3, LONG)
    assert ("last feedback:\nno such place" in user["content"]) == shown


@pytest.mark.parametrize("name", SETS)
def test_the_ground_truth_is_never_read(name):
    words, episode = SETS[name], make_episode()

    def everything():
        asked = [words.review(episode, PLAIN, 3, LONG), words.step_feedback(episode, PLAIN, 1, LONG)]
        return [*asked, *words.judge(episode.steps[1]).values()]

    before = everything()
    episode.report, episode.detail = Report("SECRET", (Fault(2, "SECRET"),)), "SECRET"
    assert everything() == before


@pytest.mark.parametrize("name", SETS)
def test_a_judge_sees_one_step_and_no_reward(name):
    step = make_episode().steps[1]
    for messages in SETS[name].judge(step).values():
        text = content(messages)
        assert "take a" in text and "And now?" in text and "0.25" not in text and "look" not in text.split("take a")[1]
        changed = SETS[name].judge(dataclasses.replace(step, reward=1.0))
        assert messages in changed.values()


@pytest.mark.parametrize("name", SETS)
def test_the_step_list_is_clipped_from_its_beginning_and_says_so(name):
    words, episode = SETS[name], make_episode()
    whole, clipped = (
        content(words.review(episode, PLAIN, 3, chars)) for chars in (LONG, 40 if name == "compact" else 80)
    )
    assert "look" in whole and "look" not in clipped and "bye" in clipped
    assert "Move it." in clipped  # the task is never cut
    assert ("earlier steps" in clipped) and ("earlier steps" not in whole)
    with pytest.raises(ValueError, match="max_chars"):
        words.review(episode, PLAIN, 3, 0)
    for step in (0, 4):
        with pytest.raises(ValueError, match=f"step {step} of an episode of 3"):
            words.step_feedback(episode, PLAIN, step, LONG)


def test_the_form_that_is_asked_for_is_no_answer_itself():
    for form in (WORDS["ask_review"], WORDS["ask_advice"]):
        assert parse_failures(form, num_steps=2, max_targets=1).problem
        assert parse_failures(form.replace("...", "so"), 2, 1).targets == (Target(2, "so"),)
    assert parse_verdict(WORDS["ask_verdict"]) is None and not parse_hint(WORDS["ask_hint"])[0]
    plain = SETS["released"].wording.words
    for form in (_form("many_form"), _form("one_form"), plain["verdict_form"], plain["hint_form"]):
        assert "{" not in form  # in words: an example is repeated as the answer
        assert form.count('"') == 2 * sum(key in form for key in KEYS)


def test_fixed_strings_are_all_of_the_compact_text():
    text = content(SETS["compact"].review(make_episode(), PLAIN, 3, LONG))
    for piece in sorted(WORDS.values(), key=len, reverse=True):
        text = text.replace(piece, "|")
    assert (
        text == "|Rules.\nuser: Move it.|0.25, max_steps||1 look|a b\n|2 take a|ok\nuser: And now?|0.25\n|3 bye|\n||3"
    )
    assert len(set(WORDS.values())) == len(WORDS) == 16


@pytest.mark.parametrize("words", SETS.values(), ids=SETS)
def test_what_judges_say(words):
    read = words.read_judgement
    assert read("verdict", '{"verdict": -1}') == Judgement(verdict=-1.0)
    assert read("verdict", "bad").problem and read("hint", "bad").problem
    assert read("hint", '{"hint": ""}') == Judgement()
    assert read("hint", '{"hint": "Look first"}') == Judgement()  # 10 characters: dropped, as released
    assert read("hint", '{"hint": "Look first."}') == Judgement(hint="Look first.")


def test_sdpos_teacher_reads_one_user_message():
    messages = ({"role": "system", "content": "Rules."}, {"role": "user", "content": "Move it."})
    words = SETS["released"]
    system, user = words.teacher_reprompt(messages, solution=["<think>\nhm\n</think>\n\ntake b", "Done."])
    assert system == messages[0] and user["role"] == "user"
    assert user["content"].startswith("Move it.\n\n") and "take b\nDone." in user["content"]
    assert "hm" not in user["content"] and user["content"].endswith("solve the original task correctly.")
    (_, user) = words.teacher_reprompt(messages, targets=[Target(2, "take b")])
    assert "Step 2: take b" in user["content"]
    (only,) = words.teacher_reprompt((), targets=[Target(2, "take b")])
    assert only["role"] == "user"


class OwnWords(Worded):
    def __init__(self):
        super().__init__(SETS["released"].wording)

    def teacher_feedback(self, feedback):
        return f"Mind: {feedback}"


NO_WORDS = object()


def test_a_prompt_set_of_ones_own_by_its_path():
    assert prompts.find(f"{__name__}:OwnWords").teacher_feedback("a") == "Mind: a"
    for path, says in {
        f"{__name__}:NO_WORDS": "lacks the methods review,",
        "relaesed": "did you mean 'released'",
    }.items():
        with pytest.raises(UserError, match=says):
            prompts.find(path)


def test_the_exact_texts_of_a_bfcl_episode():
    """Fixtures: a change of any word that a model reads shows here."""
    texts = pytest.importorskip("tests.prompt_texts", reason="the benchmark's wheel is not installed: run `make bfcl`")
    made = texts.texts()
    assert made.keys() == {path.stem for path in texts.FIXTURES.glob("*.txt")}
    for name, text in made.items():
        assert text == (texts.FIXTURES / f"{name}.txt").read_text(), name
