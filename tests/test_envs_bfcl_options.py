"""BFCL's options: checked words, tasks by category, prompts by size."""

import json

import pytest

from hintsd_jax.envs.bfcl.env import Bfcl
from hintsd_jax.envs.bfcl.options import Options
from hintsd_jax.envs.registry import resolve
from hintsd_jax.errors import UserError
from tests.bfcl_helpers import all_categories

WRONG = [
    ({"max_prompt_char": 1}, "env.options.max_prompt_char: .* no such option.*max_prompt_chars"),
    ({"category": "multi_turn_base"}, "env.options.category: .* no such option.*categories"),
    ({"format": "offical"}, "no format 'offical'; known: official, paper"),
    ({"max_observation_chars": 0}, "max_observation_chars 1 or more"),
    ({"unreadable_calls": "ignore"}, "no unreadable_calls 'ignore'; known: tell, end_turn"),
    ({"max_prompt_chars": -1}, "max_prompt_chars must be 0 or more"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_options_are_refused_in_one_line(options, message, tmp_path):
    for use in (lambda: Bfcl(**options), lambda: Bfcl.tasks("train", str(tmp_path), **options)):
        with pytest.raises(UserError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


def test_defaults_are_the_official_dialogue_of_all_categories():
    assert resolve("bfcl") is Bfcl
    assert Options.parse({}) == Options("clean", (), "official", 0, 4000, "tell", False)


def test_envs_tasks_are_chosen_by_category_and_by_the_size_of_their_prompts(tmp_path, caplog):
    data_dir = str(tmp_path)
    whole = Bfcl.tasks("eval", data_dir)
    assert {task["category"] for task in whole} == set(all_categories())
    some = Bfcl.tasks("eval", data_dir, categories=("multi_turn_miss_func", "multi_turn_base"))
    wanted = [task["id"] for task in whole if task["category"] in ("multi_turn_miss_func", "multi_turn_base")]
    assert [task["id"] for task in some] == wanted
    with pytest.raises(UserError, match="no eval task fits into max_prompt_chars=10; the smallest needs 1"):
        Bfcl.tasks("eval", data_dir, max_prompt_chars=10)
    kept = Bfcl.tasks("eval", data_dir, max_prompt_chars=16_000)
    assert (
        0 < len(kept) < len(whole)
        and f"{len(kept)} of {len(whole)} tasks kept, {len(whole) - len(kept)} dropped" in caplog.text
    )
    for task in kept:
        start = Bfcl().reset(task)
        assert sum(len(json.dumps(tool)) for tool in start.tools) + len(start.messages[0]["content"]) <= 16_000
