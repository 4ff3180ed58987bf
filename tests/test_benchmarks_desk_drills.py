"""Which words of a drill a policy gets wrong, counted against the drills' own text."""

import random
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks import desk_drills
from hintsd_jax.checkpoints.tokenizer import load_tokenizer
from hintsd_jax.envs.desk.names import NAMES
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.tools.desk_policy.drills import lab_drill

POLICY = "assets/desk-policy"
ROWS = 6


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (f" {NAMES[3]}", "name"),
        (" late", "label"),
        (' work "', "label before a name"),
        (' work \\"', "label before a name"),
        (" ok", "verdict"),
        ("#16", "step"),
        ('{"step": 16, "feedback": "', "step"),
        ('"}, ', "other"),
    ],
)
def test_words_of_a_drill_are_of_a_kind(token, kind):
    assert desk_drills.kind_of(token) == kind


def test_wrong_words_are_counted_by_kind(monkeypatch):
    tokenizer = load_tokenizer(POLICY)
    answers = ""
    for seed in range(ROWS):
        drill = lab_drill(ChatFormat(tokenizer), random.Random(seed), 3)
        answers += tokenizer.decode([token for token, weight in zip(drill.ids, drill.weights) if weight == 1.0]) + "\n"
    verdicts = re.findall(r"#\d+ \w+ \w+ (ok|bad)", answers)
    names = [word for word in re.findall(r"\w+", answers) if word in NAMES]
    right, wrong, counted = desk_drills.wrong_words(POLICY, 3, ROWS)
    assert counted["verdict"] == len(verdicts) and counted["name"] == len(names) == verdicts.count("bad") > 3
    assert wrong["verdict"] + wrong["name"] <= 1 and right >= ROWS - 1

    load = desk_drills.load_policy
    blank = lambda path, **options: (load(path, **options)[0], jax.tree.map(jnp.zeros_like, load(path, **options)[1]))
    monkeypatch.setattr(desk_drills, "load_policy", blank)
    right, wrong, again = desk_drills.wrong_words(POLICY, 3, ROWS)
    assert right == 0 and again == counted and wrong == counted  # it says token 0 everywhere
